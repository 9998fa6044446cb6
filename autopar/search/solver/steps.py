"""Few time steps: a problem whose memory differs between them becomes one whose tables hold the memory of each (`Table.later_bytes`).

Nodes and edges with equal tables and equal intervals have equal tables again, so that what was folded stays folded, and elimination and
min-plus powers go on as if there were one step: they price a weighted sum (`autopar.search.solver.minimise`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autopar.search.solver.problem import Floats, Interval, Problem, Table

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
    made: list[tuple[Table, list[list[Floats]]]] = []

    def holds(parts: list[tuple[Table, Interval]]) -> list[Floats]:
        nothing = np.zeros(parts[0][0].memory_bytes.shape)
        return [sum([table.memory_bytes for table, (lo, hi) in parts if lo <= at < hi], nothing) for at in times or [0]]

    def number(table: int, interval: Interval, more: list[tuple[int, Interval]]) -> int:
        key = (table, interval, *more)
        if key not in numbers:
            numbers[key] = len(made)
            parts = [(problem.tables[t], span) for t, span in [(table, interval), *more]]
            modes = [holds(parts)]
            if parts[0][0].again is not None:
                modes.append(holds([(one.again or one, span) for one, span in parts]))
            made.append((parts[0][0], modes))
            held.extend(modes)
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

    def stepped(table: Table, modes: list[list[Floats]]) -> Table:
        later = tuple([modes[0][step] for step in kept[1:]])
        return Table(table.cost_s, modes[0][kept[0]], later, stepped(table.again, modes[1:]) if table.again is not None else None)

    tables = tuple([stepped(table, modes) for table, modes in made])
    untimed = replace(problem, nodes=nodes, edges=edges, tables=tables, live=None, edges_live=None, also=())
    return Steps(untimed, tuple([(times or [0])[step] for step in kept]))
