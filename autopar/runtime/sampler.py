"""Per-rank batches: which ranks share a part of the batch, and the sampler that gives each its samples.

The batch dim is dim 0 of the plan's first input, and of every other input that has as many elements there. The axes that split it for
any of them are the *batch axes*: a rank's place on these says which part of the batch is its own, and ranks that differ only on
other axes need the same samples.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch.distributed as dist
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from autopar.errors import PlanMismatchError
from autopar.ir.placement import parse
from autopar.ir.plan import InputPlan, Plan


def batch_inputs(plan: Plan) -> tuple[InputPlan, ...]:
    """The inputs whose dim 0 is the batch."""
    shaped = [item for item in plan.inputs if item.shape]
    return tuple(item for item in shaped if item.shape[0] == shaped[0].shape[0])


def batch_axes(plan: Plan) -> tuple[str, ...]:
    """The mesh axes of more than one rank that split the batch, in mesh order."""
    splitting = {
        axis for item in batch_inputs(plan) for axis, text in item.placement.items() if parse(text).is_shard and parse(text).dim == 0
    }
    return tuple(axis for axis, size in plan.mesh.items() if axis in splitting and size > 1)


def batch_part(plan: Plan, rank: int) -> tuple[int, int]:
    """`(parts, index)`: into how many parts the plan cuts the batch, and which of them is `rank`'s."""
    splitting = batch_axes(plan)
    parts, index, remaining = 1, 0, plan.world_size
    for axis, size in plan.mesh.items():
        remaining //= size
        if axis in splitting:
            parts, index = parts * size, index * size + rank // remaining % size
    return parts, index


def sampler(
    plan: Plan, dataset: Dataset[Any], shuffle: bool = True, seed: int = 0, drop_last: bool = True, rank: int | None = None
) -> DistributedSampler[Any]:
    """A `DistributedSampler` that gives this rank the samples of its part of the batch (per-rank inputs).

    Use it with a `DataLoader` whose `batch_size` is the global batch divided by the number of parts, and call `set_epoch` as ever.
    `rank` is taken from the running job where it is not given.
    Raises `PlanMismatchError` where the rank is not one of the plan's.
    """
    if rank is None:
        rank = dist.get_rank() if dist.is_initialized() else 0
    if not 0 <= rank < plan.world_size:
        raise PlanMismatchError(f"rank {rank} is none of the plan's {plan.world_size} ranks; start {plan.world_size}, or plan for this job")
    assert isinstance(dataset, Sized)
    parts, index = batch_part(plan, rank)
    return DistributedSampler(dataset, num_replicas=parts, rank=index, shuffle=shuffle, seed=seed, drop_last=drop_last)
