"""Problems in the contest's format that are in no file: changed copies of one that is, and synthetic ones made like them.

A solver that was built with a few public instances in view must hold on others. `VARIANTS` change a `problem` object as it stands in a
file (see `autopar/search/solver/problem_file.py`): another limit, other costs, a part of the graph, two graphs in one. `layered` makes one
from nothing: layers of operations forward and back, whose values live from where they are made to where they are last read, with strategies
that split a value over 1, 2, 4, ... ranks. `planted` makes a random graph whose impossible pairs alone are hard to keep clear of.
Everything follows from a seed. `tests/search/test_contest_like.py` uses small ones,
`benchmarks/iopddl.md` tells of large ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

__all__ = ["VARIANTS", "Raw", "layered", "least_peak", "planted", "with_limit"]

Raw = dict[str, Any]
IMPOSSIBLE = 10**18


# ---- what limits are measured by


def least_peak(raw: Raw) -> int:
    """The largest sum over time of what nodes need at least, each at its smallest strategy: no limit below it can be met."""
    return peak_of(raw, [min(usages) for usages in raw["nodes"]["usages"]])


def peak_of(raw: Raw, amounts: Iterable[int]) -> int:
    """The largest sum over time when node `i` holds `amounts[i]`."""
    change: dict[int, int] = {}
    for (lo, hi), amount in zip(raw["nodes"]["intervals"], amounts, strict=True):
        change[lo] = change.get(lo, 0) + amount
        change[hi] = change.get(hi, 0) - amount
    now = most = 0
    for step in sorted(change):
        now += change[step]
        most = max(most, now)
    return most


def with_limit(raw: Raw, factor: float) -> Raw:
    """The same with a limit of `factor` times the least peak (the contest's public instances have 1.1)."""
    return {**raw, "usage_limit": int(np.ceil(factor * least_peak(raw)))}


# ---- changed copies


def other_costs(raw: Raw, rng: np.random.Generator) -> Raw:
    """Every node and every edge has its costs multiplied by a number of its own, between 1/4 and 4."""

    def scaled(rows: list[list[int]]) -> list[list[int]]:
        by = np.exp(rng.uniform(-np.log(4), np.log(4), len(rows)))
        return [
            [c if c >= IMPOSSIBLE else min(round(c * b), IMPOSSIBLE - 1) for c in row] for row, b in zip(rows, by.tolist(), strict=True)
        ]

    nodes, edges = raw["nodes"], raw["edges"]
    return {**raw, "nodes": {**nodes, "costs": scaled(nodes["costs"])}, "edges": {**edges, "costs": scaled(edges["costs"])}}


def nothing_impossible(raw: Raw, rng: np.random.Generator) -> Raw:
    """What was impossible costs as much as the dearest entry that is not."""
    del rng
    nodes, edges = raw["nodes"], raw["edges"]
    dearest = max((c for rows in (nodes["costs"], edges["costs"]) for row in rows for c in row if c < IMPOSSIBLE), default=0)

    def allowed(rows: list[list[int]]) -> list[list[int]]:
        return [[min(c, dearest) for c in row] for row in rows]

    return {**raw, "nodes": {**nodes, "costs": allowed(nodes["costs"])}, "edges": {**edges, "costs": allowed(edges["costs"])}}


def window(raw: Raw, rng: np.random.Generator) -> Raw:
    """The nodes that live in a random third of all time steps, and the edges among them; the limit as near to the least peak as before."""
    spans = np.array(raw["nodes"]["intervals"], np.int64)
    steps = int(spans.max())
    begin = int(rng.integers(0, 2 * steps // 3 + 1))
    return _part(raw, np.flatnonzero((spans[:, 0] < begin + steps // 3) & (spans[:, 1] > begin)).tolist())


def patch(raw: Raw, rng: np.random.Generator) -> Raw:
    """A connected half of the nodes, grown from a random one."""
    count = len(raw["nodes"]["costs"])
    around: list[list[int]] = [[] for _ in range(count)]
    for i, j in raw["edges"]["nodes"]:
        around[i].append(j)
        around[j].append(i)
    seen: set[int] = set()
    waiting: list[int] = []
    while len(seen) < count // 2:
        if not waiting:
            waiting = [int(rng.integers(count))]
        node = waiting.pop(int(rng.integers(len(waiting))))
        if node not in seen:
            seen.add(node)
            waiting += [other for other in around[node] if other not in seen]
    return _part(raw, sorted(seen))


def _part(raw: Raw, kept: list[int]) -> Raw:
    place = {node: at for at, node in enumerate(kept)}
    nodes, edges = raw["nodes"], raw["edges"]
    inner = [e for e, (i, j) in enumerate(edges["nodes"]) if i in place and j in place]
    part = {
        **raw,
        "nodes": {key: [nodes[key][node] for node in kept] for key in ("intervals", "costs", "usages")},
        "edges": {
            "nodes": [[place[edges["nodes"][e][0]], place[edges["nodes"][e][1]]] for e in inner],
            "costs": [edges["costs"][e] for e in inner],
        },
    }
    return with_limit(part, raw["usage_limit"] / max(1, least_peak(raw)))


def no_limit(raw: Raw, rng: np.random.Generator) -> Raw:
    """The limit is never in the way."""
    del rng
    return {**raw, "usage_limit": peak_of(raw, [max(usages) for usages in raw["nodes"]["usages"]])}


def no_memory(raw: Raw, rng: np.random.Generator) -> Raw:
    """No strategy needs memory, and the limit is zero."""
    del rng
    return {**raw, "nodes": {**raw["nodes"], "usages": [[0] * len(usages) for usages in raw["nodes"]["usages"]]}, "usage_limit": 0}


def at_once(raw: Raw, rng: np.random.Generator) -> Raw:
    """Every node lives at all time steps but a few."""
    spans = np.array(raw["nodes"]["intervals"], np.int64)
    steps = int(spans.max())
    ends = np.sort(np.stack([rng.integers(0, steps // 8 + 1, len(spans)), steps - rng.integers(0, steps // 8 + 1, len(spans))], 1), 1)
    return with_limit({**raw, "nodes": {**raw["nodes"], "intervals": ends.tolist()}}, raw["usage_limit"] / max(1, least_peak(raw)))


def shuffled(raw: Raw, rng: np.random.Generator) -> Raw:
    """The same problem with its nodes and edges in a random order: numbers say nothing about neighbours."""
    nodes, edges = raw["nodes"], raw["edges"]
    order, lines = rng.permutation(len(nodes["costs"])), rng.permutation(len(edges["nodes"]))
    place = np.argsort(order)
    return {
        **raw,
        "nodes": {key: [nodes[key][node] for node in order.tolist()] for key in ("intervals", "costs", "usages")},
        "edges": {
            "nodes": [[int(place[i]), int(place[j])] for i, j in (edges["nodes"][e] for e in lines.tolist())],
            "costs": [edges["costs"][e] for e in lines.tolist()],
        },
    }


def twice(raw: Raw, rng: np.random.Generator, other: Raw | None = None, meet: float = 0.5) -> Raw:
    """This and `other` (None: itself with other costs) in one: not joined by any edge, and alive together for a part `meet` of the time."""
    other = other_costs(raw, rng) if other is None else other
    shift = int((1 - meet) * max(hi for _, hi in raw["nodes"]["intervals"]))
    count = len(raw["nodes"]["costs"])
    both = {
        "nodes": {
            "intervals": raw["nodes"]["intervals"] + [[lo + shift, hi + shift] for lo, hi in other["nodes"]["intervals"]],
            "costs": raw["nodes"]["costs"] + other["nodes"]["costs"],
            "usages": raw["nodes"]["usages"] + other["nodes"]["usages"],
        },
        "edges": {
            "nodes": raw["edges"]["nodes"] + [[i + count, j + count] for i, j in other["edges"]["nodes"]],
            "costs": raw["edges"]["costs"] + other["edges"]["costs"],
        },
    }
    return with_limit(both, raw["usage_limit"] / max(1, least_peak(raw)))


VARIANTS: dict[str, Callable[[Raw, np.random.Generator], Raw]] = {
    "other costs": other_costs,
    "nothing impossible": nothing_impossible,
    "window": window,
    "patch": patch,
    "no limit": no_limit,
    "no memory": no_memory,
    "at once": at_once,
    "shuffled": shuffled,
    "twice": twice,
    **{f"limit x {factor}": (lambda raw, rng, factor=factor: with_limit(raw, factor)) for factor in (1.01, 1.03, 1.3, 2.0)},
}


# ---- from nothing


def layered(
    rng: np.random.Generator,
    layers: int = 12,
    width: int = 8,
    strategies: int = 8,
    parts: int = 1,
    bound_edges: float = 0.6,
    impossible: float = 0.1,
    uneven: float = 0.0,
    limit: float = 1.0,
) -> Raw:
    """`parts` stacks of `layers` equal layers of `width` operations each, forward and back.

    A strategy splits a value over some number of ranks, so that it holds less. `bound_edges`: the part of edges along which the reader
    must do as the maker does; of the entries of others a part `impossible` is. `uneven`: how much numbers of strategies differ (0: all
    have `strategies`; 1: from one to twice as many). The limit is `limit` times what one possible choice of little memory needs.
    """
    raw: Raw = {"nodes": {"intervals": [], "costs": [], "usages": []}, "edges": {"nodes": [], "costs": []}}
    sample: list[int] = []
    for _ in range(parts):
        _stack(raw, sample, rng, layers, width, strategies, bound_edges, impossible, uneven)
    held = [usages[s] for usages, s in zip(raw["nodes"]["usages"], sample, strict=True)]
    raw["usage_limit"] = int(np.ceil(limit * peak_of(raw, held)))
    return raw


def _stack(
    raw: Raw,
    sample: list[int],
    rng: np.random.Generator,
    layers: int,
    width: int,
    strategies: int,
    bound_edges: float,
    impossible: float,
    uneven: float,
) -> None:
    """One stack behind what is there. `sample` grows by a choice that is possible throughout and of little memory."""
    nodes, edges = raw["nodes"], raw["edges"]
    base = len(nodes["costs"])
    count = 2 * layers * width
    spread = uneven * (strategies - 1)
    sizes = rng.integers(int(strategies - spread), int(strategies + spread) + 1, width)
    bytes_of, split = 2 ** rng.integers(10, 24, width), [2 ** rng.integers(0, 6, size) for size in sizes]
    costs = [rng.integers(0, 10**6, size) * (rng.random() < 0.5) for size in sizes]
    picked = [int(s.argmax()) for s in split]
    back = rng.integers(1, 3, width)  # values that are read again on the way back, and others
    tables: dict[tuple[int, int, int], list[int]] = {}

    def table(i: int, j: int, kind: int) -> list[int]:
        if (i, j, kind) not in tables:
            cost = rng.integers(0, 10**6, (sizes[i], sizes[j])) * (rng.random((sizes[i], sizes[j])) < 0.8)
            if rng.random() < bound_edges:
                reply = rng.integers(0, sizes[j], sizes[i])
                reply[picked[i]] = picked[j]
                cost = np.where(reply[:, None] == np.arange(sizes[j]), cost // 100, IMPOSSIBLE)
            else:
                cost[rng.random(cost.shape) < impossible] = IMPOSSIBLE
                cost[picked[i], picked[j]] = min(int(cost[picked[i], picked[j]]), 10**6)
            tables[i, j, kind] = cost.ravel().tolist()
        return tables[i, j, kind]

    ends = list(range(1, count + 1))
    for at in range(count):
        kind = at % width
        readers = [at + 1] if at + 1 < count else []
        if at + width < count and kind % 3 == 0:
            readers.append(at + width)
        if at < count // 2 and back[kind] == 2:
            readers.append(count - 1 - at)
        for reader in dict.fromkeys(readers):
            if reader > at:
                edges["nodes"].append([base + at, base + reader])
                edges["costs"].append(table(kind, reader % width, min(reader - at, width + 1)))
                ends[at] = max(ends[at], reader + 1)
        nodes["costs"].append(costs[kind].tolist())
        nodes["usages"].append((bytes_of[kind] // split[kind]).tolist())
        sample.append(picked[kind])
    nodes["intervals"] += [[at, end] for at, end in enumerate(ends)]


def planted(
    rng: np.random.Generator,
    nodes: int,
    strategies: int = 6,
    neighbours: float = 5,
    impossible: float = 0.4,
    limit: float = 1.3,
    near: int = 50,
) -> Raw:
    """A random graph in which a part `impossible` of all pairs is, but not those of one hidden choice of little memory.

    Each node has about `neighbours`, at most `near` places away, and lives until the last of them. The limit is `limit` times what the
    hidden choice needs. From a certain density on (with `s` strategies, `log(s) = -neighbours / 2 * log(1 - impossible)`) little else is
    possible.
    """
    sizes = rng.integers(max(2, strategies - 1), strategies + 2, nodes)
    usages = [rng.integers(0, 1000, size) for size in sizes]
    hidden = [int(np.argsort(usage)[min(len(usage), int(rng.geometric(0.8))) - 1]) for usage in usages]
    pairs: Raw = {"nodes": [], "costs": []}
    ends = list(range(1, nodes + 1))
    for i in range(nodes):
        for j in (i + rng.integers(1, near, rng.poisson(neighbours / 2))).tolist():
            if j < nodes:
                cost = rng.integers(0, 1000, (sizes[i], sizes[j]))
                cost[rng.random(cost.shape) < impossible] = IMPOSSIBLE
                cost[hidden[i], hidden[j]] = rng.integers(0, 1000)
                pairs["nodes"].append([i, j])
                pairs["costs"].append(cost.ravel().tolist())
                ends[i] = max(ends[i], j + 1)
    own = {
        "intervals": [[i, end] for i, end in enumerate(ends)],
        "costs": [rng.integers(0, 1000, size).tolist() for size in sizes],
        "usages": [usage.tolist() for usage in usages],
    }
    raw: Raw = {"nodes": own, "edges": pairs}
    held = [int(usage[s]) for usage, s in zip(usages, hidden, strict=True)]
    return {**raw, "usage_limit": int(np.ceil(limit * peak_of(raw, held)))}
