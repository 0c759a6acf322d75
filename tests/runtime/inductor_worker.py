"""Lowers attention on CUDA tensors by Inductor where there is no GPU, in a process of its own; writes what came out.

Autograd cannot record fake CUDA tensors in a PyTorch without CUDA (the process is aborted), and meta tensors take the
same registrations: the joint graph is made on these, and traced again on fake CUDA tensors. Inductor asks the driver
for the chip's properties only; they are given here. The text that it writes is not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor import compile_fx, config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton
from torch.utils._pytree import tree_leaves

from attnopt import dynamo
from attnopt.options import Options

# What Inductor reads of a device: an H200's.
_CHIP = SimpleNamespace(
    name="H200", major=9, minor=0, multi_processor_count=132, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32, total_memory=141 << 30,
    shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip
SIZES = (2, 4, 64, 32)


def pretend() -> None:
    """Make this process one with a chip that can be asked what it is, and nothing else."""
    properties: Callable[..., Any] = lambda device=None: _CHIP  # noqa: E731
    torch.cuda.get_device_properties = properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    CudaInterface.get_device_properties = staticmethod(properties)  # type: ignore[assignment]
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)  # type: ignore[assignment]
    _triton.triton_hash_with_backend = lambda: "no driver"


def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as it is written by hand, between pointwise operators."""
    place = torch.arange(q.shape[2], device=q.device)
    scores = ((q * 2) @ k.mT / SIZES[-1] ** 0.5).masked_fill(place > place.unsqueeze(-1), float("-inf"))
    return torch.relu(scores.softmax(-1) @ v + 1)


def inputs(device: str, grad: bool = False) -> list[Tensor]:
    """q, k and v."""
    return [torch.empty(SIZES, device=device, dtype=torch.bfloat16, requires_grad=grad) for _ in range(3)]


def traced_by_aot(graph: fx.GraphModule, gradients: bool) -> tuple[fx.GraphModule, list[Tensor]]:
    """What AOTAutograd hands to Inductor: a graph on CUDA tensors, forward alone or both passes, and its inputs."""

    def run(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(graph(*x)))

    given, table = inputs("cuda"), select_decomp_table()
    if not gradients:
        return aot_export_joint_simple(run, given, trace_joint=False, decompositions=table), given
    both = aot_export_joint_simple(run, inputs("meta", True), trace_joint=True)
    given.append(torch.empty(SIZES, device="cuda", dtype=torch.bfloat16))

    def split(*x: Tensor) -> list[Tensor]:
        return tree_leaves(both(list(x[:3]), list(x[3:])))

    # Decomposed now: what decompositions make of their own is on the device of the tensors.
    return make_fx(split, decomposition_table=table)(*given), given


def lowered(graph: fx.GraphModule, given: Sequence[Tensor], mode: FakeTensorMode) -> dict[str, Any]:
    """What Inductor writes for the graph, and why it would not be recorded into a CUDA graph."""
    unsafe = compile_fx.get_first_incompatible_cudagraph_node(graph)
    handler = GraphLowering(graph, example_inputs=given)
    with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()), V.set_graph_handler(handler):  # type: ignore[arg-type]
        handler.run(*given)
        text = handler.codegen()[0]
    return {
        "nodes": [str(n.target) for n in graph.graph.nodes if n.op == "call_function"],
        "unsafe": unsafe and str(unsafe.target),
        "reason": handler.disable_cudagraphs_reason,
        "text": getattr(text, "value", text),
    }


def main() -> None:
    """Both passes, one line of JSON each."""
    mode = FakeTensorMode()
    with mode, config.patch({"triton.cudagraphs": True}):
        given = inputs("cuda")
        found, report = dynamo._rewritten(make_fx(model)(*given), given, Options())
        graphs = [traced_by_aot(found, gradients) for gradients in (False, True)]
        pretend()
        for graph, given in graphs:
            print(json.dumps({"fused": report.fused} | lowered(graph, given, mode)))


if __name__ == "__main__":
    main()
