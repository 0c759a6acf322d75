"""`Report`: what was found, fused, rewritten and declined, and the figures that were measured.

Printing it is the user interface. It is plain data: no tensor, graph or node is kept alive by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnopt import report_text
from attnopt.analysis.forms import form
from attnopt.errors import AttnoptError
from attnopt.formula import formula, mask_in_words
from attnopt.report_text import show_figure
from attnopt.spec import AttentionSpec

__all__ = ["Bystander", "Figures", "Report", "Site", "show_figure"]

VERSION = 2
STATUSES = ("fused", "rewritten", "declined")
_TEMPLATE = Path(__file__).with_name("report.html.j2")

Value = Any
"""A figure: a number, a string, a truth value, None, or `Figures` of such."""


class Figures(Mapping[str, Value]):
    """A frozen, hashable mapping of names to figures; nested mappings are frozen with it."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Value] | Iterable[tuple[str, Value]] = ()) -> None:
        self._items = tuple((str(name), _frozen(value)) for name, value in dict(items).items())

    def __getitem__(self, name: str) -> Value:
        for known, value in self._items:
            if known == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __repr__(self) -> str:
        return f"Figures({dict(self._items)!r})"


def _frozen(value: Value) -> Value:
    if isinstance(value, Mapping):
        return value if isinstance(value, Figures) else Figures(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise AttnoptError(f"a figure is a number, text or a mapping of these, not {type(value).__name__}.") from None


@dataclass(frozen=True)
class Site:
    """One attention: a normaliser between two contractions, and what became of it.

    Attributes:
        name: the node that anchors the site, unique in the model.
        module_path: path of the module that computes it, such as `h.0.attn`.
        source: the user's `file:line`, or empty.
        pattern: the pattern that found it, or the one that came nearest.
        spec: what it computes; None where that could not be proven.
        status: `fused`, `rewritten` (an approximate rewrite was applied) or `declined`.
        rewrites: names of the rewrites applied, in order.
        kernel: what runs it, such as `cpp`, `sdpa` or `reference`; empty if declined.
        reason: why it was declined, with the node at which the reasoning stopped.
        error: figures of validation against fp64 (`max`, `rms`, `eager_max`, `eager_rms`), or None.
        node: of a declined site the node at which the reasoning stopped: name, operator, shape and `file:line`.
        hint: of a declined site the smallest change that would lift the reason.
    """

    name: str
    module_path: str = ""
    source: str = ""
    pattern: str = ""
    spec: AttentionSpec | None = None
    status: str = "fused"
    rewrites: tuple[str, ...] = ()
    kernel: str = ""
    reason: str = ""
    error: Figures | None = None
    node: str = ""
    hint: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise AttnoptError(f"a site's status must be one of {', '.join(STATUSES)}, not {self.status!r}.")
        object.__setattr__(self, "rewrites", tuple(self.rewrites))
        object.__setattr__(self, "reason", str(self.reason or ""))
        object.__setattr__(self, "error", None if self.error is None else Figures(self.error))

    @property
    def formula(self) -> str:
        """What the site computes, as mathematics; empty if that could not be proven."""
        return "" if self.spec is None else formula(self.spec)

    @property
    def form(self) -> str:
        """What kind of attention it is, such as `softmax`, `sigmoid`, `linear` or `differential`; empty if unknown."""
        return self.pattern if self.pattern == "agent" else "" if self.spec is None else form(self.spec)

    @property
    def mask(self) -> str:
        """What its mask is, in words; empty if that could not be proven."""
        return "" if self.spec is None else mask_in_words(self.spec)


@dataclass(frozen=True)
class Bystander:
    """A softmax that is part of no attention, with where its result goes."""

    name: str
    module_path: str = ""
    source: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What became of every attention site of one model.

    Attributes:
        sites: one entry a site, in graph order.
        model: the model's class name.
        notes: one sentence each: fallbacks, warnings, capture path.
        figures: named groups of figures, such as `validation` or a rewrite's before and after.
        others: softmaxes that are part of no attention, such as routers and classifiers; `explain` fills it.
    """

    sites: tuple[Site, ...] = ()
    model: str = ""
    notes: tuple[str, ...] = ()
    figures: Figures = field(default_factory=Figures)
    others: tuple[Bystander, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        object.__setattr__(self, "others", tuple(self.others))
        object.__setattr__(self, "notes", tuple(map(str, self.notes)))
        object.__setattr__(self, "figures", Figures(self.figures))

    @property
    def fused(self) -> int:
        """Sites that run a fused kernel with unchanged mathematics."""
        return self._count("fused")

    @property
    def rewritten(self) -> int:
        """Sites that run a fused kernel after an approximate rewrite."""
        return self._count("rewritten")

    @property
    def declined(self) -> int:
        """Sites that were left as they are."""
        return self._count("declined")

    def _count(self, status: str) -> int:
        return sum(site.status == status for site in self.sites)

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """The distinct specs, in order of first appearance."""
        return tuple({site.spec.key: site.spec for site in self.sites if site.spec is not None}.values())

    def groups(self) -> tuple[tuple[Site, ...], ...]:
        """Sites that were recognised, gathered by status, spec, pattern, rewrites and kernel."""
        found: dict[tuple[Any, ...], list[Site]] = {}
        for site in self.sites:
            if site.status != "declined":
                key = (site.status, site.spec and site.spec.key, site.pattern, site.rewrites, site.kernel)
                found.setdefault(key, []).append(site)
        return tuple(tuple(sites) for sites in found.values())

    def declines(self) -> tuple[tuple[Site, ...], ...]:
        """Declined sites, gathered by reason and place in the source."""
        found: dict[tuple[Any, ...], list[Site]] = {}
        for site in self.sites:
            if site.status == "declined":
                found.setdefault(report_text.same_decline(site), []).append(site)
        return tuple(tuple(sites) for sites in found.values())

    @property
    def summary(self) -> str:
        """The counts in one line."""
        total = f"{len(self.sites)} site{'' if len(self.sites) == 1 else 's'}"
        return f"{total}: {self.fused} fused, {self.rewritten} rewritten, {self.declined} declined"

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, every: bool = False) -> str:
        """The report as people read it; with `every`, also the softmaxes that are part of no attention, one by one."""
        return report_text.text(self, every)

    def to_json(self) -> str:
        """The report as JSON in a fixed order of fields: the same text in every process."""
        return json.dumps(_to_dict(self), indent=2, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that `to_json` wrote. Raises `AttnoptError` for anything else."""
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise AttnoptError(f"report text is of version {data['version']!r}; this attnopt reads {VERSION}.")
            sites = tuple(_site_from(site) for site in data["sites"])
            others = tuple(Bystander(**{name: str(x[name]) for name in _OTHER}) for x in data["others"])
            return Report(sites, data["model"], tuple(data["notes"]), Figures(_from_plain(data["figures"])), others)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AttnoptError(f"report text is malformed: {type(error).__name__}: {error}.") from None

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one self-contained HTML page and return its path."""
        import jinja2

        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        environment.filters |= {"figure": show_figure, "spans": report_text.spans}
        page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        target = Path(path)
        target.write_text(page.render(report=self), encoding="utf-8")
        return target


# --- JSON ------------------------------------------------------------------------------------------


_OTHER = tuple(Bystander.__dataclass_fields__)


def _to_dict(report: Report) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": report.model,
        "counts": {"sites": len(report.sites), **{status: report._count(status) for status in STATUSES}},
        "sites": [_site_dict(site) for site in report.sites],
        "notes": list(report.notes),
        "figures": _plain(report.figures),
        "others": [{name: getattr(other, name) for name in _OTHER} for other in report.others],
    }


def _site_dict(site: Site) -> dict[str, Any]:
    data = {name: _plain(getattr(site, name)) for name in Site.__dataclass_fields__ if name != "spec"}
    spec = site.spec
    data["spec"] = spec and {
        "key": spec.key, "readable": str(spec), "formula": site.formula, "mask": site.mask,
        "definition": json.loads(spec.text),
    }  # fmt: skip
    return data


def _site_from(data: dict[str, Any]) -> Site:
    values = {name: _from_plain(data[name]) for name in Site.__dataclass_fields__ if name != "spec"}
    spec = data["spec"]
    return Site(**values, spec=None if spec is None else AttentionSpec.parse(json.dumps(spec["definition"])))


def _plain(value: Value) -> Any:
    """JSON has no infinities and no NaN: they become one-key objects."""
    if isinstance(value, Mapping):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"not finite": str(value)}
    return value


def _from_plain(value: Any) -> Value:
    if isinstance(value, dict):
        if set(value) == {"not finite"}:
            return float(value["not finite"])
        return {name: _from_plain(v) for name, v in value.items()}
    return tuple(map(_from_plain, value)) if isinstance(value, list) else value
