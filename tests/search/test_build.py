"""Problems built from graphs: shared tables, segments, and rows that stand for what they say."""

from __future__ import annotations

import numpy as np

from autopar.ir.assignment import Storage, conflict
from autopar.ir.cluster import Cluster
from autopar.search.account import account
from autopar.search.build import build
from autopar.search.prices.costs import Costs
from autopar.search.structure import Structure
from tests.search.models import graph_of

COSTS = Costs(Cluster.from_name("h100x4"), (2, 2), ("dp", "tp"))


def test_depth_adds_no_tables() -> None:
    built = [build(Structure(graph_of("gpt2", layers=layers)), COSTS) for layers in (6, 8)]
    assert len(built[0].problem.tables) == len(built[1].problem.tables)
    for one, layers in zip(built, (6, 8), strict=True):
        assert max(segment.count for segment in one.problem.segments) >= layers - 2
        position = 0
        for segment in one.problem.segments:
            assert segment.start == position
            position = segment.stop
            for repeat in range(1, segment.count):
                start = segment.start + repeat * segment.length
                assert one.problem.nodes[start : start + segment.length] == one.problem.nodes[segment.start :][: segment.length]
        assert position == len(one.problem.nodes)


def test_any_choice_adds_up_on_the_graph() -> None:
    """Tables and account price the same thing: random choices cost in the problem what they cost operation by operation."""
    random = np.random.default_rng(0)
    for name in ("llama", "t5", "resnet"):
        structure = Structure(graph_of(name))
        built = build(structure, COSTS)
        for _ in range(5):
            choice = tuple(int(random.integers(len(options))) for options in built.options)
            cost_s, memory_bytes = built.problem.evaluate(choice)
            total = account(structure, COSTS, built.assignment(choice))
            assert np.isclose(total.cost_s, cost_s, rtol=1e-9, atol=0)
            # Gradients come as activations go.
            assert np.isclose(sum(total.summed.values()) - total.summed["gradients"], memory_bytes, rtol=1e-9, atol=0)


def test_options_are_sound_and_complete_enough() -> None:
    structure = Structure(graph_of("llama"))
    built = build(structure, COSTS)
    for node, (kind, index) in enumerate(structure.order):
        options = built.options[node]
        assert options and len(set(options)) == len(options)
        if kind == "op":
            op = structure.graph.ops[index]
            for choice in options:
                assert not isinstance(choice, Storage)
                assert conflict(structure.graph, op, choice, ("dp", "tp"), (2, 2)) is None
        else:
            stored = {option.stored for option in options if isinstance(option, Storage)}
            shape = structure.graph.values[structure.graph.parameters[index].value].shape
            # Whole, sharded on either axis, and a matrix sharded on both: the storages that ZeRO and tensor parallelism need.
            assert len(stored) >= (9 if len(shape) == 2 else 3)


def test_what_autograd_keeps_is_counted_once() -> None:
    """`y = gelu(x W)`, `z = y V`: kept are x, x W and y, each once, though views and two readers see them."""
    graph = graph_of("mlp", layers=1)
    structure = Structure(graph)
    costs = Costs(Cluster.from_name("cpu:1"), (1, 1), ("dp", "tp"))
    built = build(structure, costs)
    total = account(structure, costs, built.assignment((0,) * len(built.options)))
    batch, width = 8, 32
    # up: out (norm reads it); norm: statistics, out; wide: out (gelu reads it); gelu: out; the sum that `down` reads; the result.
    expected = 4 * batch * (width + 2 + width + 2 * width + 2 * width + width + 8)
    assert total.summed["activations"] == expected
