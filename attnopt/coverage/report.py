"""docs/coverage.md and benchmarks/results/coverage.json: the figures, then every model, every decline, every miss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from attnopt._version import VERSION
from attnopt.coverage.explained import explain
from attnopt.coverage.kinds import kind
from attnopt.coverage.totals import Totals, generic, outside

Row = Mapping[str, Any]
_NOTES = (
    "Error: rms of (optimised in fp32 − original in fp64) over rms of (original in fp32 − original in fp64), over all",
    "outputs of the model; below one rounding of the output, one rounding. The independent count walks the graph from",
    "every softmax, without the patterns, and asks for a contraction of two computed tensors on both sides.",
)
_PACKAGES = ("torch", "transformers", "diffusers")


def to_markdown(rows: Sequence[Row]) -> str:
    """The report as Markdown."""
    totals = Totals.of(rows)
    main = [r for r in rows if r["variant"] != "inductor"]
    parts = (
        _head(totals, main),
        _models(main, rows),
        _declined(main),
        _missed(main),
        _unknown(main),
        _outside(totals),
        _unbuilt(totals, main),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def to_json(rows: Sequence[Row]) -> str:
    """The figures and one line a row, in a fixed order."""
    totals = Totals.of(rows)
    figures = {
        "versions": _versions(), "architectures": len(totals.architectures), "measured": len(totals.built),
        "rows": totals.rows, "sites": totals.sites, "fused": totals.fused, "missed": totals.missed,
        "unknown_graphs": totals.unknown,
        "declined": dict(totals.declined.most_common()), "declined_unexplained": totals.unexplained,
        "not_attention": totals.others, "largest_error_in_units_of_eager": round(totals.units, 3),
        "largest_error_at": totals.worst,
        "rows_by_kernel": dict(sorted(totals.kernels.items())),
        "largest_error_by_kernel": {k: round(u, 3) for k, (u, _) in sorted(totals.worst_by_kernel.items())},
        "largest_change_in_fp64": totals.fp64, "outside": len(totals.outside),
        "inductor": {
            "models": totals.inductor_models, "sites": totals.inductor_sites, "fused": totals.inductor,
            "fused_by_attnopt": totals.inductor_ours,
        },
    }  # fmt: skip
    lines = ",\n".join(f"  {json.dumps(_brief(row))}" for row in sorted(rows, key=_order))
    return json.dumps(figures, indent=1)[:-2] + ',\n "models": [\n' + lines + "\n ]\n}\n"


def _order(row: Row) -> tuple[str, str]:
    return row["architecture"].lower(), row["variant"]


def _brief(row: Row) -> dict[str, Any]:
    brief: dict[str, Any] = {n: row[n] for n in ("architecture", "variant", "status")}
    if row["status"] == "counted":
        return {**brief, "fused": row["fused"]}
    if row["status"] != "measured":
        return {**brief, "reason": row["reason"]}
    units = row["errors"].get("units")
    brief |= {"sites": len(row["sites"]) + len(row["missed"]), "fused": _fused(row), "missed": len(row["missed"])}
    return {**brief, "units": units and round(units, 3), "fp64": row["errors"].get("fp64")}


def _fused(row: Row) -> int:
    return sum(s["status"] == "fused" for s in row["sites"])


def _versions() -> dict[str, str]:
    found = {"attnopt": VERSION}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _head(totals: Totals, rows: Sequence[Row]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in _versions().items())
    declined = sum(totals.declined.values())
    yield "# Coverage"
    yield ""
    yield "Every architecture of transformers and a choice from diffusers, built small with random weights, captured,"
    yield "optimised and compared. Written by `attnopt coverage --report docs/coverage.md`; not edited by hand."
    yield ""
    yield f"Versions: {versions}."
    yield ""
    yield "| figure | value |"
    yield "|---|---|"
    for name, value in (
        ("architectures", f"{len(totals.architectures)}"),
        ("of these built and measured", f"{len(totals.built)}"),
        ("rows measured, by variant", ", ".join(f"{v} {n}" for v, n in _variants(rows).most_common())),
        ("attention sites", f"{totals.sites}"),
        ("fused", f"{totals.fused} ({_percent(totals.fused, totals.sites)})"),
        ("declined", f"{declined}"),
        ("declined, without an explanation below", f"{totals.unexplained}"),
        ("missed (seen by the independent count, by no pattern)", f"{totals.missed}"),
        ("graphs left as they are that may hold sites", f"{totals.unknown}"),
        ("softmaxes that are no attention", f"{totals.others}"),
        *_errors(totals),
        ("largest relative change of an output in fp64", f"{totals.fp64:.1e}"),
        ("rows outside of that", f"{len(totals.outside)}"),
        ("Inductor's matcher, on the eager models it was run on", _inductor(totals)),
    ):
        yield f"| {name} | {value} |"
    yield ""
    yield from _NOTES
    yield ""
    yield from _table("kind of the fused sites", totals.kinds)
    yield from _table("why declined", totals.declined)


def _errors(totals: Totals) -> Iterator[tuple[str, str]]:
    """One figure for each backend that rows were run with: a reference that is close says nothing of kernels."""
    names = {"auto": "the kernels that run here by default", "reference": "the eager reference", "cpp": "C++ kernels"}
    for kernel, (units, where) in sorted(totals.worst_by_kernel.items()):
        title = f"largest error in units of eager's, {names.get(kernel, kernel)} ({totals.kernels[kernel]} rows)"
        yield title, f"{units:.2f} ({where})"


def _variants(rows: Sequence[Row]) -> Counter[str]:
    return Counter(row["variant"] for row in rows if row["status"] == "measured")


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "none"


def _inductor(totals: Totals) -> str:
    if not totals.inductor_models:
        return "not run"
    where = f"{totals.inductor_sites} sites in {totals.inductor_models} models"
    return f"{totals.inductor} of {where}; attnopt {totals.inductor_ours}"


def _table(title: str, counts: Counter[str]) -> Iterator[str]:
    if not counts:
        return
    yield f"| {title} | sites |"
    yield "|---|---|"
    for name, count in counts.most_common():
        yield f"| {_cell(name)} | {count} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _models(rows: Sequence[Row], every: Sequence[Row]) -> Iterator[str]:
    inductor = {r["architecture"]: r["fused"] for r in every if r["variant"] == "inductor" and r["status"] == "counted"}
    yield "## Models"
    yield ""
    yield "| architecture | variant | sites | fused | error | kinds |"
    yield "|---|---|---|---|---|---|"
    for row in sorted(rows, key=_order):
        if row["status"] != "measured":
            continue
        kinds = Counter(kind(s, row["variant"]) for s in row["sites"] if s["status"] == "fused")
        text = "; ".join(f"{n} × {k}" for k, n in kinds.most_common()) or "no attention"
        beside = inductor.get(row["architecture"]) if row["variant"] == "eager" else None
        text += f" (Inductor {beside})" if isinstance(beside, int) else ""
        units = row["errors"].get("units")
        sites = len(row["sites"]) + len(row["missed"])
        error = "-" if units is None else f"{units:.2f}"
        yield f"| {row['architecture']} | {row['variant']} | {sites} | {_fused(row)} | {error} | {_cell(text)} |"
    yield ""


def _declined(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Declined"
    yield ""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        for site in row.get("sites", ()):
            if site["status"] != "fused":
                found = explain(row, site)
                text = "" if found is None else found.text
                groups.setdefault((generic(site["reason"]), site["source"], text), []).append({**row, **site})
    if not groups:
        yield "Nothing."
    for (reason, source, text), sites in sorted(groups.items(), key=lambda g: (g[0][2] != "", -len(g[1]))):
        where = Counter(f"{s['architecture']} ({s['variant']})" for s in sites)
        yield f"- **{_cell(reason)}**: {len(sites)} sites at `{source}`, such as `{sites[0]['module']}`."
        yield f"  {text or 'Open: no explanation yet.'}"
        yield f"  In {', '.join(f'{name} × {count}' for name, count in where.items())}."
    yield ""


def _missed(rows: Sequence[Row]) -> Iterator[str]:
    missed = [(row, site) for row in rows for site in row.get("missed", ())]
    if missed:
        yield "## Missed"
        yield ""
        for row, site in missed:
            yield f"- {row['architecture']} ({row['variant']}), `{site['module']}`, `{site['source']}`"
        yield ""


def _unknown(rows: Sequence[Row]) -> Iterator[str]:
    graphs = [(row, graph) for row in rows for graph in row.get("unknown", ())]
    if graphs:
        yield "## Graphs left as they are"
        yield ""
        yield "They could not be traced further. What makes weights in them is not in the counts above."
        yield ""
        for row, graph in graphs:
            count = graph["normalizers"]
            seen = f"{count} calls that may make weights" if count else "no call that makes weights"
            yield f"- {row['architecture']} ({row['variant']}), {seen}: {_cell(graph['why'])}"
        yield ""


def _outside(totals: Totals) -> Iterator[str]:
    if totals.outside:
        yield "## Outputs outside the bounds"
        yield ""
        for row in totals.outside:
            yield f"- {row['architecture']} ({row['variant']}): {outside(row)}"
        yield ""


def _unbuilt(totals: Totals, rows: Sequence[Row]) -> Iterator[str]:
    yield "## Not measured"
    yield ""
    yield "| architecture | why |"
    yield "|---|---|"
    for name, reason in sorted(totals.unbuilt.items(), key=lambda item: item[0].lower()):
        yield f"| {name} | {_cell(reason)} |"
    lost = [r for r in rows if r["status"] in ("crashed", "not captured") and r["architecture"] in totals.built]
    for row in sorted(lost, key=_order):
        yield f"| {row['architecture']} ({row['variant']}) | {_cell(row['reason'])} |"
    yield ""
