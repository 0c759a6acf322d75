"""What ONNX Runtime's operators do, each fact by itself, where the emitted graphs rely on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.onnx import emit
from attnopt.onnx.session import Session, SessionError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

_G = torch.Generator().manual_seed(0)
Q, K, V = (torch.randn(2, 4, 6, 8, generator=_G) for _ in range(3))


def _run(op: str, inputs: list[Tensor | None], domain: str = "", outputs: int = 1, **attributes: Any) -> Tensor:
    """The first output of one operator."""
    helper, kinds = onnx.helper, {torch.float32: 1, torch.bool: 9, torch.int32: 6}
    names = [f"x{i}" if x is not None else "" for i, x in enumerate(inputs)]
    given = [(n, x) for n, x in zip(names, inputs, strict=True) if x is not None]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], domain=domain, **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(n, kinds[x.dtype], list(x.shape)) for n, x in given],
        [helper.make_tensor_value_info("y0", 1, None)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return Session(model.SerializeToString())([n for n, _ in given], [x for _, x in given])[0]


def _softmax(keep: Tensor, cap: float = 0.0) -> Tensor:
    s = Q @ K.transpose(-1, -2) * 0.5
    s = cap * torch.tanh(s / cap) if cap else s
    return torch.softmax(s.masked_fill(~keep, -torch.inf), -1) @ V


_CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def test_standard_causal_is_top_left_and_the_cap_comes_before_the_mask() -> None:
    keys, values = K[:, :, :4], V[:, :, :4]
    found = _run("Attention", [Q, keys, values], is_causal=1, scale=0.5)
    s = (Q @ keys.transpose(-1, -2) * 0.5).masked_fill(~_CAUSAL[:, :4], -torch.inf)
    torch.testing.assert_close(found, torch.softmax(s, -1) @ values)
    found = _run("Attention", [Q, K, V, _CAUSAL], softcap=2.0, scale=0.5)
    torch.testing.assert_close(found, _softmax(_CAUSAL, 2.0))


def test_standard_rows_without_a_key_are_zero_and_the_lowest_float_counts_as_none() -> None:
    for fill in (-torch.inf, torch.finfo(torch.float32).min):
        bias = torch.zeros(6, 6)
        bias[2] = fill
        assert _run("Attention", [Q, K, V, bias])[:, :, 2].count_nonzero() == 0
    bias[2] = emit.LOW
    torch.testing.assert_close(_run("Attention", [Q, K, V, bias])[:, :, 2], V.mean(2))
    keep = torch.ones(6, 6, dtype=torch.bool)
    keep[2] = False
    assert _run("Attention", [Q, K, V, keep])[:, :, 2].count_nonzero() == 0


def test_standard_masks_must_have_both_last_dimensions_and_scales_must_be_positive() -> None:
    assert _run("Attention", [Q, K, V, torch.ones(2, 1, 6, 6)]).shape == Q.shape
    with pytest.raises(SessionError):
        _run("Attention", [Q, K, V, torch.ones(2, 1, 1, 6)])
    with pytest.raises(SessionError):
        _run("Attention", [Q, K, V], scale=-0.5)


def test_multi_head_attention_makes_nan_of_minus_infinity_and_the_mean_of_a_low_bias() -> None:
    flat = [x.transpose(1, 2).flatten(2) for x in (Q, K, V)]
    bias = torch.zeros(1, 1, 6, 6)
    bias[0, 0, 2] = -torch.inf
    found = _run("MultiHeadAttention", [*flat, None, None, bias], "com.microsoft", num_heads=4)
    assert found[:, 2].isnan().all()
    bias[0, 0, 2] = emit.LOW
    found = _run("MultiHeadAttention", [*flat, None, None, bias], "com.microsoft", num_heads=4)
    torch.testing.assert_close(found[:, 2], V.mean(2).flatten(1))
    found = _run("MultiHeadAttention", flat, "com.microsoft", num_heads=4, unidirectional=1, scale=0.5)
    torch.testing.assert_close(found, _softmax(_CAUSAL).transpose(1, 2).flatten(2))


def test_group_query_attention_has_windows_that_hold_the_query_and_sinks() -> None:
    flat = [x.transpose(1, 2).flatten(2) for x in (Q, K, V)]
    sizes = [torch.full((2,), 5, dtype=torch.int32), torch.tensor(6, dtype=torch.int32)]
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0])
    window = _CAUSAL & ~_CAUSAL.tril(-3)
    attributes = {"num_heads": 4, "kv_num_heads": 4, "scale": 0.5, "local_window_size": 3}
    found = _run("GroupQueryAttention", [*flat, None, None, *sizes], "com.microsoft", 3, **attributes)
    torch.testing.assert_close(found, _softmax(window).transpose(1, 2).flatten(2))
    operands = [*flat, None, None, *sizes, None, None, None, None, sink]
    found = _run("GroupQueryAttention", operands, "com.microsoft", 3, **attributes)
    s = (Q @ K.transpose(-1, -2) * 0.5).masked_fill(~window, -torch.inf)
    s = torch.cat([s, sink[:, None, None].expand(2, 4, 6, 1)], -1)
    torch.testing.assert_close(found, (torch.softmax(s, -1)[..., :-1] @ V).transpose(1, 2).flatten(2))
