"""`attnopt aot`: machine code for chips that need not be here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attnopt.codegen.triton_kinds import EMIT
from attnopt.codegen.triton_parts import ELEMENTS
from attnopt.codegen.triton_plans import CHIPS
from attnopt.errors import OptionError, SpecError
from attnopt.spec import AttentionSpec


def register(commands: Any) -> None:
    """Add the command to the parser's subcommands."""
    command = commands.add_parser("aot", help="compile Triton kernels ahead of time, without a GPU")
    command.add_argument("--arch", action="append", choices=sorted(CHIPS), required=True, help="may be repeated")
    command.add_argument("--out", metavar="DIR", required=True, help="folder that receives binaries and manifest.json")
    command.add_argument(
        "--spec", action="append", metavar="FILE", help="a spec as JSON; may be repeated (default: the usual ones)"
    )
    command.add_argument("--only", action="append", metavar="NAME", help="only this usual one; may be repeated")
    command.add_argument("--dtype", choices=sorted(ELEMENTS), default="bfloat16", help="of q, k and v (bfloat16)")
    command.add_argument("--kind", action="append", choices=sorted(EMIT), help="may be repeated (forward)")
    command.add_argument("--page", type=int, default=0, metavar="KEYS", help="keys and values in pages of so many")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compile, print a line for each kernel, write the folder. Raises `OptionError` or `CompileError`."""
    if arguments.page < 0:
        raise OptionError(f"--page {arguments.page}: a page holds at least one key; 0 is for keys in one tensor.")
    specs = _specs(arguments)
    from attnopt.aot.build import build
    from attnopt.runtime.triton_binaries import write

    chips = [CHIPS[name] for name in dict.fromkeys(arguments.arch)]
    folder = Path(arguments.out)
    try:
        say, kinds = (lambda x: print(x, flush=True)), arguments.kind or ("forward",)
        count = write(folder, build(specs, chips, arguments.dtype, say, kinds, arguments.page))
    except OSError as error:
        raise OptionError(f"{str(folder)!r} cannot be written: {error.strerror or error}.") from error
    print(f"{count} kernels in {folder}")
    return 0


def _specs(arguments: argparse.Namespace) -> list[tuple[str, AttentionSpec]]:
    from attnopt.aot.standard import standard

    if not arguments.spec:
        usual = dict(standard())
        unknown = sorted(set(arguments.only or ()) - set(usual))
        if unknown:
            raise OptionError(f"no usual spec is called {', '.join(unknown)}; choose from {', '.join(usual)}.")
        return [(name, spec) for name, spec in usual.items() if not arguments.only or name in arguments.only]
    found = []
    for path in map(Path, arguments.spec):
        try:
            found.append((path.stem, AttentionSpec.parse(path.read_text(encoding="utf-8"))))
        except SpecError as error:
            raise SpecError(f"{str(path)!r}: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"the spec {str(path)!r} cannot be read: {error}.") from error
    return found
