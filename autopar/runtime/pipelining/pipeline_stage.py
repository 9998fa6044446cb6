"""One stage on one rank: its program, the microbatches that are alive in it, and the gradients of its parameters.

A stage is lowered like any graph; what it receives are arguments of the program and what it sends are results. Between the two passes
of a microbatch lives one autograd graph from the received leaves to the sent roots. Gradients of parameters add up in the program's
leaves over the microbatches and are reduced once, behind the last.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

# Private in PyTorch; should they move: a backward pass for inputs alone and one for weights alone, as in zero-bubble schedules, and
# what goes with them to walk an autograd graph against its arrows.
from torch.distributed.pipelining._backward import (
    construct_reverse_graph,
    reverse_closure,
    stage_backward_input,
    stage_backward_weight,
)

from autopar.ir.assignment import Assignment
from autopar.ir.conversion import State
from autopar.ir.graph import Graph, Op
from autopar.ir.pipelining.stages import RECEIVE, SEND, Stage
from autopar.ir.placement import R
from autopar.ir.plan import SegmentPlan
from autopar.ir.tracing.leaf_modules import LeafModule
from autopar.runtime.convert import Place
from autopar.runtime.gather import Gatherer, buckets_of, hooks_of
from autopar.runtime.gradients import Message, Reducer
from autopar.runtime.lower import Borders, Mode, lower
from autopar.runtime.operators.alike import Draw
from autopar.runtime.parameters import Leaf, uses
from autopar.runtime.precision import Dtypes
from autopar.runtime.recompute import regions_of


@dataclass(frozen=True, slots=True)
class Sources:
    """What a stage reads besides inputs and received values: parameters by name, constants by value, how to look up a buffer, and the
    bodies of leaf modules by path."""

    parameters: Mapping[str, nn.Parameter]
    constants: Mapping[str, Tensor]
    buffer: Callable[[str], Tensor]
    leaf_modules: Mapping[str, LeafModule]


@dataclass(slots=True)
class _Alive:
    """A microbatch between its passes. `roots` stand for the results that carry a gradient, by position in what the stage sends (None:
    the loss); `relayed` says which received value a sent one is itself."""

    received: list[Tensor]
    roots: list[tuple[int | None, Tensor]]
    relayed: dict[int, int]


@dataclass(slots=True)
class _Owed:
    """What the weights' backward pass of a microbatch still needs."""

    roots: list[GradientEdge]
    gradients: list[Tensor]
    groups: list[dict[str, Any]]


