"""Where the scale stands: on queries, keys, both, the scores, in a tensor, learned."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.row import HEADS, Spelling, attend, ramp

QUARTER = "4 heads, d=8; score s/4"
ROOT = "4 heads, d=8; score 0.353553*s"


def _in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores /= math.sqrt(k.size(-1))
    return attend(scores, v)


def _cosine(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """Swin v2: normalised queries and keys, a learned scale per head that is bounded."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return attend(scores * torch.clamp(scale[:, None, None], max=math.log(100.0)).exp(), v)


def _mup(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A scale on queries and keys each, of the fourth root of the width."""
    return attend((q * 8**-0.25) @ (k * 8**-0.25).mT, v)


def _temperature_on_queries(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    return attend((q * temperature[:, None, None]) @ k.mT, v)


def _by_row(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    """A temperature for every query, as in selective self-attention."""
    return attend(q @ k.mT / temperature[:, None], v)


def _log_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A scale that grows with the logarithm of the length."""
    return attend(q @ k.mT * (math.log(k.shape[-2]) / math.log(2)) * 0.25, v)


ROWS = (
    Spelling("scale_none", lambda q, k, v: attend(q @ k.mT, v), "4 heads, d=8; score s"),
    Spelling("scale_on_query", lambda q, k, v: attend((q * 0.25) @ k.mT, v), QUARTER, kernel="auto"),
    Spelling("scale_on_key", lambda q, k, v: attend(q @ (0.25 * k).mT, v), QUARTER),
    Spelling("scale_on_transposed_key", lambda q, k, v: attend(q @ (k.transpose(-1, -2) / 4), v), QUARTER),
    Spelling("scale_on_both", lambda q, k, v: attend((q / 2) @ (k / 2).mT, v), QUARTER),
    Spelling("scale_on_scores", lambda q, k, v: attend(q @ k.mT * 0.25, v), QUARTER),
    Spelling("scale_divides", lambda q, k, v: attend(torch.div(q @ k.mT, 4.0), v), QUARTER),
    Spelling("scale_twice", lambda q, k, v: attend((q / 2) @ k.mT * 0.5, v), QUARTER),
    Spelling("scale_root", lambda q, k, v: attend(q @ k.mT / math.sqrt(8), v), ROOT),
    Spelling("scale_power", lambda q, k, v: attend((q @ k.mT) * q.shape[-1] ** -0.5, v), ROOT),
    Spelling("scale_fourth_root", _mup, ROOT),
    Spelling("scale_in_place", _in_place, ROOT),
    Spelling("scale_tensor", lambda q, k, v: attend(q @ k.mT / torch.tensor(4.0), v), QUARTER),
    Spelling("scale_root_of_tensor", lambda q, k, v: attend(q @ k.mT / torch.sqrt(torch.tensor(16.0)), v), QUARTER),
    Spelling("scale_full_tensor", lambda q, k, v: attend(q @ k.mT / torch.full([], 4.0, dtype=q.dtype), v), QUARTER),
    Spelling("scale_learned", lambda q, k, v, t: attend(q @ k.mT * t, v), "4 heads, d=8; score s*bias[]", extra=(torch.tensor(0.25),)),
    Spelling("temperature_by_head", lambda q, k, v, t: attend(q @ k.mT * t[None, :, None, None], v), "4 heads, d=8; score s*bias[h]", extra=(ramp(4),), kernel="auto"),
    Spelling("temperature_divides", lambda q, k, v, t: attend(q @ k.mT / t[:, None, None], v), "4 heads, d=8; score s*bias[h]**(-1)", extra=(ramp(4) + 2,)),
    Spelling("temperature_on_queries", _temperature_on_queries, "4 heads, d=8; score s", extra=(ramp(4),)),
    Spelling("temperature_by_query", _by_row, "4 heads, d=8; score s*bias[q]**(-1)", extra=(ramp(7) + 2,)),
    Spelling("cosine", _cosine, "4 heads, d=8; score s*bias[h]", HEADS, extra=(ramp(4),)),
    Spelling("scale_log_length", _log_length, "4 heads, d=8; score 0.792481*s"),
    Spelling("soft_cap", lambda q, k, v: attend(50.0 * torch.tanh(q @ k.mT / 8 / 50.0), v), "4 heads, d=8; score 50*tanh(s/400)", kernel="auto"),
    Spelling("soft_cap_in_place", lambda q, k, v: attend((q @ k.mT).div_(30.0).tanh_() * 30.0, v), "4 heads, d=8; score 30*tanh(s/30)"),
)  # fmt: skip
