"""Few time steps: a problem whose memory differs between them becomes one whose tables hold the memory of each (`Table.later_bytes`).

Nodes and edges with equal tables and equal intervals have equal tables again, so that what was folded stays folded, and elimination and
min-plus powers go on as if there were one step: they price a weighted sum (`autopar.search.minimise`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autopar.search.problem import Floats, Interval, Problem, Table

__all__ = ["Steps", "in_steps"]

_MOST = 4
_ALWAYS: Interval = (np.iinfo(np.int64).min, np.iinfo(np.int64).max)


@dataclass(frozen=True, slots=True)
class Steps:
    """A problem without intervals, whose tables hold the memory of the steps that begin at the times `starts`."""

    problem: Problem
    starts: tuple[int, ...]


def in_steps(problem: Problem, most: int = _MOST) -> Steps | None:
    """The problem by steps, or None where more than `most` are different.

    Steps at which no choice holds more than at another are left out.
    """
    if not problem.timed:
        return Steps(problem, (0,))
    live = problem.live or (_ALWAYS,) * len(problem.nodes)
    edges_live = problem.edges_live or (_ALWAYS,) * len(problem.edges)
    named = {*live, *edges_live, *[(lo, hi) for _, _, lo, hi in problem.also]}
    times = sorted({at for lo, hi in named if lo < hi for at in (lo, hi)})[:-1]
    if len(times) > 4 * most:
        return None
    further: dict[int, list[tuple[int, Interval]]] = {}
    for node, table, lo, hi in problem.also:
        further.setdefault(node, []).append((table, (lo, hi)))
    numbers: dict[object, int] = {}
    held: list[list[Floats]] = []
    costs: list[Floats] = []

    def number(table: int, interval: Interval, more: list[tuple[int, Interval]]) -> int:
        key = (table, interval, *more)
        if key not in numbers:
            numbers[key] = len(held)
            parts = [(problem.tables[table].memory_bytes, interval), *[(problem.tables[t].memory_bytes, span) for t, span in more]]
            nothing = np.zeros(parts[0][0].shape)
            held.append([sum([memory for memory, (lo, hi) in parts if lo <= at < hi], nothing) for at in times or [0]])
            costs.append(problem.tables[table].cost_s)
        return numbers[key]

    nodes = tuple([number(table, live[node], further.get(node, [])) for node, table in enumerate(problem.nodes)])
    edges = tuple([(i, j, number(table, edges_live[at], [])) for at, (i, j, table) in enumerate(problem.edges)])
    kept: list[int] = []
    for step in sorted(range(len(times) or 1), key=lambda step: -sum(float(table[step].sum()) for table in held)):
        if not any(all((table[step] <= table[other]).all() for table in held) for other in kept):
            kept.append(step)
    if len(kept) > most:
        return None
    kept.sort()
    tables = tuple([
        Table(cost, table[kept[0]], tuple([table[step] for step in kept[1:]])) for cost, table in zip(costs, held, strict=True)
    ])  # fmt: skip
    untimed = replace(problem, nodes=nodes, edges=edges, tables=tables, live=None, edges_live=None, also=())
    return Steps(untimed, tuple([(times or [0])[step] for step in kept]))
