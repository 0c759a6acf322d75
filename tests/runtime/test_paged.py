"""The operator of paged attention in graphs: one node, its shapes known without running it."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.runtime import paged as operator
from attnopt.runtime.pages import gathered
from tests.conformance.judge import tensors
from tests.conformance.paged_inputs import paged
from tests.runtime.test_pages import LAST, PADDED


def test_the_operator_agrees_with_the_definition_and_its_fake() -> None:
    given = paged(tensors(LAST, 3, 2, 20, "contiguous", torch.float32, 1.0), (20, 0, 9), 8)
    inputs = (given.q, given.keys, given.values, given.page_table, given.key_lengths, [], [], [], LAST.text)
    torch.library.opcheck(
        torch.ops.attnopt.paged_attention.default, inputs, test_utils=("test_schema", "test_faketensor")
    )
    out, lse = torch.ops.attnopt.paged_attention(*inputs)
    wanted = gathered(LAST.canonical(), given)
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])
    assert out.stride() == (2 * 4 * 8, 8, 4 * 8, 1)


def test_a_model_that_calls_it_is_one_graph() -> None:
    given = paged(tensors(LAST, 2, 1, 20, "contiguous", torch.float32, 1.0), (20, 5), 8)
    text = LAST.text

    class Decode(torch.nn.Module):
        def forward(self, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
            out, _ = torch.ops.attnopt.paged_attention(q * 2, keys, values, table, lengths, [], [], [], text)
            return out.transpose(1, 2).flatten(2)

    tensors_ = (given.q, given.keys, given.values, given.page_table, given.key_lengths)
    exported = torch.export.export(Decode(), tensors_)
    names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    assert names.count("attnopt.paged_attention.default") == 1
    assert torch.equal(exported.module()(*tensors_), Decode()(*tensors_))


def test_without_lse_the_second_result_is_empty() -> None:
    pad = torch.ones((1, 5), dtype=torch.int64)
    given = paged(tensors(PADDED, 1, 1, 5, "contiguous", torch.float32, 1.0), (5,), 2, [pad])
    out, lse = operator.run(PADDED.canonical(), given)
    assert out.shape == (1, 4, 1, 8)
    assert lse is not None
    assert lse.numel() == 0
