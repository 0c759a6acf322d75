"""The trained subject: a small language model of Python source, on which the quality of a rewrite is measured."""

from benchmarks.subject.model import SEED, SHAPE, heldout_excerpt, load_subject, loss_of, recipe, save_subject

__all__ = ["SEED", "SHAPE", "heldout_excerpt", "load_subject", "loss_of", "recipe", "save_subject"]
