"""One row: an architecture in one variant, optimised, with its sites, what the witness counted, and its errors.

Outputs are compared three ways, as a kernel is: G, the original model in fp64; E, the original in fp32; K, the
optimised one in fp32. Beside that both graphs are run in fp64, where only a wrong rewrite makes a difference.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnopt.capture import share
from attnopt.coverage.graphs import Pair, treat
from attnopt.coverage.inductor import fusions
from attnopt.coverage.variants import NotApplicable, variant
from attnopt.demo.measure import Tensors, golden, tensors
from attnopt.errors import AttnoptError
from attnopt.options import Options

_EPS = torch.finfo(torch.float32).eps
Row = dict[str, Any]


def measure(model_type: str, name: str, options: Options, level: int | None = None) -> Row:
    """The row as plain data. What cannot be built or captured is a row with that reason.

    The variant `inductor` counts what Inductor's own matcher fuses in the eager model.
    """
    start = time.perf_counter()
    row: Row = {"architecture": model_type, "variant": name, "kernel": options.kernel}
    try:
        model, inputs, built = variant(model_type, "eager" if name == "inductor" else name, level)
    except NotApplicable as error:
        return {**row, "status": "not applicable", "reason": str(error)}
    except AttnoptError as error:
        return {**row, "status": "not built", "reason": str(error)}
    row |= {"model": type(built.model).__name__, "level": built.level, "built_s": time.perf_counter() - start}
    if name == "inductor":
        return {**row, "status": "counted", "fused": fusions(share(model), inputs), "s": time.perf_counter() - start}
    return {**row, **_measured(model, inputs, options), "s": time.perf_counter() - start}


def _measured(model: Any, inputs: Any, options: Options) -> Row:
    eager = tensors(_run(lambda: model(**inputs)))
    try:
        treated = treat(model, inputs, options)
    except AttnoptError as error:
        return {"status": "not captured", "reason": str(error)}
    row: Row = {"status": "measured", "capture": treated.way, "nodes": treated.nodes}
    row |= {"sites": treated.sites, "missed": treated.missed, "others": treated.others}
    row["unknown"] = treated.unknown
    ours = tensors(_run(treated.run))
    exact, problem = _golden(model, inputs)
    row["errors"] = {**errors(ours, eager, exact), **in_double(treated.graphs)}
    if problem:
        row["errors"]["golden"] = problem
    return row


def _run(call: Callable[[], Any]) -> Any:
    """The call with the same noise every time, for models that draw some."""
    torch.manual_seed(0)
    with torch.no_grad():
        return call()


def _golden(model: Any, inputs: Any) -> tuple[Tensors | None, str]:
    try:
        return _run(lambda: golden(model, (), inputs)), ""
    except Exception as error:
        return None, f"the model does not run in fp64: {type(error).__name__}: {str(error).splitlines()[:1]}"


def in_double(graphs: Sequence[Pair]) -> Row:
    """`fp64`: largest relative rms change of a graph's outputs in fp64; `fp64_astray`: numbers that came or went."""
    out: Row = {"fp64": 0.0, "fp64_astray": 0}
    for pair in graphs:
        before, after = (_flat(tensors(values)) for values in pair.in_double())
        both = before.isfinite() & after.isfinite()
        change = _rms((after - before)[both]) / max(_rms(before[both]), 1e-300)
        out["fp64"], out["fp64_astray"] = max(out["fp64"], change), int((before.isfinite() != after.isfinite()).sum())
    return out


def errors(ours: Tensors, eager: Tensors, exact: Tensors | None) -> Row:
    """`units`: rms error of ours over that of eager (at least one rounding), and `max_units`, the same of maxima."""
    if [t.shape for t in ours] != [t.shape for t in eager]:
        return {"units": None, "why": "the outputs differ in number or shape"}
    if exact is None or [t.shape for t in exact] != [t.shape for t in eager]:
        change = _rms(_flat(ours) - _flat(eager)) / max(_rms(_flat(eager)), 1e-30)
        return {"units": None, "why": "no fp64 outputs to compare with", "change": change}
    g, e, k = _flat(exact), _flat(eager), _flat(ours)
    # Where eager itself has no number, or fp64 has none (two minima may add up to -inf), ours must repeat eager.
    usable = g.isfinite() & e.isfinite()
    near = ((k - e).abs() <= 1e-4 * e.abs().clamp(min=1)) & k.isfinite() & e.isfinite()
    same = (k == e) | (k.isnan() & e.isnan()) | near
    out: Row = {"elements": g.numel(), "elsewhere": int((~usable).sum()), "astray": int((~same & ~usable).sum())}
    g, e, k = g[usable], e[usable], k[usable]
    floor = _EPS * _rms(g)
    out |= {"eager_rms": _rms(e - g), "ours_rms": _rms(k - g), "golden_rms": _rms(g)}
    out["units"] = out["ours_rms"] / max(out["eager_rms"], floor, 1e-300)
    out["max_units"] = _max(k - g) / max(_max(e - g), _EPS * _max(g), 1e-300)
    return {n: (None if isinstance(v, float) and not math.isfinite(v) else v) for n, v in out.items()}


def _flat(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.detach().double().flatten() for v in values]) if values else torch.zeros(0).double()


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _max(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


__all__ = ["Row", "errors", "measure"]
