"""attnopt: the same PyTorch model, its attention recognised by meaning and run by generated kernels.

Importing this package imports neither torch nor a compiler; each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnopt._version import VERSION as __version__

if TYPE_CHECKING:
    from attnopt import onnx, rewrites
    from attnopt.api import explain, optimize
    from attnopt.conversion import standalone
    from attnopt.errors import AttnoptError
    from attnopt.healing import heal
    from attnopt.observed import attention
    from attnopt.options import Options
    from attnopt.pattern import Pattern
    from attnopt.patterns import PATTERNS
    from attnopt.report import Report
    from attnopt.spec import AttentionSpec

__all__ = [
    "PATTERNS",
    "AttentionSpec",
    "AttnoptError",
    "Options",
    "Pattern",
    "Report",
    "__version__",
    "attention",
    "explain",
    "heal",
    "onnx",
    "optimize",
    "rewrites",
    "standalone",
]

_HOMES = {
    "optimize": "attnopt.api",
    "explain": "attnopt.api",
    "attention": "attnopt.observed",
    "heal": "attnopt.healing",
    "standalone": "attnopt.conversion",
    "AttentionSpec": "attnopt.spec",
    "AttnoptError": "attnopt.errors",
    "Options": "attnopt.options",
    "Pattern": "attnopt.pattern",
    "PATTERNS": "attnopt.patterns",
    "Report": "attnopt.report",
}


def __getattr__(name: str) -> Any:
    if name in ("onnx", "rewrites"):
        return import_module(f"attnopt.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'attnopt' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
