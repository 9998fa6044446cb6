"""Per-rank batches: which ranks share a part of the batch, and the sampler that gives each its samples.

The batch dim is dim 0 of the plan's first input, and of every other input that has as many elements there. The axes that split it for
any of them are the *batch axes*: a rank's place on these says which part of the batch is its own, and ranks that differ only on
other axes need the same samples. Ranks of different groups of a pipeline need the same samples where they are the same part of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from autopar.errors import InputError, PlanMismatchError
from autopar.ir.placement import parse
from autopar.ir.plan import InputPlan, Plan


def batch_inputs(plan: Plan) -> tuple[InputPlan, ...]:
    """The inputs whose dim 0 is the batch; one that several stages read has a row for each."""
    shaped = [item for item in plan.inputs if item.shape]
    return tuple(item for item in shaped if item.shape[0] == shaped[0].shape[0])


def batch_axes(plan: Plan, group: int = 0) -> tuple[str, ...]:
    """The mesh axes of more than one rank that split the batch, in the order of the mesh of `group`."""
    splitting = {
        axis for item in batch_inputs(plan) for axis, text in item.placement.items() if parse(text).is_shard and parse(text).dim == 0
    }
    return tuple(axis for axis, size in plan.groups[group].mesh.items() if axis in splitting and size > 1)


def batch_parts(plan: Plan) -> int:
    """Into how many parts the plan cuts the batch.

    Raises `InputError` where the groups of a pipeline cut it differently: their ranks would need different samples of it.
    """
    counts = [math.prod(item.mesh[axis] for axis in batch_axes(plan, group)) for group, item in enumerate(plan.groups)]
    if len(set(counts)) > 1:
        raise InputError(
            f"the stages of this plan cut the batch in different numbers of parts ({', '.join(map(str, counts))}), so there is no part "
            'that is a rank\'s own; pass the whole batch on every rank (inputs="global")'
        )
    return counts[0]


def batch_part(plan: Plan, rank: int) -> tuple[int, int]:
    """`(parts, index)`: into how many parts the plan cuts the batch, and which of them is `rank`'s."""
    parts = batch_parts(plan)
    group = max(index for index, item in enumerate(plan.groups) if item.first_rank <= rank)
    splitting = batch_axes(plan, group)
    mesh = plan.groups[group].mesh
    index, place, remaining = 0, rank - plan.groups[group].first_rank, math.prod(mesh.values())
    for axis, size in mesh.items():
        remaining //= size
        if axis in splitting:
            index = index * size + place // remaining % size
    return parts, index


def sampler(
    plan: Plan, dataset: Dataset[Any], shuffle: bool = True, seed: int = 0, drop_last: bool = True, rank: int | None = None
) -> DistributedSampler[Any]:
    """A `DistributedSampler` that gives this rank the samples of its part of the batch (per-rank inputs).

    Use it with a `DataLoader` whose `batch_size` is the global batch divided by the number of parts, and call `set_epoch` as ever.
    That batch is the rank's part of every microbatch, one behind the other. `rank` is taken from the running job where it is not given.
    Raises `PlanMismatchError` where the rank is not one of the plan's, and `InputError` where the stages of a pipeline cut the batch
    differently.
    """
    if rank is None:
        rank = dist.get_rank() if dist.is_initialized() else 0
    if not 0 <= rank < plan.world_size:
        raise PlanMismatchError(f"rank {rank} is none of the plan's {plan.world_size} ranks; start {plan.world_size}, or plan for this job")
    assert isinstance(dataset, Sized)
    parts, index = batch_part(plan, rank)
    return DistributedSampler(dataset, num_replicas=parts, rank=index, shuffle=shuffle, seed=seed, drop_last=drop_last)
