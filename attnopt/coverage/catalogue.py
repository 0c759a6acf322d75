"""Which architectures there are: one for each model type of the installed transformers, and the rows of diffusers."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from attnopt.errors import OptionError


def model_types() -> tuple[str, ...]:
    """Every model type that the installed transformers knows, in alphabetical order."""
    return tuple(sorted(transformers().CONFIG_MAPPING.keys()))


def transformers() -> Any:
    """The package, quiet. Raises `OptionError` if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise OptionError("the zoo comes from transformers: pip install 'attnopt[hf]'.") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def model_class(model_type: str) -> type:
    """The class that stands for the model type: the causal language model of a decoder, else the base model.

    Raises `LookupError` if transformers has no model for the configuration.
    """
    package = transformers()
    from transformers.models.auto import modeling_auto as auto

    config = package.CONFIG_MAPPING[model_type]()
    # Encoders that can be told to decode, and encoder-decoders, show more as base models.
    decoder = not config.is_encoder_decoder and not hasattr(config, "is_decoder")
    mappings = (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_MAPPING_NAMES)
    for mapping in mappings if decoder else mappings[::-1]:
        name = mapping.get(model_type)
        name = name[0] if isinstance(name, (list, tuple)) else name
        if name and _suits(getattr(package, name, None), model_type):
            return getattr(package, name)  # type: ignore[no-any-return]
    return _by_config(model_type)


def _suits(found: Any, model_type: str) -> bool:
    config = transformers().CONFIG_MAPPING[model_type]
    # Some types reuse the model of another, which reads a configuration of that other type.
    return isinstance(found, type) and getattr(found, "config_class", None) in (config, *config.__mro__[1:-1])


def _by_config(model_type: str) -> type:
    """The first model in the configuration's own package that is made from it, base models first."""
    package = transformers()
    config = package.CONFIG_MAPPING[model_type]
    name = config.__module__.replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise LookupError(f"no modelling code: {error}") from None
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if c.__module__ == name and issubclass(c, package.PreTrainedModel)
        and getattr(c, "config_class", None) is config
        and "forward" in vars(c) and not c.__name__.endswith("PreTrainedModel")
    ]  # fmt: skip
    if not found:
        raise LookupError("no model class takes this configuration")
    return min(found, key=lambda c: ("For" in c.__name__, len(c.__name__)))


def architectures() -> tuple[str, ...]:
    """Every architecture by name, those of diffusers as `diffusers:CLASS` if it is installed."""
    from attnopt.coverage.diffusion import names

    return (*model_types(), *names())
