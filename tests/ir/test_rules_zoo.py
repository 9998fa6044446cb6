"""Sharding rules on whole models: every split of every operation of the zoo, on one axis and on two."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from autopar.ir import rules
from autopar.ir.assignment import conflict
from autopar.ir.graph import Graph, Op
from autopar.ir.placement import RP, P, R, S
from autopar.ir.rules import Split, splits, unruled
from autopar.ir.tracing.trace import trace
from autopar.runtime.verification.launch import RankPool
from tests.ir.checking import check
from tests.zoo import ZOO

SEEN: set[Any] = set()


@cache
def graph_of(name: str) -> Graph:
    model = ZOO[name].build(device="meta")
    example = ZOO[name].inputs(model, batch=6, device="meta")
    return trace(model, (), example).graph if isinstance(example, dict) else trace(model, example, {}).graph


def first_time(*key: Any) -> bool:
    known = key in SEEN
    SEEN.add(key)
    return not known


@pytest.mark.parametrize("name", ZOO)
def test_every_operator_has_a_rule(name: str) -> None:
    assert unruled(graph_of(name)) == ()


@pytest.mark.parametrize("name", ZOO)
def test_every_split_is_right(name: str) -> None:
    graph = graph_of(name)
    for op in graph.ops:
        for split in splits(graph, op):
            for parts in (2, 3):
                if split.fits(parts) and first_time(rules._structure(graph, op), split, parts):
                    check(graph, op, split, parts)


@pytest.mark.parametrize("name", ZOO)
def test_every_pair_of_splits_is_right_on_two_axes(name: str) -> None:
    graph = graph_of(name)
    mesh = (2, 2)
    for op in graph.ops:
        for one in splits(graph, op):
            for other in splits(graph, op):
                fits = one.fits(2) and other.fits(2) and (one.name != other.name or one.fits(2, 2))
                allowed = fits and conflict(graph, op, (one, other), ("dp", "tp"), mesh) is None
                if allowed and first_time(rules._structure(graph, op), one, other):
                    check(graph, op, (one, other), mesh)


def named(graph: Graph, op: Op, name: str) -> rules.Split:
    return next(split for split in splits(graph, op) if split.name == name)


def test_fused_columns_of_gpt2_stay_with_their_heads() -> None:
    """The chain from the fused weight to the heads of attention has splits that fit without moving anything."""
    graph = graph_of("gpt2")
    projection = next(op for op in graph.ops if op.target == "aten.addmm.default")
    columns = named(graph, projection, "n:3")
    assert columns.inputs == (S(0, 3), RP, S(1, 3)) and columns.outputs == (S(1, 3),)
    view = next(op for op in graph.ops if op.operands == projection.outputs)
    assert named(graph, view, "d2:3").inputs == (S(1, 3),)
    fused = next(op for op in graph.ops if op.target == "aten.split.Tensor")
    assert named(graph, fused, "d2").inputs == (S(2, 3),) and set(named(graph, fused, "d2").outputs) == {S(2)}


def test_a_batch_goes_through_merged_dims() -> None:
    graph = graph_of("gpt2")
    logits = next(op for op in graph.ops if op.target == "autopar.cross_entropy")
    assert named(graph, logits, "m").outputs == (P, P)
    assert any(split.inputs[0].blocks > 1 for split in splits(graph, logits)), "sequence-parallel loss"


def test_reshard_offers_what_its_neighbours_give_and_want() -> None:
    graph = graph_of("llama")
    reshard = next(op for op in graph.ops if op.target == "autopar.reshard" and graph.producers.get(op.operands[0]) is not None)
    states = {split.inputs[0] for split in splits(graph, reshard)}
    assert {R, RP, S(0), S(1)} <= states
    for split in splits(graph, reshard):
        assert split.name == str(split.inputs[0]) and split.inputs == split.outputs
    consumer = graph.consumers[reshard.outputs[0]][0]
    slot = consumer.operands.index(reshard.outputs[0])
    wanted = {split.inputs[slot] for split in splits(graph, consumer)}
    assert wanted <= states


@pytest.mark.processes
def test_pickled_graph_has_the_same_splits_in_another_process(ranks2: RankPool) -> None:
    """What is worked out once for a graph must not be taken for the same in a process that met other operations first."""
    graph = graph_of("gpt2")
    here = [splits(graph, op) for op in graph.ops]
    ranks2.run(_splits_of, graph_of("convnet"))
    assert ranks2.run(_splits_of, graph) == [here, here]


def _splits_of(graph: Graph) -> list[tuple[Split, ...]]:
    return [splits(graph, op) for op in graph.ops]
