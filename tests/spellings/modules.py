"""PyTorch's own attention modules and functions, in the forms that their options give them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.spellings.row import Spelling, ramp

ROOT = "2 heads, d=8; score 0.353553*s"
X, Y = (2, 7, 16), (2, 9, 16)
PADDED = torch.tensor([[0] * 7, [0] * 4 + [1] * 3], dtype=torch.bool)
CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)


class Heads(nn.Module):
    """`nn.MultiheadAttention` of 2 heads of width 8, called with fixed options."""

    def __init__(self, options: dict[str, Any], call: dict[str, Any], cross: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.attention = nn.MultiheadAttention(16, 2, **{"batch_first": True, **options})
        self.call, self.cross = call, cross

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        """Self-attention of `x`, or attention to the next input; further inputs by the name that `call` gives them."""
        names = [name for name, given in self.call.items() if given is ...]
        fixed = {name: given for name, given in self.call.items() if given is not ...}
        keys = others[0] if self.cross else x
        values = others[1] if self.cross and len(others) - len(names) > 1 else keys
        named = dict(zip(names, others[len(others) - len(names) :], strict=True))
        out, weights = self.attention(x, keys, values, **fixed, **named)
        return out if weights is None else (out, weights)


def _layer(kind: type, **options: Any) -> nn.Module:
    torch.manual_seed(4)
    return kind(16, 2, 32, batch_first=True, **{"dropout": 0.1, **options}).eval()


class Causal(nn.Module):
    """An encoder layer under a causal mask."""

    def __init__(self, hint: bool) -> None:
        super().__init__()
        self.layer, self.hint = _layer(nn.TransformerEncoderLayer), hint

    def forward(self, x: Tensor) -> Tensor:
        """`x [B, N, 16]` to the same."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.layer(x, src_mask=mask, is_causal=self.hint)


