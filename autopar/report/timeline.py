"""What a picture of a step shows: for each group of ranks what it computes, what it moves, and the memory it holds, over time.

The one form from which the SVG and the Chrome trace are written. Times in seconds from the start of the step, memory in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, for the inputs",
    "W": "backward, for the weights",
    "recompute": "forward again",
    "optimizer": "optimizer",
    "other": "other computing",
    "communication": "communication",
}
"""What a span can be, in the order of legends."""


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that a stream does from `start_s` to `end_s`: `kind` is in `KINDS`, `what` the part of the model or what is moved.

    `stage` and `microbatch` are None where it is for none in particular.
    """

    start_s: float
    end_s: float
    kind: str
    what: str = ""
    stage: int | None = None
    microbatch: int | None = None

    @property
    def passes(self) -> str:
        """Its pass: what is computed again belongs to the backward pass that needs it."""
        return "B" if self.kind in ("B", "recompute") else self.kind

    @property
    def words(self) -> str:
        """`backward of microbatch 3, stage 1`."""
        words = KINDS[self.passes]
        words += f" of microbatch {self.microbatch}" if self.microbatch is not None else ""
        return words + (f", stage {self.stage}" if self.stage is not None else "")


@dataclass(frozen=True, slots=True)
class Lane:
    """The spans of one stream, in order, none overlapping another."""

    name: str
    computes: bool
    spans: tuple[Span, ...]

    def actions(self) -> Iterator[list[Span]]:
        """Its spans, those of one pass of a microbatch through a stage together; each by itself where the lane does not compute."""
        action: list[Span] = []
        for span in self.spans:
            same = action and (span.stage, span.microbatch, span.passes) == (action[0].stage, action[0].microbatch, action[0].passes)
            if action and not (same and self.computes):
                yield action
                action = []
            action.append(span)
        if action:
            yield action


@dataclass(frozen=True, slots=True)
class Row:
    """A group of ranks that all do the same: `ranks` as in `0-3`; `memory` as (time, bytes by kind) at each change, in order."""

    group: int
    ranks: str
    size: int
    stages: tuple[int, ...]
    lanes: tuple[Lane, ...]
    memory: tuple[tuple[float, dict[str, int]], ...]

    @property
    def peak_bytes(self) -> int:
        return max((sum(kinds.values()) for _, kinds in self.memory), default=0)

    def level(self, count: int, step_s: float) -> list[int]:
        """The largest memory in each of `count` equal parts of the step, for drawing small."""
        levels = [0] * count
        points = [*self.memory, (step_s, {})]
        for (start, kinds), (end, _) in pairwise(points):
            total = sum(kinds.values())
            first = min(count - 1, max(0, int(start / step_s * count))) if step_s > 0 else 0
            last = min(count - 1, max(first, -int(-end / step_s * count // 1) - 1)) if step_s > 0 else count - 1
            for place in range(first, last + 1):
                levels[place] = max(levels[place], total)
        return levels


@dataclass(frozen=True, slots=True)
class Timeline:
    """A step of `step_s` seconds. `title` names the plan, `remark` what to know beside; of a rank's memory `limit_bytes` may be used."""

    title: str
    remark: str
    step_s: float
    limit_bytes: int
    rows: tuple[Row, ...]
