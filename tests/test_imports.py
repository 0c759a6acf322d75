"""What importing attnopt costs and touches, each in a fresh process; and the import contracts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAZY = ("triton", "onnx", "onnxscript", "onnxruntime", "transformers", "rich", "jinja2")
NAMES = (
    "optimize", "explain", "heal", "standalone", "AttentionSpec", "Options", "Report", "AttnoptError", "Pattern", "PATTERNS", "rewrites",
    "onnx", "__version__", "attention",
)  # fmt: skip


def _python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter at the repository's root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _modules_beyond_torch(then: str) -> set[str]:
    """Top-level modules that `then` adds to what `import torch` loads."""
    code = f"import sys, json, torch\nbefore = set(sys.modules)\n{then}\n"
    return set(
        json.loads(_python(code + "print(json.dumps(sorted({m.split('.')[0] for m in set(sys.modules) - before})))"))
    )


def test_import_loads_no_optional_package() -> None:
    assert not _modules_beyond_torch("import attnopt") & set(LAZY)


def test_the_doors_load_no_optional_package() -> None:
    loaded = _modules_beyond_torch("import attnopt; attnopt.optimize, attnopt.explain, attnopt.Options, attnopt.Report")
    assert not loaded & set(LAZY)


def test_the_onnx_door_imports_onnx_only_when_it_is_used() -> None:
    assert not _modules_beyond_torch("import attnopt.onnx; attnopt.onnx.export") & set(LAZY)


@pytest.mark.parametrize(
    "module", ["errors", "options", "expr", "spec", "report", "analysis", "codegen", "codegen.base"]
)
def test_the_mathematics_is_free_of_torch(module: str) -> None:
    loaded = _python(f"import sys, attnopt.{module}; print('torch' in sys.modules, 'triton' in sys.modules)")
    assert loaded.split() == ["False", "False"]


HEAVY = ("networkx", "transformers", "diffusers", "triton", "onnx", "matplotlib", "jinja2", "rich", "typer", "numba")


def test_the_doors_import_nothing_heavy() -> None:
    """What costs long to import is imported by whoever uses it."""
    code = (
        "import torch, torch.export, sys\nbefore = set(sys.modules)\n"
        "import attnopt\nattnopt.optimize, attnopt.AttentionSpec\n"
        f"print(*[name for name in {HEAVY!r} if name in set(sys.modules) - before])"
    )
    assert _python(code).split() == []


def test_every_public_name_is_there() -> None:
    import attnopt

    assert set(attnopt.__all__) == set(NAMES)
    for name in NAMES:
        assert getattr(attnopt, name) is not None
    assert set(NAMES) <= set(dir(attnopt))
    assert attnopt.rewrites.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    import attnopt

    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = attnopt.optimise


def test_version_is_the_one_that_is_packaged() -> None:
    import attnopt
    from attnopt._version import VERSION

    assert attnopt.__version__ == VERSION
    assert 'attr = "attnopt._version.VERSION"' in (ROOT / "pyproject.toml").read_text()


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_torch_finds_the_backend_by_entry_point() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points.torch_dynamo_backends]\nattnopt = "attnopt.dynamo:attnopt_backend"' in text
