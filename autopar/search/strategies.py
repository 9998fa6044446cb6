"""The ways to run one operation on a mesh: one `Split` per axis, those that are valid together; and the ways to store a parameter."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from autopar.ir.assignment import Choice, Storage, conflict, state_conflict
from autopar.ir.conversion import State
from autopar.ir.graph import Graph, Op, Value
from autopar.ir.placement import Placement, R, S
from autopar.ir.rules import splits
from autopar.search.follow import fits

Allowed = tuple[frozenset[str] | None, ...]
"""Per axis the names of the splits that may be used; None allows all."""


def strategies(graph: Graph, op: Op, axes: tuple[str, ...], mesh: tuple[int, ...], allowed: Allowed) -> tuple[Choice, ...]:
    """All choices for `op` on axes of these sizes, without those that do the same as one before them. May be empty if `allowed` is
    narrow; with everything allowed it holds at least `replicate` on every axis, and on an axis of one rank nothing else."""
    options = splits(graph, op)
    per_axis = [
        [split for split in options if fits(split, size) and (names is None or split.name in names)] if size > 1 else options[:1]
        for size, names in zip(mesh, allowed, strict=True)
    ]
    found: dict[object, Choice] = {}
    for choice in product(*per_axis):
        does = tuple((split.inputs, split.outputs, split.work, split.implementation) for split in choice)
        if does not in found and conflict(graph, op, choice, axes, mesh) is None:
            found[does] = choice
    return tuple(found.values())


def storages(
    value: Value, mesh: tuple[int, ...], wanted: Iterable[State], trains: bool, pinned: tuple[Placement | None, ...],
    stored: tuple[tuple[Placement, ...] | None, ...] = (None, None), gathers: tuple[str, ...] = ("step", "use"),
) -> tuple[Storage, ...]:  # fmt: skip
    """The ways to store a parameter: per axis whole, split along the leading dim or along another that divides, or as an operation
    `wanted` it. `pinned` fixes an axis; `stored` lists what an axis may be instead; `gathers` are the times of gathering to consider.
    Where everything is whole there is nothing to gather."""
    per_axis: list[list[Placement]] = []
    wanted = list(wanted)
    for axis, parts in enumerate(mesh):
        pin, given = pinned[axis], stored[axis]
        if pin is not None:
            per_axis.append([pin])
        elif parts == 1:
            per_axis.append([R])
        elif given is not None:
            per_axis.append(list(given))
        else:
            even = [S(dim) for dim, size in enumerate(value.shape) if size % parts == 0 or (dim == 0 and size >= parts)]
            used = [state[axis] for state in wanted if state[axis].is_shard]
            # Of equal prices the first is taken: whole before parts, and parts along the leading dim before others.
            per_axis.append([R, *sorted({*used, *even}, key=lambda placement: (placement.dim, placement.blocks))])
    found = []
    for state in product(*per_axis):
        if state_conflict(state, value.shape) or not _nests(state, value.shape, mesh):
            continue
        whole = all(placement == R for placement in state)
        found += [Storage(state, gather) for gather in (("never",) if whole else gathers if trains else gathers[-1:])]
    return tuple(found)


def _nests(state: State, shape: tuple[int, ...], mesh: tuple[int, ...]) -> bool:
    """A dim stored in parts of parts divides evenly and has no blocks: other layouts have no DTensor that names them."""
    shards = [(placement, parts) for placement, parts in zip(state, mesh, strict=True) if placement.is_shard and parts > 1]
    if len(shards) < 2 or shards[0][0].dim != shards[1][0].dim:
        return True
    return shards[0][0].blocks == 1 and shape[shards[0][0].dim] % (shards[0][1] * shards[1][1]) == 0
