"""A judge of answers that shares nothing with the solver: cost and usage in whole numbers, from the file as it was written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

__all__ = ["Verdict", "judge"]

_IMPOSSIBLE = 10**18


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer costs, and whether it counts. `fault` says in words why it does not; empty where it does.

    `peak` is the largest summed usage over all time steps, `at` the first step that has it.
    """

    cost: int | Fraction
    peak: int | Fraction
    at: int
    fault: str

    @property
    def feasible(self) -> bool:
        return not self.fault


def judge(raw: dict[str, Any], choice: Sequence[int]) -> Verdict:
    """Cost and validity of `choice`, one strategy per node, for the `problem` object `raw` of a file (see `problem_file`).

    `raw` must be sound, as `read_instance` leaves it. An answer does not count when it is of the wrong length, names a strategy that
    does not exist, uses an entry that costs 10^18 or more, or breaks the limit at some time step.
    """
    nodes, edges = raw["nodes"], raw["edges"]
    costs, usages = nodes["costs"], nodes["usages"]
    if len(choice) != len(costs):
        return Verdict(0, 0, 0, f"{len(choice)} strategies for {len(costs)} nodes")
    for node, strategy in enumerate(choice):
        if not 0 <= strategy < len(costs[node]):
            return Verdict(0, 0, 0, f"node {node}: strategy {strategy} of {len(costs[node])}")
    terms = [(f"node {node}", costs[node][strategy]) for node, strategy in enumerate(choice)]
    for edge, ((i, j), table) in enumerate(zip(edges["nodes"], edges["costs"], strict=True)):
        terms.append((f"edge {edge}", table[choice[i] * len(costs[j]) + choice[j]]))
    forbidden = next((place for place, term in terms if term >= _IMPOSSIBLE), None)
    cost = sum(_exact(term) for _, term in terms if term < _IMPOSSIBLE)
    steps: dict[int, int | Fraction] = {}
    for node, (start, stop) in enumerate(nodes["intervals"]):
        usage = _exact(usages[node][choice[node]])
        steps[start] = steps.get(start, 0) + usage
        steps[stop] = steps.get(stop, 0) - usage
    peak: int | Fraction = 0
    now: int | Fraction = 0
    at = 0
    for step in sorted(steps):
        now += steps[step]
        if now > peak:
            peak, at = now, step
    limit = raw.get("usage_limit")
    fault = ""
    if forbidden is not None:
        fault = f"{forbidden}: not possible"
    elif limit is not None and peak > limit:
        fault = f"step {at}: usage {peak} over the limit of {limit}"
    return Verdict(cost, peak, at, fault)


def _exact(number: int | float) -> int | Fraction:
    return number if isinstance(number, int) else Fraction(number)
