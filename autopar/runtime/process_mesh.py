"""The DeviceMesh that a plan runs on: taken from the running job, or from `torchrun`'s environment where none runs yet.

Groups are made once for each mesh shape and kept for as long as the job's default process group lives: many plans of one shape share
them, plans of different shapes have their own, and neither touches the default group that the user may use for work of his own.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import PlanMismatchError, RuntimeSetupError

DEFAULT_TIMEOUT_S = 600.0
"""Timeout of a collective where the caller gives none: PyTorch's own for NCCL, and a third of its own for gloo."""

_Axes = tuple[tuple[str, int], ...]
_Key = tuple[str, _Axes | tuple[_Axes, ...], float]
_meshes: weakref.WeakKeyDictionary[Any, dict[_Key, DeviceMesh]] = weakref.WeakKeyDictionary()
"""By default process group, so that meshes go when `destroy_process_group` drops it."""


def ensure_process_group(device: torch.device | str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
    """World size of the running job. Where no process group is up but `torchrun` has set its environment, one is initialised:
    nccl for a CUDA `device` (the default where there is one), gloo otherwise.

    1 where there is neither: a single process needs no group. Raises `RuntimeSetupError` where the job cannot be joined.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise RuntimeSetupError(
                f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']} but has no {', '.join(missing)}; start with "
                "`torchrun`, or call torch.distributed.init_process_group yourself"
            )
        return 1
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if str(device) == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    except Exception as error:
        raise RuntimeSetupError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the job at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout_s:g} s: {error}. Are all ranks started, and can they reach that address?"
        ) from error
    return dist.get_world_size()


def mesh_for(axes: Mapping[str, int], device: torch.device | str = "cpu", timeout_s: float = DEFAULT_TIMEOUT_S) -> DeviceMesh:
    """The mesh with these axis names and sizes (outer first) over all ranks of the job; `rank = outer index * inner size + inner index`.

    `timeout_s` is that of every collective on the mesh's groups. A mesh of one rank needs no process group and has none.
    A collective call: every rank must make it, in the same order among its other such calls.
    Raises `PlanMismatchError` where the sizes do not multiply to the world size.
    """
    device = torch.device(device)
    check_fits(axes, ensure_process_group(device, timeout_s))
    shape = tuple(axes.values())
    numbers = torch.arange(math.prod(shape), dtype=torch.int).view(shape)
    if not dist.is_initialized():
        # Private in PyTorch; should it go, a mesh over a one-rank group made with `dist.HashStore` replaces it.
        return DeviceMesh(device.type, numbers, mesh_dim_names=tuple(axes), _init_backend=False, _rank=0)
    known = _meshes.setdefault(dist.group.WORLD, {})
    key = (device.type, tuple(axes.items()), timeout_s)
    if key not in known:
        groups = [_group_along(numbers, axis, timeout_s) for axis in range(len(shape))]
        mine = [group for group in groups if group is not None]
        known[key] = DeviceMesh.from_group(mine, device.type, numbers, mesh_dim_names=tuple(axes))
    return known[key]


@dataclass(frozen=True, slots=True)
class GroupMesh:
    """This rank's place in a pipeline: its group's `index` and `mesh`, and a process group of `everyone` for what passes between groups."""

    index: int
    mesh: DeviceMesh
    everyone: dist.ProcessGroup


_pipelines: weakref.WeakKeyDictionary[Any, dict[_Key, GroupMesh]] = weakref.WeakKeyDictionary()


def group_mesh_for(
    groups: Sequence[Mapping[str, int]], device: torch.device | str = "cpu", timeout_s: float = DEFAULT_TIMEOUT_S
) -> GroupMesh:
    """The mesh of this rank's group, where `groups` (axis names and sizes, outer first) follow each other in rank order.

    A collective call, like `mesh_for`. Raises `PlanMismatchError` where the groups together have not as many ranks as the job.
    """
    device = torch.device(device)
    check_groups_fit(groups, ensure_process_group(device, timeout_s))
    if not dist.is_initialized():
        raise RuntimeSetupError("a plan with stages needs a process group, even of one rank; start it with `torchrun`")
    known = _pipelines.setdefault(dist.group.WORLD, {})
    key = (device.type, tuple(tuple(axes.items()) for axes in groups), timeout_s)
    if key not in known:
        known[key] = _group_mesh(groups, device, timeout_s)
    return known[key]


def _group_mesh(groups: Sequence[Mapping[str, int]], device: torch.device, timeout_s: float) -> GroupMesh:
    everyone = dist.new_group(timeout=timedelta(seconds=timeout_s))
    assert isinstance(everyone, dist.ProcessGroup)
    found = None
    first_rank = 0
    for index, axes in enumerate(groups):
        size = math.prod(axes.values())
        numbers = torch.arange(first_rank, first_rank + size, dtype=torch.int).view(tuple(axes.values()))
        along = [_group_along(numbers, axis, timeout_s) for axis in range(numbers.dim())]  # every rank makes all groups
        if first_rank <= dist.get_rank() < first_rank + size:
            mine = [group for group in along if group is not None]
            mesh = DeviceMesh.from_group(mine, device.type, numbers, mesh_dim_names=tuple(axes))
            found = GroupMesh(index, mesh, everyone)
        first_rank += size
    assert found is not None
    return found


def check_fits(axes: Mapping[str, int], world_size: int) -> None:
    """Raise `PlanMismatchError` where the axis sizes do not multiply to `world_size`."""
    _check_count(math.prod(axes.values()), _sizes(axes), world_size)


def check_groups_fit(groups: Sequence[Mapping[str, int]], world_size: int) -> None:
    """Raise `PlanMismatchError` where the groups together do not have `world_size` ranks."""
    ranks = sum(math.prod(axes.values()) for axes in groups)
    _check_count(ranks, f"{len(groups)} groups: {'; '.join(map(_sizes, groups))}", world_size)


def _sizes(axes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in axes.items())


def _check_count(ranks: int, what: str, world_size: int) -> None:
    if ranks == world_size:
        return
    start = f"it with `torchrun --nproc-per-node {ranks}`" if ranks > 1 else "one process"
    raise PlanMismatchError(
        f"the plan is for a mesh of {ranks} rank{'s' * (ranks > 1)} ({what}), but this job has {world_size}; "
        f"start {start}, or plan for {world_size} device{'s' * (world_size > 1)}"
    )


def _group_along(numbers: torch.Tensor, axis: int, timeout_s: float) -> dist.ProcessGroup | None:
    """This rank's group along `axis`, None where it is none of `numbers`. Our own even where it spans the whole job, so that its timeout
    and its order are ours alone."""
    mine = None
    for row in numbers.movedim(axis, -1).reshape(-1, numbers.shape[axis]).tolist():
        group = dist.new_group(row, timeout=timedelta(seconds=timeout_s))
        if dist.get_rank() in row:
            mine = group
    assert mine is None or isinstance(mine, dist.ProcessGroup)
    return mine
