"""What a command is pointed at: `package.module:factory` or `hf:model_type`, to a model and its example inputs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from attnopt.errors import OptionError

Target = tuple[Any, tuple[Any, ...], dict[str, Any]]
_FORMS = "give package.module:factory or hf:MODEL_TYPE, such as my_models:build or hf:gpt2"
# Where models keep inputs of their own: Hugging Face models, and Lightning modules.
_EXAMPLES = ("dummy_inputs", "example_input_array")


def load(text: str, layers: int = 2, tokens: int = 128) -> Target:
    """The model, its arguments and keyword arguments.

    A factory returns a model with inputs of its own, `(model, args)` or `(model, args, kwargs)`. Raises `OptionError`
    that says what was given and what is asked for.
    """
    if text.startswith("hf:"):
        from attnopt.demo.hub import from_config

        return from_config(text.removeprefix("hf:"), layers, tokens)
    module_name, separator, name = text.partition(":")
    if not separator or not module_name or not name:
        raise OptionError(f"{text!r} is neither MODULE:NAME nor hf:MODEL_TYPE: {_FORMS}.")
    return _model_and_inputs(_made(_named(module_name, name), text), text)


def _named(module_name: str, name: str) -> Any:
    """The object of this name, its module looked for in the current folder first."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise OptionError(f"cannot import {module_name!r}: {error}. It is looked for in {here} too.") from error
        raise OptionError(f"cannot import {module_name!r}, which needs another module: {error}.") from error
    except Exception as error:  # whatever the user's module raises while it is imported
        raise OptionError(f"cannot import {module_name!r}: it raised {type(error).__name__}: {error}.") from error
    finally:
        sys.path.remove(here)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = ", ".join(sorted(n for n, v in vars(value).items() if callable(v) and n[0] != "_")[:8])
            raise OptionError(f"{module_name!r} has no {name!r}; it has {known or 'nothing that can be called'}.")
        value = getattr(value, part)
    return value


def _made(value: Any, text: str) -> Any:
    from torch import nn

    if isinstance(value, nn.Module) or not callable(value):
        return value
    try:
        return value()
    except Exception as error:  # a factory is the user's code
        raise OptionError(f"{text} was called without arguments and raised {type(error).__name__}: {error}.") from error


def _model_and_inputs(made: Any, text: str) -> Target:
    from torch import nn

    if isinstance(made, nn.Module):
        return _with_own_inputs(made, text)
    wanted = f"{text} must give (model, args) or (model, args, kwargs), with args a tuple and kwargs a dict"
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not isinstance(made[0], nn.Module):
        raise OptionError(f"{wanted}; it gave {_shown(made)}.")
    model, args, kwargs = (*made, {})[:3]
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise OptionError(f"{wanted}; it gave {type(args).__name__} and {type(kwargs).__name__}.")
    if not args and not kwargs:
        raise OptionError(f"{text} gave a model without inputs; {wanted}.")
    return model, tuple(args), kwargs


def _with_own_inputs(model: Any, text: str) -> Target:
    for name in _EXAMPLES:
        inputs = getattr(model, name, None)
        if isinstance(inputs, dict) and inputs:
            return model, (), dict(inputs)
        if inputs is not None and not isinstance(inputs, dict):
            return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
    raise OptionError(
        f"{text} gave a {type(model).__name__} without inputs. Return (model, args) or (model, args, kwargs), "
        f"or give the model a {' or '.join(_EXAMPLES)}."
    )


def _shown(made: Any) -> str:
    if isinstance(made, tuple):
        return f"a tuple of {', '.join(type(x).__name__ for x in made) or 'nothing'}"
    return type(made).__name__
