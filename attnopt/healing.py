"""`heal`: a short distillation that brings a rewritten model back toward the one it came from."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.errors import OptionError, ValidationError

Loss = Callable[[Any, Any], Tensor]
_MEASURED = 8  # batches on which the figures before and after are taken
_WARMUP, _LAST = 0.1, 0.1  # share of the steps; last rate as a share of the first


@dataclass(frozen=True)
class Healing:
    """What healing did: steps, the distance to the teacher before and after on the first batches, and the seconds."""

    steps: int
    loss: str
    before: float
    after: float
    seconds: float


def heal(
    model: nn.Module, teacher: nn.Module, data: Iterable[Any], steps: int, *, lr: float = 3e-4,
    loss: str | Loss = "auto", parameters: Callable[[str], bool] | None = None, weight_decay: float = 0.0,
    clip: float = 1.0, progress: bool = True,
) -> nn.Module:  # fmt: skip
    """A copy of `model`, trained for some steps to give what `teacher` gives (Hinton et al. 2015).

    Both run in evaluation mode, the teacher without gradients. AdamW with a short warm-up and a cosine schedule.

    Args:
        model: the rewritten model; neither it nor the teacher is changed.
        teacher: the model it came from.
        data: inputs, each a tuple of arguments or a mapping of keywords; used again from the start when they end.
        steps: how many updates; one input each.
        lr: the largest learning rate.
        loss: `kl` (of the softmax of `.logits`), `mse` (of the first floating output, over its own mean square),
            `cosine` (one minus the cosine along the last dimension), or a function of both outputs. `auto` takes `kl`
            where the output has `.logits`, else `mse`.
        parameters: which parameters to train, by name; None means all that require gradients.
        weight_decay: as of AdamW. clip: the largest norm of the gradient.
        progress: whether a bar is shown.

    Returns:
        The healed copy in evaluation mode; its attribute `healing` has the figures.

    Raises:
        OptionError: for arguments that do not fit. ValidationError: if the loss stops being finite.
    """
    batches = _checked(model, teacher, data, steps, lr, loss)
    _checked_training(parameters, weight_decay, clip)
    started = time.monotonic()
    student = copy.deepcopy(model).eval()
    trained = [p for n, p in student.named_parameters() if p.requires_grad and (parameters is None or parameters(n))]
    if not trained:
        raise OptionError("heal: no parameter to train: none that `parameters` names needs gradients.")
    modes = {part: part.training for part in teacher.modules()}
    teacher.eval()
    try:
        measure, name = _loss(loss, _target(teacher, batches[0]))
        first = batches[:_MEASURED]
        before = _mean(student, teacher, first, measure)
        _train(student, teacher, batches, steps, measure, trained, (lr, weight_decay, clip), progress)
        after = _mean(student, teacher, first, measure)
    finally:
        for part, mode in modes.items():
            part.training = mode
    student.healing = Healing(steps, name, before, after, time.monotonic() - started)  # type: ignore[assignment]
    return student


def _train(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Any], steps: int, measure: Loss, trained: list[Any],
    rates: tuple[float, float, float], progress: bool,
) -> None:  # fmt: skip
    lr, weight_decay, clip = rates
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
    figures = TextColumn("{task.fields[at]}")
    columns = (TextColumn("healing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), figures)
    with torch.enable_grad(), Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=steps, at="")
        for step, inputs in enumerate(itertools.islice(_forever(batches), steps)):
            for group in optimizer.param_groups:
                group["lr"] = lr * _rate(step, steps)
            found = measure(_call(student, inputs), _target(teacher, inputs))
            seen = float(found.detach())
            if not math.isfinite(seen):
                raise ValidationError(f"heal: the loss is {seen} at step {step}; try a smaller lr than {lr:g}.")
            optimizer.zero_grad(set_to_none=True)
            found.backward()
            nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            bar.update(task, advance=1, at=f"loss {seen:.4g}")
        optimizer.zero_grad(set_to_none=True)


def _rate(step: int, steps: int) -> float:
    """The share of the largest learning rate."""
    warm = max(1, round(_WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * along))


def _forever(batches: Sequence[Any]) -> Iterator[Any]:
    return itertools.cycle(batches)


def _mean(student: nn.Module, teacher: nn.Module, batches: Sequence[Any], measure: Loss) -> float:
    with torch.no_grad():
        found = [float(measure(_call(student, x), _target(teacher, x))) for x in batches]
    return sum(found) / len(found)


def _call(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)


def _target(teacher: nn.Module, inputs: Any) -> Any:
    with torch.no_grad():
        return _call(teacher, inputs)


def _kl(output: Any, target: Any) -> Tensor:
    """Mean over positions of KL(teacher || student), nats."""
    student, teacher = (F.log_softmax(x.logits.float(), -1).flatten(0, -2) for x in (output, target))
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def _mse(output: Any, target: Any) -> Tensor:
    student, teacher = _first(output).float(), _first(target).float()
    return (student - teacher).square().mean() / teacher.square().mean().clamp_min(1e-30)


def _cosine(output: Any, target: Any) -> Tensor:
    return 1 - F.cosine_similarity(_first(output).float(), _first(target).float(), dim=-1).mean()


_LOSSES: dict[str, Loss] = {"kl": _kl, "mse": _mse, "cosine": _cosine}


def _first(output: Any) -> Tensor:
    """The first floating tensor with dimensions of an output."""
    found = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]
    if not found and hasattr(output, "values"):
        found = [x for x in output.values() if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]
    if not found:
        raise OptionError("heal: the model returns no floating tensor; give loss= as a function of both outputs.")
    return found[0]


def _loss(given: str | Loss, target: Any) -> tuple[Loss, str]:
    if not isinstance(given, str):
        return given, getattr(given, "__name__", "loss")
    name = given
    if given == "auto":
        name = "kl" if isinstance(getattr(target, "logits", None), Tensor) else "mse"
    if name == "kl" and not isinstance(getattr(target, "logits", None), Tensor):
        raise OptionError(
            f"heal(loss='kl') needs outputs with .logits, not {type(target).__name__}; take mse or cosine."
        )
    return _LOSSES[name], name


def _checked(model: Any, teacher: Any, data: Any, steps: Any, lr: Any, loss: Any) -> list[Any]:
    """The data as a list. Raises `OptionError` for what does not fit."""
    for role, given in (("model", model), ("teacher", teacher)):
        if not isinstance(given, nn.Module):
            raise OptionError(f"heal: the {role} must be a torch.nn.Module, not {type(given).__name__}.")
    if model is teacher:
        raise OptionError("heal: model and teacher are the same module; the teacher is the model before the rewrite.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise OptionError(f"heal: steps must be a positive number, not {steps!r}.")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
        raise OptionError(f"heal: lr must be a positive number, not {lr!r}.")
    if not callable(loss) and loss not in (*_LOSSES, "auto"):
        raise OptionError(f"heal(loss={loss!r}) is unknown; choose auto, {', '.join(_LOSSES)}, or give a function.")
    if isinstance(data, (str, Mapping, Tensor)) or not isinstance(data, Iterable):
        raise OptionError(f"heal: data must be inputs one after another, not {type(data).__name__}: write [(x,), ...].")
    batches = list(itertools.islice(data, steps))
    for inputs in batches:
        if not isinstance(inputs, (tuple, list, Mapping)):
            raise OptionError(
                f"heal: each input must be a tuple of arguments or a mapping, not {type(inputs).__name__}."
            )
    if not batches:
        raise OptionError("heal: data is empty; give at least one input.")
    return batches


def _checked_training(parameters: Any, weight_decay: Any, clip: Any) -> None:
    for name, given, least in (("clip", clip, "more than 0"), ("weight_decay", weight_decay, "0 or more")):
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if not number or not (given > 0 or (given == 0 and least == "0 or more")):
            raise OptionError(f"heal: {name} must be a number, {least}, not {given!r}.")
    if parameters is not None and not callable(parameters):
        raise OptionError(f"heal: parameters must be a function of a parameter's name, not {parameters!r}.")
