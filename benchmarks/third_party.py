"""Models of third-party libraries: attentions found, fused and declined with the reason, and the largest error.

    python benchmarks/third_party.py --write docs/third-party.md
    python benchmarks/third_party.py --only timm x-transformers --kernel auto

Rows of packages that are not installed are skipped and named. attnopt needs none of them; `pip install --no-deps` of
those named in the table, and of what their imports ask for, is enough.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import attnopt
from attnopt.demo.measure import tensors

sys.path.insert(0, str(Path(__file__).resolve().parent))

from third_party_parts.models import ROWS, Row, stand_in_for_torchvision_operators

HEAD = """# Models of other libraries

Code that attnopt was not written against, built small with random weights, none left at a constant, in evaluation
mode. *Has* is the number of attentions by reading the model's source; *error* is the largest difference of an output
from the original's in fp32, relative to the output's largest element.
`python benchmarks/third_party.py --write docs/third-party.md` makes this table from what is installed.

Without gradients, `nn.TransformerEncoder` and its layers in evaluation mode may take a fast path of torch's own that
zeroes padded places, and that gives NaN for some three-dimensional masks. attnopt computes what they compute with
gradients, and the errors here are against that. Fused sites ran with `kernel="KERNEL"`.

| package | model | has | fused | declined, and why | error |
|---|---|---|---|---|---|
"""


def version(package: str) -> str | None:
    """The installed version; None if there is none."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def error(ours: Any, theirs: Any) -> float:
    """Largest difference, relative to the output's largest element; infinite where finite elements differ."""
    worst = 0.0
    for x, y in zip(tensors(ours), tensors(theirs), strict=True):
        finite = y.isfinite()
        if x.shape != y.shape or not torch.equal(finite, x.isfinite()):
            return float("inf")
        if finite.any():
            size = y[finite].abs().max().clamp(min=torch.finfo(y.dtype).tiny)
            worst = max(worst, ((x - y)[finite].abs().max() / size).item())
    return worst


@torch.no_grad()
def stir(model: torch.nn.Module) -> None:
    """Take parameters off the constants they start from: a layer scale or a head of zeros would hide every error."""
    for parameter in model.parameters():
        if parameter.numel() and parameter.is_floating_point() and parameter.min() == parameter.max():
            parameter.add_(0.2 * torch.randn_like(parameter))


def measured(row: Row, kernel: str) -> str:
    """One line of the table. Raises what building, optimising or running the model raises."""
    torch.manual_seed(0)
    model, args, kwargs = row.build()
    stir(model.eval())
    fast = attnopt.optimize(model, args, kwargs, options={"kernel": kernel})
    # Without gradients torch's own encoder layers would take another path, which zeroes padded places.
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        difference = error(fast(*args, **kwargs), model(*args, **kwargs))
    declined = [s for s in fast.report.sites if s.status == "declined"]
    reasons = dict.fromkeys(s.reason.partition(" (at %")[0] for s in declined)
    why = f"{len(declined)}: {'; '.join(reasons)}" if declined else ""
    fused = len(fast.report.sites) - len(declined)
    name = f"{row.package} {version(row.package)}"
    return f"| {name} | `{row.model}` | {row.attentions} | {fused} | {why} | {difference:.0e} |"


def main() -> None:
    """Measure the rows and print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="packages, or parts of a model's name")
    parser.add_argument("--kernel", default="auto", help="what runs a fused site, as in attnopt.Options")
    parser.add_argument("--write", type=Path, help="the file that receives the table")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    library = stand_in_for_torchvision_operators()
    lines: list[str] = []
    failed = False
    for row in ROWS:
        if given.only and not any(part in (row.package, row.model) or part in row.model for part in given.only):
            continue
        if version(row.package) is None:
            print(f"skipped: {row.package} is not installed ({row.model})", file=sys.stderr)
            continue
        try:
            lines.append(measured(row, given.kernel))
        except ImportError as missing:
            print(f"skipped: {row.package} cannot be imported ({row.model}): {missing}", file=sys.stderr)
            continue
        except Exception as problem:
            print(f"failed: {row.package} ({row.model}): {type(problem).__name__}: {problem}", file=sys.stderr)
            failed = True
            continue
        print(lines[-1], flush=True)
    del library
    if given.write:
        given.write.write_text(HEAD.replace("KERNEL", given.kernel) + "\n".join(lines) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
