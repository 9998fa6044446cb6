"""Models by name, for the command line: `MODULE:FACTORY`, `hf:MODEL_TYPE` and `hf:path/to/config.json`.

`hf:llama?num_hidden_layers=4&vocab_size=1000` is a transformers configuration by model type, with attributes changed. Such a model is
built on `meta`: no weights are made, and nothing is ever downloaded.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from autopar.errors import TraceError

if TYPE_CHECKING:
    from torch import nn

DEFAULT_BATCH = 8
DEFAULT_SEQ = 1024
"""Tokens; fewer if the model has fewer positions."""

_AUTO_CLASSES = ("AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForImageClassification")


def load_model(spec: str, batch: int | None = None, seq: int | None = None, dtype: str | None = None) -> tuple[nn.Module, Any]:
    """The model that `spec` names, and example inputs for it.

    A factory `MODULE:FACTORY` is called without arguments, or with those of `batch`, `seq` and `dtype` that it takes; it returns the
    model, or the model and example inputs. For a transformers model the inputs are made here: `input_ids` and `labels` `(batch, seq)`,
    or `pixel_values` `(batch, channels, height, width)` and `labels` `(batch,)`. `dtype` is a torch name, such as `"bfloat16"`.
    Raises `TraceError` where there is no such model.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or not rest:
        raise TraceError(
            f"`{spec}` names no model; write MODULE:FACTORY (a function that returns a model and example inputs), "
            "hf:MODEL_TYPE such as hf:llama, or hf:path/to/config.json"
        )
    if kind == "hf":
        return _from_transformers(spec, rest, batch, seq, dtype)
    return _from_factory(spec, kind, rest, batch, seq, dtype)


def _dtype(name: str | None) -> Any:
    import torch

    if name is None:
        return None
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TraceError(f"`{name}` is no dtype of parameters; write float32, bfloat16, float16 or float64")
    return found


# ---- MODULE:FACTORY ----------------------------------------------------------------------------------------------------------------


def _from_factory(spec: str, module_name: str, factory_name: str, batch: int | None, seq: int | None, dtype: str | None) -> tuple[Any, Any]:
    from torch import nn

    factory = _find(spec, module_name, factory_name)
    if isinstance(factory, nn.Module):
        found: Any = factory
    elif callable(factory):
        given = {"batch": batch, "seq": seq, "dtype": dtype}
        taken = inspect.signature(factory).parameters
        try:
            found = factory(**{name: value for name, value in given.items() if name in taken and value is not None})
        except Exception as error:
            raise TraceError(f"`{spec}`: {factory_name}() raised {_raised(error, factory)}") from error
    else:
        raise TraceError(f"`{spec}` is a {type(factory).__name__}; it must be a function that returns a model and example inputs")
    model, inputs = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise TraceError(f"`{spec}` returned a {type(model).__name__}; it must return a model, or `(model, example_inputs)`")
    if inputs is None:
        if not hasattr(getattr(model, "config", None), "model_type"):
            raise TraceError(f"`{spec}` returned no example inputs; return `(model, example_inputs)`")
        inputs = _inputs_of(spec, model, batch, seq)
    if dtype is not None:
        model, inputs = _in_dtype(model, inputs, _dtype(dtype))
    _check_sizes(spec, inputs, batch, seq)
    return model, inputs


def _raised(error: Exception, factory: Any) -> str:
    """`ValueError: no such size (models.py:12)`: what was raised, and the last line of the factory's own file on the way there."""
    own = inspect.unwrap(factory).__code__.co_filename if hasattr(inspect.unwrap(factory), "__code__") else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f"{type(error).__name__}: {error}" + (f" ({Path(own).name}:{lines[-1]})" if lines else "")


def _find(spec: str, module_name: str, name: str) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise TraceError(f"`{spec}`: module `{module_name}` imports `{error.name}`, which is not installed") from error
        raise TraceError(f"`{spec}`: there is no module `{error.name}` in {here} or among the installed packages") from error
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [item for item in vars(found) if not item.startswith("_")], 3)
            hint = f"; did you mean {' or '.join(f'`{item}`' for item in close)}?" if close else ""
            raise TraceError(f"`{spec}`: `{module_name}` has no `{part}`{hint}")
        found = getattr(found, part)
    return found


def _in_dtype(model: Any, inputs: Any, dtype: Any) -> tuple[Any, Any]:
    from torch import Tensor
    from torch.utils import _pytree as pytree

    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return model.to(dtype), pytree.tree_map(cast, inputs)


