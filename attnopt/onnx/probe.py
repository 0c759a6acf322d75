"""Every operator is run alone in ONNX Runtime, on the operands of its own site, before the model is built with it.

G is the spec's reference in fp64, E the reference in the operands' dtype, K what ONNX Runtime gives: the kernel-exact
contract of `runtime.validate`. An operator that cannot run, or is not as close, gives way to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attnopt.errors import AttnoptError
from attnopt.onnx.program import build
from attnopt.onnx.session import Session
from attnopt.onnx.sites import Attention, Operands
from attnopt.runtime.reference import reference
from attnopt.runtime.validate import Verdict, compare

# Above this many scores only sampled query rows are compared with the reference.
_MOST_SCORES = 2**24
_ROWS = 32


class _Alone(nn.Module):
    """Attentions without their model; takes their operands one after the other."""

    def __init__(self, sites: Sequence[Attention]) -> None:
        super().__init__()
        self.sites = nn.ModuleList(sites)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        given, out = list(tensors), []
        for site in self.sites:
            assert isinstance(site, Attention)
            assert site.seen is not None
            count = len(site.seen.captures)
            (q, k, v, *captures), given = given[: 3 + count], given[3 + count :]
            out.append(site(q, k, v, captures, list(site.seen.scalars), "")[0])
        return out


def choose(sites: Sequence[Attention], opset: int) -> None:
    """Settle the operator of every site that has seen operands; puts the figures into `verdict`."""
    waiting = list(sites)
    while waiting:
        groups: dict[object, list[Attention]] = {}
        for site in waiting:
            if site.operator is not None and site.seen is not None:
                groups.setdefault(site.group, []).append(site)
        firsts = [same[0] for same in groups.values()]
        verdicts = _probed(firsts, opset)
        waiting = []
        for same, verdict in zip(groups.values(), verdicts, strict=True):
            for site in same:
                site.verdict = verdict
                if not verdict.ok:
                    site.next(verdict.reason)
                    site.verdict = None
                    waiting.append(site)


def _probed(sites: Sequence[Attention], opset: int) -> list[Verdict]:
    """A verdict for each; those that cannot run together are run one by one."""
    if not sites:
        return []
    seen = [s.seen for s in sites if s.seen is not None]
    tensors = [t.contiguous() for x in seen for t in (*x.tensors, *x.captures)]
    names = [f"x{i}" for i in range(len(tensors))]
    try:
        program = build(_Alone(sites), tensors, opset, inputs=names)
        results = Session(program.model_proto.SerializeToString())(names, tensors)
    except AttnoptError as error:
        if len(sites) > 1:
            return [v for site in sites for v in _probed([site], opset)]
        return [Verdict(False, torch.inf, torch.inf, 0.0, 0.0, str(error))]
    return [_judged(site, x, out) for site, x, out in zip(sites, seen, results, strict=True)]


def _judged(site: Attention, x: Operands, out: Tensor) -> Verdict:
    rows = None
    if x.tensors[0].shape[:3].numel() * x.tensors[1].shape[2] > _MOST_SCORES:
        rows = torch.linspace(0, x.tensors[0].shape[2] - 1, _ROWS, dtype=torch.int64).unique()
        out = out[:, :, rows]
    wide = [t.double() if t.is_floating_point() else t for t in (*x.tensors, *x.captures)]
    golden, _ = reference(site.spec, *wide[:3], wide[3:], x.scalars, rows=rows)
    eager, _ = reference(site.spec, *x.tensors, x.captures, x.scalars, rows=rows)
    return compare(golden, eager, out)
