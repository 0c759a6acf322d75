"""Column mass and weights by generated kernels: which one runs, whether it is trusted, and what it leaves to torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnopt.codegen.base import Layout
from attnopt.codegen.cpp_loads import k_axes
from attnopt.errors import AttnoptError
from attnopt.options import Options
from attnopt.returns import AGAIN
from attnopt.runtime import triton_launch
from attnopt.runtime.bounds import by_data, outside
from attnopt.runtime.capturing import recorded, refuse
from attnopt.runtime.cpp_side import CppSide
from attnopt.runtime.native import layout_of
from attnopt.runtime.pairs import defined
from attnopt.runtime.reference import reference
from attnopt.runtime.triton_ahead import Ahead
from attnopt.runtime.triton_side import TritonSide
from attnopt.runtime.validate import Verdict, compare, nudge
from attnopt.spec import AttentionSpec, EmptyRow, Softmax

# Queries and keys of the problem on which a kernel is compared with the definition before its first use: some tiles.
_SAMPLE = 136


class Runner(Protocol):
    """Kernels of one spec and layout. `problem`: why there are none; empty if there are."""

    problem: str

    def __call__(
        self, q: Tensor, k: Tensor, rows: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], name: str
    ) -> Tensor:
        """As the operator, but that rows without keys have not been added to a column. Raises `CompileError`."""


@dataclass
class Trusted:
    """A runner, its spec of weights, sizes whose loads were checked, and classes of sizes that were compared."""

    spec: AttentionSpec
    runner: Runner
    sizes: set[Any] = field(default_factory=set)
    compared: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.by_data = by_data(self.spec)

    def problem(
        self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], name: str, compares: bool
    ) -> str:
        """Why the kernel may not be used on these inputs; empty if it may. Raises `CompileError` as `refuse`."""
        if self.runner.problem:
            return self.runner.problem
        key = (q.shape, k.shape, *[t.shape for t in captures], *scalars)
        refuse(q, key in self.sizes, self.by_data, captures)
        found = outside(self.spec, q, k, captures, scalars, key in self.sizes) if captures else None
        if found:
            return found
        kind = (name, *((min(n, _SAMPLE).bit_length(), n % 8 == 0) for n in (q.shape[2], k.shape[2])))
        if compares and kind not in self.compared and not recorded(q):
            verdict = self.compare(q, k, captures, scalars, name)
            if not verdict.ok:
                self.runner.problem = f"its {name} disagrees with the reference ({verdict})"
                return self.runner.problem
            self.compared.add(kind)
        self.sizes.add(key)
        return ""

    def compare(
        self, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int], name: str, most: int = _SAMPLE
    ) -> Verdict:
        """The kernel beside the definition on the first queries and keys, where loads stay inside their tensors."""
        few = (q[:2, :, :most], k[:2, :, :most])
        if captures and outside(self.spec, *few, captures, scalars):
            few = (q, k)
        given = (self.spec, *few, captures, scalars)
        mine = completed(self.spec, self.runner(*few, rows_of(*given), captures, scalars, name), rows_of(*given), name)
        golden = defined(self.spec, few[0].double(), few[1].double(), captures, scalars, name)
        eager = defined(*given, name, q.dtype)
        verdict = compare(golden, eager, mine)
        if verdict.ok:
            return verdict
        # Another order of the d products moves a score by as much as inputs that are off by sqrt(d/2) roundings; the
        # maximum and the sum of a row are made of a third one.
        size = 2.0 * (1.0 + (q.shape[3] / 2) ** 0.5)
        moved = [(nudge(few[0], size, 2 * seed), nudge(few[1], size, 2 * seed + 1)) for seed in range(3)]
        pairs = zip(moved, [*moved[1:], moved[0]], strict=True)
        runs = [_measured(self.spec, x, other, captures, scalars, name) for x, other in pairs]
        return compare(golden, eager, mine, nudged=runs)


def _measured(
    spec: AttentionSpec, inputs: Sequence[Tensor], others: Sequence[Tensor], captures: Sequence[Tensor],
    scalars: Sequence[int], name: str,
) -> Tensor:  # fmt: skip
    """Weights of some inputs, in fp64, divided by the sums of others."""
    made = defined(spec, *inputs, captures, scalars, "weights")
    if isinstance(spec.normalizer, Softmax):
        rows, other = (_statistics(spec, *x, captures, scalars).sum(-1) for x in (inputs, others))
        made = made * torch.exp(rows - other).nan_to_num()[..., None]
    return made if name == "weights" else made.sum(-2)


def rows_of(spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]) -> Tensor:
    """`max` and `log_sum` of every row by the definition; empty for a normaliser that is no softmax."""
    if not isinstance(spec.normalizer, Softmax):
        return q.new_empty(0, dtype=torch.float32)
    return _statistics(spec, q, k, captures, scalars).to(torch.float32).contiguous()


def _statistics(
    spec: AttentionSpec, q: Tensor, k: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
) -> Tensor:
    values = k.new_zeros(()).expand(k.shape[0], spec.heads.v, k.shape[2], spec.heads.d_v)
    return reference(replace(spec, returns=AGAIN), q, k, values, captures, scalars)[1]


def completed(spec: AttentionSpec, made: Tensor, rows: Tensor, name: str) -> Tensor:
    """A column mass with the share of rows that have no key, and NaN where a row is NaN. In place; nothing waits."""
    if name == "weights" or not isinstance(spec.normalizer, Softmax):
        return made
    empty, spoilt = rows[..., 0] == -torch.inf, rows.isnan().any(-1)
    if spec.empty_row is EmptyRow.UNIFORM:
        made += empty.sum(-1, keepdim=True) / made.shape[-1]
    if spec.empty_row is EmptyRow.NAN:
        spoilt = spoilt | empty
    return made.masked_fill_(spoilt.any(-1, keepdim=True), torch.nan)


_KNOWN: dict[Any, Trusted] = {}
_LOCK = threading.RLock()


def by_kernel(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    rows: Tensor,
    captures: Sequence[Tensor],
    scalars: Sequence[int],
    name: str,
    options: Options,
    warn: Callable[[str], None],
) -> Tensor | None:
    """What the operator returns; None, after a warning with the reason, where no kernel makes it."""
    if q.dtype == torch.float64 or 0 in (*q.shape, *k.shape) or options.disable:
        return None
    try:
        kernel = _kernel(spec, layout_of(k_axes(spec), q, captures), q.device, options, warn)
        if kernel is None:
            return None
        with torch.no_grad():
            problem = kernel.problem(q, k, captures, scalars, name, options.first_use_check)
            if not problem:
                return completed(spec, kernel.runner(q, k, rows, captures, scalars, name), rows, name)
    except AttnoptError as error:
        problem = str(error)
    warn(
        f"no kernel makes the {name.replace('_', ' ')} of {spec}: {problem.rstrip('.')}. The reference does it instead."
    )
    return None


def _kernel(
    spec: AttentionSpec, layout: Layout, device: torch.device, options: Options, warn: Callable[[str], None]
) -> Trusted | None:
    triton = triton_launch.runs_on(device, options)
    if not triton and (device.type != "cpu" or options.kernel not in ("auto", "cpp")):
        return None
    key = (spec.key, layout, device.type, options)
    with _LOCK:
        if key not in _KNOWN:
            if triton:
                chip = triton_launch.chip_of(device)
                _KNOWN[key] = Trusted(spec, TritonSide(spec, layout, chip, Ahead(chip, options, warn)))
            else:
                _KNOWN[key] = Trusted(spec, CppSide(spec, layout, options, warn))
        return _KNOWN[key]
