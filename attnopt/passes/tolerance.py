"""How much an approximate rewrite may change, and how much it did on the calibration inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree

from attnopt.errors import OptionError

# A scalar of the model's output or, where it takes two arguments, of the output and the flattened inputs.
Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Tolerance:
    """The largest change that is accepted; at least one of the two.

    Attributes:
        output: root mean square of the change of the model's first floating output, relative to that output's own.
        loss: change of the loss, relative to what it was: 0.02 means two percent. The loss is the rewrite's `loss`,
            else the output's `.loss`, else the mean square of its first floating tensor.
    """

    output: float | None = None
    loss: float | None = None

    def __post_init__(self) -> None:
        if self.output is None and self.loss is None:
            raise OptionError("Tolerance needs a limit: write Tolerance(output=0.05) or Tolerance(loss=0.01).")
        for name in ("output", "loss"):
            limit = getattr(self, name)
            if limit is None:
                continue
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0 or math.isinf(limit):
                raise OptionError(f"Tolerance({name}={limit!r}) must be a positive finite number.")

    @classmethod
    def make(cls, given: Tolerance | float | None) -> Tolerance | None:
        """A tolerance, or a number that limits the change of the output."""
        if given is None or isinstance(given, Tolerance):
            return given
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            raise OptionError(f"tolerance must be an attnopt.rewrites.Tolerance or a number, not {given!r}.")
        return cls(output=float(given))

    def exceeded(self, change: Change) -> str | None:
        """What was measured and what was allowed, if it is too much."""
        for name, limit, seen in (("output", self.output, change.output), ("loss", self.loss, change.loss)):
            # Written so that NaN exceeds every limit.
            if limit is not None and not seen <= limit:
                return f"the {name} changed by {seen:.3g}, and the tolerance is {limit:g}"
        return None


@dataclass(frozen=True)
class Change:
    """Figures of a rewrite on the calibration inputs.

    Attributes:
        output: relative root-mean-square change of the first floating output.
        loss_before, loss_after: mean loss over the calibration inputs.
    """

    output: float
    loss_before: float
    loss_after: float

    @property
    def loss(self) -> float:
        """Change of the loss, relative to what it was."""
        gap, size = abs(self.loss_after - self.loss_before), abs(self.loss_before)
        return gap / size if size > 0 else 0.0 if gap == 0 else math.inf


class _Probed(fx.Interpreter):
    """Runs a graph; the values of some nodes pass through a function on the way."""

    def __init__(self, gm: fx.GraphModule, probes: Mapping[str, Callable[[Any], Any]]) -> None:
        super().__init__(gm)
        self.probes = probes

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        probe = self.probes.get(n.name)
        return result if probe is None else probe(result)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Inputs on which rewrites are measured, for the graphs of one capture.

    Attributes:
        states: names of the tensors that the graphs take before their inputs.
        batches: flattened inputs, one list a batch.
        out_spec: how a flattened output becomes what the model returns.
        loss_of: the user's loss, a function of the model's output; None for the default.
        given: whether the user gave the inputs, rather than the example being taken for want of any.
    """

    states: tuple[str, ...]
    batches: tuple[tuple[Any, ...], ...]
    out_spec: Any
    loss_of: Loss | None = None
    given: bool = False

    @staticmethod
    def make(captured: Any, inputs: Any, example: tuple[Any, Any], loss_of: Loss | None = None) -> Calibration:
        """From the `calibration` argument of `optimize`; without one, from the example inputs."""
        pairs = [example] if inputs is None else [_pair(x) for x in _sequence(inputs)]
        batches = tuple(tuple(captured.flatten(args, kwargs)) for args, kwargs in pairs)
        return Calibration(captured.states, batches, captured.out_spec, loss_of, inputs is not None)

    def run(
        self,
        gm: fx.GraphModule | fx.Interpreter,
        tensors: Mapping[str, torch.Tensor],
        probes: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> Iterator[list[Any]]:
        """The flattened outputs, batch by batch. Buffers and inputs are copied: a run changes nothing outside it."""
        runner = gm if isinstance(gm, fx.Interpreter) else _Probed(gm, probes or {})
        for number, batch in enumerate(self.batches):
            given = [_copy(tensors[name]) for name in self.states]
            inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in batch]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                yield list(runner.run(*given, *inputs))

    def loss(self, flat: Sequence[Any], batch: Sequence[Any] = ()) -> torch.Tensor:
        """The scalar loss of one output, given for one batch."""
        output = pytree.tree_unflatten(list(flat), self.out_spec)
        if self.loss_of is not None:
            return _number(self.loss_of, output, batch)
        found = getattr(output, "loss", None)
        if isinstance(found, torch.Tensor):
            return found.mean()
        return first_floating(flat).square().mean()

    def baseline(self, gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, float]]:
        """The first floating output and the loss of every batch."""
        with torch.no_grad():
            runs = zip(self.run(gm, tensors), self.batches, strict=True)
            return [(first_floating(flat), float(self.loss(flat, batch))) for flat, batch in runs]

    def change(
        self, before: Sequence[tuple[torch.Tensor, float]], gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor],
        probes: Mapping[str, Callable[[Any], Any]] | None = None,
    ) -> Change:  # fmt: skip
        """What the graph changes against `baseline`."""
        gap = size = after = 0.0
        with torch.no_grad():
            for (old, _), batch, flat in zip(before, self.batches, self.run(gm, tensors, probes), strict=True):
                new = first_floating(flat)
                # What the model makes infinite or NaN by itself, such as fully padded rows, did not change.
                same = (old == new) | (old.isnan() & new.isnan())
                gap += (new.double() - old.double()).masked_fill(same, 0.0).square().sum().item()
                size += old.double().masked_fill(~old.isfinite(), 0.0).square().sum().item()
                after += float(self.loss(flat, batch)) / len(before)
        # Outputs without a single finite value measure nothing, and what was not measured is not within a tolerance.
        measured = all(bool(old.isfinite().any()) for old, _ in before if old.numel())
        relative = math.sqrt(gap / size) if size > 0 else 0.0 if gap == 0 and measured else math.inf
        return Change(relative, sum(loss for _, loss in before) / len(before), after)


