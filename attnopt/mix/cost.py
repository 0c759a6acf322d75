"""Whether skipping heads pays: an estimate in multiply-adds, taken at the calibration inputs."""

from __future__ import annotations

from dataclasses import dataclass

from attnopt import expr as ex
from attnopt.spec import AttentionSpec

# Multiply-adds that one pass over an element is worth, and that the calls of the router cost whatever the size.
_PASS, _CALLS = 4, 1_000_000
# Passes over a gate `[B, H, n]`, and over the output `[B, H, n, d_v]` for the means.
_GATE_PASSES, _MEAN_PASSES = 12, 3


@dataclass(frozen=True)
class Estimate:
    """Multiply-adds of a call that are saved, and what the router and the means add."""

    saved: float
    added: float
    share: float

    @property
    def pays(self) -> bool:
        """Whether more is saved than added."""
        return self.saved > self.added

    def __str__(self) -> str:
        return (
            f"with {self.share:.0%} of the heads on, about {self.saved / 1e6:.1f} million multiply-adds would be saved "
            f"at these lengths, and the router costs {self.added / 1e6:.1f} million"
        )


def estimate(spec: AttentionSpec, query: tuple[int, ...], n_k: int, on: int, width: int) -> Estimate:
    """For a query `[B, H, n_q, d]`, `n_k` keys and `on` active heads; `width`: of what the router reads of a token."""
    batch, heads, n_q, _ = query
    causal = ex.sp.Ge(ex.q - ex.k, 0) in ex.conjuncts(spec.keep)
    pairs = batch * heads * n_q * n_k * (0.5 if causal and n_q > 1 else 1.0)
    saved = pairs * (spec.heads.d_qk + spec.heads.d_v) * (1 - on / heads)
    rows = batch * heads * n_q
    added = rows * (width + _PASS * (_GATE_PASSES + _MEAN_PASSES * spec.heads.d_v)) + _CALLS
    return Estimate(saved, added, on / heads)
