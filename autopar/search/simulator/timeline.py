"""Memory of a group over a step.

The walk follows the group's actions; the kinds are those of a plan's prediction (`KINDS`). All the time there are parameters, optimizer
state and what is resident. Beside them, piece by piece:

* A forward pass adds the piece's activations, or only its checkpoint where the backward pass recomputes.
* A backward pass takes them away when the piece is done; with a split backward pass its `W` does, and from `I` on there is also what is
  postponed. Where it recomputes, the piece's activations are there again while it runs.
* The piece's gradients come with its first backward pass, and stay until the end of the step.
* While a piece runs there is its workspace, its gathered parameters and those of the piece after it, which are fetched meanwhile.
* Gradients that become smaller when they are reduced are as large as they were until then. They are packed in messages that leave when
  they have 25 MiB, or at the end of the last backward pass; two are on their way at once (`autopar.runtime.gradients`). A message that
  packs more than one gradient is a copy, for a moment beside what it packs.
* What comes from another group has its place from when its receive is posted, which may be some actions ahead. What was sent, forward or
  back, is held until the stage has sent the same of the next microbatch (`autopar.runtime.pipelining.pipeline_wire`). What stages of one
  group hand to each other stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from autopar.ir.pipelining.schedules import Orders
from autopar.search.simulator.workload import Piece, Workload

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers")
PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, BUFFERS = range(5)
MESSAGE_BYTES = 25 * 2**20
IN_FLIGHT = 2
Level = tuple[float, float, float, float, float]
"""Bytes by kind, in the order of `KINDS`."""


@dataclass(frozen=True, slots=True)
class Memory:
    """`levels[i]` is what a rank holds from `times_s[i]` until `times_s[i + 1]`; `peak`: the largest, at `peak_s`."""

    times_s: tuple[float, ...]
    levels: tuple[Level, ...]
    peak_s: float
    peak: Level

    @property
    def peak_bytes(self) -> float:
        return sum(self.peak)

    def at_peak(self) -> dict[str, float]:
        """Bytes by kind at the peak."""
        return dict(zip(KINDS, self.peak, strict=True))


def memory(workload: Workload, group: int, spans: Sequence[tuple[float, float]], step_s: float) -> Memory:
    """The memory of `group`, whose actions run in `spans` (start and end in seconds). Within an action time is shared among the pieces
    as their computing is."""
    times: list[float] = []
    levels: list[Level] = []
    for action, fraction, level in walk(workload, group):
        start_s, end_s = spans[action] if action < len(spans) else (step_s, step_s)
        time_s = start_s + fraction * (end_s - start_s) if action >= 0 else 0.0
        if times and time_s <= times[-1]:
            time_s = times[-1]
        times.append(time_s)
        levels.append(level)
    top = max(range(len(levels)), key=lambda index: sum(levels[index]))
    return Memory(tuple(times), tuple(levels), times[top], levels[top])


def walk(workload: Workload, group: int) -> Iterator[tuple[int, float, Level]]:
    """(position of the action, how much of it is over, bytes by kind from there on); -1 before the first and their count after the last."""
    stages = [stage for stage in workload.stages if stage.group == group]
    pieces = [piece for stage in stages for piece in stage.pieces]
    resident = workload.resident_bytes[group] if workload.resident_bytes else 0.0
    now = [sum(piece.parameter_bytes for piece in pieces), 0.0, sum(piece.optimizer_bytes for piece in pieces), 0.0, resident]
    yield -1, 0.0, _level(now)
    graded: set[int] = set()
    order = workload.orders[group]
    final = {action.stage: action for action in order if workload.stages[action.stage].does(action.kind) in ("B", "W")}
    once = workload.microbatches == 1
    way = _Messages()
    at_end = workload.splits
    coming = _coming(workload, group)
    leaving: dict[tuple[int, bool], float] = {}  # by stage and whether forward: what it sent last
    handed: dict[tuple[int, int, bool], float] = {}  # by stage, microbatch and whether forward: what waits for it on its own group
    for position, action in enumerate(order):
        stage = workload.stages[action.stage]
        row, kind = stage.pieces, stage.does(action.kind)
        if not kind:
            continue
        handed.pop((action.stage, action.microbatch, kind == "F"), None)
        now[BUFFERS] = resident + coming[position] + sum(leaving.values()) + sum(handed.values())
        # What a stage receives from one of its own group is that one's memory.
        shared = _shared_bytes(workload, action.stage)
        done = 0.0
        run = row if kind == "F" else row[::-1]
        total = sum(_work(piece, kind) for piece in run) or 1.0
        makes_gradients = kind in "BW"
        for index, piece in enumerate(run):
            kept = piece.checkpoint_bytes if piece.recompute else piece.activation_bytes
            new = piece.gradient_bytes if makes_gradients and action.stage not in graded else 0.0
            if kind == "F":
                now[ACTIVATIONS] += kept - (shared if index == 0 else 0.0)
            if not once and kind == "B":
                now[GRADIENTS] += new  # the workspace of one microbatch counts them as they come
            extra = _passing(piece, run[index + 1] if index + 1 < len(run) else None, kind)
            if once and makes_gradients:
                way.add(piece.unreduced_bytes)
            rebuilt = piece.activation_bytes - kept if kind in "BI" else 0.0
            now[ACTIVATIONS] += rebuilt
            now[BUFFERS] += extra + way.bytes
            yield position, done / total, _level(now)
            now[ACTIVATIONS] -= rebuilt
            now[BUFFERS] -= extra + way.bytes
            if once or kind == "W":
                now[GRADIENTS] += new
            if kind == "I":
                now[ACTIVATIONS] += rebuilt + piece.postponed_bytes
            elif makes_gradients:
                again = piece.activation_bytes + piece.postponed_bytes if kind == "W" else kept
                now[ACTIVATIONS] -= again - (shared if index + 1 == len(run) else 0.0)
                if final[action.stage] == action:
                    copy = way.ready(piece, leaves=not at_end, last=index + 1 == len(run))
                    # A message is full in the middle of a piece; the last leaves at the end.
                    there = (again + rebuilt) / 2 if copy and index + 1 < len(run) else 0.0
                    now[BUFFERS] += copy + way.bytes
                    now[ACTIVATIONS] += there
                    yield position, (done + _work(piece, kind)) / total, _level(now)
                    now[ACTIVATIONS] -= there
                    now[BUFFERS] -= copy + way.bytes
                    way.settle(last=index + 1 == len(run))
            done += _work(piece, kind)
            now[BUFFERS] += way.bytes
            yield position, done / total, _level(now)
            now[BUFFERS] -= way.bytes
        if makes_gradients:
            graded.add(action.stage)
        if kind == "F":
            sent = sum(piece.sent_bytes for piece in row)
            if _is_here(workload, action.stage + 1):
                handed[action.stage + 1, action.microbatch, True] = sent
            else:
                leaving[action.stage, True] = sent
        if kind in "BI":
            if _is_here(workload, action.stage):
                handed[action.stage - 1, action.microbatch, False] = stage.receives_bytes
            else:
                leaving[action.stage, False] = stage.receives_bytes
    now[GRADIENTS], now[BUFFERS] = 0.0, resident
    yield len(order), 1.0, _level(now)


class _Messages:
    """Gradients on their way. `bytes`: what they take beyond what is left of them when they are reduced."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self._packing = self._packed = self._scattered = 0.0  # what is being packed: beyond what stays, in all, and of that scattered
        self._flying: list[float] = []

    def add(self, more: float) -> None:
        self.bytes += more
        self._packing += more

    def ready(self, piece: Piece, leaves: bool, last: bool) -> float:
        """A piece's gradients are there; returns what packing takes if a message leaves now: a copy, and where parts of it go to
        different ranks one more, in their order. (Of these at least a half is beyond what stays.)"""
        if piece.reduce:
            whole = piece.message_bytes or piece.gradient_bytes + piece.unreduced_bytes
            self._packed += whole
            self._scattered += piece.scattered_bytes if piece.message_bytes else min(whole, 2 * piece.unreduced_bytes)
        if not self._packed or (not last and (self._packed < MESSAGE_BYTES or not leaves)):
            return 0.0
        self._flying.append(self._packing)
        copy = max(2 * min(self._scattered, MESSAGE_BYTES), min(self._packed - self._scattered, MESSAGE_BYTES))
        self._packing = self._packed = self._scattered = 0.0
        return copy

    def settle(self, last: bool) -> None:
        while self._flying and (last or len(self._flying) > IN_FLIGHT):
            self.bytes -= self._flying.pop(0)


