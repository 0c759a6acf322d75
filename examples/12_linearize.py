"""Softmax attention of a trained language model made linear: with a softmax window, what it costs and what stays."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import attnopt
from attnopt.rewrites import Linearize, Tolerance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.subject import heldout_excerpt, load_subject, loss_of

model = load_subject()
ids = heldout_excerpt()[:, :256]
# Without a mask `transformers` looks for packed documents in a batch.
everything = torch.ones(2, 256, dtype=torch.long)
example = {"input_ids": ids[:2], "attention_mask": everything, "use_cache": False}
calibration = [{"input_ids": ids[2:], "attention_mask": everything, "use_cache": False}]


def loss(module: torch.nn.Module) -> float:
    """Held-out loss, nats a byte."""
    return loss_of(lambda x: module(input_ids=x, attention_mask=everything, use_cache=False), ids[:2])


def optimized(rewrite: Linearize, tolerance: Tolerance) -> attnopt.OptimizedModule:
    return attnopt.optimize(
        model, (), example, rewrites=[rewrite], tolerance=tolerance, calibration=calibration, validate=False
    )


before = loss(model)
print(f"softmax: {before:.3f} nats a byte")
# `length`: it is long inputs that linear attention is for; these are short.
mixed = optimized(Linearize("hedgehog", window=64, length=8192, steps=20), Tolerance(output=0.5))
after = loss(mixed)
print(
    f"a softmax of 64 keys, fitted features beyond: {after:.3f} nats a byte; first site:\n{mixed.report.sites[0].spec}"
)
assert mixed.report.rewritten == 6
assert after < before + 0.1

plain = optimized(Linearize("elu", length=8192), Tolerance(output=0.05))
print(next(note for note in plain.report.notes if "refused" in note or "tolerance" in note))
assert plain.report.rewritten == 0, "features that were never fitted lose too much"
