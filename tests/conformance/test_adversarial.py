"""Models and inputs that once gave a wrong number, a crash or no word: each is right now, with and without validation.

A row is captured on its first inputs and called on both: nothing may be specialised on the values of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import attnopt
from attnopt.runtime.validate import compare
from tests.modules import Function, SelfAttention

MIN, INF = torch.finfo(torch.float32).min, float("inf")
B, H, S, D = 2, 4, 9, 8
GENERATOR = torch.Generator().manual_seed(7)
QKV = tuple(torch.randn(B, H, S, D, generator=GENERATOR) for _ in range(3))
CAUSAL = torch.arange(S)[None] > torch.arange(S)[:, None]
KEEP, LEFT = torch.ones(B, S, dtype=torch.bool), torch.ones(B, S, dtype=torch.bool)
LEFT[0, :3] = False
PLACES = torch.arange(S)


def _at(place: int, value: float, like: torch.Tensor) -> torch.Tensor:
    changed = like.clone()
    changed[place] = value
    return changed


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, change: Callable = lambda s: s) -> torch.Tensor:
    return change(q @ k.mT).softmax(-1) @ v


@dataclass(frozen=True)
class Case:
    """A function of q, k, v and more, and the further inputs at capture and at the call."""

    name: str
    run: Callable[..., torch.Tensor]
    first: tuple[torch.Tensor, ...] = ()
    then: tuple[torch.Tensor, ...] = ()


def _infinite_then_finite(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v, lambda s: s.masked_fill(CAUSAL, -INF).masked_fill(~pad[:, None, None], MIN))


def _data_and_finite(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return attend(q, k, v, lambda s: s + bias + torch.full((S, S), MIN).triu(1))


def _split_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    packed = torch.cat([q, k, v], 1).transpose(1, 2).reshape(B, S, 3 * H * D)
    q, k, v = packed.view(B, S, 3 * H, D).transpose(1, 2).split(H, 1)
    return F.scaled_dot_product_attention(q, k, v)


FLOAT = torch.zeros(B, 1, S, S)


def _assigned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A boolean mask, part of which is written after it was made."""
    keep = mask[:, None, None].expand(B, H, S, S).clone()
    keep[..., 0] = True
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, keep)


CASES = (
    Case("float_mask_with_empty_row", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), (FLOAT,), (_at(0, -INF, FLOAT),)),
    Case("infinite_then_finite", _infinite_then_finite, (KEEP,), (LEFT,)),
    Case("data_and_finite", _data_and_finite, (torch.zeros(B, 1, 1, S),), (torch.where(LEFT, 0.0, -INF)[:, None, None],)),
    Case("positions_at_the_end_of_their_type", lambda q, k, v, a, b: attend(q, k, v, lambda s: s.masked_fill(b[None] > a[:, None], -INF)),
         (PLACES, PLACES), (PLACES, _at(5, torch.iinfo(torch.int64).min, PLACES))),
    Case("infinite_positions", lambda q, k, v, a: attend(q, k, v, lambda s: s.masked_fill(a[None] > a[:, None], -1e4)),
         (PLACES.float(),), (_at(8, INF, _at(7, INF, PLACES.float())),)),
    Case("bytes_wrap", lambda q, k, v, m: attend(q, k, v, lambda s: s.masked_fill((m - 1)[:, None, None] > 0, -10)),
         (KEEP.byte(),), (LEFT.byte(),)),
    Case("remainder_of_floats", lambda q, k, v, a: attend(q, k, v, lambda s: s.masked_fill((a % 2.0)[None, :] > 0, -5)),
         (torch.zeros(S),), (torch.linspace(0, 3, S),)),
    Case("constant_beyond_its_type", lambda q, k, v, m: attend(q, k, v, lambda s: s + ((1 - m.float()) * MIN).to(torch.bfloat16)[:, None, None]),
         (KEEP,), (KEEP & (torch.arange(B) > 0)[:, None],)),
    Case("boolean_mask_assigned", _assigned, (KEEP,), (LEFT,)),
    Case("flipped_query_heads", lambda q, k, v: attend(q.flip(1), k, v)),
    Case("one_query_head_for_all", lambda q, k, v: attend(q[:, :1], k, v)),
    Case("heads_split_from_one_tensor", _split_heads),
    Case("window_longer_than_the_row", lambda q, k, v: attend(q, k, v, lambda s: s.masked_fill(torch.arange(S)[-20:] > torch.arange(S)[:, None], -INF))),
    Case("view_after_a_product", lambda q, k, v: (attend(q, k, v) * 2).view(B, -1)),
    Case("view_after_a_part", lambda q, k, v: attend(q, k, v)[:1].view(-1)),
    Case("memory_read_afterwards", lambda q, k, v: attend(q, k, v).as_strided((B, H * S), (H * S * D, D))),
    Case("largest_score_moved", lambda q, k, v: attend(q, k, v, lambda s: torch.where(s >= s.amax(-1, keepdim=True), s, -5.0))),
    Case("not_a_number", lambda q, k, v, m: attend(q, k, v, lambda s: s + (1 - m.float())[:, None, None] * -INF), (KEEP,), (LEFT,)),
    Case("padding_added_then_causal_filled", lambda q, k, v, m: attend(q, k, v, lambda s: (s + (~m)[:, None, None] * MIN).masked_fill(CAUSAL, MIN)), (KEEP,), (LEFT,)),
    Case("filled_lower_then_higher", lambda q, k, v, m: attend(q, k, v, lambda s: s.masked_fill(~m[:, None, None], MIN).masked_fill(CAUSAL, -1e38)), (KEEP,), (LEFT,)),
    Case("integer_padding_and_finite", lambda q, k, v, m: attend(q, k, v, lambda s: s + (1 - m)[:, None, None] * MIN + torch.full((S, S), MIN).triu(1)),
         (KEEP.long(),), (LEFT.long(),)),
    Case("positions_rounded", lambda q, k, v: attend(q, k, v, lambda s: s.masked_fill((PLACES * 0.1 + 0.2)[None] == ((PLACES + 2) * 0.1)[:, None], -5.0))),
    Case("positions_of_eight_bits", lambda q, k, v: attend(q, k, v, lambda s: s.masked_fill((PLACES.bfloat16() * 99)[None] > (PLACES.bfloat16() * 99)[:, None] - 1, -INF))),
    Case("weights_zeroed", lambda q, k, v, m: (q @ k.mT).softmax(-1).masked_fill(~m[:, None, None], 0) @ v, (KEEP,), (LEFT,)),
)  # fmt: skip


