"""A mixed normaliser taken apart: a softmax of the near keys and a linear attention of all before. Free of torch.

Both are attentions of their own. With the log-sum-exp of the first and the sum of weights `t` of the second they meet
in one normaliser: `out = (exp(lse) near + t far) / (exp(lse) + t)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy as sp

from attnopt import expr as ex
from attnopt.analysis.linear_form import LinearForm, linear_form
from attnopt.spec import AttentionSpec, EmptyRow, Mixed, Pointwise, Softmax

# Sums of linear weights below this are none.
LEAST = 1e-30


@dataclass(frozen=True)
class MixedForm:
    """The parts of a mixed attention.

    `near` is a softmax over the first `width` columns that returns its lse, `far` a linear attention over the others;
    a query at place q sees the keys up to `q + offset`, the last `window` of them near. `scale` is that of the scores.
    """

    near: AttentionSpec
    far: AttentionSpec
    linear: LinearForm
    width: int
    offset: sp.Expr
    window: int
    scale: sp.Expr


def mixed_form(spec: AttentionSpec) -> MixedForm | None:
    """The parts of a spec with a mixed normaliser; None where the near keys are not a window before the query."""
    normalizer = spec.normalizer
    if not isinstance(normalizer, Mixed) or spec.weight != 1 or spec.dropout or spec.merge or spec.returns:
        return None
    if spec.rows != sp.true:
        return None
    scale = sp.cancel(spec.score / ex.s)
    if not scale.is_number or spec.empty_row is not EmptyRow.ZERO:
        return None
    width = spec.heads.d_qk - normalizer.features
    plain = replace(spec, gate=sp.S.One)
    near = replace(
        plain, heads=replace(spec.heads, d_qk=width), normalizer=Softmax(), keep=sp.And(spec.keep, normalizer.near),
        returns=("lse",),
    ).canonical()  # fmt: skip
    far = replace(
        plain, heads=replace(spec.heads, d_qk=normalizer.features), score=ex.s,
        normalizer=Pointwise(ex.Maximum(ex.t, sp.Rational(1, 10**30))), keep=sp.And(spec.keep, sp.Not(normalizer.near)),
    ).canonical()  # fmt: skip
    whole, linear = linear_form(replace(far, keep=ex.canon(spec.keep))), linear_form(far)
    if whole is None or linear is None or whole.offset is None or linear.offset is None or whole.key != linear.key:
        return None
    window = sp.expand(whole.offset - linear.offset)
    if not window.is_Integer or window < 1:
        return None
    return MixedForm(near, far, linear, width, whole.offset, int(window), scale)
