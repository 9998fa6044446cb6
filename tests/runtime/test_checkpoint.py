"""Parameters and optimizer states in every placement, saved under one mesh and loaded under another, by PyTorch's tools and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from autopar.errors import PlanMismatchError
from autopar.ir.conversion import State
from autopar.ir.placement import R, S
from autopar.runtime.process_mesh import mesh_for
from autopar.runtime.state.checkpoint import (
    accept_whole_tensors,
    full_state_dict,
    load_optimizer_state_dict,
    optimizer_state_dict,
    whole_tensor,
)
from autopar.runtime.state.shards import distribute
from autopar.runtime.verification.launch import RankPool

SHAPES = {"plain": (6, 5), "rows": (7, 3), "qkv": (3, 12), "qkv_bias": (12,), "both": (8, 6), "mixed": (12, 4)}
SQUARE: dict[str, State] = {
    "plain": (R, R), "rows": (S(0), R), "qkv": (S(0), S(1, 3)), "qkv_bias": (R, S(0, 3)), "both": (S(0), S(0)), "mixed": (S(0, 3), S(1)),
}  # fmt: skip
FLAT: dict[str, State] = {
    "plain": (R, S(1)), "rows": (R, S(0)), "qkv": (R, S(1, 3)), "qkv_bias": (R, R), "both": (R, S(1, 2)), "mixed": (R, S(0)),
}  # fmt: skip


def whole(scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in SHAPES.items()}


class Holder(nn.Module):
    """Parameters as a parallel module has them, and nothing else."""

    def __init__(self, mesh: dict[str, int], states: dict[str, State], scale: float) -> None:
        super().__init__()
        self.inner = nn.Module()
        for name, tensor in whole(scale).items():
            self.inner.register_parameter(name, nn.Parameter(distribute(tensor, mesh_for(mesh), states[name])))
        self.register_load_state_dict_pre_hook(accept_whole_tensors)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        for name, parameter in self.inner.named_parameters():
            assert isinstance(parameter, DTensor)
            gradient = whole(2.0)[name]
            parameter.grad = distribute(gradient, parameter.device_mesh, STATES[parameter.device_mesh.shape][name])
        optimizer.step()


STATES = {(2, 2): SQUARE, (1, 4): FLAT}


def square(scale: float = 1.0) -> Holder:
    return Holder({"dp": 2, "tp": 2}, SQUARE, scale)


def flat(scale: float = 1.0) -> Holder:
    return Holder({"dp": 1, "tp": 4}, FLAT, scale)


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=0.1)


def wholes(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: wholes(value) for key, value in tree.items()}
    return whole_tensor(tree).clone() if isinstance(tree, Tensor) else tree


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):  # PyTorch hands betas back as a list
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


def trained(make: Any) -> tuple[Holder, torch.optim.AdamW]:
    module = make()
    optimizer = adamw(module)
    for _ in range(2):
        module.step(optimizer)
    return module, optimizer


def snapshot(module: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    return wholes({"model": dict(module.state_dict()), "optimizer": optimizer_state_dict(module, optimizer)})


def through_dcp(path: str, there: Any, here: Any, helpers: bool) -> bool:
    """Save with one layout, load with another into a fresh model and optimizer."""
    module, optimizer = trained(there)
    other = here(0.0)
    fresh = adamw(other)
    if helpers:
        dcp.save({"model": module.state_dict(), "optimizer": optimizer_state_dict(module, optimizer)}, checkpoint_id=path)
        loaded = {"model": other.state_dict(), "optimizer": optimizer_state_dict(other, fresh)}
        dcp.load(loaded, checkpoint_id=path)
        other.load_state_dict(loaded["model"])
        load_optimizer_state_dict(other, fresh, loaded["optimizer"])
    else:
        model_state, optimizer_state = get_state_dict(module, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
        model_state, optimizer_state = get_state_dict(other, fresh)
        loaded = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(loaded, checkpoint_id=path)
        set_state_dict(other, fresh, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    return same(snapshot(module, optimizer), snapshot(other, fresh))


def whole_tensors_in_and_out() -> dict[str, bool]:
    expected = {f"inner.{name}": tensor for name, tensor in whole().items()}
    found = {}
    module = square()
    found["full_tensor"] = same({name: tensor.full_tensor() for name, tensor in module.state_dict().items()}, expected)
    found["whole_tensor"] = same(wholes(dict(module.state_dict())), expected)
    consolidated = full_state_dict(module)
    found["full_state_dict"] = same(consolidated, expected if dist.get_rank() == 0 else {})
    other = flat(0.0)
    other.load_state_dict(expected)
    found["load_state_dict of whole tensors"] = same(wholes(dict(other.state_dict())), expected)
    other = flat(0.0)
    other.load_state_dict(module.state_dict())
    found["load_state_dict of another mesh"] = same(wholes(dict(other.state_dict())), expected)
    other = square(0.0)
    set_model_state_dict(other, dict(expected), options=StateDictOptions(full_state_dict=True))
    found["set_model_state_dict"] = same(wholes(dict(other.state_dict())), expected)
    other = square(0.0)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(other, dict(expected) if dist.get_rank() == 0 else {}, options=options)
    found["set_model_state_dict from rank 0"] = same(wholes(dict(other.state_dict())), expected)
    gathered = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True))
    found["get_model_state_dict"] = same(dict(gathered), expected)
    try:
        other.load_state_dict({**expected, "inner.rows": torch.zeros(3, 7)})
    except PlanMismatchError as error:
        found["shape"] = "`inner.rows` has shape [3, 7] in the checkpoint and [7, 3]" in str(error)
    return found


def optimizer_on_rank_0() -> dict[str, bool]:
    module, optimizer = trained(square)
    expected = snapshot(module, optimizer)["optimizer"]
    whole_state = optimizer_state_dict(module, optimizer, full=True)
    found = {"full": same(whole_state, expected if dist.get_rank() == 0 else {})}
    other = flat()
    fresh = adamw(other)
    load_optimizer_state_dict(other, fresh, expected)
    found["whole everywhere"] = same(snapshot(other, fresh)["optimizer"], expected)
    fresh = adamw(other)
    load_optimizer_state_dict(other, fresh, whole_state)
    found["whole on rank 0"] = same(snapshot(other, fresh)["optimizer"], expected)
    return found


@pytest.mark.processes
@pytest.mark.parametrize("helpers", [True, False])
@pytest.mark.parametrize(("there", "here"), [(square, flat), (flat, square)])
def test_dcp_between_meshes(ranks4: RankPool, tmp_path: Path, there: Any, here: Any, helpers: bool) -> None:
    assert ranks4.run(through_dcp, str(tmp_path / "checkpoint"), there, here, helpers) == [True] * 4


@pytest.mark.processes
def test_whole_tensors(ranks4: RankPool) -> None:
    for found in ranks4.run(whole_tensors_in_and_out):
        assert all(found.values()) and "shape" in found, found


@pytest.mark.processes
def test_optimizer_as_a_single_file(ranks4: RankPool) -> None:
    for found in ranks4.run(optimizer_on_rank_0):
        assert all(found.values()), found
