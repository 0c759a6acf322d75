"""The trained subject: its checkpoint says what its recipe says, and training goes on where it stopped."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.subject import heldout_excerpt, load_subject, loss_of, recipe
from benchmarks.subject import model as subject
from benchmarks.subject import train as training
from benchmarks.subject.text import is_heldout, stdlib


def test_the_checkpoint_loads_and_has_the_recorded_loss() -> None:
    model, about = load_subject(), recipe()
    assert sum(p.numel() for p in model.parameters()) == about["parameters"] == 4_590_848
    assert subject.WEIGHTS.stat().st_size < 8 * 2**20
    ids = heldout_excerpt()
    assert ids.shape == (4, 1024)
    # The recipe keeps four decimals; rounding of fp32 in another order of summation is far below that.
    assert loss_of(model, ids) == pytest.approx(about["excerpt_loss"], abs=1e-3)
    assert max(about["heldout_loss"], about["heldout_loss_256"]) < 0.6 * _pairs(ids)


def _pairs(ids: Tensor) -> float:
    """The loss of the best table of pairs of bytes, fitted to the very text it is measured on: no table does better."""
    pairs = [p for row in ids.tolist() for p in itertools.pairwise(row)]
    firsts = Counter(a for a, _ in pairs)
    return -sum(n * math.log(n / firsts[a]) for (a, _), n in Counter(pairs).items()) / len(pairs)


def test_longer_contexts_are_read() -> None:
    """The last 128 bytes of windows of 1,024 are predicted better than without what comes before."""
    model, ids = load_subject(), heldout_excerpt()
    with torch.no_grad():
        whole = model(ids).logits[:, -128:]
        alone = model(ids[:, -128:]).logits
    losses = [subject.next_byte_loss(x, ids[:, -128:]).item() for x in (whole, alone)]
    assert losses[0] < losses[1]


def test_stored_matrices_are_within_half_a_step(tmp_path: Path) -> None:
    model = subject.new_subject(seed=3)
    subject.save_subject(model, {"a": 1}, tmp_path / "w", tmp_path / "r")
    read = subject.load_subject(tmp_path / "w")
    assert subject.recipe(tmp_path / "r") == {"a": 1}
    for (name, p), q in zip(model.named_parameters(), read.parameters(), strict=True):
        step = p.abs().amax(-1, keepdim=True) / 127 if p.dim() > 1 else torch.zeros(())
        assert bool(((p - q).abs() <= 0.5001 * step).all()), name


def test_the_text_is_split_by_the_names_of_files(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    names = [f"m{i}.py" for i in range(60)]
    for name in (*names, "test/left_out.py"):
        (tmp_path / name).write_text(f"# {name}")
    text = stdlib(tmp_path)
    assert text.files == 60
    assert b"left_out" not in text.train + text.heldout
    for name in names:
        assert (name.encode() in text.heldout) == is_heldout(name)
    assert text.train
    assert text.heldout


def test_training_is_taken_up_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**subject.SHAPE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 2}
    monkeypatch.setattr(subject, "SHAPE", small)
    library = tmp_path / "library"
    library.mkdir()
    for i in range(60):
        (library / f"m{i}.py").write_text("def f(x): return x\n" * 20)
    text = stdlib(library)
    half = training.Recipe(tokens=512, batch=64, short=16, long=32)
    whole = training.Recipe(tokens=1024, batch=64, short=16, long=32)
    _, first = training.train(half, text, tmp_path / "state")
    model, progress = training.train(whole, text, tmp_path / "state")
    assert (first.tokens, progress.tokens, progress.step) == (512, 1024, 16)
    assert progress.seconds > first.seconds
    assert subject.loss_of(model.eval(), subject.windows(text.heldout, 64, 1)) < math.log(256) + 0.05
    with pytest.raises(SystemExit, match="another text"):
        training.train(whole, stdlib(tmp_path), tmp_path / "state")


def test_the_rate_rises_and_falls_with_what_is_spent() -> None:
    recipe = training.Recipe()
    rates = [recipe.rate(x / 100) for x in range(101)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(recipe.lr * recipe.last_lr)
