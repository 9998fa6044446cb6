"""Read a problem from a file in the format of the ASPLOS 2025 / EuroSys 2025 contest on intra-operator parallelism.

The file is JSON, gzipped or not, with one object `problem` (https://github.com/google/iopddl describes it):

    nodes.intervals[i] = [lo, hi)    time steps at which node i holds its memory
    nodes.costs[i][s]                cost of strategy s of node i;    nodes.usages[i][s]: its memory
    edges.nodes[e] = [i, j]          edges.costs[e]: row-major, entry s_i * len(strategies of j) + s_j
    usage_limit                      what the summed usages must not exceed at any time step

A cost of 10^18 and more means "not possible" and becomes `inf`. Costs are unitless there; here they stand in `cost_s`, which is
seconds for a planned model. Equal tables are stored once.
"""

from __future__ import annotations

import gc
import gzip
import json
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autopar.errors import ProblemError
from autopar.search.solver.problem import Floats, Ints, Problem, Segment, Table

__all__ = ["IMPOSSIBLE", "Instance", "read_instance"]

IMPOSSIBLE = 10**18
_LARGEST = sys.float_info.max
_MOST_BYTES = 2**30  # unpacked; the largest public instances are a tenth of it


@dataclass(frozen=True, slots=True, eq=False)
class Instance:
    """A problem as read, and `raw`: the `problem` object of the file, in whole numbers as written, for the judge."""

    name: str
    problem: Problem
    raw: dict[str, Any]


def read_instance(path: str | Path) -> Instance:
    """The problem in the file `path`, gzipped or not.

    Raises `ProblemError` that names the place in the file when it cannot be read, is no JSON or breaks the format.
    """
    path = Path(path)
    document = _decoded(_unpacked(path), path.name)
    if not isinstance(document, dict) or not isinstance(document.get("problem"), dict):
        raise ProblemError(f"{path.name}: wanted a JSON object that holds an object `problem`")
    raw = document["problem"]
    name = raw.get("name")
    problem = _Reader(path.name, raw).problem()
    return Instance(name if isinstance(name, str) else path.name.split(".")[0], problem, raw)


