"""A report as text: what was recognised grouped by spec, then what was not, each with what would lift it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attnopt.formula import formula, mask_in_words

if TYPE_CHECKING:
    from attnopt.report import Report, Site

# The node that ends a reason: equal layers differ in it alone.
_NODE = re.compile(r" \(at %\w+\)$")


def show_figure(value: Any) -> str:
    """A figure as a person reads it: three significant digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, tuple):
        return ", ".join(map(show_figure, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {show_figure(v)}" for name, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def text(report: Report, every: bool = False) -> str:
    """The report; with `every`, also each softmax that is part of no attention."""
    return "\n".join(_lines(report, every))


def _lines(report: Report, every: bool) -> Iterator[str]:
    yield f"attnopt report{f' for {report.model}' if report.model else ''}"
    yield report.summary
    for sites in report.groups():
        yield from ("", *_group_lines(sites))
    declines = report.declines()
    if declines:
        yield from ("", "declined")
    for sites in declines:
        yield from _decline_lines(sites)
    if report.others:
        yield from ("", *_other_lines(report, every))
    for name, figures in report.figures.items():
        yield from ("", name)
        rows = figures.items() if isinstance(figures, Mapping) else [("", figures)]
        yield from (f"  {label + ': ' if label else ''}{show_figure(value)}" for label, value in rows)
    if report.notes:
        yield from ("", "notes", *_note_lines(report.notes))


def _note_lines(notes: Iterable[str]) -> Iterator[str]:
    """Notes that differ in their numbers only are told once."""
    alike: dict[str, list[str]] = {}
    for note in notes:
        alike.setdefault(re.sub(r"\d+", "#", re.sub(r"(%\w+?)_\d+\b", r"\1", note)), []).append(note)
    for first, *more in alike.values():
        yield f"  {first}{f' (and {len(more)} more like this)' if more else ''}"


def _group_lines(sites: tuple[Site, ...]) -> Iterator[str]:
    first = sites[0]
    yield f"{len(sites)} × {first.spec if first.spec is not None else 'unknown spec'}"
    if first.spec is not None:
        yield f"  {formula(first.spec)}"
        yield f"  mask: {mask_in_words(first.spec)}"
    kind = first.form if first.form not in ("", "softmax") else ""
    found = first.pattern and f"found by {first.pattern}"
    how = [first.status, kind and f"{kind} attention", found, first.kernel and f"kernel {first.kernel}"]
    if first.rewrites:
        how.append(f"rewrites {', '.join(first.rewrites)}")
    yield f"  {'; '.join(filter(None, how))}"
    yield from _places(sites)
    errors = [site.error for site in sites if site.error is not None]
    if errors:
        worst = max(errors, key=lambda e: _order(e.get("max")))
        yield f"  worst error: {show_figure(worst)}"


def _places(sites: Iterable[Site]) -> Iterator[str]:
    """One line for each place in the user's source, with the modules that run it."""
    lines: dict[str, list[str]] = {}
    for site in sites:
        lines.setdefault(site.source, []).append(site.module_path or site.name)
    for source, names in lines.items():
        yield f"  {spans(names)}{f' ({source})' if source else ''}"


def _decline_lines(sites: tuple[Site, ...]) -> Iterator[str]:
    first = sites[0]
    yield f"  {spans([s.module_path or s.name for s in sites])}: {first.reason or 'no reason was recorded'}"
    if first.source or first.pattern:
        yield f"    {'; '.join(filter(None, (first.source, first.pattern and f'nearest pattern {first.pattern}')))}"
    if first.node:
        yield f"    stopped at {first.node}"
    if first.hint:
        yield f"    to lift it: {first.hint}"
    if first.spec is not None:
        yield f"    {first.spec}"


def same_decline(site: Site) -> tuple[Any, ...]:
    """What equal declines share: all but the module and the node's name."""
    spec = site.spec and site.spec.key
    return (_NODE.sub("", site.reason), site.source, site.pattern, spec, site.rewrites)


def _other_lines(report: Report, every: bool) -> Iterator[str]:
    count = len(report.others)
    plural = "es are" if count > 1 else " is"
    yield f"{count} softmax{plural} no attention{'' if every else ' (attnopt explain --all lists them)'}"
    for other in report.others if every else ():
        yield f"  {other.module_path or other.name}: {other.reason}{f' ({other.source})' if other.source else ''}"


def _order(value: Any) -> float:
    """NaN is the worst error there is."""
    return math.inf if not isinstance(value, (int, float)) or math.isnan(value) else float(value)


def spans(names: list[str]) -> str:
    """Names with runs of numbers folded: `h.{0-11}.attn`. What cannot be folded is listed."""
    names = list(dict.fromkeys(names))
    if len(names) <= 3:
        return ", ".join(names)
    folded: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        folded.setdefault(tuple(re.split(r"\d+", name)), []).append(name)
    return ", ".join(_fold(around, group) for around, group in folded.items())


def _fold(around: tuple[str, ...], names: list[str]) -> str:
    """Names that differ in their numbers only."""
    numbers = [tuple(map(int, re.findall(r"\d+", name))) for name in names]
    columns = [list(dict.fromkeys(column)) for column in zip(*numbers, strict=True)]
    if len(names) == 1 or len(names) != math.prod(map(len, columns)):
        return ", ".join(names)
    out = around[0]
    for column, after in zip(columns, around[1:], strict=True):
        out += _numbers(column) + after
    return out


def _numbers(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"