def _passing(piece: Piece, after: Piece | None, kind: str) -> float:
    """What is there only while `piece` runs, beside its activations."""
    if kind == "W":
        return 0.0
    if kind == "F":
        ahead = after is not None and after.gather
        passing = piece.unkept_bytes if piece.recompute else piece.workspace_bytes
        return passing + piece.gathered_bytes + (after.gathered_bytes if after and ahead else 0.0)
    ahead = after is not None and after.regather
    if kind == "I":
        return piece.input_workspace_bytes + piece.gathered_bytes + (after.gathered_bytes if after and ahead else 0.0)
    # Computing again what the forward pass had for a moment is over before the backward pass needs its own.
    passing = max(piece.workspace_bytes, piece.backward_workspace_bytes) if piece.recompute else piece.backward_workspace_bytes
    return passing + piece.gathered_bytes + (after.gathered_bytes if after and ahead else 0.0)


def _coming(workload: Workload, group: int) -> list[float]:
    """By action of the group, bytes of receives that are posted for later ones. Of a group on its own: the next microbatch's."""
    order, stages = workload.orders[group], workload.stages

    def size(stage: int, forward: bool) -> float:
        number = stage if forward else stage + 1
        return stages[number].receives_bytes if number < len(stages) and not _is_here(workload, number) else 0.0

    if len(workload.orders) == 1:
        last = {(action.stage, action.kind == "F"): action.microbatch for action in order}
        found = []
        waiting = {action.stage: size(action.stage, True) for action in order}
        for action in order:
            if action.kind == "F" and action.microbatch == last[action.stage, True]:
                waiting[action.stage] = 0.0
            found.append(sum(waiting.values()))
        return found
    row = [0.0] * len(order)
    for posted, read in receives(workload.orders)[group]:
        action = order[read]
        if more := size(action.stage, action.kind == "F"):
            for position in range(posted, read):
                row[position] += more
    return row


