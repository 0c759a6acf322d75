"""Teach attnopt an attention it cannot know: an operator of your own library, described by one pattern."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

import attnopt
from attnopt import expr as ex
from attnopt.patterns import Decline, Lifter, Parts, Place, Region, build, frame, shape, split, width


@torch.library.custom_op("mylib::fused_attn", mutates_args=())
def fused_attn(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
    """A library's attention: `[batch, position, head, width]`; padding `[batch, key]`, True where there is no token."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(padding[:, None, None, :], float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


@fused_attn.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def match(node: fx.Node, constants: Mapping[str, Tensor]) -> Region | Decline | None:
    """What `mylib::fused_attn` computes."""
    if node.target is not torch.ops.mylib.fused_attn.default:
        return None
    query, key, values, padding = node.args
    # Dimension 1 of the output counts queries, dimension 3 features; the others are the batch and the heads.
    framed = frame(node, query_dim=1, width_dim=3, n_k=shape(key)[1], d_qk=shape(query)[3], fold=None)
    if isinstance(framed, Decline):
        return framed
    b, h = framed.index[0], framed.index[2]
    lifter = Lifter(framed.sizes, constants)
    score = ex.s * ex.number(int(shape(query)[3]) ** -0.5)
    masked = split(ex.Where(lifter.lift(padding, (b, ex.k)), ex.NEG_INF, score))
    places = (
        Place(query, (b, ex.q, h, ex.d), ex.q, ex.d),
        Place(key, (b, ex.k, h, ex.d), ex.k, ex.d),
        Place(values, (b, ex.k, h, width), ex.k, width),
    )
    return build(Parts("mylib", node, node, masked, *places), framed, lifter)


class Model(nn.Module):
    """Self-attention by the library's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        return torch.ops.mylib.fused_attn(query, key, value, padding).flatten(2)


torch.manual_seed(0)
model, x = Model().eval(), torch.randn(2, 10, 32)
padding = torch.arange(10) >= torch.tensor([[10], [6]])
mine = attnopt.Pattern("mylib", match)
options = attnopt.Options(patterns=(*attnopt.PATTERNS, mine))

assert not attnopt.explain(model, (x, padding)).sites
fast = attnopt.optimize(model, (x, padding), options=options)
print(fast.report)
assert fast.report.fused == 1
assert fast.report.sites[0].pattern == "mylib"
with torch.no_grad():
    torch.testing.assert_close(fast(x, padding), model(x, padding))

# The operator has no gradient of its own; the attention it was read as has one.
fast(x, padding).sum().backward()
assert model.qkv.weight.grad is not None
