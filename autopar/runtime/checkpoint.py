"""Saving and loading: what works with PyTorch's own tools as it is, and the few helpers for the rest.

`state_dict()` of a `ParallelModule` has DTensors under the original names, so `torch.distributed.checkpoint.save` and `load` take it,
under whatever plan and mesh; `load_state_dict` also takes the original model's own state dict of whole tensors. Optimizers are covered
by `torch.distributed.checkpoint.state_dict` (`get_state_dict`, `set_state_dict`) or by the two helpers here, which name optimizer
state by parameter. All of these are collective calls: every rank makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor

from autopar.errors import PlanMismatchError
from autopar.ir.placement import R
from autopar.runtime import strided_shards
from autopar.runtime.convert import local_steps
from autopar.runtime.handshake import exchange
from autopar.runtime.module import place_on
from autopar.runtime.shards import distribute, state_of

strided_shards.install()


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a DTensor on every rank (a collective call), or a plain tensor as it is; detached."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    state = state_of(tensor)
    if state is None:  # a sum over ranks, say: not one of ours
        return tensor.full_tensor()
    whole = (R,) * len(state)
    part = tensor.to_local()
    for step in local_steps(state, whole, tuple(tensor.shape), place_on(tensor.device_mesh)):
        part = step.run(part)
    return part


def full_state_dict(module: nn.Module) -> dict[str, Any]:
    """The original model's state dict: whole tensors on CPU on rank 0, ready for `torch.save`; empty on the other ranks.

    Gathers one tensor at a time. A collective call.
    """
    return dict(_to_rank_0(module.state_dict()))


def optimizer_state_dict(module: nn.Module, optimizer: torch.optim.Optimizer, *, full: bool = False) -> dict[str, Any]:
    """The state of `optimizer` named by parameter, `{"state": {name: {...}}, "param_groups": [...]}`; a collective call.

    With DTensors, for `torch.distributed.checkpoint`, under whatever plan and mesh it is loaded; or, where `full`, with whole tensors
    on CPU on rank 0 and empty elsewhere.
    """
    state: dict[str, Any] = dict(get_optimizer_state_dict(module, optimizer))
    return dict(_to_rank_0(state)) if full else state


def load_optimizer_state_dict(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state_dict` gave, under any plan: DTensors on this or other meshes, or whole tensors.

    Whole tensors must be given on every rank, or on rank 0 alone (then pass an empty mapping on the others). A collective call.
    """
    target: dict[str, Any] = dict(get_optimizer_state_dict(module, optimizer))
    if not all(exchange(bool(state), "loading the state of an optimizer", timeout_s=600.0)):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_optimizer_state_dict(module, optimizer, dict(state), options=options)
        return
    matched = {key: value for key, value in state.items() if key != "state"}
    matched["state"] = {
        name: {key: _like(value, target["state"].get(name, {}).get(key), f"{name}.{key}") for key, value in entries.items()}
        for name, entries in state["state"].items()
    }
    set_optimizer_state_dict(module, optimizer, matched)


def accept_whole_tensors(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """A `load_state_dict` pre-hook: whatever comes for a DTensor of `module` becomes one with its mesh and placement.

    Whole tensors (the same on every rank) are cut, DTensors resharded.
    """
    for name, held in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        key = prefix + name
        if key in state_dict and isinstance(state_dict[key], Tensor):
            state_dict[key] = _like(state_dict[key], held.detach(), key)


def _like(value: Any, target: Any, name: str) -> Any:
    """`value` with the mesh and placement of `target`. Raises `PlanMismatchError` where the shapes differ."""
    if not isinstance(value, Tensor) or not isinstance(target, Tensor):
        return value
    if isinstance(value, DTensor) and isinstance(target, DTensor):
        if value.device_mesh == target.device_mesh and value.placements == target.placements:
            return value
    elif not isinstance(value, DTensor) and not isinstance(target, DTensor):
        return value
    if value.shape != target.shape:
        raise PlanMismatchError(
            f"`{name}` has shape {list(value.shape)} in the checkpoint and {list(target.shape)} in the model; "
            "load a checkpoint of this model"
        )
    whole = whole_tensor(value)
    if not isinstance(target, DTensor):
        return whole
    state = state_of(target)
    assert state is not None
    return distribute(whole.to(target.device), target.device_mesh, state)


def _to_rank_0(tree: Any) -> Any:
    """The mapping `tree` with whole tensors on CPU, on rank 0; empty on other ranks. None holds more than one whole tensor at a time."""
    first = not dist.is_initialized() or dist.get_rank() == 0

    def walk(item: Any) -> Any:
        if isinstance(item, Mapping):
            found = {key: walk(value) for key, value in item.items()}
            return found if first else {}
        if isinstance(item, list | tuple):
            parts = [walk(value) for value in item]
            return type(item)(parts) if first else None
        if isinstance(item, Tensor):
            whole = whole_tensor(item)
            return whole.cpu().clone() if first else None
        return item if first else None

    return walk(tree)
