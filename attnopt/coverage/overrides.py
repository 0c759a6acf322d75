"""What the general rules do not know: settings of one model type, also where it is part of another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "swin": {"embed_dim": 32, "num_heads": [2, 4, 8, 16], "image_size": 64, "patch_size": 2, "window_size": 4},
    "swinv2": {"embed_dim": 32, "num_heads": [2, 4, 8, 16], "image_size": 64, "patch_size": 2, "window_size": 4},
    "donut-swin": {"embed_dim": 32, "num_heads": [2, 4, 8, 16], "image_size": 64, "patch_size": 2, "window_size": 4},
}
