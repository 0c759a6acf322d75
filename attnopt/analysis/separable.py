"""What a score adds to the product of query and key, sorted by how it can be factored. Free of torch.

A term `f(q) g(k)` is one more dimension of query and key; a term that loads an element a pair is a table, which may
have a low rank or depend on the distance alone; everything else stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy as sp

from attnopt import expr as ex
from attnopt.spec import AttentionSpec, Softmax


@dataclass(frozen=True)
class Split:
    """A score as `scale*s + sum_i f_i(q) g_i(k) + table(q, k) + rest`.

    Attributes:
        scale: the number before the product of query and key.
        pairs: `(f, g)`: f is free of the key, g is free of the query and has no number as a factor.
        table: terms that load one element for each pair of query and key, alike for the whole batch; 0 for none.
        rest: masks, lines and terms that cannot be separated.
        separable: the terms that `pairs` stand for, as they were.
    """

    scale: sp.Expr
    pairs: tuple[tuple[sp.Expr, sp.Expr], ...]
    table: sp.Expr
    rest: sp.Expr
    separable: sp.Expr


def split(spec: AttentionSpec) -> Split | str:
    """The parts of a spec's score, or why it has none."""
    if spec.merge:
        return "a sum of attentions has several scores"
    if spec.weight.has(ex.s):
        return "the weights read the score once more"
    terms = sp.Add.make_args(spec.score)
    products = [t for t in terms if t.has(ex.s)]
    scale = products[0].coeff(ex.s) if len(products) == 1 else sp.S.Zero
    if not (scale.is_number and scale.is_finite and scale != 0 and products[0] == scale * ex.s):
        return "the bias is not added to the plain product of query and key"
    pairs: dict[sp.Expr, sp.Expr] = {}
    table: list[sp.Expr] = []
    rest: list[sp.Expr] = []
    separable: list[sp.Expr] = []
    for term in (t for t in terms if not t.has(ex.s)):
        parts = _pairs(term, spec.keep)
        if parts is None:
            (table if _is_table(term) else rest).append(term)
            continue
        separable.append(term)
        for f, g in parts:
            pairs[g] = pairs.get(g, sp.S.Zero) + f
    if _rows_cancel(spec):
        pairs.pop(sp.S.One, None)
    found = tuple((f, g) for g, f in sorted(pairs.items(), key=lambda pair: str(pair[0])) if f != 0)
    return Split(scale, found, sp.Add(*table), sp.Add(*rest), sp.Add(*separable))


def _rows_cancel(spec: AttentionSpec) -> bool:
    """Whether what is added alike to all keys of a row changes nothing."""
    return spec.normalizer == Softmax() and not spec.returns


def _pairs(term: sp.Expr, keep: sp.Basic) -> list[tuple[sp.Expr, sp.Expr]] | None:
    """A term as a sum of products `f(q) g(k)`, if it is one."""
    if ex.depends(term, ex.b) or any(isinstance(x, ex.IntLoad) for x in ex.loads(term)):
        return None
    found = []
    for part in sp.Add.make_args(sp.expand(_unsigned(term, keep))):
        of_key = [x for x in sp.Mul.make_args(part) if ex.depends(x, ex.k)]
        if any(ex.depends(x, ex.q) for x in of_key) or part.has(sp.oo, ex.NEG_INF, sp.nan, ex.Where):
            return None
        number, g = sp.Mul(*of_key).as_coeff_Mul()
        f = number * sp.Mul(*[x for x in sp.Mul.make_args(part) if not ex.depends(x, ex.k)])
        found.append((f, g))
    return found


def _unsigned(term: sp.Expr, keep: sp.Basic) -> sp.Expr:
    """Distances without their absolute value, where no key after its query is kept."""
    if sp.Ge(ex.q - ex.k, 0) not in ex.conjuncts(ex.canon(keep)):
        return term
    changes = {}
    for size in term.atoms(sp.Abs):
        slope = sp.expand(size.args[0]).coeff(ex.q)
        if slope.is_number and sp.expand(size.args[0] - slope * (ex.q - ex.k)) == 0:
            changes[size] = sp.Abs(slope) * (ex.q - ex.k)
    return term.xreplace(changes)


def _is_table(term: sp.Expr) -> bool:
    """Whether a term of the score loads an element for each pair, the same for every entry of the batch."""
    if ex.depends(term, ex.b) or ex.is_boolean(term):
        return False
    loads = [x for x in ex.loads(term) if ex.depends(x, ex.q) and ex.depends(x, ex.k)]
    return bool(loads) and not all(_is_line(x) for x in loads)


def _is_line(load: ex.Load) -> bool:
    """Whether query and key enter a load as their distance alone."""
    moving = [i for i in load.args[1:] if ex.depends(i, ex.q) or ex.depends(i, ex.k)]
    return all(not ex.depends(sp.expand(i.xreplace({ex.k: ex.k + ex.q})), ex.q) for i in moving)


def operations(term: sp.Expr) -> int:
    """About how many fused multiply-adds a score costs that computes this term, its loads left out."""
    count = 0
    for node in sp.preorder_traversal(term):
        if isinstance(node, ex.Load) or not (ex.depends(node, ex.q) or ex.depends(node, ex.k)):
            continue
        if isinstance(node, (sp.Add, sp.Mul)):
            count += len(node.args) - 1
        elif node.args:
            count += 1 if isinstance(node, (sp.Abs, ex.Where)) or (node.is_Pow and node.exp == 2) else 8
    return max(count, 1) if term != 0 else 0
