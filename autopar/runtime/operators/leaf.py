"""Leaf modules on a rank: the user's own module, run whole with the parameters and buffers that the program hands it.

Every rank runs it on the same values and draws the same random numbers, so that every rank has the same results and, through the module's
own autograd, the same gradients. Where a rule splits its rows, each rank runs it on its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import RuntimeSetupError
from autopar.ir.tracing.leaf_modules import LeafModule
from autopar.runtime.operators.alike import draws_alike, eagerly_alike
from autopar.runtime.operators.dropout import drawing, seeded

Shape = tuple[int, ...]

_around: list[Callable[[], AbstractContextManager[Any]]] = []


@contextmanager
def leaves_run_within(context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within, every leaf runs in a `context()` of its own, as all of the model does on one device."""
    _around.append(context)
    try:
        yield
    finally:
        _around.pop()


def body(leaf: LeafModule, training: bool, shapes: Sequence[Shape], device: torch.device) -> Callable[..., list[Tensor]]:
    """The operation `autopar.leaf` on this rank, in training or evaluation mode, behind what it draws random numbers by: `part`, `seed` and
    `counter`, as `dropout.drawing` takes them. `shapes`: of its results here, then of the new values of its buffers."""

    def leaf_module(part: int, seed: int, counter: Tensor, *args: Any) -> list[Tensor]:
        found: list[Tensor] = drawing(_run, device, part, seed, counter, leaf, training, shapes, device, *args)
        return found

    return leaf_module


def _run(
    leaf: LeafModule,
    training: bool,
    shapes: Sequence[Shape],
    device: torch.device,
    kind: str,
    nth: int,
    follows: list[bool],
    state: list[Tensor],
    inputs: list[Tensor],
) -> list[Tensor]:
    call = leaf.calls[nth]
    names = list(leaf.state())
    given = dict(zip(names, state, strict=True))
    given |= {name: given[name].clone() for name in call.updated}
    versions = {name: item._version for name, item in given.items()}
    before = [item._version for item in inputs]
    args, kwargs = call.arguments(inputs)
    with _mode(leaf.module, training), _all_seeded(device), _drawing(leaf), _inside():
        result = torch.func.functional_call(leaf.module, given, args, kwargs)
    results = [item for item in pytree.tree_leaves(result) if isinstance(item, Tensor)]
    if [tuple(item.shape) for item in results] != list(shapes[: len(call.results)]):
        gave, wanted = [list(item.shape) for item in results], [list(shape) for shape in shapes[: len(call.results)]]
        raise RuntimeSetupError(
            f"leaf module `{leaf.path}` gave results of shapes {gave}, and {wanted} when it was traced; what follows it needs fixed "
            "shapes. Pad what it gives to a fixed size"
        )
    changed = [name for name in names if name not in call.updated and given[name]._version != versions[name]]
    if changed or any(item._version != version for item, version in zip(inputs, before, strict=True)):
        what = f"`{leaf.path}.{changed[0]}`" if changed else "its input"
        raise RuntimeSetupError(
            f"leaf module `{leaf.path}` changed {what} in place, which it did not when it was traced; work on a copy there"
        )
    # Gathered parameters are freed after use: nothing that goes on may lie in their memory.
    memory = {item.untyped_storage().data_ptr() for item in (*state, *inputs)}
    found = [item.clone() if item.untyped_storage().data_ptr() in memory else item for item in results]
    found = [item if wanted or not item.requires_grad else item.detach() for item, wanted in zip(found, follows, strict=True)]
    return found + [given[name].detach() for name in call.updated]


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Within, `module` is in training mode as it was when it was traced, or in evaluation mode."""
    before = [(item, item.training) for item in module.modules()]
    try:
        if not training:
            module.eval()
        yield
    finally:
        for item, mode in before:
            item.training = mode


@contextmanager
def _all_seeded(device: torch.device) -> Iterator[None]:
    """Within, all generators that a module may draw from are seeded as that of `device` is: the CPU's, Python's and numpy's too."""
    seed = torch.cuda.initial_seed() if device.type == "cuda" else torch.initial_seed()
    python, numpy = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        with seeded(torch.device("cpu"), seed):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _drawing(leaf: LeafModule) -> AbstractContextManager[Any]:
    return eagerly_alike(leaf.module, leaf.path) if draws_alike() else nullcontext()


def _inside() -> AbstractContextManager[Any]:
    return _around[-1]() if _around else nullcontext()