def next_token_loss(output: Any, inputs: Sequence[Any]) -> torch.Tensor:
    """The mean cross entropy of each next token under a language model's logits `[B, S, vocabulary]`, nats.

    The tokens are the first input of integers `[B, S]`. For the `loss` of a rewrite.

    Raises:
        OptionError: if the output or the inputs are others.
    """
    logits = getattr(output, "logits", output)
    logits = logits if isinstance(logits, torch.Tensor) else first_floating(pytree.tree_leaves(output))
    found = (x for x in inputs if isinstance(x, torch.Tensor) and not x.is_floating_point() and x.dtype != torch.bool)
    tokens = next((x for x in found if x.shape == logits.shape[:2]), None)
    if tokens is None or logits.dim() != 3:
        raise OptionError(f"next_token_loss needs logits [B, S, vocabulary] and tokens [B, S]; saw {logits.shape}.")
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().long())


def _number(loss: Loss, output: Any, batch: Sequence[Any]) -> torch.Tensor:
    """What the user's loss gives: one number, as a tensor."""
    try:
        made: Any = loss(output, batch) if _takes_inputs(loss) else loss(output)
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(
            f"loss failed on an output of the model: {type(error).__name__}: {error}. It is called with the output or, "
            "if it takes two arguments, with the output and the list of the inputs."
        ) from error
    if isinstance(made, torch.Tensor) and made.numel() == 1:
        return made
    if isinstance(made, (int, float)):
        return torch.tensor(float(made))
    what = f"a tensor {list(made.shape)}: take its mean" if isinstance(made, torch.Tensor) else repr(made)
    raise OptionError(f"loss must give one number, not {what}.")


def _takes_inputs(loss: Loss) -> bool:
    try:
        wanted = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in plain and p.default is p.empty for p in wanted) == 2


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if isinstance(tensor, torch.nn.Parameter) else tensor.clone()


def first_floating(flat: Sequence[Any]) -> torch.Tensor:
    """The first floating tensor with dimensions of an output, else the first floating one (a loss alone)."""
    found = [x for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if not found:
        raise OptionError("the model returns no floating tensor, so approximate rewrites cannot be measured.")
    return next((x for x in found if x.dim() > 0), found[0])


def _sequence(inputs: Any) -> Sequence[Any]:
    if isinstance(inputs, (str, Mapping, torch.Tensor)) or not isinstance(inputs, Sequence) or not inputs:
        raise OptionError(
            "calibration must be a non-empty sequence of inputs, each a tuple of arguments or a mapping of keywords; "
            f"saw {'an empty list' if inputs == [] else type(inputs).__name__}."
        )
    return inputs


def _pair(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), dict(given)
    if not isinstance(given, (tuple, list)):
        raise OptionError(f"a calibration input must be a tuple of arguments or a mapping, not {type(given).__name__}.")
    if len(given) == 2 and isinstance(given[0], (tuple, list)) and isinstance(given[1], Mapping):
        return tuple(given[0]), dict(given[1])
    return tuple(given), {}