def _unpacked(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            data = (gzip.GzipFile(fileobj=file) if packed else file).read(_MOST_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ProblemError(f"{path.name}: the gzip data is damaged or cut short ({error}); fetch the file again") from error
    except OSError as error:
        raise ProblemError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > _MOST_BYTES:
        raise ProblemError(f"{path.name}: unpacks to more than {_MOST_BYTES} bytes")
    return data


def _decoded(data: bytes, name: str) -> Any:
    collecting = gc.isenabled()
    gc.disable()  # millions of numbers and no cycle among them: looking for garbage would take half of the time
    try:
        return json.loads(data, object_pairs_hook=_object)
    except _Twice as error:
        raise ProblemError(f"{name}: the key {_shown(error.key)} occurs twice in one object") from error
    except json.JSONDecodeError as error:
        raise ProblemError(f"{name}: no JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8; a number of thousands of digits; nested without end
        raise ProblemError(f"{name}: no JSON: {error}") from error
    finally:
        if collecting:
            gc.enable()


class _Twice(Exception):
    """A key that occurs twice in an object: which of the two counts would be a guess."""

    def __init__(self, key: str) -> None:
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Twice(key)
        found[key] = value
    return found


class _Reader:
    """Checks and converts one decoded `problem` object."""

    def __init__(self, file: str, raw: dict[str, Any]) -> None:
        self.file, self.raw = file, raw
        self.tables: list[Table] = []
        self.known: dict[Any, int] = {}

    def problem(self) -> Problem:
        intervals, costs, usages = (self._lists("nodes", key) for key in ("intervals", "costs", "usages"))
        ends, tables = self._lists("edges", "nodes"), self._lists("edges", "costs")
        for key, found in (("costs", costs), ("usages", usages)):
            if len(found) != len(intervals):
                raise self._wrong("nodes", f"has {len(intervals)} intervals and {len(found)} {key}; one of each per node")
        if len(ends) != len(tables):
            raise self._wrong("edges", f"has {len(ends)} nodes and {len(tables)} costs; one of each per edge")
        live = self._intervals(intervals)
        nodes = [self._node(i, cost, usage) for i, (cost, usage) in enumerate(zip(costs, usages, strict=True))]
        sizes = [len(cost) for cost in costs]
        edges = []
        for e, ((i, j), table) in enumerate(zip(self._ends(ends, len(nodes)).tolist(), tables, strict=True)):
            number = self._edge(e, i, j, sizes, table)
            if i == j:  # an edge from a node to itself is a cost of the node
                nodes[i] = self._with_diagonal(nodes[i], number)
            else:
                edges.append((min(i, j), max(i, j), number))
        segments = (Segment(0, len(nodes), 1),) if nodes else ()
        return Problem(tuple(nodes), tuple(edges), tuple(self.tables), segments, self._limit(), tuple(map(tuple, live.tolist())))

    def _wrong(self, place: str, what: str) -> ProblemError:
        return ProblemError(f"{self.file}: problem.{place} {what}")

    def _lists(self, group: str, key: str) -> list[Any]:
        found = self.raw.get(group)
        if not isinstance(found, dict):
            raise self._wrong(group, f"is {_shown(found)}; wanted an object" if group in self.raw else "is missing")
        if key not in found:
            raise self._wrong(f"{group}.{key}", "is missing")
        if not isinstance(found[key], list):
            raise self._wrong(f"{group}.{key}", f"is {_shown(found[key])}; wanted a list")
        rows: list[Any] = found[key]
        for at, row in enumerate(rows):
            if not isinstance(row, list):
                raise self._wrong(f"{group}.{key}[{at}]", f"is {_shown(row)}; wanted a list")
        return rows

    def _limit(self) -> float:
        limit = self.raw.get("usage_limit")
        if limit is None:
            return float("inf")
        return float(self._numbers([limit], "usage_limit", single=True)[0])

    def _pairs(self, rows: list[Any], place: str, what: str) -> Ints:
        """`(len(rows), 2)` whole numbers."""
        for at, row in enumerate(rows):
            if len(row) != 2 or not all(type(value) is int and abs(value) < 2**62 for value in row):
                raise self._wrong(f"{place}[{at}]", f"is {_shown(row)}; wanted {what}")
        return np.array(rows, np.int64).reshape(-1, 2)

    def _intervals(self, rows: list[Any]) -> Ints:
        wanted = "[lo, hi] in whole numbers with 0 <= lo <= hi"
        live = self._pairs(rows, "nodes.intervals", wanted)
        for node in np.flatnonzero((live[:, 0] < 0) | (live[:, 1] < live[:, 0]))[:1].tolist():
            raise self._wrong(f"nodes.intervals[{node}]", f"is {live[node].tolist()}; wanted {wanted}")
        return live

    def _ends(self, rows: list[Any], count: int) -> Ints:
        ends = self._pairs(rows, "edges.nodes", "the numbers of two nodes")
        for edge in np.flatnonzero(((ends < 0) | (ends >= count)).any(1))[:1].tolist():
            raise self._wrong(f"edges.nodes[{edge}]", f"is {ends[edge].tolist()}; nodes are numbered 0 to {count - 1}")
        return ends

    def _node(self, node: int, cost: list[Any], usage: list[Any]) -> int:
        if not cost:
            raise self._wrong(f"nodes.costs[{node}]", "is empty; a node has at least one strategy")
        if len(cost) != len(usage):
            raise self._wrong(f"nodes.usages[{node}]", f"has {len(usage)} entries, and the node has {len(cost)} costs")
        key = self._key(("node", tuple(cost), tuple(usage)), cost, f"nodes.costs[{node}]")
        if key not in self.known:
            memory = self._numbers(usage, f"nodes.usages[{node}]")
            for strategy in np.flatnonzero((memory < 0) | (memory == np.inf))[:1].tolist():
                found = _shown(usage[strategy])
                raise self._wrong(f"nodes.usages[{node}][{strategy}]", f"is {found}; wanted a finite number of at least 0")
            self._note(key, self._costs(cost, f"nodes.costs[{node}]"), memory)
        return self.known[key]

    def _edge(self, edge: int, i: int, j: int, sizes: list[int], flat: list[Any]) -> int:
        rows, columns = sizes[i], sizes[j]
        if len(flat) != rows * columns:
            has = f"has {len(flat)} entries; nodes {i} and {j} have {rows} and {columns} strategies: wanted {rows * columns}"
            raise self._wrong(f"edges.costs[{edge}]", has)
        key = self._key((rows, columns, i > j, tuple(flat)), flat, f"edges.costs[{edge}]")
        if key not in self.known:
            cost = self._costs(flat, f"edges.costs[{edge}]").reshape(rows, columns)
            cost = np.ascontiguousarray(cost.T) if i > j else cost
            self._note(key, cost, np.broadcast_to(0.0, cost.shape))
        return self.known[key]

    def _with_diagonal(self, node_table: int, edge_table: int) -> int:
        key = ("self", node_table, edge_table)
        if key not in self.known:
            table = self.tables[node_table]
            self._note(key, _sum_from_below(table.cost_s, self.tables[edge_table].cost_s.diagonal()), table.memory_bytes)
        return self.known[key]

    def _key(self, key: Any, values: list[Any], place: str) -> Any:
        try:
            hash(key)
        except TypeError:
            self._numbers(values, place)  # says which
            raise self._wrong(place, "or what belongs to it holds a list or object; wanted numbers") from None
        return key

    def _note(self, key: Any, cost: Floats, memory: Floats) -> None:
        self.known[key] = len(self.tables)
        self.tables.append(Table(cost, memory))

    def _costs(self, values: list[Any], place: str) -> Floats:
        cost = self._numbers(values, place)
        for at in np.flatnonzero(cost == IMPOSSIBLE).tolist():
            if values[at] < IMPOSSIBLE:  # by less than floating-point numbers there differ
                cost[at] = np.nextafter(cost[at], 0.0)
        cost[cost >= IMPOSSIBLE] = np.inf
        return cost

    def _numbers(self, values: Sequence[Any], place: str, single: bool = False) -> Floats:
        """`(len(values),)`: all must be numbers, and neither NaN nor minus infinity."""
        if set(map(type, values)) <= {int, float}:
            try:
                found: Floats = np.array(values, np.float64)
            except OverflowError:  # whole numbers of more than 308 digits
                found = np.array([value if abs(value) <= _LARGEST else np.inf if value > 0 else -np.inf for value in values], np.float64)
            if not (np.isnan(found).any() or (found == -np.inf).any()):
                return found
        for at, value in enumerate(values):
            if type(value) not in (int, float) or not value >= -_LARGEST:
                raise self._wrong(place if single else f"{place}[{at}]", f"is {_shown(value)}; wanted a number")
        raise AssertionError(f"{place}: numbers that are none")


def _sum_from_below(a: Floats, b: Floats) -> Floats:
    """The sum, or the next number below it where it was rounded up (by Knuth's two-sum): what bounds are proven of is never dearer."""
    total: Floats = a + b
    with np.errstate(invalid="ignore"):
        part = total - a
        error = (a - (total - part)) + (b - part)
    return np.where(error < 0, np.nextafter(total, -np.inf), total)


def _shown(value: Any) -> str:
    """The start of `value` as JSON."""
    if isinstance(value, (dict, list)) and len(value) > 8:
        return "a long list" if isinstance(value, list) else "a large object"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."
