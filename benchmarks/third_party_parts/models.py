"""Models of libraries that attnopt was not written against, built small with random weights.

A row names the distribution, the class, how many attentions its source has by reading it, and how it is built. Only
the row's own package is imported, when it is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One model: `attentions` that its source has, those included that no kernel could fuse."""

    package: str
    model: str
    attentions: int
    build: Callable[[], Built]


def stand_in_for_torchvision_operators() -> torch.library.Library | None:
    """Operators of torchvision by name: compiled, they fit one build of torch; the import asks, no model here does."""
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _image(size: int, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, 3, size, size),)


# --- vit-pytorch ------------------------------------------------------------------------------------

_VIT = {
    "image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64,
    "dim_head": 8,
}  # fmt: skip
_REGION = {"dim": (32, 32, 32, 32), "depth": (1, 1, 1, 1), "num_classes": 10}
_LEVIT = {
    "image_size": 64, "num_classes": 10, "stages": 2, "dim": (32, 48), "depth": 2, "heads": (2, 4), "mlp_mult": 2,
    "dim_key": 8, "dim_value": 16,
}  # fmt: skip


def _vit(module: str, name: str, attentions: int, size: int = 32, without: str = "", **more: Any) -> Row:
    def build() -> Built:
        kind = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)
        return kind(**{k: v for k, v in {**_VIT, **more}.items() if k not in without.split()}), _image(size), {}

    return Row("vit-pytorch", f"{module}.{name}", attentions, build)


def _own(module: str, name: str, attentions: int, size: int, **settings: Any) -> Row:
    def build() -> Built:
        kind = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)
        return kind(**settings), _image(size, 1), {}

    return Row("vit-pytorch", f"{module}.{name}", attentions, build)


# --- timm -------------------------------------------------------------------------------------------

_TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 4}


def _timm(name: str, attentions: int, size: int = 64, small: bool = False, **settings: Any) -> Row:
    def build() -> Built:
        import timm

        given = {"num_classes": 7, **({**_TIMM, "img_size": size} if small else {}), **settings}
        return timm.create_model(name, pretrained=False, **given), _image(size, 1), {}

    return Row("timm", name, attentions, build)


# --- x-transformers ---------------------------------------------------------------------------------


def _x(title: str, causal: bool = True, mask: bool = False, **settings: Any) -> Row:
    def build() -> Built:
        from x_transformers import Decoder, Encoder, TransformerWrapper

        kind = Decoder if causal else Encoder
        layers = kind(dim=32, depth=2, heads=4, attn_dim_head=16, **settings)
        model = TransformerWrapper(num_tokens=64, max_seq_len=32, attn_layers=layers)
        keep = torch.arange(12) < torch.tensor([[12], [8]])
        return model, (torch.randint(0, 64, (2, 12)),), {"mask": keep} if mask else {}

    return Row("x-transformers", title, 2, build)


# --- torch and torchvision --------------------------------------------------------------------------


def _transformer(title: str, **masks: Callable[[], Any]) -> Row:
    def build() -> Built:
        model = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        return model, (torch.randn(2, 7, 32), torch.randn(2, 5, 32)), {name: make() for name, make in masks.items()}

    return Row("torch", f"nn.Transformer, {title}", 6, build)


def _causal(n: int) -> Callable[[], Tensor]:
    return lambda: nn.Transformer.generate_square_subsequent_mask(n)


def _padding(*lengths: int) -> Callable[[], Tensor]:
    return lambda: torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


def _swin() -> Built:
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5)
    return model, (torch.randn(1, 3, 56, 64),), {}


def _swin3d() -> Built:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return (
        SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [4, 3, 3], num_classes=5),
        (torch.randn(1, 3, 8, 24, 24),),
        {},
    )


def _sam() -> Built:
    from segment_anything.modeling import ImageEncoderViT

    more = {"use_rel_pos": True, "window_size": 3, "global_attn_indexes": (1,)}
    return ImageEncoderViT(64, 8, 3, 32, 2, 4, out_chans=16, **more), _image(64, 1), {}


def _two_ways() -> Built:
    from segment_anything.modeling import TwoWayTransformer

    grid = torch.randn(2, 32, 4, 4)
    return TwoWayTransformer(2, 32, 4, 64), (grid, grid.flip(0), torch.randn(2, 5, 32)), {}


ROWS = (
    _transformer("no mask"),
    _transformer("causal target", tgt_mask=_causal(5)),
    _transformer("padding", src_key_padding_mask=_padding(7, 4), memory_key_padding_mask=_padding(7, 4)),
    _transformer("all masks", src_mask=_causal(7), tgt_mask=_causal(5), memory_mask=lambda: torch.randn(5, 7),
                 src_key_padding_mask=_padding(7, 4), tgt_key_padding_mask=_padding(5, 3)),
    Row("torchvision", "SwinTransformer", 4, _swin),
    Row("torchvision", "SwinTransformer3d", 4, _swin3d),
    Row("segment-anything", "ImageEncoderViT", 2, _sam),
    Row("segment-anything", "TwoWayTransformer", 7, _two_ways),
    _vit("vit", "ViT", 2),
    _vit("cait", "CaiT", 3, cls_depth=1),
    _vit("deepvit", "DeepViT", 2),
    _vit("rvt", "RvT", 2),
    _vit("vit_5", "ViT", 2, dim_head=16),
    _vit("vit_nd_rotary", "ViTND", 2, without="image_size", ndim=2, input_shape=(32, 32), dim_head=16, causal_dims=0),
    _vit("t2t", "T2TViT", 3, without="patch_size", t2t_layers=((7, 4), (3, 2))),
    _own("levit", "LeViT", 5, 64, **_LEVIT),
    _own("regionvit", "RegionViT", 8, 224, **_REGION),
    _timm("vit_tiny_patch16_224", 2, small=True),
    _timm("vit_relpos_small_patch16_224", 2, small=True),
    _timm("beit_base_patch16_224", 2, small=True),
    _timm("eva02_tiny_patch14_224", 2, 56, small=True),
    _timm("cait_xxs24_224", 4, small=True),
    _timm("xcit_nano_12_p16_224", 4, small=True),
    _timm("swinv2_tiny_window8_256", 4, img_size=64, window_size=4, depths=(2, 2), num_heads=(2, 4), embed_dim=16),
    _timm("tnt_s_legacy_patch16_224", 2, 224, depth=1),
    _timm("coatnet_pico_rw_224", 7, img_size=64),
    _timm("pvt_v2_b0", 8),
    _x("decoder, mask", mask=True),
    _x("flash, mask", attn_flash=True, mask=True),
    _x("ALiBi", alibi_pos_bias=True),
    _x("T5 bias", rel_pos_bias=True, causal=False, mask=True),
    _x("memory keys, mask", attn_num_mem_kv=4, mask=True),
    _x("one key head", attn_one_kv_head=True),
    _x("soft cap", attn_softclamp_logits=True),
    _x("sigmoid", attn_sigmoid=True, mask=True),
    _x("signed", attn_cog_signed=True),
    _x("LASER", attn_laser=True),
    _x("learned sink", attn_head_learned_sink=True),
    _x("forgetting", attn_data_dependent_alibi=True),
    _x("talking heads", attn_pre_talking_heads=True, attn_post_talking_heads=True),
    _x("top-k", attn_sparse_topk=3),
    _x("CoPE", attn_use_cope=True),
    _x("selective", attn_selective=True),
)  # fmt: skip
