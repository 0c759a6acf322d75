"""`Select`: which blocks of keys a tile of queries visits, chosen by the inputs themselves. Free of torch.

Keys are cut into blocks of `block`, queries into tiles of `tile`. With the mean query of a tile and the mean key of a
block, over the keys that the clauses of `keep` on keys alone allow, the block's score is

    e[t, j] = scale * mean(q[t]) . mean(k[j])

Candidates of a tile are the blocks that `keep` may allow (`analysis.tables` proves the others empty). Of these are kept

    topk   the `amount` best, equal ones in ascending order
    mass   the best whose weights softmax_j(e + log(keys of j)) reach `amount` together

and always the first `first` candidates and the blocks that hold the tile's own positions `own`; those count among the
`amount`, and come first. Inside a kept block `keep` holds as it does without a selection.

topk over single queries (`tile` = 1) is MoBA: Mixture of Block Attention for Long-Context LLMs, Lu et al., 2025; the
cumulative mass follows FlexPrefill, Lai et al., 2025, and XAttention, Xu et al., 2025.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp

from attnopt import expr as ex
from attnopt.errors import SpecError
from attnopt.readable import show

RULES = ("topk", "mass")
# Kernels cut both into tiles of their own, which these have to fit.
_LARGEST = 1 << 16


@dataclass(frozen=True)
class Select:
    """The choice of blocks; see the module.

    Attributes:
        rule: `topk` or `mass`.
        amount: how many blocks, or which mass in (0, 1]: one number for all heads, or one a head (a key head if
            `shared`). Exact rationals.
        block, tile: keys and queries of one choice, powers of two.
        own: the key position of query q, an expression in `b, q`, sizes and loads; None where there is none.
        first: how many of the first candidates are always kept.
        scale: what the products are multiplied by, exact; only `mass` depends on it.
        shared: whether the query heads of a key head choose together, by their mean query.
        estimator: how blocks are scored: `mean`.
    """

    rule: str
    amount: tuple[sp.Rational, ...]
    block: int = 64
    tile: int = 64
    own: sp.Expr | None = None
    first: int = 0
    scale: sp.Rational = sp.S.One
    shared: bool = False
    estimator: str = "mean"

    def canonical(self) -> Select:
        """The same choice with a canonical expression."""
        own = None if self.own is None else ex.canon(self.own)
        return Select(
            self.rule, tuple(map(sp.Rational, self.amount)), self.block, self.tile, own, self.first,
            sp.Rational(self.scale), self.shared, self.estimator,
        )  # fmt: skip

    def verify(self, heads: int) -> None:
        """Raise `SpecError` unless the parts fit together; `heads` is how many choose."""
        if self.rule not in RULES or self.estimator != "mean":
            raise SpecError(f"blocks are chosen by {' or '.join(RULES)} of means, not {self.rule} of {self.estimator}.")
        for name in ("block", "tile"):
            size = getattr(self, name)
            if not 0 < size <= _LARGEST or size & (size - 1):
                raise SpecError(f"select: {name} must be a power of two up to {_LARGEST}: {size}.")
        if len(self.amount) not in (1, heads):
            raise SpecError(f"select: one amount, or one for each of {heads} heads: {len(self.amount)} are given.")
        for x in self.amount:
            if x <= 0 or (x > 1 if self.rule == "mass" else not x.is_Integer):
                raise SpecError(f"select: {x} is no {'mass in (0, 1]' if self.rule == 'mass' else 'number of blocks'}.")
        if self.first < 0 or not self.scale.is_Rational:
            raise SpecError("select: `first` is a number of blocks, `scale` a rational number.")
        if self.own is not None and (ex.is_boolean(self.own) or not self.own.is_integer):
            raise SpecError(f"select: own positions must be integers: {show(self.own)}.")

    def __str__(self) -> str:
        low, high = min(self.amount), max(self.amount)
        many = f"{low}" if low == high else f"{low} to {high}"
        what = f"{many} blocks" if self.rule == "topk" else f"blocks of mass {many}"
        forced = [f"the first {self.first}"] if self.first else []
        forced += [] if self.own is None else [f"that of key {show(self.own)}"]
        return (
            f"select {what} of {self.block} keys by mean for {self.tile} queries"
            + (", heads of a group together" if self.shared else "")
            + (f", always {' and '.join(forced)}" if forced else "")
        )


def select_to_json(select: Select) -> dict[str, Any]:
    """As plain data for a spec's text."""
    return {
        "rule": select.rule,
        "amount": [[str(x.p), str(x.q)] for x in select.amount],
        "sizes": [select.block, select.tile, select.first],
        "own": None if select.own is None else ex.to_tree(select.own),
        "scale": [str(select.scale.p), str(select.scale.q)],
        "shared": select.shared,
        "estimator": select.estimator,
    }


def select_from_json(data: dict[str, Any]) -> Select:
    """The inverse of `select_to_json`; the spec's `verify` says whether it makes sense."""
    block, tile, first = map(int, data["sizes"])
    return Select(
        str(data["rule"]), tuple(map(_rational, data["amount"])), block, tile,
        None if data["own"] is None else ex.from_tree(data["own"]), first,
        _rational(data["scale"]), bool(data["shared"]), str(data["estimator"]),
    )  # fmt: skip


def _rational(pair: Any) -> sp.Rational:
    numerator, denominator = pair
    if int(denominator) < 1:
        raise SpecError(f"spec text has a denominator of {denominator}.")
    return sp.Rational(int(numerator), int(denominator))
