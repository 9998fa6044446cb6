"""Before a model with leaf modules is traced: one run of it that shows how each leaf is called and what it gives.

On fake tensors first: nothing is computed, and a model on `meta` will do. A leaf that looks at values cannot run so; then the model runs
once for real, on the example inputs, and is put back as it was but for Python state of the leaves' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import TraceError
from autopar.ir.tracing.leaf_modules import LeafModule, recording
from autopar.ir.tracing.trace_export import running_on_fakes


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: Mapping[str, LeafModule]) -> None:
    """Fill the `calls` of `leaves`. What they held before stands in where neither fake nor real values serve.

    Raises `TraceError` where there is no way to see what a leaf gives.
    """
    known = {path: list(leaf.calls) for path, leaf in leaves.items()}
    try:
        with _numbers_kept(model), recording(leaves), running_on_fakes(model, args, kwargs) as (fake_args, fake_kwargs):
            model(*fake_args, **fake_kwargs)
        return
    except TraceError:
        raise
    except Exception as error:  # a leaf may do anything with values that are not there
        if all(known.values()):
            for path, calls in known.items():
                leaves[path].calls[:] = calls
            return
        tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]
        if any(isinstance(item, Tensor) and item.is_meta for item in tensors):
            names = ", ".join(f"`{path}`" for path in leaves)
            first = str(error).splitlines()[0][:200] if str(error) else ""
            raise TraceError(
                f"what leaf module {names} gives can only be seen with values, and the model or its example inputs are on `meta` "
                f"({type(error).__name__}: {first})\n  Remedy: give a model and inputs with values, or a function that gives tensors like "
                "the leaf's results: leaf_modules={'router': lambda x: x.new_empty(x.shape[0], 4)}"
            ) from error
    with _numbers_kept(model), _values_kept(model), recording(leaves):
        model(*args, **kwargs)


@contextmanager
def _numbers_kept(model: nn.Module) -> Iterator[None]:
    """The plain numbers of modules are afterwards as they were before."""
    numbers = plain_numbers(model)
    try:
        yield
    finally:
        for (path, name), value in numbers.items():
            model.get_submodule(path).__dict__[name] = value


@contextmanager
def _values_kept(model: nn.Module) -> Iterator[None]:
    """Buffers and random generators are afterwards as they were before."""
    buffers = [(item, item.detach().clone()) for item in model.buffers()]
    devices = sorted({item.device.index or 0 for item in (*model.parameters(), *model.buffers()) if item.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for item, before in buffers:
                item.copy_(before)


def plain_numbers(model: nn.Module) -> dict[tuple[str, str], float]:
    """The numbers that modules hold as plain attributes, by path and name."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if type(value) is int or type(value) is float
    }
