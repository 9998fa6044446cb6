"""Check that a problem keeps the laws that `Problem` states, and name the place where it does not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autopar.errors import PlanError
from autopar.search.solver.problem import Ints, Problem
from autopar.search.solver.reduce import domain_sizes

__all__ = ["check"]


def check(problem: Problem) -> None:
    """Raise `PlanError` naming the place where `problem` breaks the laws of its docstring."""
    for index, table in enumerate(problem.tables):
        cost, memory = table.cost_s, table.memory_bytes
        if cost.shape != memory.shape or cost.ndim not in (1, 2) or 0 in cost.shape:
            raise PlanError(f"table {index}: cost has shape {cost.shape}, memory {memory.shape}; both must be (n,) or (n, m), not empty")
        if np.isnan(cost).any() or (cost == -np.inf).any():
            raise PlanError(f"table {index}: cost_s holds {'NaN' if np.isnan(cost).any() else '-inf'} at {_first(~(cost > -np.inf))}")
        if not (memory >= 0).all() or np.isinf(memory).any():
            raise PlanError(
                f"table {index}: memory_bytes must be finite and not negative; see entry {_first(~((memory >= 0) & (memory < np.inf)))}"
            )
    count = len(problem.tables)
    shapes = [table.cost_s.shape for table in problem.tables]
    nodes, edges = np.array(problem.nodes, np.int64), np.array(problem.edges, np.int64).reshape(-1, 3)
    for node in np.flatnonzero((nodes < 0) | (nodes >= count))[:1].tolist():
        raise PlanError(f"node {node}: table {nodes[node]} does not exist; there are {count}")
    vector = np.array([len(shape) == 1 for shape in shapes], np.bool_)
    for node in np.flatnonzero(~vector[nodes])[:1].tolist() if len(nodes) else ():
        raise PlanError(f"node {node}: table {nodes[node]} has shape {shapes[nodes[node]]}; a node's is (n,)")
    sizes = domain_sizes(problem)
    i, j, table_of = edges.T
    for edge in np.flatnonzero((i < 0) | (j <= i) | (j >= len(nodes)))[:1].tolist():
        raise PlanError(f"edge {edge}: joins nodes {i[edge]} and {j[edge]}; wanted 0 <= i < j < {len(nodes)}")
    for edge in np.flatnonzero((table_of < 0) | (table_of >= count))[:1].tolist():
        raise PlanError(f"edge {edge}: table {table_of[edge]} does not exist; there are {count}")
    if len(edges):
        wanted = np.array([shape if len(shape) == 2 else (-1, -1) for shape in shapes], np.int64)[table_of]
        for edge in np.flatnonzero((wanted[:, 0] != sizes[i]) | (wanted[:, 1] != sizes[j]))[:1].tolist():
            raise PlanError(
                f"edge {edge}: table {table_of[edge]} has shape {shapes[table_of[edge]]}, but nodes {i[edge]}, {j[edge]} have "
                f"{sizes[i[edge]]}, {sizes[j[edge]]} strategies"
            )
    at = 0
    for segment in problem.segments:
        if segment.start != at or segment.length < 1 or segment.count < 1:
            raise PlanError(f"segments must tile the nodes: wanted one that starts at {at}, found {segment}")
        at = segment.stop
    if problem.segments and at != len(problem.nodes):
        raise PlanError(f"segments end at node {at}, the problem has {len(problem.nodes)}")
    _check_times(problem, sizes, shapes)
    if np.isnan(problem.memory_limit_bytes):
        raise PlanError("memory_limit_bytes is NaN; use inf for no limit")


def _check_times(problem: Problem, sizes: Ints, shapes: list[tuple[int, ...]]) -> None:
    """Raise `PlanError` where intervals of time, or further holdings, break the laws."""
    further = [(lo, hi) for _, _, lo, hi in problem.also]
    for name, live, count in (
        ("live", problem.live, len(problem.nodes)),
        ("edges_live", problem.edges_live, len(problem.edges)),
        ("also", further, len(further)),
    ):
        if live is None:
            continue
        if len(live) != count:
            raise PlanError(f"{name} has {len(live)} intervals, and there are {count} {'edges' if name == 'edges_live' else 'nodes'}")
        bounds = np.array(live, np.int64).reshape(-1, 2)
        for at in np.flatnonzero(bounds[:, 1] < bounds[:, 0])[:1].tolist():
            raise PlanError(f"{name}[{at}] is the interval {bounds[at].tolist()}; wanted (lo, hi) with lo <= hi")
    for at, (node, table, _, _) in enumerate(problem.also):
        if not (0 <= node < len(problem.nodes) and 0 <= table < len(shapes) and shapes[table] == (sizes[node],)):
            raise PlanError(f"also[{at}] gives table {table} to node {node}; wanted a node and a table with its number of strategies")


def _first(flags: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(flags)[0])
