"""The functions of generated files that launch their kernels on tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from attnopt.codegen.base import CaptureLayout, Layout
from attnopt.codegen.triton_decode import group
from attnopt.codegen.triton_forward import Argument
from attnopt.codegen.triton_gather import launch_list
from attnopt.codegen.triton_pages import tensors
from attnopt.codegen.triton_parts import row_ends
from attnopt.codegen.triton_readers import ADDED, BY_HEAD, by_runs, readers
from attnopt.codegen.triton_rows import described, launched
from attnopt.spec import AttentionSpec


def forward_launcher(
    spec: AttentionSpec,
    given: Sequence[Argument],
    listed: bool = False,
    rows: Sequence[Argument] = (),
    layout: Layout | None = None,
) -> str:
    """The function that launches the kernel on tensors; with `listed` its last one is the list of tiles to visit.

    `rows`: the arguments of the kernel that lists rows, where some are not computed.
    """
    captures = [c.name for c in spec.captures]
    names = [*(f"{name}_tensor" for name in captures), *(f"{name}_value" for name in spec.scalars)]
    more = [] if layout is None else [name for name, _, _ in tensors(layout)]
    names += [*more, *["visited"] * listed]
    room, rows_made = launched(spec)
    made = [
        "batch, heads, n_q, _ = q.shape",
        "if out is None:",
        "    out = q.new_empty((batch, n_q, heads, v.shape[3])).transpose(1, 2)",
    ]
    made += room
    if rows:
        made += [*launch_list(), f"attention_rows[(batch * {spec.heads.q}, 1, 1)]("]
        made += [*(f"    {line}" for line in launch_arguments(rows, captures)), "    **OPTIONS,", ")"]
    made += [
        f"grid = (triton.cdiv(n_q, BLOCK_M.value) * batch * {spec.heads.q}, 1, 1)",
        "launch[grid](",
        *(f"    {line}" for line in launch_arguments(given, captures)),
        "    **(OPTIONS if launch is attention_forward else {}),",
        ")",
        f"return out, {rows_made}",
    ]
    return "\n".join(
        [
            f"def attention({', '.join(['q', 'k', 'v', *names])}, launch=attention_forward, out=None):",
            f'    """out [B, {spec.heads.q}, n_q, {spec.heads.d_v}], a view of a contiguous [B, n_q, {spec.heads.q}, '
            f"{spec.heads.d_v}], and {described(spec)}",
            "",
            *(_pool(spec) if more else []),
            *(_visited(spec) if listed else []),
            "    `launch`: the kernel, or one that was compiled before; `out`: where to write, of any float dtype.",
            '    """',
            *(f"    {line}" for line in made),
        ]
    )


def _visited(spec: AttentionSpec) -> list[str]:
    """What a launcher says of its list."""
    return [
        f"    `visited` [B, {spec.heads.q}, tiles of queries, 2 + n], int32: how many tiles of keys are",
        "    kept whole, how many are visited, and which, those that are kept whole first.",
    ]


def _pool(spec: AttentionSpec) -> list[str]:
    """What a launcher says of pages."""
    shape = f"[pages, {spec.heads.k}, PAGE, {spec.heads.d_qk}]"
    return [
        f"    k {shape} and v are pools. `page_table` [B, slots], int32: the page",
        "    of keys slot * PAGE and on of an entry; `key_lengths` [B], int32: how many keys it has there; `new_k` and",
        "    `new_v` [B, H, n, d], where there are any: keys and values that follow.",
    ]