class Padded(nn.Module):
    """An encoder layer with padded keys, or a decoder layer with a causal mask and padded memory."""

    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.layer = _layer(nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """`x [B, N, 16]` (and a memory) and the padding, True where there is none to attend to."""
        if len(others) == 1:
            return self.layer(x, src_key_padding_mask=others[0])
        return self.layer(x, others[0], tgt_mask=CAUSAL, memory_key_padding_mask=others[1], tgt_is_causal=True)


class Stacks(nn.Module):
    """`nn.Transformer` with masks, which it compares with the causal one to give a hint."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.model = nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True).eval()

    def forward(self, x: Tensor, y: Tensor, pad: Tensor, bias: Tensor) -> Tensor:
        """`x, y [B, N, 16]`, padding of x `[B, N]`, and what is added to the scores of y with itself `[N, N]`."""
        keep = {"src_key_padding_mask": pad, "memory_key_padding_mask": pad}
        return self.model(x, y, src_mask=CAUSAL, tgt_mask=bias, **keep)


def _functional(x: Tensor, w: Tensor, b: Tensor, o: Tensor) -> Tensor:
    """`F.multi_head_attention_forward` on time, batch, channels."""
    x = x.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        x, x, x, 16, 2, w, b, None, None, False, 0.0, o, None, training=False, need_weights=False
    )
    return out


KEEP = "; keep not mask[b, k] (empty row: zero)"
ROWS = (
    Spelling("mha", Heads({}, {"need_weights": False}), ROOT, (X,), kernel="auto"),
    Spelling("mha_time_first", Heads({"batch_first": False}, {"need_weights": False}), ROOT, (X,)),
    Spelling("mha_without_bias", Heads({"bias": False}, {"need_weights": False}), ROOT, (X,)),
    Spelling("mha_unbatched", Heads({}, {"need_weights": False}), ROOT, ((7, 16),)),
    Spelling("mha_weights", Heads({}, {"need_weights": True}), ROOT, (X,)),
    Spelling("mha_weights_by_head", Heads({}, {"average_attn_weights": False}), ROOT, (X,)),
    Spelling("mha_cross", Heads({}, {"need_weights": False}, True), ROOT, (X, Y)),
    Spelling("mha_other_widths", Heads({"kdim": 12, "vdim": 10}, {"need_weights": False}, True), ROOT, (X, (2, 9, 12), (2, 9, 10))),
    Spelling("mha_boolean_mask", Heads({}, {"need_weights": False, "attn_mask": CAUSAL}), f"{ROOT}; keep k <= q (empty row: zero)", (X,)),
    Spelling("mha_float_mask", Heads({}, {"need_weights": False, "attn_mask": ...}), f"{ROOT} + bias[q, k]", (X,), extra=(ramp(7, 7),)),
    Spelling("mha_mask_by_head", Heads({}, {"need_weights": False, "attn_mask": ...}), f"{ROOT} + bias[b, h, q, k]", (X,), extra=(ramp(4, 7, 7),)),
    Spelling("mha_causal_hint", Heads({}, {"need_weights": False, "attn_mask": CAUSAL, "is_causal": True}), f"{ROOT}; keep k <= q (empty row: zero)", (X,)),
    Spelling("mha_key_padding", Heads({}, {"need_weights": False, "key_padding_mask": ...}), ROOT + KEEP, (X,), extra=(PADDED,), kernel="auto"),
    Spelling("mha_key_padding_float", Heads({}, {"need_weights": False, "key_padding_mask": ...}), f"{ROOT} + bias[b, k]", (X,), extra=(torch.zeros(2, 7).masked_fill(PADDED, -5.0),)),
    Spelling("mha_both_masks", Heads({}, {"need_weights": False, "attn_mask": CAUSAL, "key_padding_mask": ...}), f"{ROOT}; keep k <= q and not mask[b, k] (empty row: zero)", (X,), extra=(PADDED,)),
    Spelling("mha_both_masks_weights", Heads({}, {"need_weights": True, "attn_mask": CAUSAL, "key_padding_mask": ...}), f"{ROOT}; keep k <= q and not mask[b, k] (empty row: nan)", (X,), extra=(PADDED,)),
    Spelling("mha_added_bias", Heads({"add_bias_kv": True}, {"need_weights": False}), ROOT, (X,)),
    Spelling("mha_added_zero", Heads({"add_zero_attn": True}, {"need_weights": False}), ROOT, (X,)),
    Spelling("mha_dropout_off", Heads({"dropout": 0.5}, {"need_weights": False}).eval(), ROOT, (X,)),
    Spelling("mha_training", Heads({}, {"need_weights": False}), ROOT, (X,), training=True),
    Spelling("mha_forward", _functional, ROOT, (X,), extra=(ramp(48, 16), ramp(48), ramp(16, 16))),
    Spelling("encoder_layer", _layer(nn.TransformerEncoderLayer), ROOT, (X,), kernel="auto"),
    Spelling("encoder_layer_norm_first", _layer(nn.TransformerEncoderLayer, norm_first=True), ROOT, (X,)),
    Spelling("encoder_layer_training", _layer(nn.TransformerEncoderLayer, dropout=0.0), ROOT, (X,), training=True),
    Spelling("encoder_layer_mask", Causal(False), f"{ROOT}; keep k <= q (empty row: zero)", (X,)),
    Spelling("encoder_layer_causal", Causal(True), f"{ROOT}; keep k <= q (empty row: zero)", (X,)),
    Spelling("encoder_layer_padding", Padded(False), ROOT + KEEP, (X,), extra=(PADDED,)),
    Spelling("decoder_layer_masks", Padded(True), (f"{ROOT}; keep k <= q (empty row: zero)", ROOT + KEEP), (X, X), extra=(PADDED,)),
    Spelling("decoder_layer", _layer(nn.TransformerDecoderLayer), (ROOT, ROOT), (X, Y)),
    Spelling("transformer_masks", Stacks(), (f"{ROOT}; keep k <= q and not mask[b, k] (empty row: zero)", f"{ROOT} + bias[q, k]", ROOT + KEEP), (X, X), extra=(PADDED, ramp(7, 7))),
    Spelling("encoder", nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2, enable_nested_tensor=False).eval(), (ROOT, ROOT), (X,)),
)  # fmt: skip
