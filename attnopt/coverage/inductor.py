"""Where Inductor's own matcher stands on the same model: Dynamo, AOT, decompositions, the joint-graph passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn


def fusions(model: nn.Module, inputs: dict[str, Any]) -> int | str:
    """How many attentions `fuse_attention` replaces in the model's graphs, or why that could not be found out.

    The graphs are those of `torch.compile`, so that Inductor meets what it meets in use; nothing is compiled.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import select_decomp_table

    torch._dynamo.reset()
    counters.clear()
    backend = aot_autograd(fw_compiler=_passes, inference_compiler=_passes, decompositions=select_decomp_table())
    try:
        with torch.no_grad():
            torch.compile(model, backend=backend, dynamic=False)(**inputs)
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:200]}"
    finally:
        torch._dynamo.reset()
    return int(counters["inductor"]["fuse_attention"])


def _passes(joint: fx.GraphModule, example_inputs: list[Any]) -> Any:
    """Inductor's passes on one graph, which then runs as it is."""
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    mode = torch._guards.detect_fake_mode(example_inputs)
    with V.set_fake_mode(mode):
        joint_graph_passes(joint, input_device=torch.device("cpu"))
    return joint.forward
