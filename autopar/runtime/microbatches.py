"""The parts of a global batch on one rank: inputs cut for each microbatch, the prologue, and outputs joined again.

Microbatch `i` has the `i`-th of `count` equal parts of every input that is cut over time (`Microbatched.inputs`). A rank that is given
its own part of the batch holds its part of every microbatch, one behind the other: its rows are split in `count` blocks, `S(0, count)`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from autopar.ir.assignment import Assignment
from autopar.ir.conversion import State
from autopar.ir.graph import Graph
from autopar.ir.pipelining.microbatch import Microbatched
from autopar.ir.placement import Placement, R, S
from autopar.ir.rules import splits
from autopar.ir.tracing.leaf_modules import LeafModule
from autopar.runtime.convert import Place
from autopar.runtime.lower import Borders, Mode, lower


class Microbatches:
    """Cuts batches that come in `states` (by input path, on the mesh of `place`), in the order of `inputs` (paths).

    `buffers` and `constants` by name, whole: what the prologue reads of them it reads from here, when it runs. `reads`: what of the
    body's inputs this rank wants, by path.
    """

    def __init__(
        self,
        batched: Microbatched,
        inputs: Sequence[str],
        states: Mapping[str, State],
        place: Place,
        device: torch.device,
        constants: Mapping[str, Tensor],
        reads: Collection[str],
        leaf_modules: Mapping[str, LeafModule],
    ) -> None:
        self.count = batched.count
        self.batched = batched
        self._inputs = tuple(inputs)
        self._constants = constants
        self._reads = frozenset(reads)
        whole: State = (R,) * len(place.mesh)
        over_time = dict.fromkeys(inputs, R) | dict(batched.inputs)
        self.states: dict[str, State] = {path: _of_a_part(states[path], over_time[path], self.count) for path in inputs}
        """The state in which each input of the body comes, by path."""
        self._over_time = over_time
        self._programs: dict[Mode, fx.GraphModule] = {}
        self._lower = partial(_whole_program, batched.prologue, states, place, device, leaf_modules)
        if batched.prologue is not None:
            self.states |= {item.path: whole for item in batched.prologue.outputs}

    def cut(self, tensors: Sequence[Tensor], buffers: Mapping[str, Tensor], mode: Mode, counter: Tensor) -> list[dict[str, Tensor]]:
        """The inputs of the body that are read, by path, for each microbatch. `tensors`: the call's, in the order of `inputs`.

        `mode`, `counter`: whether and by what state the prologue draws masks of dropout, which are one for all microbatches.
        """
        given = dict(zip(self._inputs, tensors, strict=True))
        ahead: dict[str, Tensor] = {}
        prologue = self.batched.prologue
        if prologue is not None:
            if mode not in self._programs:
                self._programs[mode] = self._lower(mode)
            arguments = [given[item.path] for item in prologue.inputs]
            arguments += [buffers[item.fqn] for item in prologue.buffers]
            arguments += [self._constants[item.value] for item in prologue.constants]
            with torch.no_grad():
                results = self._programs[mode](*arguments, counter)
            ahead = {item.path: result for item, result in zip(prologue.outputs, results, strict=False)}
        read = {path: tensor for path, tensor in (given | ahead).items() if path in self._reads}
        return [
            {path: part_of(tensor, self._over_time[path], self.count, index) for path, tensor in read.items()}
            for index in range(self.count)
        ]

    def join(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Whole outputs from those of all microbatches."""
        return [joined(terms, placement) for terms, placement in zip(zip(*parts, strict=True), self.batched.outputs, strict=True)]


def part_of(tensor: Tensor, placement: Placement, count: int, index: int) -> Tensor:
    """Microbatch `index` of `count` of what is in `placement` over time."""
    if not placement.is_shard or count == 1:
        return tensor
    length = tensor.shape[placement.dim] // count
    return tensor.narrow(placement.dim, index * length, length).contiguous()


def joined(terms: Sequence[Tensor], placement: Placement) -> Tensor:
    """The whole of which `terms` are what each microbatch made."""
    if placement.is_shard:
        return torch.cat(list(terms), placement.dim)
    if placement.is_partial:
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total
    return terms[-1]


def _of_a_part(state: State, over_time: Placement, count: int) -> State:
    """The state of a microbatch of an input that comes in `state`."""
    if not over_time.is_shard:
        return state
    return tuple(S(0) if placement == S(0, count) and over_time.dim == 0 else placement for placement in state)


def _whole_program(
    graph: Graph | None,
    states: Mapping[str, State],
    place: Place,
    device: torch.device,
    leaf_modules: Mapping[str, LeafModule],
    mode: Mode,
) -> fx.GraphModule:
    """The program that runs `graph` whole on every rank, from inputs in `states`."""
    assert graph is not None
    whole: State = (R,) * len(place.mesh)
    replicate = {op.name: (splits(graph, op)[0],) * len(place.mesh) for op in graph.ops}
    assignment = Assignment(tuple(str(axis) for axis in range(len(place.mesh))), place.mesh, replicate, {})
    borders = Borders({item.value: states[item.path] for item in graph.inputs}, {}, (whole,) * len(graph.outputs))
    return lower(graph, assignment, place, borders, device, mode, leaf_modules=leaf_modules)
