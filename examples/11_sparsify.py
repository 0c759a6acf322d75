"""Fewer keys a query on a trained language model: a window with sinks, and blocks that the inputs choose."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import attnopt
from attnopt.rewrites import Sparsify, Tolerance, next_token_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.subject import heldout_excerpt, load_subject, loss_of

model = load_subject()
ids = heldout_excerpt()[:1, :256]
example = {"input_ids": ids, "use_cache": False}


def loss(module: torch.nn.Module) -> float:
    """Held-out loss, nats a byte."""
    return loss_of(lambda x: module(input_ids=x, use_cache=False), ids)


def sparse(**options: object) -> attnopt.OptimizedModule:
    """The model with fewer keys a query, where that pays at 4,096 tokens and the loss stays within a limit."""
    rewrite = Sparsify(length=4096, loss=next_token_loss, **options)  # type: ignore[arg-type]
    return attnopt.optimize(
        model, (), example, rewrites=[rewrite], tolerance=Tolerance(loss=0.6), calibration=[example], validate=False
    )


print(f"all keys: {loss(model):.3f} nats a byte")
window = sparse(method="window", window=64, sinks=4)
print(f"the last 64 and 4 sinks: {loss(window):.3f}")
blocks = sparse(method="blocks", top=3, block=32, tile=32)
print(f"3 blocks of 32 keys a tile: {loss(blocks):.3f}")
print(f"\n{blocks.report.sites[0].spec}")

assert window.report.rewritten == blocks.report.rewritten == 6
assert all(site.spec.select.rule == "topk" for site in blocks.report.sites)
assert abs(loss(window) - loss(model)) < 0.6
assert abs(loss(blocks) - loss(model)) < 0.6
