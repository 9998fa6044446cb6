"""Memory of a group over a step.

The walk follows the group's actions; the kinds are those of a plan's prediction (`KINDS`). All the time there are parameters, optimizer
state and what is resident. Beside them, piece by piece:

* A forward pass adds the piece's activations, or only its checkpoint where the backward pass recomputes.
* A backward pass takes them away when the piece is done; with a split backward pass its `W` does, as it still reads them. Where it
  recomputes, the piece's activations are there again while it runs.
* The piece's gradients appear in its first backward pass, and stay until the end of the step.
* While a piece runs there is its workspace, its gathered parameters and those of the piece after it, which are fetched meanwhile; in the
  backward pass also the whole gradients of gathered parameters, which become the stored part when they are reduced: those of the piece
  that runs and of the one before, which are on their way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autopar.ir.schedules import Action
from autopar.search.workload import Piece, Workload

KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers")
PARAMETERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, BUFFERS = range(5)
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
    for position, action in enumerate(order):
        row = workload.stages[action.stage].pieces
        done = 0.0
        run = row if action.kind == "F" else row[::-1]
        total = sum(_work(piece, action) for piece in run) or 1.0
        for index, piece in enumerate(run):
            after = run[index + 1] if index + 1 < len(run) else None
            before = run[index - 1] if index else None
            kept = piece.checkpoint_bytes if piece.recompute else piece.activation_bytes
            if action.kind == "F":
                now[ACTIVATIONS] += kept
            elif action.kind in "BW" and action.stage not in graded:
                now[GRADIENTS] += piece.gradient_bytes
            extra = _passing(piece, after, before, action)
            rebuilt = piece.activation_bytes - kept if action.kind != "F" else 0.0
            now[ACTIVATIONS] += rebuilt
            now[BUFFERS] += extra
            yield position, done / total, _level(now)
            now[ACTIVATIONS] -= rebuilt
            now[BUFFERS] -= extra
            if action.kind in "BW":
                now[ACTIVATIONS] -= kept
            done += _work(piece, action)
            yield position, done / total, _level(now)
        if action.kind in "BW":
            graded.add(action.stage)
    now[GRADIENTS] = 0.0
    yield len(order), 1.0, _level(now)


def _passing(piece: Piece, after: Piece | None, before: Piece | None, action: Action) -> float:
    """What is there only while `piece` runs, beside its activations."""
    passing = piece.workspace_bytes
    if action.kind == "W":
        return passing
    passing += piece.gathered_bytes
    if after is not None and (after.gather if action.kind == "F" else after.regather):
        passing += after.gathered_bytes
    if action.kind != "F" and piece.reduce:
        passing += piece.gathered_bytes
        if before is not None and before.reduce:
            passing += before.gathered_bytes
    return passing


def _work(piece: Piece, action: Action) -> float:
    if action.kind == "F":
        return piece.forward_s + sum(flow.seconds for flow in piece.forward_comm)
    if action.kind == "W":
        return piece.weight_s
    seconds = piece.backward_s - (piece.weight_s if action.kind == "I" else 0.0) + sum(flow.seconds for flow in piece.backward_comm)
    return seconds + (piece.forward_s + sum(flow.seconds for flow in piece.forward_comm) if piece.recompute else 0.0)


def _level(now: list[float]) -> Level:
    return now[0], now[1], now[2], now[3], now[4]
