"""Launch functions: each argument of a kernel is given, in its order."""

from __future__ import annotations

from attnopt.codegen.triton_forward import forward_arguments
from attnopt.codegen.triton_launchers import backward_launcher, decode_launcher, forward_launcher, launch_arguments
from tests.codegen.test_triton import layout
from tests.specs import case

SPEC = case("sink").spec


def test_arguments_stand_by_kind() -> None:
    given = forward_arguments(SPEC, layout(SPEC))
    assert launch_arguments(given, ["sink"]) == [
        "q, k, v, out, sink_tensor, lse,",
        "batch, n_q, k.shape[2],",
        "*q.stride(), *k.stride(), *v.stride(), *out.stride(), *sink_tensor.stride(),",
    ]
    scalars = forward_arguments(case("offset").spec, layout(case("offset").spec))
    assert launch_arguments(scalars, [])[-1] == "start_value,"


def test_the_functions_take_tensors_and_scalars() -> None:
    given = forward_arguments(SPEC, layout(SPEC))
    assert forward_launcher(SPEC, given).startswith("def attention(q, k, v, sink_tensor, launch=")
    assert "return out, None" in forward_launcher(case("plain").spec, given)
    assert "splits=None" in decode_launcher(SPEC, given, given, layout(SPEC))
    text = backward_launcher(SPEC, {"attention_dq": given}, ("sink",))
    assert "grad_sink = torch.zeros(sink_tensor.shape" in text
    assert text.rstrip().splitlines()[-1].strip() == "return dq, dk, dv, grad_sink"
