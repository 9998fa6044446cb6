"""Saving and loading: what works with PyTorch's own tools as it is, and the few helpers for the rest.

`state_dict()` of a `ParallelModule` has DTensors under the original names, so `torch.distributed.checkpoint.save` and `load` take it,
under whatever plan and mesh; `load_state_dict` also takes the original model's own state dict of whole tensors. Optimizers are covered
by `torch.distributed.checkpoint.state_dict` (`get_state_dict`, `set_state_dict`) or by the two helpers here, which name optimizer
state by parameter. All of these are collective calls: every rank makes them.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.errors import PlanMismatchError
from autopar.ir.placement import R
from autopar.runtime.convert import local_steps
from autopar.runtime.handshake import agree, exchange
from autopar.runtime.module import place_on
from autopar.runtime.state import strided_shards
from autopar.runtime.state.parts import PartOfModel, part_in
from autopar.runtime.state.shards import distribute, state_of

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
    return dict(_to_rank_0(module.state_dict(), part_in(module)))


def optimizer_state_dict(module: nn.Module, optimizer: torch.optim.Optimizer, *, full: bool = False) -> dict[str, Any]:
    """The state of `optimizer` named by parameter, `{"state": {name: {...}}, "param_groups": [...]}`; a collective call.

    With DTensors, for `torch.distributed.checkpoint`, under whatever plan and mesh it is loaded; or, where `full`, with whole tensors
    on CPU on rank 0 and empty elsewhere.
    """
    state: dict[str, Any] = dict(get_optimizer_state_dict(module, optimizer))
    return dict(_to_rank_0(state, part_in(module))) if full else state


def load_optimizer_state_dict(module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `optimizer_state_dict` gave, under any plan: DTensors on this or other meshes, or whole tensors.

    Whole tensors must be given on every rank, or on rank 0 alone (then pass an empty mapping on the others). A collective call.
    """
    target: dict[str, Any] = dict(get_optimizer_state_dict(module, optimizer))
    given = all(exchange(bool(state), "loading the state of an optimizer", timeout_s=600.0))
    if not given and (part := part_in(module)) is not None:
        state = _from_rank_0(state, part, held=target["state"])
    elif not given:
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


def _to_rank_0(tree: Any, part: PartOfModel | None = None) -> Any:
    """The mapping `tree` with whole tensors on CPU, on rank 0; empty on other ranks. None holds more than one whole tensor at a time.

    `part`: each group of ranks has a part of the tree; rank 0 gets what it lacks from the first rank of each group.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    leaves = dict(_leaves(tree))
    described = {path: _described(leaf) for path, leaf in leaves.items()}
    holders = exchange((part.first, described), "gathering a state dict", timeout_s=600.0) if part is not None else [(True, described)]
    found: dict[_Path, Any] = {}
    for rank, (leads, theirs) in enumerate(holders):
        if not leads:
            continue
        after = next((other for other in range(rank + 1, len(holders)) if holders[other][0]), len(holders))  # of the next group
        member = part is None or rank <= dist.get_rank() < after
        for path, what in theirs.items():
            if path in found:
                continue
            found[path] = what
            if not isinstance(what, _Tensor):
                continue
            whole = whole_tensor(leaves[path]) if member else None
            if part is None or rank == 0:
                found[path] = whole.cpu().clone() if first and whole is not None else None
            elif dist.get_rank() == rank:
                assert whole is not None
                _send(whole, part)
            elif first:
                found[path] = _receive(what, rank, part)
            del whole
    return _tree(found, tree) if first else {}


def _from_rank_0(state: Mapping[str, Any], part: PartOfModel, held: Container[str]) -> dict[str, Any]:
    """The optimizer's state dict of whole tensors that rank 0 has, on every rank; of parameters only those that it has `held`."""
    leaves = dict(_leaves(state))
    described: dict[_Path, Any] = agree(lambda: {path: _described(leaf) for path, leaf in leaves.items()}, "loading a state dict")
    found: dict[_Path, Any] = {}
    for path, what in described.items():
        found[path] = what
        if isinstance(what, _Tensor):
            mine = leaves[path].to(part.device).contiguous() if dist.get_rank() == 0 else what.empty(part.device)
            if mine.numel():
                dist.broadcast(mine.view(-1).view(torch.uint8), src=0, group=part.everyone)
            found[path] = mine
            if path[0] == "state" and path[1] not in held:
                del found[path]
            del mine
    tree: dict[str, Any] = _tree(found, {})
    return tree


_Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


def _described(leaf: Any) -> Any:
    """What stands for a leaf while it is under way: of a tensor its kind, of all else the leaf itself."""
    if isinstance(leaf, Tensor):
        return _Tensor(tuple(leaf.shape), leaf.dtype)
    return pytree.tree_map_only(Tensor, lambda tensor: whole_tensor(tensor).cpu().clone(), leaf)


def _leaves(tree: Any, path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    """What stands in a tree of mappings under each path."""
    if isinstance(tree, Mapping) and (tree or not path):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path, tree


def _tree(leaves: Mapping[_Path, Any], like: Any) -> Any:
    found: dict[Any, Any] = {key: {} for key, value in like.items() if isinstance(value, Mapping)}
    for path, leaf in leaves.items():
        inner = found
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return found


def _send(whole: Tensor, part: PartOfModel) -> None:
    whole = whole.to(part.device).contiguous()
    if whole.numel():
        dist.send(whole.view(-1).view(torch.uint8), 0, group=part.everyone)


def _receive(what: _Tensor, rank: int, part: PartOfModel) -> Tensor:
    whole = what.empty(part.device)
    if whole.numel():
        dist.recv(whole.view(-1).view(torch.uint8), rank, group=part.everyone)
    return whole.cpu()