def _check_sizes(spec: str, inputs: Any, batch: int | None, seq: int | None) -> None:
    """A factory that takes no `batch` must not be thought to have obeyed it."""
    from torch import Tensor
    from torch.utils import _pytree as pytree

    first = next((leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    for dim, name, wanted in ((0, "batch", batch), (1, "seq", seq)):
        if wanted is not None and first is not None and first.dim() > dim and first.shape[dim] != wanted:
            raise TraceError(f"`{spec}` gives inputs of {name} {first.shape[dim]}, not {wanted}; let the factory take `{name}`")


# ---- hf: ---------------------------------------------------------------------------------------------------------------------------


def _from_transformers(spec: str, rest: str, batch: int | None, seq: int | None, dtype: str | None) -> tuple[Any, Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise TraceError(f"`{spec}` needs the transformers package; install `autopar[hf]`") from error
    import torch

    name, _, query = rest.partition("?")
    config = _config(spec, name, _overrides(spec, query))
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0  # needed to make decoder inputs of labels
    model_class = _class_for(spec, config)
    given = {} if dtype is None else {"dtype": _dtype(dtype)}
    try:
        with torch.device("meta"):
            if issubclass(model_class, transformers.PreTrainedModel):
                model = model_class._from_config(config, **given)
            else:
                model = model_class.from_config(config, **given)
    except Exception as error:
        raise TraceError(f"`{spec}`: transformers cannot build {model_class.__name__} of this configuration: {error}") from error
    return model.train(), _inputs_of(spec, model, batch, seq)


def _overrides(spec: str, query: str) -> dict[str, Any]:
    """Attributes of the configuration to change; values are JSON (`4`, `0.1`, `true`, `[2,2]`), anything else is a text."""
    found: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    if query and not found:
        raise TraceError(f"`{spec}`: write changes of the configuration as `?name=value&name=value`")
    return found


def _config(spec: str, name: str, overrides: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    path = Path(name)
    try:
        if path.suffix == ".json" or path.is_dir():
            file = path / "config.json" if path.is_dir() else path
            if not file.is_file():
                raise TraceError(f"`{spec}`: there is no file {file}")
            values = json.loads(file.read_text())
            model_type = values.get("model_type") if isinstance(values, dict) else None
            if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
                raise TraceError(f"`{spec}`: {file} has model_type {model_type!r}, which this transformers does not know")
            config_class = CONFIG_MAPPING[model_type]
        elif name in CONFIG_MAPPING:
            values, config_class = {}, CONFIG_MAPPING[name]
        else:
            close = difflib.get_close_matches(name, list(CONFIG_MAPPING.keys()), 3)
            hint = (
                f"did you mean {' or '.join(f'hf:{item}' for item in close)}?" if close else "write a model type or a path to a config.json"
            )
            raise TraceError(f"`{spec}`: transformers has no model type `{name}`; {hint}")
        plain = config_class.from_dict(dict(values)) if values else config_class()
        for key in overrides:
            if not hasattr(plain, key):
                close = difflib.get_close_matches(key, list(plain.to_dict()), 3)
                hint = f"; did you mean {' or '.join(f'`{item}`' for item in close)}?" if close else ""
                raise TraceError(f"`{spec}`: {config_class.__name__} has no attribute `{key}`{hint}")
        return config_class.from_dict(dict(values) | dict(overrides))
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"`{spec}`: transformers cannot read this configuration: {error}") from error


def _class_for(spec: str, config: Any) -> Any:
    """The class with a loss that fits: the one the configuration names, else by what its model type can do."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    fits = [name for name in _AUTO_CLASSES if type(config) in getattr(transformers, name)._model_mapping]
    if getattr(config, "is_decoder", False) and "AutoModelForCausalLM" in fits:
        fits = ["AutoModelForCausalLM"]
    if not fits:
        raise TraceError(
            f"`{spec}`: model type `{config.model_type}` has no language model and no image classifier; "
            "write a function that builds it and its example inputs, and name it as MODULE:FACTORY"
        )
    return getattr(transformers, fits[0])


def _inputs_of(spec: str, model: Any, batch: int | None, seq: int | None) -> dict[str, Any]:
    """Example inputs on `meta` for a transformers model, labels included, so that it gives a loss."""
    import torch

    config = model.config
    batch = batch or DEFAULT_BATCH

    def numbers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device="meta")

    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(config, "num_channels", 3)
        pixels = torch.zeros((batch, channels, height, width), dtype=model.dtype, device="meta")
        return {"pixel_values": pixels, "labels": numbers(batch)}
    if model.main_input_name != "input_ids":
        raise TraceError(
            f"`{spec}` takes `{model.main_input_name}`, for which autopar makes no example; "
            "write a function that returns the model and its example inputs, and name it as MODULE:FACTORY"
        )
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or DEFAULT_SEQ
    seq = seq or min(DEFAULT_SEQ, positions)
    return {"input_ids": numbers(batch, seq), "labels": numbers(batch, seq)}
