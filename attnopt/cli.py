"""The `attnopt` command. Exit status: 0 done, 1 the answer is no (a declined site, a bad entry), 2 misuse."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from attnopt._version import VERSION
from attnopt.aot.cli import register as register_aot
from attnopt.aot.tune import register as register_tune
from attnopt.coverage.cli import register as register_coverage
from attnopt.errors import AttnoptError, CompileError, OptionError
from attnopt.export import register as register_export
from attnopt.options import Options
from attnopt.target import load

_PACKAGES = ("torch", "sympy", "networkx", "numpy", "transformers", "triton", "onnx")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv`, by default the process's arguments, and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except AttnoptError as error:
        print(f"attnopt: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader went away, as `| head` does
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print("attnopt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnopt", description="Finds the attention in a PyTorch model and fuses it.")
    parser.add_argument("--version", action="version", version=f"attnopt {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="optimise real models side by side with eager and print a table")
    demo.add_argument("--only", action="append", default=[], metavar="NAME", help="only this model; may be repeated")
    demo.add_argument("--quick", action="store_true", help="smaller models and shorter sequences, for a first look")
    demo.add_argument("--json", metavar="PATH", help="also write the figures as JSON")
    demo.set_defaults(run=_demo)

    bench = commands.add_parser("bench", help="measure the kernels against what people run today, in one process")
    bench.add_argument("device", choices=("cpu",), help="where to measure")
    bench.add_argument("--only", action="append", default=[], metavar="TEXT", help="rows whose name contains it")
    bench.add_argument("--quick", action="store_true", help="shorter sequences and fewer repeats")
    bench.add_argument("--threads", type=_positive, default=1, help="threads to measure with (1)")
    bench.add_argument("--flex", action="store_true", help="also measure compiled FlexAttention")
    for name, text in (("json", "the figures"), ("markdown", "the table"), ("plot", "a picture")):
        bench.add_argument(f"--{name}", metavar="PATH", help=f"write {text}")
    bench.set_defaults(run=_bench)

    _register_explain(commands)

    info = commands.add_parser("info", help="versions, compiler, processor, cache and options")
    info.set_defaults(run=_info)

    register_export(commands)
    register_coverage(commands)
    register_aot(commands)
    register_tune(commands)

    cache = commands.add_parser("cache", help="look after the compiled kernels")
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, run, text in (
        ("ls", _cache_ls, "list the entries"),
        ("verify", _cache_verify, "check every entry; exit with 1 if one is bad"),
        ("clear", _cache_clear, "remove every entry"),
        ("export", _cache_export, "write every good entry to a .tar.gz"),
    ):
        action = actions.add_parser(name, help=text)
        action.set_defaults(run=run)
    actions.choices["export"].add_argument("path", help="the archive to write")
    return parser


def _register_explain(commands: Any) -> None:
    explain = commands.add_parser("explain", help="report every attention of a model, and why any is declined")
    explain.add_argument("target", help="package.module:factory, which returns (model, args, kwargs), or hf:MODEL_TYPE")
    explain.add_argument("--tokens", type=_positive, default=128, help="sequence length for hf: models (128)")
    explain.add_argument("--layers", type=_positive, default=2, help="layers for hf: models (2)")
    explain.add_argument("--all", action="store_true", help="also list every softmax that is part of no attention")
    explain.add_argument("--strict", action="store_true", help="exit with 1 if any site is declined or none is found")
    explain.add_argument("--json", metavar="PATH", help="also write the report as JSON")
    explain.add_argument("--html", metavar="PATH", help="also write the report as one HTML page")
    explain.set_defaults(run=_explain)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return int(text)


def _bench(arguments: argparse.Namespace) -> int:
    from attnopt.bench.run import bench

    for path in filter(None, (arguments.json, arguments.markdown, arguments.plot)):
        _writable(path)
    names = ("only", "quick", "threads", "flex", "json", "markdown", "plot")
    return bench(**{name: getattr(arguments, name) for name in names})


def _demo(arguments: argparse.Namespace) -> int:
    from attnopt.demo.run import demo

    if arguments.json:
        _writable(arguments.json)
    return demo(arguments.only, arguments.quick, arguments.json)


def _explain(arguments: argparse.Namespace) -> int:
    for path in filter(None, (arguments.json, arguments.html)):
        _writable(path)
    model, args, kwargs = load(arguments.target, arguments.layers, arguments.tokens)
    from attnopt.api import explain

    report = explain(model, args, kwargs)
    print(report.to_text(every=arguments.all))
    if arguments.json:
        Path(arguments.json).write_text(report.to_json() + "\n", encoding="utf-8")
    if arguments.html:
        report.to_html(arguments.html)
    return 1 if arguments.strict and (report.declined or not report.sites) else 0


def _writable(path: str) -> None:
    """Find out before the work, not after it. Raises `OptionError`."""
    folder = Path(path).resolve().parent
    if not folder.is_dir():
        raise OptionError(f"{path!r} cannot be written: the folder {str(folder)!r} does not exist.")


def _info(arguments: argparse.Namespace) -> int:
    for label, value in _facts():
        print(f"{label:<12} {value}")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    import torch

    from attnopt.runtime.compile import find_compiler

    yield "attnopt", VERSION
    yield "python", platform.python_version()
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"
    options = Options.make()
    try:
        yield "compiler", find_compiler(options).identity
    except CompileError as error:
        yield "compiler", f"none: {error}"
    threads = f"{torch.get_num_threads()} threads"
    yield "processor", f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {threads}"
    path = options.cache_path
    yield "cache", f"{path}{'' if path.exists() else ' (not made yet)'}"
    yield "options", ", ".join(f"{name}={getattr(options, name)!r}" for name in Options.__dataclass_fields__)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cache() -> Any:
    from attnopt.runtime.cache import Cache

    return Cache(Options.make().cache_path)


def _cache_ls(arguments: argparse.Namespace) -> int:
    cache = _cache()
    entries = cache.entries()
    for entry in entries:
        made = datetime.fromtimestamp(entry.created).strftime("%Y-%m-%d %H:%M")
        print(f"{entry.key[:16]}  {made}  {entry.size / 1024:8.0f} KiB  {entry.manifest.get('compiler', '')}")
    total = sum(entry.size for entry in entries)
    print(f"{len(entries)} kernels, {total / 2**20:.1f} MiB in {cache.path}")
    return 0


def _cache_verify(arguments: argparse.Namespace) -> int:
    cache = _cache()
    problems = {key: problem for key, problem in cache.verify().items() if problem is not None}
    for key, problem in problems.items():
        print(f"{key[:16]}  {problem}")
    print(f"{len(cache.keys()) - len(problems)} good, {len(problems)} bad in {cache.path}")
    return 1 if problems else 0


def _cache_clear(arguments: argparse.Namespace) -> int:
    cache = _cache()
    print(f"{cache.clear()} kernels removed from {cache.path}")
    return 0


def _cache_export(arguments: argparse.Namespace) -> int:
    _writable(arguments.path)
    print(f"{_cache().export(Path(arguments.path))} kernels written to {arguments.path}")
    return 0