@pytest.mark.parametrize("validate", [True, False], ids=["validated", "not validated"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_case_is_right(case: Case, validate: bool) -> None:
    model = Function(case.run)
    fast = attnopt.optimize(model, (*QKV, *case.first), validate=validate)
    assert len(fast.report.sites) == 1
    assert fast.report.sites[0].status == "fused" or fast.report.sites[0].reason
    for more in (case.first, case.then or case.first):
        eager = model(*QKV, *more)
        wide = [x.double() if x.is_floating_point() else x for x in (*QKV, *more)]
        golden = eager.double() if case.name == "largest_score_moved" else model(*wide)
        verdict = compare(golden.nan_to_num(3.0), eager.nan_to_num(3.0), fast(*QKV, *more).nan_to_num(3.0))
        assert verdict.ok, verdict


def test_the_smaller_of_two_masks_rounds_scores_of_sixteen_bits() -> None:
    fill = torch.finfo(torch.float16).min

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        causal = torch.full((S, S), fill, dtype=torch.float16).triu(1)
        return attend(q, k, v, lambda s: s + torch.minimum((~m)[:, None, None].half() * fill, causal))

    half = tuple(x.half() for x in QKV)
    fast = attnopt.optimize(Function(run), (*half, KEEP), validate=False)
    assert fast.report.fused == 1
    torch.testing.assert_close(fast(*half, LEFT), run(*half, LEFT), atol=4e-3, rtol=4e-3)


def test_a_tensor_given_twice_is_two_inputs() -> None:
    model = Function(lambda a, b: attend(a, b, b))
    x, y = QKV[:2]
    fast = attnopt.optimize(model, (x, x))
    torch.testing.assert_close(fast(x, y), model(x, y))


def test_an_output_that_strays_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.api._MOST_CHANGE", -1.0)
    fast = attnopt.optimize(Function(attend), QKV)
    assert "moved although every site agrees" in fast.report.sites[0].reason


def test_calibration_that_measures_nothing_refuses_a_rewrite() -> None:
    model = SelfAttention()
    unusable = torch.full((2, 5, 16), float("nan"))
    prune = attnopt.rewrites.PruneHeads(fraction=0.25, score="magnitude")
    fast = attnopt.optimize(model.eval(), (unusable,), rewrites=[prune], tolerance=1e-6, validate=False)
    assert fast.report.rewritten == 0
    assert any("refused" in note for note in fast.report.notes)
