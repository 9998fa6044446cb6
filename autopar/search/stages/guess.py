"""About what a step takes, for every way to run a model with stages: which ways are worth pricing.

A way is a number of groups `p`, a size `t` of the inner axis, and the number `k` of sequences of a microbatch on each of the `d` ranks of
the outer axis; a batch of `B` sequences is then `m = B / (d k)` microbatches. What a rank computes for a microbatch depends on `t` and `k`
alone, and grows with `k` about linearly. So the shortened model is solved for two `k` on one group of `t` ranks, and all else follows:

    step = (m + p - 1) (T / p + U / 2) + reduction

T: forward and backward pass of a microbatch, all stages; U: that of the longest unit, of which the longest stage has half of one too many;
with as much computed again as memory asks for: group `g` keeps activations of `p - g` microbatches, of which it has a part `1 / p`, beside
its part of the parameters, their gradients, and the optimizer's state, which is shared among `d`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from autopar.errors import PlanError
from autopar.ir.precision import stored_bytes
from autopar.search.meshes import AXES
from autopar.search.prices.collectives import axes
from autopar.search.prices.optimizers import OPTIMIZER_STATES
from autopar.search.stages.place import Settings
from autopar.search.stages.stage_prices import StagePrices

_SECOND = 4  # sequences of the larger of the two microbatches that are solved, at least
_FEW_MICROBATCHES = 2  # times the groups; fewer are tried only where there is nothing else
_SMALL_BUBBLE = 1 / 3  # of that of `1f1b`: what the best schedules have
_MOST_ACTIONS = 60_000  # of a step; a schedule with more takes long to simulate


@dataclass(frozen=True, slots=True)
class Guess:
    """A way to run the model with `groups` groups, and about what its step takes. `hope_s`: under a schedule with small bubbles, with even
    stages and reductions hidden."""

    groups: int
    tensor: int
    microbatches: int
    step_s: float
    hope_s: float


@dataclass(frozen=True, slots=True)
class _Line:
    """What all stages take for a microbatch of `k` sequences, on a line through two sizes: seconds forward and backward, bytes kept, bytes
    that enter units, bytes of workspace, seconds of the longest unit."""

    first: int
    at_first: np.ndarray
    slope: np.ndarray

    def at(self, k: int) -> list[float]:
        found: list[float] = np.maximum(self.at_first + (k - self.first) * self.slope, 0.0).tolist()
        return found


class Guesses:
    """Ways to run the model that `prices` prices. `microbatches`: what is forced."""

    def __init__(self, prices: StagePrices, settings: Settings, schedule: str, microbatches: int | None) -> None:
        self.prices, self.settings, self.schedule, self.forced = prices, settings, schedule, microbatches
        graph = prices.graph
        self.parameter_bytes = sum(stored_bytes(graph.values[item.value], settings.precision) for item in graph.parameters)
        self._line = cache(self._make_line)
        self._counts = cache(self._make_counts)

    def microbatches(self, groups: int) -> tuple[int, ...]:
        """Numbers of microbatches that pipelines of so many groups may have."""
        return self._counts(groups)

    def _make_counts(self, groups: int) -> tuple[int, ...]:
        if self.forced is not None:
            return (self.forced,) if self.prices.divides(self.forced) else ()
        batch = self.prices.batch
        most = max(2 * groups, _MOST_ACTIONS // (2 * groups))
        found = [count for count in range(2, min(batch, most) + 1) if batch % count == 0]
        enough = [count for count in found if count >= _FEW_MICROBATCHES * groups] or found[-1:]
        return tuple(count for count in (enough if groups > 1 else found) if self.prices.divides(count))

    def best(self, groups: int) -> tuple[Guess, ...]:
        """All ways with so many groups, the most promising first."""
        size = self.settings.cluster.world_size // groups
        found = []
        for tensor in self.prices.tensor:
            if size % tensor:
                continue
            for count in self._counts(groups):
                each = self.prices.batch / count / (size // tensor)  # sequences of a microbatch on a rank
                times_s = self._times_s(groups, tensor, count, max(1, math.ceil(each)))
                if times_s is not None:
                    found.append(Guess(groups, tensor, count, *times_s))
        return tuple(sorted(found, key=lambda guess: (guess.step_s, guess.microbatches)))

    def _times_s(self, p: int, tensor: int, m: int, k: int) -> tuple[float, float] | None:
        """A microbatch of fewer sequences than `d` is priced as one for each rank: about what it is if something else is split instead."""
        line = self._line(tensor)
        if line is None:
            return None
        forward_s, backward_s, kept, enters, workspace, longest_s = line.at(k)
        settings = self.settings
        d = settings.cluster.world_size // (p * tensor)
        held = self.parameter_bytes / (p * tensor)
        fixed = held * (2 + OPTIMIZER_STATES[settings.optimizer] / d)
        live = np.minimum(m, p - np.arange(p)) / p
        room = settings.limit_bytes - fixed - workspace
        again = np.clip((live * kept - room) / np.maximum(live * (kept - enters), 1.0), 0.0, None)
        tight = settings.recompute == "none"
        lacking = float(np.maximum(again - (0.0 if tight else 1.0), 0.0).max())  # what does not fit at all comes last
        one_s = forward_s + backward_s + float(np.minimum(again, 1.0).mean()) * (0.0 if tight else forward_s)
        if settings.recompute == "all":
            one_s = 2 * forward_s + backward_s
        slot_s = max(one_s / p + (longest_s / 2 if p > 1 else 0.0), longest_s)
        axis = axes(settings.cluster, (d, tensor), AXES)[0]
        reduce_s = axis.bucketed_s("all_reduce", held) if d > 1 else 0.0
        step_s, hope_s = (m + p - 1) * slot_s + reduce_s, (m + (p - 1) * _SMALL_BUBBLE) * max(one_s / p, longest_s)
        return step_s * (1 + 10 * lacking), hope_s

    def _make_line(self, tensor: int) -> _Line | None:
        batch = self.prices.batch
        sizes = [k for k in range(1, batch + 1) if batch % k == 0 and k < batch and self.prices.divides(batch // k)]
        if not sizes:
            return None
        first = sizes[0]
        second = next((k for k in sizes if k >= _SECOND * first), sizes[-1])
        try:
            rows = [self._whole(tensor, batch // k) for k in (first, second)]
        except PlanError:
            return None
        if rows[0] is None or rows[1] is None:
            return None
        slope = (rows[1] - rows[0]) / (second - first) if second > first else rows[0] / first
        return _Line(first, rows[0], slope)

    def _whole(self, tensor: int, microbatches: int) -> np.ndarray | None:
        found = self.prices.solved((1, tensor), microbatches, 1)
        if not found:
            return None
        fastest = min(found, key=lambda one: one.all_units.forward_s + one.all_units.backward_s)
        cost = fastest.all_units
        longest_s = fastest.longest_unit_s
        return np.array([
            cost.forward_s, cost.backward_s, cost.live_bytes, float(fastest.enters_bytes.sum()), cost.workspace_bytes, longest_s
        ])  # fmt: skip