def decode_launcher(spec: AttentionSpec, split: Sequence[Argument], combine: Sequence[Argument], layout: Layout) -> str:
    """The function that launches both kernels on tensors."""
    captures, packed, heads = [c.name for c in spec.captures], group(spec), spec.heads.q
    names = [*(f"{name}_tensor" for name in captures), *(f"{name}_value" for name in spec.scalars)]
    more = [name for name, _, _ in tensors(layout)]
    names += more
    room, rows_made = launched(spec)
    keys = "page_table.shape[1] * PAGE.value" if layout.page else "k.shape[2]"
    keys += " + new_k.shape[2]" * layout.new
    count = len(row_ends(spec, Layout("float32", tuple(CaptureLayout("float32", None) for _ in captures))).state)
    lines = [
        "batch, heads, n_q, _ = q.shape",
        f"parts = batch * {heads // packed} * triton.cdiv({packed} * n_q, BLOCK_M.value)",
        "if splits is None:  # enough programs for every processor, and some keys for each",
        f"    splits = max(1, min(2 * processors // parts, triton.cdiv({keys}, BLOCK_N.value), 128))",
        "out = q.new_empty((batch, n_q, heads, v.shape[3])).transpose(1, 2)",
        *room,
        "sums = q.new_empty((batch * heads * n_q * splits, v.shape[3]), dtype=torch.float32)",
        f"state = q.new_empty((batch * heads * n_q * splits, {max(1, count)}), dtype=torch.float32)",
        "attention_split[(parts * splits, 1, 1)](",
        *(f"    {line}" for line in launch_arguments(split, captures)),
        "    **OPTIONS,",
        ")",
        f"attention_combine[(triton.cdiv(n_q, BLOCK_M.value) * batch * {heads}, 1, 1)](",
        *(f"    {line}" for line in launch_arguments(combine, captures)),
        "    **OPTIONS,",
        ")",
        f"return out, {rows_made}",
    ]
    return "\n".join(
        [
            f"def attention({', '.join(['q', 'k', 'v', *names])}, processors=132, splits=None):",
            f'    """out [B, {heads}, n_q, {spec.heads.d_v}], a view of a contiguous [B, n_q, {heads}, '
            f"{spec.heads.d_v}], and {described(spec)}",
            "",
            *(_pool(spec) if more else []),
            "    `processors`: how many the chip has; `splits`: how many programs share the keys of a row.",
            '    """',
            *(f"    {line}" for line in lines),
        ]
    )


def launch_arguments(given: Iterable[Argument], captures: Sequence[str]) -> list[str]:
    """The arguments of a call, by lines."""
    sizes = {"n_b": "batch", "n_q": "n_q", "n_k": "k.shape[2]", "n_splits": "splits", "n_pages": "k.shape[0]"}
    sizes |= {"n_slots": "page_table.shape[1]", "n_new": "new_k.shape[2]"}
    groups: dict[str, list[str]] = {}
    for argument in given:
        tensor = f"{argument.of}_tensor" if argument.of in captures else argument.of
        if argument.kind == "stride":
            groups.setdefault("strides", [])
            if f"*{tensor}.stride()" not in groups["strides"]:
                groups["strides"].append(f"*{tensor}.stride()")
        elif argument.kind == "size":
            groups.setdefault("splits" if argument.of else "sizes", []).append(sizes[argument.name])
        elif argument.kind == "scalar":
            groups.setdefault("scalars", []).append(argument.name)
        else:
            groups.setdefault("pointers", []).append(tensor)
    return [f"{', '.join(names)}," for names in groups.values()]


def backward_launcher(spec: AttentionSpec, given: Mapping[str, Sequence[Argument]], learned: Sequence[str]) -> str:
    """The function that launches the kernels of the gradients."""
    captures, heads, runs = [c.name for c in spec.captures], spec.heads.q, by_runs(spec.heads)
    names = [*(f"{name}_tensor" for name in captures), *(f"{name}_value" for name in spec.scalars)]
    grids = {
        "attention_delta": f"(triton.cdiv(n_q, BLOCK_M.value) * batch * {heads}, 1, 1)",
        "attention_dkv": f"(triton.cdiv(k.shape[2], BLOCK_N.value) * batch * {spec.heads.k if runs else heads}, 1, 1)",
        "attention_dq": f"(triton.cdiv(n_q, BLOCK_M.value) * batch * {heads}, 1, 1)",
    }
    tables = [f"grad_{name}" for name in captures if name in learned]
    lines = [
        "batch, heads, n_q, _ = q.shape",
        "if dlse is None:",
        "    dlse = torch.zeros_like(lse)",
        "delta = q.new_empty((batch, heads, n_q), dtype=torch.float32)",
        "dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))" if runs else BY_HEAD,
        *(
            f"{x} = torch.zeros({x.removeprefix('grad_')}_tensor.shape, dtype=torch.float32, device=q.device)"
            for x in tables
        ),
    ]
    for name, arguments in given.items():
        lines += [f"{name}[{grids[name]}](", *(f"    {line}" for line in launch_arguments(arguments, captures))]
        lines += ["    **OPTIONS,", ")"]
    lines += [] if runs else [ADDED]
    lines.append(f"return {', '.join(['dq', 'dk', 'dv', *tables])}")
    return "\n".join(
        [
            *([] if runs else readers(spec.heads)),
            f"def attention_backward({', '.join(['q', 'k', 'v', *names])}, out, lse, grad, dlse=None):",
            '    """dQ, dK and dV, contiguous, and in fp32 the gradients of the tables that have one.',
            "",
            "    `out` and `lse` are those of the forward kernel, `grad` and `dlse` their gradients.",
            '    """',
            *(f"    {line}" for line in lines),
        ]
    )