@lru_cache(maxsize=16)
def receives(orders: Orders) -> tuple[tuple[tuple[int, int], ...], ...]:
    """By group, for every receive the position of the action before which it is posted and of the one that reads it.

    PyTorch's runtime (`_add_send_recv`) lays actions out group after group, one each in turn as far as what they read has been sent, and
    posts a receive where its group stands when the other side sends."""
    group_of = {action.stage: group for group, order in enumerate(orders) for action in order}
    at = [0] * len(orders)
    posted: dict[tuple[int, int, bool], int] = {(0, action.microbatch, True): -1 for action in orders[group_of[0]]}
    posted |= {(max(group_of), action.microbatch, False): -1 for order in orders for action in order}
    found: list[list[tuple[int, int]]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for group, order in enumerate(orders):
            if at[group] == len(order):
                continue
            kind, stage, microbatch = order[at[group]]
            forward = kind == "F"
            if kind != "W":
                if (stage, microbatch, forward) not in posted:
                    continue
                begun = posted[stage, microbatch, forward]
                if 0 <= begun < at[group]:
                    found[group].append((begun, at[group]))
                other = stage + 1 if forward else stage - 1
                if other in group_of:
                    posted[other, microbatch, forward] = at[group_of[other]] if group_of[other] != group else -1
            at[group] += 1
            moved = True
    return tuple(tuple(rows) for rows in found)


def _is_here(workload: Workload, stage: int) -> bool:
    """Whether a stage receives from one of its own group."""
    return 0 < stage < len(workload.stages) and workload.stages[stage - 1].group == workload.stages[stage].group


def _shared_bytes(workload: Workload, stage: int) -> float:
    """Of what a stage receives, as much as the stage before keeps for itself, on the same ranks."""
    if not _is_here(workload, stage):
        return 0.0
    before = workload.stages[stage - 1].pieces
    if any(piece.recompute for piece in workload.stages[stage].pieces[:1]):
        return 0.0
    return max(0.0, workload.stages[stage].receives_bytes - sum(piece.sent_bytes for piece in before))


def _work(piece: Piece, kind: str) -> float:
    if kind == "F":
        return piece.forward_s + sum(flow.seconds for flow in piece.forward_comm)
    if kind == "W":
        return piece.weight_s
    seconds = piece.backward_s - (piece.weight_s if kind == "I" else 0.0) + sum(flow.seconds for flow in piece.backward_comm)
    return seconds + (piece.forward_s + sum(flow.seconds for flow in piece.forward_comm) if piece.recompute else 0.0)


def _level(now: list[float]) -> Level:
    return now[0], now[1], now[2], now[3], now[4]
