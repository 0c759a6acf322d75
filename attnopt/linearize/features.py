"""Feature maps of linear attention: `phi(q) . phi(k)` stands for the weight `exp(score)`, and is never negative.

A map is written once, over the function that makes a call: in a graph that is a new node, in eager PyTorch the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten
Call = Callable[..., Any]

# Exponents of learned features end here: e^10 is within fp16, and a sum of products of two within fp32.
LARGEST = 10.0


@dataclass(frozen=True)
class FeatureMap:
    """One feature map.

    Attributes:
        make: `(call, x, weight)` gives the features of `x [B, H, n, d]`; `weight [H, d, f]` only where it is learned.
        learned: whether it has weights that are fitted to the attention it replaces.
        width: number of features, from the width of a head and of the weight.
        positive: whether products of features are above zero, so that only a row without keys sums to it.
    """

    make: Callable[[Call, Any, Any], Any]
    learned: bool
    width: Callable[[int, int], int]
    positive: bool


def _elu(call: Call, x: Any, weight: Any) -> Any:
    """`elu(x) + 1` (Katharopoulos et al., Transformers are RNNs, 2020)."""
    return call(aten.add.Tensor, call(aten.elu.default, x), 1)


def _relu(call: Call, x: Any, weight: Any) -> Any:
    return call(aten.relu.default, x)


def _hedgehog(call: Call, x: Any, weight: Any) -> Any:
    """`[exp(xW), exp(-xW)]` (Zhang et al., The Hedgehog and the Porcupine, 2024).

    The products are `sum_j 2 cosh(..)`: at least 2 a feature, so no row sums to zero.
    """
    made = call(aten.clamp.default, call(aten.matmul.default, x, weight), -LARGEST, LARGEST)
    return call(
        aten.cat.default, [call(aten.exp.default, made), call(aten.exp.default, call(aten.neg.default, made))], -1
    )


MAPS = {
    "elu": FeatureMap(_elu, False, lambda d, f: d, True),
    "relu": FeatureMap(_relu, False, lambda d, f: d, False),
    "hedgehog": FeatureMap(_hedgehog, True, lambda d, f: 2 * f, True),
}


def eager(target: Any, *args: Any) -> Any:
    """The `call` of eager PyTorch."""
    return target(*args)
