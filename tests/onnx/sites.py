"""Attentions with operands, without a model."""

from __future__ import annotations

import torch

from attnopt.onnx.operators import Shape
from attnopt.onnx.sites import Attention, Operands
from attnopt.spec import AttentionSpec
from tests.specs import Case, Sizes


def site(spec: AttentionSpec, n_q: int = 9, n_k: int = 9, target: str = "onnx", **operands: object) -> Attention:
    """An attention that has seen random operands; its shape claims no more than the sizes show."""
    generator = torch.Generator().manual_seed(0)
    heads = spec.heads
    shapes = ((heads.q, n_q, heads.d_qk), (heads.k, n_k, heads.d_qk), (heads.v, n_k, heads.d_v))
    q, k, v = (torch.randn(2, *shape, generator=generator) for shape in shapes)
    made = Attention(spec, "softmax", Shape(torch.float32, n_q == n_k, n_q <= n_k), target, 23)
    made.seen = Operands((q, k, v), tuple(operands.get("captures", ())), tuple(operands.get("scalars", ())))
    return made


def of_case(case: Case, n_q: int, n_k: int, target: str) -> Attention:
    """The site of a row of the conformance list."""
    sizes = Sizes(2, case.spec.heads.q, n_q, n_k)
    captures = case.captures(sizes, torch.Generator().manual_seed(1))
    return site(case.spec, n_q, n_k, target, captures=captures, scalars=case.scalars)
