"""Whether a kernel is as right as eager PyTorch: tolerances derived from three runs, never a fixed number.

G is the fp64 run, E eager in the run's dtype, K the kernel. Two statistics catch both a bias and a single bad element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Roundings that two fp64 runs of the same mathematics may differ by: that of the products, summed in another order.
_FP64 = 8.0


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison; `reason` is empty where it is `ok`. Errors are absolute, against fp64."""

    ok: bool
    rms: float
    max: float
    rms_eager: float
    max_eager: float
    reason: str = ""

    def __str__(self) -> str:
        figures = f"rms {self.rms:.2e} (eager {self.rms_eager:.2e}), max {self.max:.2e} (eager {self.max_eager:.2e})"
        return figures if self.ok else f"{self.reason}: {figures}"


def compare(
    golden: Tensor, eager: Tensor, kernel: Tensor, gradients: bool = False, nudged: Sequence[Tensor] = (),
    elementary: bool = False,
) -> Verdict:  # fmt: skip
    """Judge a kernel's result by the contract "the same mathematics in another order".

    `rms(K-G) <= 1.2 rms(E-G) + eps rms(G)` and `max|K-G| <= 2 max|E-G| + 2 ulp(max|G|)`, with factors 1.5 and 3 for
    gradients. A NaN must be where golden has one; an infinity where golden or eager has the same.

    Args:
        golden, eager, kernel: tensors of one shape; the kernel's dtype gives eps.
        gradients: use the wider factors.
        nudged: fp64 runs at inputs moved by some roundings. Where the mathematics itself is that sensitive (logits
            so large that keys tie), their distance from golden counts where it is larger than eager's: no stable
            algorithm can do better, and eager may have been lucky.
        elementary: the kernel is made of another engine's elementary operators, whose products are summed in its own
            order (ONNX Runtime's sums of 512 products were measured to be 1.7 times as far off as torch's): factors 2
            and 4.
    """
    if golden.shape != kernel.shape or eager.shape != kernel.shape:
        shapes = f"{tuple(golden.shape)}, {tuple(eager.shape)}, {tuple(kernel.shape)}"
        return Verdict(False, torch.inf, torch.inf, 0.0, 0.0, f"shapes differ: {shapes}")
    eps = torch.finfo(kernel.dtype).eps
    if kernel.dtype == torch.float64:
        eps *= _FP64  # golden itself is off by as many roundings, and eager often is golden
    g, e, k = (t.detach().to(torch.float64) for t in (golden, eager, kernel))
    if bool((k.isnan() != g.isnan()).any()):
        where = "where golden has none" if bool((k.isnan() & ~g.isnan()).any()) else "is missing where golden has one"
        return Verdict(False, torch.inf, torch.inf, 0.0, 0.0, f"NaN {where}")
    same_infinity = k.isinf() & ((k == g) | (k == e))
    if bool((k.isinf() & ~same_infinity).any()) or bool((g.isinf() & (k != g)).any()):
        return Verdict(False, torch.inf, torch.inf, 0.0, 0.0, "infinities differ")
    usable = g.isfinite() & k.isfinite()
    g, e, k = g[usable], torch.nan_to_num(e[usable], posinf=0.0, neginf=0.0), k[usable]
    if not g.numel():
        return Verdict(True, 0.0, 0.0, 0.0, 0.0)
    rms, top = _errors(k, g)
    rms_eager, top_eager = _errors(e, g)
    for run in nudged:
        rms_nudged, top_nudged = _errors(torch.nan_to_num(run.detach().to(torch.float64)[usable]), g)
        rms_eager, top_eager = max(rms_eager, rms_nudged), max(top_eager, top_nudged)
    share, peak = (2.0, 4.0) if elementary else (1.5, 3.0) if gradients else (1.2, 2.0)
    reason = ""
    if rms > share * rms_eager + eps * float(g.square().mean().sqrt()):
        reason = f"rms error above {share:g} times eager's"
    elif top > peak * top_eager + 2.0 * eps * float(g.abs().max()):
        reason = f"largest error above {peak:g} times eager's"
    return Verdict(not reason, rms, top, rms_eager, top_eager, reason)


def _errors(x: Tensor, g: Tensor) -> tuple[float, float]:
    difference = x - g
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def relative_l1(golden: Tensor, other: Tensor) -> float:
    """`sum|golden - other| / sum|golden|`: the measure of approximate rewrites. 0 is equal."""
    g, o = golden.to(torch.float64), other.to(torch.float64)
    total, difference = float(g.abs().sum()), float((g - o).abs().sum())
    return difference / total if total else (0.0 if difference == 0 else torch.inf)


def cosine(golden: Tensor, other: Tensor) -> float:
    """The cosine between two results seen as vectors. 1 is equal direction; two zero vectors are equal."""
    g, o = golden.to(torch.float64).flatten(), other.to(torch.float64).flatten()
    norms = float(g.norm() * o.norm())
    return float(g @ o) / norms if norms else float(bool(torch.equal(g, o)))


def nudge(tensor: Tensor, roundings: float, seed: int) -> Tensor:
    """The tensor in fp64, each element moved at random by up to so many fp32 roundings."""
    generator = torch.Generator().manual_seed(seed)
    moves = 2.0 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 1.0
    return tensor.to(torch.float64) * (1.0 + roundings * torch.finfo(torch.float32).eps / 2 * moves.to(tensor.device))
