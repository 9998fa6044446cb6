"""Which elements travel between two groups of ranks that hold the same value in different parts. Plain numbers, no communication.

A value leaves one group in a state on that group's mesh and is wanted by another group in another state on another mesh. Every rank
that wants elements gets each of them from exactly one rank that has it; where several have it (replicas), the least busy one sends.
Both sides compute the same list from the same plan, so that nothing has to be negotiated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from autopar.ir.conversion import State
from autopar.ir.placement import Placement, R, chunk, local_shape

Run = tuple[int, int]
"""First index and length of consecutive indices of one dim."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A value on the ranks `first_rank, first_rank + 1, ...` of a mesh with axis sizes `mesh`: `state`, of `S` and `R` alone."""

    state: State
    mesh: tuple[int, ...]
    first_rank: int

    @property
    def size(self) -> int:
        return math.prod(self.mesh)

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where the global `rank` stands on the mesh."""
        number = rank - self.first_rank
        found = []
        for parts in reversed(self.mesh):
            number, index = divmod(number, parts)
            found.append(index)
        return tuple(reversed(found))

    def local_shape(self, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Shape of the part that `rank` holds of a value of global `shape`."""
        return local_shape(shape, self.state, self.mesh, self.coordinate(rank))

    def held(self, shape: tuple[int, ...], rank: int) -> tuple[tuple[Run, ...], ...]:
        """For every dim the runs of global indices that `rank` holds, in the order in which they lie in its local part."""
        coordinate = self.coordinate(rank)
        return tuple(_runs(size, dim, self.state, self.mesh, coordinate) for dim, size in enumerate(shape))


@dataclass(frozen=True, slots=True)
class Box:
    """Elements that are consecutive on both sides: where they start in the sender's and the receiver's local part, and how many."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.lengths)


@dataclass(frozen=True, slots=True)
class Message:
    """What rank `source` sends to rank `target` (global numbers): `boxes`, one behind the other, each in row-major order."""

    source: int
    target: int
    boxes: tuple[Box, ...]

    @property
    def numel(self) -> int:
        return sum(box.numel for box in self.boxes)


@lru_cache(maxsize=4096)
def messages(shape: tuple[int, ...], source: Layout, target: Layout) -> tuple[Message, ...]:
    """All messages that bring a value of global `shape` from `source` to `target`, by target rank, then by source rank.

    Every element of every target rank's part comes exactly once. Among ranks that hold the same part the one that sends least so far
    is taken; of equally busy ones that which stands where the target stands, so that equal meshes send rank to rank.
    """
    assert all(placement.is_shard or placement == R for placement in (*source.state, *target.state))
    replicas: dict[tuple[tuple[Run, ...], ...], list[int]] = {}
    for rank in range(source.first_rank, source.first_rank + source.size):
        replicas.setdefault(source.held(shape, rank), []).append(rank)
    sent = dict.fromkeys(range(source.first_rank, source.first_rank + source.size), 0)
    found = []
    for index in range(target.size):
        rank = target.first_rank + index
        wanted = target.held(shape, rank)
        stands = source.first_rank + index * source.size // target.size
        into = []
        for parts, holders in replicas.items():
            boxes = _boxes(parts, wanted)
            if boxes:
                sender = min(holders, key=lambda holder: (sent[holder], abs(holder - stands)))
                message = Message(sender, rank, boxes)
                sent[sender] += message.numel
                into.append(message)
        found += sorted(into, key=lambda message: message.source)
    return tuple(found)


def _boxes(source: tuple[tuple[Run, ...], ...], target: tuple[tuple[Run, ...], ...]) -> tuple[Box, ...]:
    along = [_overlaps(ours, theirs) for ours, theirs in zip(source, target, strict=True)]
    return tuple(Box(tuple(o[0] for o in box), tuple(o[1] for o in box), tuple(o[2] for o in box)) for box in product(*along))


def _overlaps(source: tuple[Run, ...], target: tuple[Run, ...]) -> list[tuple[int, int, int]]:
    """`(start in source's part, start in target's part, length)` of all indices that both hold."""
    found = []
    source_offset = 0
    for source_start, source_length in source:
        target_offset = 0
        for target_start, target_length in target:
            start, stop = max(source_start, target_start), min(source_start + source_length, target_start + target_length)
            if start < stop:
                found.append((source_offset + start - source_start, target_offset + start - target_start, stop - start))
            target_offset += target_length
        source_offset += source_length
    return found


@lru_cache(maxsize=65536)
def _runs(size: int, dim: int, state: tuple[Placement, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...]) -> tuple[Run, ...]:
    """The indices of dim `dim` (of `size`) that are held at `coordinate`: the axes cut in mesh order, the first coarsest."""
    runs: tuple[Run, ...] = ((0, size),) if size else ()
    for placement, parts, index in zip(state, mesh, coordinate, strict=True):
        if not placement.is_shard or placement.dim != dim:
            continue
        block = sum(length for _, length in runs) // placement.blocks
        start, length = chunk(block, parts, index)
        taken = [run for number in range(placement.blocks) for run in _take(runs, number * block + start, length)]
        runs = _joined(taken)
    return runs


def _take(runs: tuple[Run, ...], start: int, length: int) -> list[Run]:
    """The indices at positions `start` to `start + length` of those in `runs`."""
    found = []
    for first, count in runs:
        low, high = max(start, 0), min(start + length, count)
        if low < high:
            found.append((first + low, high - low))
        start -= count
    return found


def _joined(runs: list[Run]) -> tuple[Run, ...]:
    found: list[Run] = []
    for start, length in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return tuple(found)
