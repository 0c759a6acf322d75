"""Whether a captured graph computes what its model computes: some models go another way while they are traced."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from attnopt.capture import Captured

log = logging.getLogger("attnopt")

# Of the root mean square of the outputs: roundings, which other kernels may cause, stay far below.
_MOST = 0.1
# A model whose own outputs differ by more from run to run is random.
_AGAIN = 1e-3


def strayed(
    model: nn.Module, captured: Captured, states: list[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """How the graph's outputs differ from the model's on these inputs; empty where they agree or cannot be compared.

    A copy of the model runs, with parameters shared, on copies of the inputs: caches may be written to. A model in
    training, or one that is random, says nothing.
    """
    if any(part.training for part in model.modules()):
        return ""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            wanted, found = _run(model, args, kwargs), _replay(captured, states, args, kwargs)
            gap = _gap(wanted, found)
            if gap is None or gap <= _MOST:
                return ""
            again = _gap(wanted, _run(model, args, kwargs))
    except Exception as error:
        log.info("the captured graph was not compared with the model: %s", error)
        return ""
    if again is None or again > _AGAIN:
        return ""
    return f"the model computes something else while it is traced: its outputs differ by {gap:.2g} of their size"


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    own = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    given = copy.deepcopy((args, dict(kwargs)))
    # PyTorch's own fast path of encoder layers fills padded rows with zeros, which tracing never does.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return own(*given[0], **given[1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _replay(captured: Captured, states: list[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    given = copy.deepcopy((args, dict(kwargs)))
    copies = [x.clone() if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter) else x for x in states]
    return captured.gm(*copies, *captured.flatten(*given))


def _gap(wanted: Any, found: Any) -> float | None:
    """The root mean square of the differences over that of what is wanted; None where they are of different kinds."""
    pairs = list(zip(_floats(wanted), _floats(found), strict=True))
    if not pairs or any(x.shape != y.shape for x, y in pairs):
        return None
    x, y = (torch.cat([t.double().flatten() for t in side]) for side in zip(*pairs, strict=True))
    both = x.isfinite() & y.isfinite()
    size = x[both].square().mean().sqrt().item() if both.any() else 0.0
    change = (x - y)[both].square().mean().sqrt().item() if both.any() else 0.0
    return change / size if size > 0 else 0.0


def _floats(output: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
