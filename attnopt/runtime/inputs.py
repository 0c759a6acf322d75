"""Checks of the tensors that a site is called with: shapes, dtypes, devices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.errors import ShapeError, SpecError
from attnopt.returns import PAIRS
from attnopt.spec import AttentionSpec


def check_inputs(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, captures: Sequence[Tensor], scalars: Sequence[int]
) -> None:
    """Raise `ShapeError`, saying what was asked, what was seen and what to do, unless the inputs fit the spec.

    `SpecError` for a spec that returns what takes another visit of the keys.
    """
    heads = spec.heads
    if set(spec.returns) & set(PAIRS):
        raise SpecError(f"the operator returns what a row has, not {', '.join(spec.returns)}: call attnopt.attention.")
    _expect("q", q, (None, heads.q, None, heads.d_qk))
    _expect("k", k, (q.shape[0], heads.k, None, heads.d_qk))
    _expect("v", v, (q.shape[0], heads.v, k.shape[2], heads.d_v))
    if not q.is_floating_point():
        raise ShapeError(f"attention needs floating-point q, k and v; q is {_name(q)}. Cast them first.")
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            f"q, k and v must have one dtype; they are {_name(q)}, {_name(k)} and {_name(v)}. Cast them to one, or run "
            f"the model under torch.autocast."
        )
    devices = {str(t.device) for t in (q, k, v, *captures)}
    if len(devices) > 1:
        raise ShapeError(
            f"all tensors of an attention must be on one device; they are on {', '.join(sorted(devices))}. Move the "
            f"inputs to the model's device."
        )
    _check_captures(spec, captures)
    wanted = len(spec.scalars) + bool(spec.dropout)
    if len(scalars) != wanted:
        seed = " and a seed for dropout" if spec.dropout else ""
        raise ShapeError(f"the spec takes the scalars {list(spec.scalars)}{seed}; {len(scalars)} were given.")


def _check_captures(spec: AttentionSpec, captures: Sequence[Tensor]) -> None:
    if len(captures) != len(spec.captures):
        raise ShapeError(f"the spec captures {[c.name for c in spec.captures]}; {len(captures)} tensors were given.")
    for capture, tensor in zip(spec.captures, captures, strict=True):
        _expect(capture.name, tensor, capture.shape)
        if tensor.is_floating_point() != (capture.kind == "float") or tensor.is_complex():
            kind = "floating-point numbers" if capture.kind == "float" else "integers or booleans"
            raise ShapeError(f"capture {capture.name} must hold {kind}; it is {_name(tensor)}. Cast it first.")


def _expect(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    fits = tensor.dim() == len(shape) and all(w is None or w == s for w, s in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        raise ShapeError(
            f"{name} must have the shape [{wanted}]; it is {list(tensor.shape)}. Call the model with inputs of the "
            f"captured shape, or mark the dimension in dynamic_shapes."
        )


def _name(tensor: Tensor) -> str:
    return dtype_name(tensor.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
