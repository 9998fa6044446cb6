"""Repairs what `torch.distributed.checkpoint` does with a module of which each group of ranks holds a part (a pipeline).

Ranks that hold different parameters each save their own, which is right but for three things:

* a weight that several groups hold, in different parts perhaps, is saved by each of them, which the metadata refuses: here by the first;
* an optimizer's `param_groups` are saved by one rank and name its parameters only: here each rank names those of all ranks;
* "full" state dicts are made by ranks that have the same keys: here they are refused, with what to call instead.

`install` is called when such a module is made. Should PyTorch do these itself, `tests/runtime/test_resume.py` passes without it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed.checkpoint.state_dict as state_dict
from torch import nn
from torch.distributed.tensor import DTensor

from autopar.errors import RuntimeSetupError
from autopar.runtime.handshake import exchange
from autopar.runtime.state.parts import enrolled, part_in


def saved_elsewhere(tensor: DTensor, key: str) -> bool:
    """Whether `tensor`, saved under `key`, is or belongs to a parameter that an earlier group of ranks saves."""
    for module, part in enrolled():
        if not part.counted_elsewhere or all(item.device_mesh is not tensor.device_mesh for item in part.counted_elsewhere):  # type: ignore[attr-defined]
            continue
        elsewhere = {id(item) for item in part.counted_elsewhere}
        names = (name for name, item in module.named_parameters(remove_duplicate=False) if id(item) in elsewhere)
        if any(f".{name}." in f".{key}." for name in names):
            return True
    return False


def _write_items(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def write_items(self: DTensor, fqn: str, object: Any) -> Any:
        return [] if saved_elsewhere(self, fqn) else original(self, fqn, object)

    return write_items


def _optimizer_state(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def optimizer_state(model: nn.Module, optimizers: Any, info: Any) -> Any:
        if part_in(model) is None:
            return original(model, optimizers, info)
        if info.full_state_dict:
            raise RuntimeSetupError(_FULL.format("autopar.optimizer_state_dict(module, optimizer, full=True)"))
        found = original(model, optimizers, info)
        if "param_groups" in found:
            mine = [list(group["params"]) for group in found["param_groups"]]
            everyone = exchange(mine, "naming the parameters of an optimizer", timeout_s=600.0)
            for index, group in enumerate(found["param_groups"]):
                group["params"] = list(dict.fromkeys(name for theirs in everyone for name in (theirs[index : index + 1] or [[]])[0]))
        return found

    return optimizer_state


def _model_state(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def model_state(model: nn.Module, info: Any) -> Any:
        if info.full_state_dict and part_in(model) is not None:
            raise RuntimeSetupError(_FULL.format("autopar.full_state_dict(module)"))
        return original(model, info)

    return model_state


def _load_optimizer_state(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def load_optimizer_state(model: nn.Module, optimizers: Any, state: Any, info: Any) -> None:
        if info.broadcast_from_rank0 and part_in(model) is not None:
            raise RuntimeSetupError(_FULL.format("autopar.load_optimizer_state_dict(module, optimizer, state)"))
        original(model, optimizers, state, info)

    return load_optimizer_state


_FULL = (
    "under a pipeline no rank has all parameters, and PyTorch would take one rank's for the whole model: call `{}`, or save and load "
    "DTensors with torch.distributed.checkpoint"
)


def install() -> None:
    """Put the repairs in place; once, however often it is called."""
    if getattr(DTensor, "_autopar_parts", False):
        return
    # Private in PyTorch; should they move, the tests named above fail.
    DTensor.__create_write_items__ = _write_items(DTensor.__create_write_items__)  # type: ignore[method-assign]
    state_dict._get_optim_state_dict = _optimizer_state(state_dict._get_optim_state_dict)
    state_dict._get_model_state_dict = _model_state(state_dict._get_model_state_dict)
    state_dict._load_optim_state_dict = _load_optimizer_state(state_dict._load_optim_state_dict)
    DTensor._autopar_parts = True  # type: ignore[attr-defined]