class LiveStage:
    """`stage` for the rank at `place`, under `assignment`. `loss`: path of the output that is differentiated, where this stage makes it;
    the whole loss is the sum of those of all `microbatches` (`loss_terms`), or equal in all and counts once. `reached`: the values that
    its gradient flows to.

    `segments`: the plan's. `drawn`: how operations draw random numbers. `inputs`: the state in which each comes, by
    path. `splits_backward`: whether the schedule runs the weights' backward pass apart.
    """

    def __init__(
        self,
        stage: Stage,
        assignment: Assignment,
        place: Place,
        sources: Sources,
        segments: Sequence[SegmentPlan],
        drawn: Mapping[str, Draw],
        device: torch.device,
        *,
        inputs: Mapping[str, State],
        loss: str | None,
        reached: Container[str],
        loss_terms: bool,
        microbatches: int,
        splits_backward: bool,
        dtypes: Dtypes,
    ) -> None:
        graph = stage.graph
        self.stage, self.graph, self.assignment, self.place = stage, graph, assignment, place
        self.sources, self.drawn, self.device = sources, drawn, device
        self._inputs = inputs
        self.splits_backward = splits_backward
        self._counts = range(microbatches) if loss_terms else range(microbatches - 1, microbatches)
        self.loss = next((index for index, output in enumerate(graph.outputs) if output.path == loss), None)
        self.receives = tuple(op for op in graph.ops if op.target == RECEIVE)
        self.sends = tuple(op for op in graph.ops if op.target == SEND)
        self.differentiable_receives = tuple(op.outputs[0] in reached for op in self.receives)
        self.differentiable_sends = tuple(op.operands[0] in reached for op in self.sends)
        self.regions = regions_of(segments, stage.index)
        self._uses = uses(graph, assignment, place, dtypes)
        self.leaves = [Leaf(use, sources.parameters[use.fqn], place) for use in self._uses]
        self._buckets = buckets_of(self.leaves, [segment for segment in segments if segment.stage == stage.index])
        if splits_backward:
            # The weights' backward pass comes at any later time and reads what the forward pass did: leaves stay for the step.
            for bucket in self._buckets:
                bucket.keep = True
        self._gatherer = Gatherer(self._buckets)
        self._reducer = _StepReducer(self.leaves, self._gatherer.gradient_done, self._gatherer.backward_done)
        self._reducer.enabled = False
        self._programs: dict[tuple[Mode, bool], fx.GraphModule] = {}
        self._alive: dict[int, _Alive] = {}
        self._owed: dict[int, _Owed | None] = {}
        self._at_once: frozenset[int] | None = None

    # ---- states on the wire --------------------------------------------------------------------------------------------------------

    def received_state(self, op: Op) -> State:
        return self.assignment.output_states(op)[0]

    def sent_state(self, op: Op) -> State:
        return self.assignment.operand_states(op)[0]

    # ---- a step ----------------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A new step: parameters may have changed since the last."""
        renewed = [leaf.refresh() for leaf in self.leaves]
        if any(renewed):
            self._at_once = None
            self._reducer.watch()
            for bucket in self._buckets:
                bucket.renew()
        self._reducer.reset()
        self._gatherer.holding = False
        self._gatherer.start()
        self._gatherer.holding = True
        # The first microbatch may be long in coming. What stays for the step comes now, of the rest only what is used first.
        for index, bucket in enumerate(self._buckets):
            if bucket.keep or index == 0:
                bucket.prefetch()
        self._alive.clear()
        self._owed.clear()

    def forward(
        self, microbatch: int, inputs: Mapping[str, Tensor], received: Sequence[Tensor], counter: Tensor, mode: Mode, *, train: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the stage on one microbatch: what it returns of the model's outputs (in training the loss alone) and what it sends.

        `inputs` by path; `received` in wire order, this rank's parts. Outputs are whole, what is sent is detached.
        """
        graph, program = self._graph(train), self._program(mode, train)
        leaves = [
            tensor.detach().requires_grad_(train and differentiable)
            for tensor, differentiable in zip(received, self.differentiable_receives, strict=True)
        ]
        buffers = [self.sources.buffer(item.fqn) for item in graph.buffers]
        constants = [self.sources.constants[item.value] for item in graph.constants]
        arguments = [inputs[item.path] for item in graph.inputs]
        results = list(program(*arguments, *(leaf.tensor for leaf in self.leaves), *buffers, *constants, *leaves, counter))
        outputs, rest = results[: len(graph.outputs)], results[len(graph.outputs) :]
        updated = [index for index, item in enumerate(graph.buffers) if item.updated is not None]
        values, sent = rest[: len(updated)], rest[len(updated) :]
        if mode.statistics:
            with torch.no_grad():
                for index, value in zip(updated, values, strict=True):
                    buffers[index].copy_(value)
        if train:
            self._keep(microbatch, leaves, outputs, sent)
        return [output.detach() for output in outputs], [tensor.detach() for tensor in sent]

    def _keep(self, microbatch: int, leaves: list[Tensor], outputs: list[Tensor], sent: list[Tensor]) -> None:
        root: Callable[[Tensor], Tensor] = _Root.apply
        roots: list[tuple[int | None, Tensor]] = [(None, root(loss)) for loss in outputs if loss.requires_grad]
        relayed = {}
        for position, (tensor, differentiable) in enumerate(zip(sent, self.differentiable_sends, strict=True)):
            origin = next((index for index, leaf in enumerate(leaves) if tensor is leaf), None)
            if not differentiable or not tensor.requires_grad:
                continue
            if origin is not None:
                relayed[position] = origin
            else:
                roots.append((position, root(tensor)))
        self._alive[microbatch] = _Alive(leaves, roots, relayed)

    def backward(self, microbatch: int, gradients: Sequence[Tensor | None], *, reduce: bool = False) -> list[Tensor | None]:
        """Both backward passes: from the gradients of what was sent (None for what carries none) to those of what was received.

        `reduce`: it is the step's last; gradients of parameters are reduced as they come, in the background.
        """
        alive = self._alive.pop(microbatch)
        roots, given = self._seeds(microbatch, alive, gradients)
        if roots:
            self._reducer.enabled = reduce
            torch.autograd.backward(roots, given)
            self._reducer.enabled = False
        return self._of_received(alive, gradients)

    def backward_input(self, microbatch: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Only the gradients of what was received; `backward_weight` of the same microbatch follows some time.

        A stage that recomputes does both passes at once: each would compute the forward pass again.
        """
        if self.regions:
            self._owed[microbatch] = None
            return self.backward(microbatch, gradients)
        alive = self._alive.pop(microbatch)
        roots, given = self._seeds(microbatch, alive, gradients)
        inputs = [leaf for leaf in alive.received if leaf.requires_grad]
        if not inputs or not roots:
            self._owed[microbatch] = _Owed([get_gradient_edge(root) for root in roots], given, [])
            return self._of_received(alive, gradients)
        if self._at_once is None:
            self._at_once = _not_apart(roots, inputs, self._weights())
        at_once = [weight for index, weight in enumerate(self._weights()) if index in self._at_once]
        apart = [weight for index, weight in enumerate(self._weights()) if index not in self._at_once]
        _, groups = stage_backward_input(roots, given, [*inputs, *at_once], iter(apart))  # type: ignore[arg-type]  # any leaf will do
        self._owed[microbatch] = _Owed([], [], groups)
        self._hold()
        return self._of_received(alive, gradients)

    def backward_weight(self, microbatch: int) -> None:
        """The gradients of the weights that `backward_input` left."""
        owed = self._owed.pop(microbatch)
        if owed is None:
            return
        if owed.roots:
            torch.autograd.backward(owed.roots, owed.gradients)
        if owed.groups:
            stage_backward_weight(iter(self._weights()), owed.groups)  # type: ignore[arg-type]
        self._hold()

    def _hold(self) -> None:
        """Torch's passes for inputs and for weights alone leave gradients where no hook of the reducer sees them."""
        for leaf in self.leaves:
            leaf.hold()

    def reduce(self) -> None:
        """Start reducing the gradients that are left, in the background."""
        self._reducer.launch()

    def finish(self, *, reduced: bool = True) -> None:
        """End the step: with gradients `reduced` those of the parameters are set, or added to; gathered parameters are freed."""
        if reduced:
            self._reducer.land()
        self._gatherer.holding = False
        self._gatherer.backward_done()

    def abandon(self) -> None:
        """After a step that raised: forget all of it."""
        self._alive.clear()
        self._owed.clear()
        self._reducer.enabled = False
        self._reducer.reset()
        self.drop_terms()

    def drop_terms(self) -> None:
        """Forget gradients that no reduction has taken."""
        for leaf in self.leaves:
            leaf.drop()

    # ---- inside ----------------------------------------------------------------------------------------------------------------------

    def _weights(self) -> list[Tensor]:
        return [leaf.tensor for leaf in self.leaves if leaf.tensor.requires_grad]

    def _seeds(self, microbatch: int, alive: _Alive, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
        roots, given = [], []
        for position, root in alive.roots:
            gradient = torch.full_like(root, microbatch in self._counts) if position is None else gradients[position]
            assert gradient is not None
            roots.append(root)
            given.append(gradient)
        return roots, given

    def _of_received(self, alive: _Alive, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for leaf in alive.received:
            found.append(leaf.grad)
            leaf.grad = None
        for position, origin in alive.relayed.items():
            gradient, present = gradients[position], found[origin]
            found[origin] = gradient if present is None or gradient is None else present + gradient
        return found

    def _graph(self, train: bool) -> Graph:
        if not train:
            return self.graph
        return replace(self.graph, outputs=() if self.loss is None else (self.graph.outputs[self.loss],))

    def _program(self, mode: Mode, train: bool) -> fx.GraphModule:
        key = (mode, train)
        if key not in self._programs:
            graph, whole = self._graph(train), (R,) * len(self.place.mesh)
            inputs = {item.value: self._inputs[item.path] for item in graph.inputs}
            borders = Borders(inputs, {use.value: use.leaf for use in self._uses}, (whole,) * len(graph.outputs))
            hooks = hooks_of(self._buckets, self._gatherer, self._reducer.begin)
            regions = self.regions if train else ()
            self._programs[key] = lower(
                graph, self.assignment, self.place, borders, self.device, mode, hooks, regions, self.drawn, self.sources.leaf_modules
            )
        return self._programs[key]


class _Root(torch.autograd.Function):
    """Where a microbatch's backward pass begins: of its operand's shape, with its operand's gradient, and without its values, which live
    no longer than it takes to send them. Torch's `stage_backward_input` cuts it loose in place, so it is no view."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.new_empty(0).set_(tensor.new_empty(1).untyped_storage(), 0, tensor.size(), (0,) * tensor.dim())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _StepReducer(Reducer):
    """A `Reducer` whose messages stay under way behind the backward pass that sends them: the stage before is waiting for what that
    pass has for it, and nobody for these. So they are awaited early only to free memory."""

    @torch.no_grad()
    def _end(self) -> None:
        self._running = False
        if self.enabled:
            self.launch()
        self.on_end()

    def _attend(self, earlier: Message) -> None:
        if earlier.scatters:
            super()._attend(earlier)

    @torch.no_grad()
    def launch(self) -> None:
        self._send_rest()

    @torch.no_grad()
    def land(self) -> None:
        self._land()


def _not_apart(roots: Sequence[Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> frozenset[int]:
    """Positions of those `weights` whose gradients must be computed together with those of the `inputs`.

    PyTorch's backward pass for weights starts where a weight's path meets the path to an input. A weight that meets it in several places
    (one used twice) would have it run the path between them again, and one that reaches a root on a path of its own (a table that is
    sent on to later stages) would lose that part of its gradient.
    """
    ends = [get_gradient_edge(root).node for root in roots]
    behind = construct_reverse_graph(ends)
    goals = [get_gradient_edge(leaf).node for leaf in inputs]
    nodes = [get_gradient_edge(weight).node for weight in weights]
    found: set[int] = set()
    while True:
        toward, _ = reverse_closure([*goals, *(nodes[index] for index in found)], set(), behind)
        more = set()
        for index, node in enumerate(nodes):
            if index not in found:
                own, meets = reverse_closure([node], toward, behind)
                if len(meets) > 1 or any(end in own for end in ends):
                    more.add(index)
        if not more:
            return frozenset(found)
        found |= more
