"""Best first over meshes and numbers of microbatches: against every way planned by itself, and the bookkeeping with made-up ways."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autopar.errors import InfeasibleError
from autopar.ir.cluster import resolve
from autopar.search import ways
from autopar.search.build import FREE
from autopar.search.flat import Search, best_of
from autopar.search.meshes import candidates
from autopar.search.pins import read_pins
from autopar.search.planner import plan_graph
from autopar.search.stages.place import Settings
from autopar.search.structure import Structure
from autopar.search.ways import Way, best_first
from tests.search.models import graph_of

CLUSTER = resolve("h100x4")
COUNTS = (1, 2, 4, 8)


@pytest.mark.parametrize(("name", "layers"), [("gpt2", 3), ("t5", 1), ("encoder", 3), ("unet-groups", 2)])
@pytest.mark.parametrize("share", [0.75, 0.95])
def test_no_way_planned_by_itself_is_better(name: str, layers: int, share: float) -> None:
    graph = graph_of(name, layers)
    free = plan_graph(graph, CLUSTER)
    limit = int(share * sum(free.memory_bytes.values()))
    plan = plan_graph(graph, CLUSTER, memory_limit_bytes=limit)
    costs = []
    for dp, tp in candidates(CLUSTER, None):
        for count in COUNTS:
            try:
                one = plan_graph(graph, CLUSTER, mesh=(dp, tp), microbatches=count, memory_limit_bytes=limit)
            except InfeasibleError:
                continue
            if one.predicted.fits:
                costs.append(one.cost_s)
                assert plan.lower_bound_s <= one.cost_s * (1 + 1e-9), (dp, tp, count)
    assert plan.predicted.fits == bool(costs)
    if costs and len(plan.groups) == 1:
        # The search leaves ways alone that promise less than 1% (they recompute) or 0.2%.
        assert plan.cost_s <= 1.01 * min(costs)


def test_the_bound_covers_ways_that_were_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of("gpt2", 3)
    limit = int(0.75 * sum(plan_graph(graph, CLUSTER).memory_bytes.values()))
    whole = plan_graph(graph, CLUSTER, memory_limit_bytes=limit)
    monkeypatch.setattr(ways, "_LOOKS", 1)
    few = plan_graph(graph, CLUSTER, memory_limit_bytes=limit)
    assert few.predicted.fits
    assert few.lower_bound_s <= whole.cost_s * (1 + 1e-9) and whole.cost_s <= few.cost_s * 1.01


def settings(limit_bytes: int) -> Settings:
    return Settings(CLUSTER, limit_bytes, "adamw", "fast")


def test_more_ways_are_asked_for_only_when_memory_has_a_price() -> None:
    graph = graph_of("llama", 4)
    asked: list[float] = []

    def more(bound_s: float, price: float) -> list[Way]:
        asked.append(price)
        return []

    def searched(limit_bytes: int) -> None:
        search = Search(Structure(graph), settings(limit_bytes))
        found, _ = best_of(search, ((4, 1),), FREE, read_pins(None, graph), "nothing")
        place = found.place
        best_first(search.settings, [Way(0.0, lambda: place)], more)

    free = plan_graph(graph, CLUSTER, mesh=(4, 1))
    searched(2 * sum(free.memory_bytes.values()))
    assert asked == []
    searched(int(0.7 * sum(free.memory_bytes.values())))
    assert len(asked) == 1 and asked[0] > 0


def test_a_way_whose_bound_is_above_the_best_is_never_made() -> None:
    graph = graph_of("llama", 4)
    search = Search(Structure(graph), settings(2**40))
    found, _ = best_of(search, ((4, 1),), FREE, read_pins(None, graph), "nothing")

    def made() -> None:
        raise AssertionError("nothing asks for it")

    three = [Way(0.0, lambda: found.place), Way(2 * found.cost_s, made), Way(math.inf, made)]  # type: ignore[arg-type, list-item]
    best = best_first(search.settings, three)
    assert best.found is not None and best.found.cost_s == found.cost_s and best.bound_s <= found.cost_s


def test_ways_that_cannot_be_are_passed_over_and_named_when_none_can() -> None:
    graph = graph_of("llama", 4)
    search = Search(Structure(graph), settings(2**40))
    found, _ = best_of(search, ((4, 1),), FREE, read_pins(None, graph), "nothing")

    def impossible() -> None:
        raise InfeasibleError("the batch has 3 rows")

    best = best_first(search.settings, [Way(0.0, impossible), Way(0.0, lambda: found.place)])  # type: ignore[arg-type, return-value]
    assert best.found is not None
    with pytest.raises(InfeasibleError, match="3 rows"):
        best_first(replace(search.settings), [Way(0.0, impossible)])  # type: ignore[arg-type, return-value]
