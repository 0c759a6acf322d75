"""What the demo shows: progress while it runs, then one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from attnopt.demo.run import Result

# A pipe has no width of its own: wide enough for one model a line.
_PIPE_WIDTH = 140


class Screen:
    """Progress on standard error, the table on standard output."""

    def __init__(self, total: int) -> None:
        width = None if sys.stdout.isatty() else _PIPE_WIDTH
        self.out = Console(width=width)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.task = self.progress.add_task("starting", total=total)

    def __enter__(self) -> Screen:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def step_of(self, title: str) -> Callable[[str], None]:
        """A function that shows which step of this model runs."""
        return lambda step: self.progress.update(self.task, description=f"{title}: {step}")

    def done(self, result: Result) -> None:
        """Count the model, and leave one line of it for readers of a log."""
        self.progress.advance(self.task)
        mark = "[green]ok[/]" if result.good else "[red]FAILED[/]"
        self.progress.console.print(
            f"{mark} {result.title}: {result.fused}/{result.sites} sites fused, "
            f"{_ms(result.eager_seconds)} ms eager, {_ms(result.seconds)} ms ours"
        )

    def table(self, results: Sequence[Result], seconds: float) -> None:
        """The table, then every declined site and broken contract in words."""
        table = Table(title="attnopt demo: errors are against fp64; where two figures stand, eager is above ours")
        table.add_column("model", min_width=15)
        table.add_column("found\nfused\ndeclined", justify="right", no_wrap=True)
        table.add_column("attention", min_width=30, overflow="fold")
        for title in ("max error", "rms error", "ms", "speed", "peak MB"):
            table.add_column(title, justify="right", no_wrap=True)
        for result in results:
            table.add_row(*_cells(result), end_section=True)
        self.out.print(table)
        for result in results:
            for decline in result.declines:
                self.out.print(f"declined in {result.title}: {decline}", style="red", markup=False)
            if not result.within_contract:
                self.out.print(f"outside the contract: {result.title}", style="red", markup=False)
        good = sum(result.good for result in results)
        self.out.print(f"{good} of {len(results)} models good; {seconds:.0f} s in all", markup=False)


def _cells(result: Result) -> list[str]:
    specs = "\n".join(result.specs) or "-"
    kernels = ", ".join(result.kernels)
    return [
        f"[bold]{result.title}[/]\n[dim]{result.note}[/]",
        f"{result.sites}\n{result.fused}\n{result.declined}",
        _plain(specs) + (f"\n[dim]kernel {_plain(kernels)}[/]" if kernels else ""),
        f"{result.eager_error.max:.1e}\n{result.error.max:.1e}",
        f"{result.eager_error.rms:.1e}\n{result.error.rms:.1e}",
        f"{_ms(result.eager_seconds)}\n{_ms(result.seconds)}",
        f"{result.eager_seconds / result.seconds:.2f}x",
        f"{_mb(result.eager_memory)}\n{_mb(result.memory)}",
    ]


def _plain(text: str) -> str:
    """Square brackets of expressions are no markup."""
    return text.replace("[", "\\[")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def _mb(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f}"
