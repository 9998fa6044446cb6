"""What every decision costs, term by term, on one mesh.

* An operation takes `max(flops / achieved flop rate, bytes / achieved bandwidth) + launches` on its local operands, forward and backward.
* A conversion takes the time of its collectives and local copies, forward and backward (`autopar.ir.conversion`), and is not hidden.
* A parameter is converted from where it is stored to where it is used. That traffic goes in buckets beside computing: what is exposed
  is what exceeds the computing of the operation it serves, in the forward and in the backward pass each, and the device's `felt_share`
  of the rest.
* The optimizer's step reads and writes parameter, gradient and state once.

All is for one step of a stage: what runs for every microbatch counts `microbatches` times, activations are those of the `live`
microbatches between their forward and backward passes. Parameters gathered once a step, reductions of gradients and the optimizer count
once; with several microbatches gradients add up where they are used, and that memory is counted. Of what travels between stages, only
what the devices feel of it is counted here: the simulator says what of it nothing hides.

Every term adds up over nodes and edges, so that a solver may minimise the sum and anyone may add it up again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from autopar.errors import PlanError
from autopar.ir.assignment import Choice, Storage
from autopar.ir.cluster import Cluster
from autopar.ir.conversion import COLLECTIVES, Action, State, Step, steps
from autopar.ir.graph import DTYPE_BYTES, Value
from autopar.ir.placement import RP, Placement, R, local_shape
from autopar.ir.precision import Precision
from autopar.search.prices.collectives import axes, between
from autopar.search.prices.experts import INDEX_BYTES, Experts, Share, share
from autopar.search.prices.optimizers import OPTIMIZER_STATES as OPTIMIZER_STATES  # known here too
from autopar.search.prices.sequence import SequenceSplit, sequence_split
from autopar.search.prices.work import Work
from autopar.search.solver.problem import Floats

KEPT, LEAVES, WITHIN, ENTERS, ENTERS_TOO = WAYS = ("kept", "leaves", "within", "enters", "enters too")
"""Of an edge: between operations whose values are kept for the backward pass; from one that is recomputed to one that is not; inside a
repeat that is recomputed; into it (its checkpoint); into it, of a value that another edge has brought in."""
AGAIN = frozenset((WITHIN, ENTERS, ENTERS_TOO))


@dataclass(frozen=True, slots=True)
class Move:
    """One collective, run `times` a step: `axis` by index, `bytes` on one rank, `time_s` of which `exposed_s` is not hidden behind
    computing, both of one run."""

    kind: str
    axis: int
    phase: str
    bytes: int
    time_s: float
    exposed_s: float
    times: int = 1


@dataclass(frozen=True, slots=True)
class Term:
    """What one node or edge adds: time (`compute_s` includes local copies, `exposed_s` is communication) and memory by kind."""

    compute_s: float = 0.0
    exposed_s: float = 0.0
    memory: tuple[tuple[str, float], ...] = ()
    moves: tuple[Move, ...] = ()

    @property
    def cost_s(self) -> float:
        return self.compute_s + self.exposed_s

    @property
    def memory_bytes(self) -> float:
        return sum(size for _, size in self.memory)


NOTHING = Term()


@dataclass(frozen=True, slots=True)
class Conversion:
    """Time of local copies and collectives of a conversion, per phase; `moved` is whether the forward pass makes a new tensor, `gathers`
    whether it collects one from several ranks."""

    copy_s: tuple[float, float]
    moves: tuple[tuple[Action, int, str, int], ...]
    moved: bool
    gathers: bool
    exposed_s: float
    """Time of all collectives, one after the other."""
    forward_s: float = 0.0
    """Of these in the forward pass."""

    def __add__(self, other: Conversion) -> Conversion:
        """One after the other."""
        return Conversion(
            (self.copy_s[0] + other.copy_s[0], self.copy_s[1] + other.copy_s[1]), self.moves + other.moves, self.moved or other.moved,
            self.gathers or other.gathers, self.exposed_s + other.exposed_s, self.forward_s + other.forward_s,
        )  # fmt: skip


_IDENTITY = Conversion((0.0, 0.0), (), False, False, 0.0)

# All-reduces inside communicating implementations: (phase, how many numbers for each row, or for each channel of batch norm).
# Vocabulary cross-entropy: maximum, then sum of exponentials and the target's logit together, per row (Megatron-LM section 3). The
# softmax of a row and its normaliser alike; the gradient of a softmax needs the row's sum of gradients.
# Synchronised batch norm: mean and mean of squares of each channel forward; the two sums of the backward formula backward.
_INSIDE: Mapping[str, tuple[tuple[str, int], ...]] = {
    "vocab_cross_entropy": (("forward", 1), ("forward", 2)),
    "split_cross_entropy": (("forward", 1), ("forward", 1), ("backward", 1)),
    "split_softmax": (("forward", 1), ("forward", 1), ("backward", 1)),
    "split_logsumexp": (("forward", 1), ("forward", 1)),
    "split_amax": (("forward", 1), ("backward", 1)),
    "split_max": (("forward", 1), ("forward", 2)),
    "split_argmax": (("forward", 1), ("forward", 2)),
    "sync_batch_norm": (("forward", 2), ("backward", 2)),
}

# Passes over the first operand that such an implementation makes beside those of the operator itself. Vocabulary cross-entropy: forward
# the place of the maximum (1) beside the log-softmax that both make; backward difference, exponential and scaling (2 each) in place of
# four (`autopar.runtime.operators.local_ops`). The others make each step on its own (`autopar.runtime.operators.local_classes`).
_PASSES: Mapping[str, tuple[int, int]] = {
    "vocab_cross_entropy": (1, 2), "split_cross_entropy": (6, 4), "split_softmax": (6, 3), "split_logsumexp": (1, 0), "split_amax": (0, 2),
    "split_max": (4, 2), "split_argmax": (4, 0),
}  # fmt: skip


class Traffic(NamedTuple):
    """What a parameter's way to an operation and its gradient's way back take, before any is hidden: local copies a step (`copy_s`), one
    gathering for the forward pass (`gather_s`) and one for the backward pass (`regather_s`), reducing the gradient (`reduce_s`). Memory
    for a whole step: `gathered_bytes` of the parameter, `gradient_bytes` of the gradient on top of what its storage counts."""

    copy_s: float
    gather_s: float
    regather_s: float
    reduce_s: float
    gathered_bytes: int
    gradient_bytes: int


class Costs:
    """Prices on one mesh (`mesh`: axis sizes, outer first) of a cluster, whose first rank is `first_rank`.

    `precision`: in which dtypes parameters are stored and gradients reduced. `microbatches` a
    step; `live`: of how many at once a rank keeps activations; `wire_bytes_per_s`: of the link to other stages."""

    def __init__(
        self, cluster: Cluster, mesh: tuple[int, ...], names: tuple[str, ...], optimizer: str = "adamw", training: bool = True, *,
        microbatches: int = 1, live: int = 1, first_rank: int = 0, precision: Precision | None = None,
    ) -> None:  # fmt: skip
        assert 1 <= live <= microbatches
        if optimizer not in OPTIMIZER_STATES:
            raise PlanError(f"optimizer `{optimizer}` is not known; one of {', '.join(OPTIMIZER_STATES)}")
        self.mesh, self.names, self.training = mesh, names, training
        self.microbatches, self.live = microbatches, live
        self.precision = precision
        self.axes = axes(cluster, mesh, names, first_rank)
        ranks = prod(mesh)
        self.wire_bytes_per_s = between(cluster, (max(0, first_rank - ranks), ranks), (first_rank, ranks)).bytes_per_s
        self.states = OPTIMIZER_STATES[optimizer] if training else 0
        device = cluster.device
        rates = dict(device.flops_per_s)
        slowest = rates.get("float32", min(rates.values()))
        self._flops_per_s = {dtype: rates.get(dtype, slowest) * device.flops_efficiency for dtype in DTYPE_BYTES}
        self._bytes_per_s = device.memory_bytes_per_s * device.bandwidth_efficiency
        self._launch_s = device.launch_s
        self.felt_share = device.felt_share
        self.expert_imbalance = cluster.expert_imbalance
        self.conversion = cache(self._conversion)
        self.local_bytes = cache(self._local_bytes)
        self._legs: dict[object, dict[tuple[State, int, Placement], Conversion]] = {}
        # Of whoever builds problems (`autopar.search.build`): states by number, and what conversions between them cost.
        self.state_numbers: dict[State, int] = {}
        self.edge_prices: dict[object, dict[int, tuple[float, float, bool]]] = {}

    def living(self, live: int) -> Costs:
        """The same prices with activations of so many microbatches; what has been priced is known to both."""
        assert 1 <= live <= self.microbatches
        other = copy(self)
        other.live = live
        return other

    @property
    def prices(self) -> tuple[object, ...]:
        """Equal for costs that price everything alike but the memory of activations."""
        return self.mesh, self.axes, self.states, self.microbatches, self.wire_bytes_per_s, self.expert_imbalance, self.precision

    def _local_bytes(self, shape: tuple[int, ...], dtype: str, state: State) -> int:
        """Bytes of a value of global `shape` on the rank that holds most."""
        count = 1
        for size in local_shape(shape, state, self.mesh):
            count *= size
        return count * DTYPE_BYTES[dtype]

    def of(self, value: Value, state: State) -> int:
        return self.local_bytes(value.shape, value.dtype, state)

    # ---- operations -------------------------------------------------------------------------------------------------------------

    def op_times(self, work: Work, operands: tuple[Value, ...], outputs: tuple[Value, ...], choice: Choice) -> tuple[float, float]:
        """Computing time forward and backward on the rank with most work."""
        if work.experts is not None:
            return self._expert_times(work, work.experts, operands, outputs, choice)
        share = 1.0
        for split, size in zip(choice, self.mesh, strict=True):
            share /= size if split.work == "split" else 1
        ins = [self.of(value, tuple(split.inputs[slot] for split in choice)) for slot, value in enumerate(operands)]
        outs = [self.of(value, tuple(split.outputs[slot] for split in choice)) for slot, value in enumerate(outputs)]
        talks = any(split.implementation for split in choice)
        rate = self._flops_per_s[outputs[0].dtype] if outputs else 1.0
        forward_s = backward_s = 0.0
        if not work.view:
            forward_s = max(work.forward_flops * share / rate, (sum(ins) + sum(outs)) / self._bytes_per_s) + work.kernels * self._launch_s
        passes = [
            _PASSES[split.implementation]
            for split, size in zip(choice, self.mesh, strict=True)
            if split.implementation in _PASSES and size > 1
        ]
        if passes:
            forward_s += passes[0][0] * ins[0] / self._bytes_per_s
        blocks = sequence_split([split.implementation for split in choice], self.mesh, ins, outs, outputs[0].dtype) if talks else None
        if blocks:
            forward_s += blocks.merging_bytes()[0] / self._bytes_per_s + blocks.kernels()[0] * self._launch_s
        if work.trains:
            # Gradients of results and kept tensors are read, gradients of operands written.
            grads = sum(size for size, value in zip(ins, operands, strict=True) if value.requires_grad)
            if work.view:
                # The gradient of a view is a view, but for slices and the like, which pad: those have a smaller result.
                padded = len(outs) == 1 and ins and outs[0] < ins[0]
                backward_s = (outs[0] + ins[0]) / self._bytes_per_s + self._launch_s if padded else 0.0
            else:
                kept = sum(ins[slot] for slot in work.keeps) + sum(outs[slot] for slot in work.keeps_outputs)
                kept += int(work.extra.bytes * share) if work.extra else 0
                moved = sum(outs) + kept + grads
                kernels = max(1, 2 * work.kernels if work.backward_flops else work.kernels)
                backward_s = max(work.backward_flops * share / rate, moved / self._bytes_per_s) + kernels * self._launch_s
                backward_s += passes[0][1] * ins[0] / self._bytes_per_s if passes else 0.0
                if blocks:
                    backward_s += blocks.merging_bytes()[1] / self._bytes_per_s + blocks.kernels()[1] * self._launch_s
        return forward_s, backward_s

    def starts_s(self, works: Iterable[Work]) -> float:
        """What starting the kernels of operations takes at least, forward and backward, however they are split."""
        kernels = 0
        for work in works:
            if not work.view and work.experts is None:
                kernels += work.kernels
                kernels += max(1, 2 * work.kernels if work.backward_flops else work.kernels) if work.trains else 0
        return kernels * self._launch_s

    def op_term(
        self, work: Work, operands: tuple[Value, ...], outputs: tuple[Value, ...], choice: Choice, kept_outputs: frozenset[int],
        returned: tuple[tuple[int, bool], ...], again: bool = False,
    ) -> Term:  # fmt: skip
        """Computing, the collectives inside, what is kept for the backward pass, and bringing results home.

        `kept_outputs`: results whose storage lives until the backward pass; `returned`: results the model returns, and whether whole.
        `again`: the backward pass computes it once more instead of keeping anything.
        """
        forward_s, backward_s = self.op_times(work, operands, outputs, choice)
        compute_s = forward_s * (2 if again else 1) + backward_s
        moves = self._inside(work, operands, choice) + self._along(work, operands, outputs, choice, (forward_s, backward_s))
        moves = self._again(moves, again)
        kept = 0.0
        for slot in kept_outputs:
            kept += self.of(outputs[slot], tuple(split.outputs[slot] for split in choice))
        if work.experts is not None and work.trains:
            kept += self._expert_share(work.experts, choice).kept_bytes(work.experts)
        if work.extra:
            value = (outputs if work.extra.output else operands)[work.extra.slot]
            state = tuple((split.outputs if work.extra.output else split.inputs)[work.extra.slot] for split in choice)
            kept += work.extra.bytes * self.of(value, state) / max(value.size_bytes, 1)
        wire_s = 0.0
        if work.wire:  # what arrives: the value forward, or its gradient backward
            value = (outputs or operands)[0]
            state = tuple((split.outputs if outputs else split.inputs)[0] for split in choice)
            wire_s = self.felt_share * self.wire_s(value, state) if outputs or (value.requires_grad and self.training) else 0.0
        for slot, whole in returned:
            value = outputs[slot]
            state = tuple(split.outputs[slot] for split in choice)
            conversion = self.conversion(value.shape, value.dtype, False, state, home(state, whole))
            compute_s += conversion.copy_s[0]
            moves += self._moves(conversion)
        return self._term(compute_s, moves, 0.0 if again else kept, wire_s)

    def _again(self, moves: list[Move], again: bool) -> list[Move]:
        """Forward collectives run twice where the forward pass does."""
        return [replace(move, times=2 * move.times) if move.phase == "forward" else move for move in moves] if again else moves

    def _term(self, compute_s: float, moves: list[Move], kept: float, wire_s: float = 0.0) -> Term:
        """Of what every microbatch computes, waits for and keeps."""
        times = self.microbatches
        exposed_s = sum(move.exposed_s * move.times for move in moves) + wire_s * times
        return Term(compute_s * times, exposed_s, (("activations", kept * self.live),) if kept else (), tuple(moves))

    def workspace_bytes(self, work: Work, operands: tuple[Value, ...], outputs: tuple[Value, ...], choice: Choice) -> float:
        """What the operation holds for a moment on top of what is kept: forward its operands and results, backward their gradients."""
        if work.view:
            return 0.0
        ins = [self.of(value, tuple(split.inputs[slot] for split in choice)) for slot, value in enumerate(operands)]
        outs = [self.of(value, tuple(split.outputs[slot] for split in choice)) for slot, value in enumerate(outputs)]
        forward = sum(size for slot, size in enumerate(ins) if slot not in work.keeps) + sum(outs)
        backward = sum(outs) + sum(size for size, value in zip(ins, operands, strict=True) if value.requires_grad)
        if work.extra and not work.extra.output:
            # Backward through what is kept in an operand's stead (the log-softmax) makes its gradient first.
            slot = work.extra.slot
            backward += int(work.extra.bytes * ins[slot] / max(operands[slot].size_bytes, 1))
        held = self.held_bytes(work, operands, outputs, choice)
        return float(max(forward + held[0], backward + held[1] if work.trains else 0))

    def held_bytes(self, work: Work, operands: tuple[Value, ...], outputs: tuple[Value, ...], choice: Choice) -> tuple[float, float]:
        """What an operation holds for a moment beside operands, results and their gradients, forward and backward: local implementations,
        and rows of experts."""
        if work.experts is not None:
            within = self._expert_share(work.experts, choice).moment_bytes(work.experts)
            return within, within
        if not any(split.implementation for split in choice):
            return 0.0, 0.0
        blocks = self._blocks(operands, outputs, choice)
        return blocks.held_bytes() if blocks else (0.0, 0.0)

    def _blocks(self, operands: tuple[Value, ...], outputs: tuple[Value, ...], choice: Choice) -> SequenceSplit | None:
        """Attention over a sequence that an axis splits; None for all else."""
        names = [split.implementation for split in choice]
        if not any(names):
            return None
        ins = [self.of(value, tuple(split.inputs[slot] for split in choice)) for slot, value in enumerate(operands)]
        outs = [self.of(value, tuple(split.outputs[slot] for split in choice)) for slot, value in enumerate(outputs)]
        return sequence_split(names, self.mesh, ins, outs, outputs[0].dtype)

    def _along(
        self, work: Work, operands: tuple[Value, ...], outputs: tuple[Value, ...], choice: Choice, times_s: tuple[float, float]
    ) -> list[Move]:
        """What attention sends along a split sequence. What travels in a ring is exposed as far as it exceeds the computing beside it."""
        blocks = self._blocks(operands, outputs, choice)
        found: list[Move] = []
        for wire in blocks.wires(work.trains) if blocks else ():
            time_s = self.axes[wire.axis].time_s("shift", wire.bytes)
            found.append(Move("shift", wire.axis, wire.phase, wire.bytes, time_s, time_s, wire.times * self.microbatches))
        if blocks is None:
            return found
        for phase, computing_s in zip(("forward", "backward"), times_s, strict=True):
            hidden = [number for number, wire in enumerate(blocks.wires(work.trains)) if wire.hidden and wire.phase == phase]
            total_s = sum(found[number].time_s * found[number].times for number in hidden) / self.microbatches
            if total_s:
                share = float(self.exposed_s(total_s, computing_s * blocks.hidden_share)) / total_s
                for number in hidden:
                    found[number] = replace(found[number], exposed_s=found[number].time_s * share)
        return found

    def _expert_share(self, experts: Experts, choice: Choice) -> Share:
        return share(experts, choice, self.mesh, self.expert_imbalance)

    def _expert_times(
        self, work: Work, experts: Experts, operands: tuple[Value, ...], outputs: tuple[Value, ...], choice: Choice
    ) -> tuple[float, float]:
        """Of the fullest rank: products of its rows, or reading its tensors where that takes longer, and all that moves rows."""
        own, rate = self._expert_share(experts, choice), self._flops_per_s[operands[experts.first_tensor].dtype]
        tensors = sum(
            self.of(value, tuple(split.inputs[slot] for split in choice))
            for slot, value in enumerate(operands)
            if slot >= experts.first_tensor
        )
        products_s = own.rows * own.inside / rate
        forward_s = (
            max(products_s * experts.flops, tensors / self._bytes_per_s) + own.rows * experts.moved.on(own.inside) / self._bytes_per_s
        )
        forward_s += experts.kernels * self._launch_s
        # A token that travels is taken, put in a row, and what comes back put in place.
        carried = sum(copies for _, copies in own.sent) * (experts.token_bytes + experts.result_bytes) * 2
        forward_s += carried / self._bytes_per_s + len(own.sent) * experts.kernels * self._launch_s
        backward_s = 0.0
        if work.trains:
            moved = own.rows * experts.moved_backward.on(own.inside) + carried
            backward_s = max(products_s * experts.trained, 2 * tensors / self._bytes_per_s) + moved / self._bytes_per_s
            backward_s += 2 * experts.kernels * self._launch_s
        return forward_s, backward_s

    def _expert_moves(self, work: Work, experts: Experts, choice: Choice) -> list[Move]:
        """Tokens on their way to experts and back, and how many they are."""
        moves = []
        for axis, copies in self._expert_share(experts, choice).sent:
            there, back = copies * experts.token_bytes, copies * experts.result_bytes
            sizes = [("forward", self.mesh[axis] * INDEX_BYTES), ("forward", int(there)), ("forward", int(back))]
            if work.trains:
                sizes += [("backward", int(back)), ("backward", int(copies * experts.back_bytes))]
            for phase, size in sizes:
                time_s = self.axes[axis].time_s("all_to_all", size)
                moves.append(Move("all_to_all", axis, phase, size, time_s, time_s, self.microbatches))
        return moves

    def _inside(self, work: Work, operands: tuple[Value, ...], choice: Choice) -> list[Move]:
        if work.experts is not None:
            return self._expert_moves(work, work.experts, choice)
        moves = []
        for axis, split in enumerate(choice):
            if self.mesh[axis] == 1:
                continue
            for phase, numbers in _INSIDE.get(split.implementation, ()):
                if phase == "backward" and not work.trains:
                    continue
                value = operands[0]
                state = tuple(other.inputs[0] for other in choice)
                local = local_shape(value.shape, state, self.mesh)
                rows = local[1] if split.implementation == "sync_batch_norm" else prod(local) // max(1, local[split.inputs[0].dim])
                size = rows * numbers * max(4, DTYPE_BYTES[value.dtype])
                time_s = self.axes[axis].time_s("all_reduce", size)
                moves.append(Move("all_reduce", axis, phase, size, time_s, time_s, self.microbatches))
        return moves

    # ---- conversions ------------------------------------------------------------------------------------------------------------

    def _conversion(self, shape: tuple[int, ...], dtype: str, grad: bool, source: State, target: State) -> Conversion:
        if not grad:  # without a gradient the two kinds of replicas are one
            source, target = (tuple(R if p == RP else p for p in state) for state in (source, target))
        legs = self._legs.setdefault((shape, dtype, grad), {})
        state, found = source, _IDENTITY
        for step in steps(source, target):
            after = (step.target, *state[1:]) if step.axis == 0 else (*state[: step.axis], step.target, *state[step.axis + 1 :])
            if self.mesh[step.axis] > 1:
                key = state, step.axis, step.target
                leg = legs.get(key)
                if leg is None:
                    leg = legs[key] = self._leg(shape, dtype, grad, step, state, after)
                found = leg if found is _IDENTITY else found + leg
            state = after
        return found

    def _leg(self, shape: tuple[int, ...], dtype: str, grad: bool, step: Step, source: State, target: State) -> Conversion:
        """One step of a conversion, on one axis."""
        before, after = self.local_bytes(shape, dtype, source), self.local_bytes(shape, dtype, target)
        copy_s = [0.0, 0.0]
        moves: list[tuple[Action, int, str, int]] = []
        for phase, action in enumerate((step.forward, step.backward)[: 2 if grad and self.training else 1]):
            if action == "nothing":
                continue
            if action == "all_to_all" and step.source.dim == step.target.dim:
                # Other blocks of the same dim: the runtime gathers and slices.
                moves.append(("all_gather", step.axis, ("forward", "backward")[phase], before * self.mesh[step.axis]))
                copy_s[phase] += 2 * after / self._bytes_per_s + self._launch_s
            elif action in COLLECTIVES:
                size = before if action == "all_to_all" else max(before, after)
                moves.append((action, step.axis, ("forward", "backward")[phase], size))
            else:
                size = 2 * min(before, after) if action == "slice" else max(before, after)
                copy_s[phase] += size / self._bytes_per_s + self._launch_s
        moved = step.forward != "nothing"
        if not moved and not moves and copy_s == [0.0, 0.0]:
            return _IDENTITY
        times = [self.axes[axis].time_s(kind, size) for kind, axis, _, size in moves]
        forward_s = sum(seconds for seconds, move in zip(times, moves, strict=True) if move[2] == "forward")
        gathers = any(phase == "forward" for _, _, phase, _ in moves)
        return Conversion((copy_s[0], copy_s[1]), tuple(moves), moved, gathers, sum(times), forward_s)

    def _moves(self, conversion: Conversion) -> list[Move]:
        found = []
        for kind, axis, phase, size in conversion.moves:
            time_s = self.axes[axis].time_s(kind, size)
            found.append(Move(kind, axis, phase, size, time_s, time_s, self.microbatches))
        return found

    def edge_term(self, value: Value, source: State, targets: tuple[State, ...], keeps: str, way: str = KEPT) -> Term:
        """A value goes from where it is made to where one operation wants it (in several states, if it reads it more than once).

        `keeps`: `"target"` when the backward pass reads what arrives and nothing else accounts for it, `"copy"` when it does but the
        original is accounted for elsewhere, so that only a new tensor counts, `""` when it does not. `way`: see `WAYS`.
        """
        compute_s = 0.0
        moves: list[Move] = []
        kept = 0
        for target in dict.fromkeys(targets):
            conversion = self.conversion(value.shape, value.dtype, value.requires_grad, source, target)
            compute_s += sum(conversion.copy_s) + (conversion.copy_s[0] if way in AGAIN else 0.0)
            moves += self._again(self._moves(conversion), way in AGAIN)
            if way not in AGAIN and (keeps == "target" or (keeps and (way == LEAVES or conversion.moved))):
                kept += self.of(value, target)
        if way == ENTERS:
            kept = self.of(value, source)
        return self._term(compute_s, moves, kept)

    # ---- parameters -------------------------------------------------------------------------------------------------------------

    def parameter_term(self, value: Value, storage: Storage) -> Term:
        """Memory of a parameter, its gradient and its optimizer state, and the optimizer's step on them."""
        size = self.stored_bytes(value, storage.stored)
        if not (value.requires_grad and self.training):
            return Term(memory=(("parameters", size),))
        # One pass: parameter, gradient and states are read, parameter and states written.
        step_s = size * (3 + 2 * self.states) / self._bytes_per_s + self._launch_s * min(1.0, size / 2**20)
        return Term(step_s, 0.0, (("parameters", size), ("gradients", size), ("optimizer", self.states * size)))

    def is_cast(self, value: Value) -> bool:
        """Whether the plan's precision says of a parameter in which dtype it is stored and its gradient reduced."""
        return self.precision is not None and value.dtype == self.precision.compute

    def stored_bytes(self, value: Value, state: State) -> int:
        """Bytes of a parameter, of its gradient, or of one of its optimizer's states, on the rank that holds most."""
        dtype = self.precision.stored if self.precision is not None and self.is_cast(value) else value.dtype
        return self.local_bytes(value.shape, dtype, state)

    def reduced_bytes(self, value: Value, state: State) -> int:
        """Bytes of a parameter's gradient in `state` as it travels to be reduced."""
        dtype = self.precision.reduce if self.precision is not None and self.is_cast(value) else value.dtype
        return self.local_bytes(value.shape, dtype, state)

    def traffic(self, value: Value, storage: Storage, targets: tuple[State, ...], regather: bool) -> Traffic:
        """A parameter on its way from storage to use in states `targets`, and its gradient back. `regather`: the backward pass reads it."""
        rows, copies_s = self._conversions(value, storage, targets)
        gather_s, reduce_s = (
            sum(self.axes[axis].bucketed_s(kind, size) for kind, axis, phase, size in rows if phase == wanted)
            for wanted in ("forward", "backward")
        )
        held = gradients = 0
        trains = value.requires_grad and self.training
        copied = self.precision is not None and self.precision.copies and self.is_cast(value)
        for target in targets:
            whole = self.of(value, target)
            if (storage.gather == "step" and self.conversion(*_kind(value), storage.stored, target).gathers) or (
                copied and storage.gather != "use"
            ):
                held += whole
            if self.microbatches > 1 and trains:  # they add up in the dtype of what is stored
                gradients += max(0, self.stored_bytes(value, target) - self.stored_bytes(value, storage.stored))
        again = storage.gather == "use" and gather_s > 0.0
        casts_s = (0.0, 0.0)
        if copied:  # one way the stored part is read and written narrower, the other way its gradient is written wider
            one_s = (self.of(value, storage.stored) + self.stored_bytes(value, storage.stored)) / self._bytes_per_s + self._launch_s
            casts_s = one_s * (2 if again and regather else 1), one_s if trains else 0.0
        copy_s = (copies_s[0] + casts_s[0]) * (self.microbatches if again else 1) + copies_s[1] + casts_s[1]
        return Traffic(copy_s, gather_s, gather_s if again and regather else 0.0, reduce_s, held, gradients)

    def _conversions(
        self, value: Value, storage: Storage, targets: tuple[State, ...]
    ) -> tuple[list[tuple[Action, int, str, int]], tuple[float, float]]:
        """Collectives of one gathering and one reduction, and the time of local copies in each."""
        copy_s = [0.0, 0.0]
        found: list[tuple[Action, int, str, int]] = []
        for target in targets:
            conversion = self.conversion(*_kind(value), storage.stored, target)
            copy_s[0] += conversion.copy_s[0]
            copy_s[1] += conversion.copy_s[1]
            found += conversion.moves
        if self.precision is not None and self.is_cast(value):
            wide, narrow = DTYPE_BYTES[self.precision.reduce], DTYPE_BYTES[value.dtype]
            found = [(kind, axis, phase, size * wide // narrow if phase == "backward" else size) for kind, axis, phase, size in found]
        return found, (copy_s[0], copy_s[1])

    def shares(self, value: Value, storage: Storage, targets: tuple[State, ...]) -> tuple[Floats, Floats]:
        """Seconds of one gathering and of one reduction by axis, `(axes,)` each."""
        found = np.zeros(len(self.mesh)), np.zeros(len(self.mesh))
        for kind, axis, phase, size in self._conversions(value, storage, targets)[0]:
            found[phase == "backward"][axis] += self.axes[axis].bucketed_s(kind, size)
        return found

    def exposed_s(self, traffic_s: Any, computing_s: Any) -> Any:
        """Of traffic beside computing: what exceeds it, and what the device feels of the rest. Numbers or arrays."""
        return np.maximum(traffic_s - computing_s, 0.0) + self.felt_share * np.minimum(traffic_s, computing_s)

    def phases(self, traffic: Traffic, storage: Storage, times_s: tuple[Any, Any]) -> tuple[tuple[int, int, float, float, Any], ...]:
        """When the traffic of a parameter runs: rows of phase (0 forward, 1 backward), times a step, seconds of gathering and of reducing,
        and what is exposed of all times. Gathered once a step it is gathered for the first microbatch (in a pipeline before that comes, so
        that later groups wait for less than is said here); gradients are reduced after the last. `times_s`: computing of the operation
        that uses it, forward and backward."""
        m = self.microbatches
        times = m if storage.gather == "use" else 1
        first = 0, times, traffic.gather_s, 0.0, times * self.exposed_s(traffic.gather_s, times_s[0])
        last = 1, 1, traffic.regather_s, traffic.reduce_s, self.exposed_s(traffic.regather_s + traffic.reduce_s, times_s[1])
        if m == 1:
            return first, last
        return first, (1, m - 1, traffic.regather_s, 0.0, (m - 1) * self.exposed_s(traffic.regather_s, times_s[1])), last

    def use_term(self, value: Value, storage: Storage, targets: tuple[State, ...], times_s: tuple[float, float], regather: bool) -> Term:
        """A parameter goes from where it is stored to where an operation uses it, its gradient the way back.

        `times_s`: computing of that operation on one microbatch, forward and backward. `regather`: whether its backward pass reads it.
        """
        traffic = self.traffic(value, storage, targets, regather)
        rows, _ = self._conversions(value, storage, targets)
        moves: list[Move] = []
        exposed_s = 0.0
        for phase, times, gather_s, reduce_s, all_exposed_s in self.phases(traffic, storage, times_s):
            total_s = gather_s + reduce_s
            if not total_s:
                continue
            exposed = min(total_s, float(all_exposed_s) / times)
            exposed_s += float(all_exposed_s)
            for of, seconds in (("backward", reduce_s), ("forward", gather_s)):
                if not seconds:
                    continue
                for kind, axis, _, size in (row for row in rows if row[2] == of):
                    time_s = self.axes[axis].bucketed_s(kind, size)
                    label = ("forward", "backward")[phase]
                    label = "gradient" if of == "backward" and kind in ("all_reduce", "reduce_scatter") else label
                    moves.append(Move(kind, axis, label, size, time_s, exposed * time_s / total_s, times))
        memory = (("buffers", traffic.gathered_bytes), ("gradients", traffic.gradient_bytes))
        return Term(traffic.copy_s, exposed_s, tuple(item for item in memory if item[1]), tuple(moves))

    # ---- between stages ---------------------------------------------------------------------------------------------------------

    def wire_s(self, value: Value, state: State) -> float:
        """Time on the link for one rank to receive its part of `value`, of one microbatch."""
        return self.of(value, state) / self.wire_bytes_per_s


def _kind(value: Value) -> tuple[tuple[int, ...], str, bool]:
    return value.shape, value.dtype, value.requires_grad


def home(state: State, whole: bool) -> State:
    """Where a returned value ends: whole on every rank, or as it was computed with sums done (contract of outputs)."""
    return tuple(placement if placement.is_shard and not whole else R for placement in state)
