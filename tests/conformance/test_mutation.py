"""Kernels that are broken on purpose: the check at first use has to object to each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.codegen import cpp
from attnopt.codegen.base import Plan
from attnopt.options import Options
from attnopt.runtime.build import build_kernel
from attnopt.runtime.native import Native, check_rows, layout_of
from attnopt.runtime.validate import Verdict
from tests.conformance.judge import tensors
from tests.specs import Sizes, case

STREAM = Plan(16, 64, 8, 8, "stream")
# What is broken, the case it is broken in, the text of the kernel, what it becomes.
MUTATIONS = (
    ("drops the scale", "scale", "kD, kScale, t.q", "kD, 1.0f, t.q"),
    ("causal is off by one", "causal", "splat_i(q) >= k", "splat_i(q) > k"),
    ("causal range ends a key early", "causal", "minimum(n_k, q1)", "minimum(n_k, q1 - 1)"),
    ("skips the rescale", "scale", "splat_f(1.0f), exp_negative(old - shift)", "splat_f(1.0f), splat_f(1.0f)"),
    ("forgets the earlier sum", "scale", "VF sum = load(t.sum + r * kLanes) * t.scale[r];", "VF sum{};"),
    ("forgets the earlier values", "scale", "store(o, load(o) * scale[r] + sum[r][i]);", "store(o, sum[r][i]);"),
    ("reads the wrong key head", "gqa", "{ return h / 4; }", "{ return h % 2; }"),
    ("yields zeros for uniform rows", "empty_uniform", "n_k > 0 ? t.mean[d] : 0.0f", "0.0f"),
    ("does not mask the tail", "bias", "logit = select(kIota < valid, logit, nothing);", "{}"),
    ("drops the bias", "bias", "VF logit = (bias_0 + s)", "VF logit = s"),
    ("ignores padding", "padding", "load_i<kRagged>(pad", "splat_i(1) | load_i<kRagged>(pad"),
    ("uses another base", "scale", "exp_negative(load(x + j) - shift)", "exp_negative((load(x + j) - shift) * 0.99f)"),
    ("does not divide by the sum", "scale", "1.0f / sum;", "1.0f;"),
    ("forgets the sink", "sink", ": 1.0f + (sink - sink)", ": 0.0f"),
    ("drops the gate", "gate", "inverse * gate", "inverse"),
    (
        "takes one key's values for another's",
        "scale",
        "load(v + (key * NV + i) * kLanes)",
        "load(v + (key / 2 * 2 * NV + i) * kLanes)",
    ),
    ("multiplies no weights", "signed", "store(x + j, p * load(t.w + r * kBlockK + j));", "store(x + j, p);"),
    ("divides by no total", "softplus", "inverse = 1.0f / divisor", "inverse = 1.0f"),
    ("sums signed weights as absolute", "linear", "sum += logit;", "sum += abs_(logit);"),
    ("sums absolute weights as signed", "linear_absolute", "size += abs_(logit);", "size += logit;"),
    ("keeps masked weights", "relu", "const VF nothing{};", "const VF nothing = splat_f(0.01f);"),
    ("decays too slowly", "decay", "= exp_(", "= 0.9f * exp_("),
    ("soft-caps too low", "softcap", "= tanh_(s)", "= tanh_(s * 0.999f)"),
)


# The same for the form that streams keys and values, with two threads that share the keys of a head.
STREAM_MUTATIONS = (
    ("scores one key for all", "gqa_group_of_two", "keys.at(key + i < valid ? key + i : valid - 1)", "keys.at(0)"),
    ("reads another head's values", "gqa_group_of_two", "v_head = value_head(tile.h[0])", "v_head = 0"),
    (
        "forgets the scale of earlier values",
        "gqa_group_of_two",
        "load(o) * scale[r] + sum[r][i]",
        "load(o) + sum[r][i]",
    ),
    ("loses lanes of a score", "gqa_group_of_two", "const VF folded = fold(sum);", "const VF folded = sum[0];"),
    (
        "merges without the maximum",
        "gqa_group_of_two",
        "other = exp_negative(splat_f(part.max - shift))[0]",
        "other = 1.0f",
    ),
    (
        "counts a sink in every part",
        "sink",
        "  t.max[r] = -INFINITY;\n  store(t.sum + r * kLanes, VF{});",
        "",
    ),
)
LONG, FEW = (2, 61, 301), (1, 2, 1300)


def checked(
    name: str, old: str, new: str, options: Options, plan: Plan | None = None, size: tuple[int, int, int] = LONG
) -> Verdict:
    """The verdict of the check at first use on a kernel of which part of the text was replaced."""
    item = case(name)
    # Not multiples of any tile, and more keys than one tile has: every part of the kernel takes part.
    sizes = Sizes(size[0], item.spec.heads.q, *size[1:])
    inputs = tensors(item.spec, sizes.batch, sizes.n_q, sizes.n_k, "contiguous", torch.float32, 2.0)
    captures = item.captures(sizes, torch.Generator().manual_seed(1))
    spec = item.spec.canonical()
    kernel = cpp.emit(spec, layout_of(cpp.k_axes(spec), inputs[0], captures), plan)
    assert old in kernel.source, f"the kernel of {name} has no {old!r}; the mutation has to follow the generator."
    broken = replace(kernel, source=kernel.source.replace(old, new))
    library = build_kernel(broken, options, pytest.fail)
    result = Native(spec, library)(*inputs, captures, item.scalars)
    return check_rows(spec, inputs, captures, item.scalars, *result)


@pytest.mark.parametrize(("what", "name", "old", "new"), MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_the_check_objects(what: str, name: str, old: str, new: str, options: Options) -> None:
    verdict = checked(name, old, new, options)
    assert not verdict.ok, f"a kernel that {what} passed: {verdict}"
    assert verdict.reason


@pytest.mark.parametrize(("what", "name", "old", "new"), STREAM_MUTATIONS, ids=[m[0] for m in STREAM_MUTATIONS])
def test_the_check_objects_to_a_stream(what: str, name: str, old: str, new: str, options: Options) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        verdict = checked(name, old, new, options, STREAM, FEW)
        assert not verdict.ok, f"a kernel that {what} passed: {verdict}"
        assert checked(name, "", "", options, STREAM, FEW).ok
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", sorted({m[1] for m in MUTATIONS}))
def test_the_check_accepts_the_kernel_as_generated(name: str, options: Options) -> None:
    verdict = checked(name, "", "", options)
    assert verdict.ok, str(verdict)
