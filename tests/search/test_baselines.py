"""What makes each baseline what it is called, on models that name their parts differently."""

from __future__ import annotations

import pytest

from autopar.ir.assignment import Assignment, expand
from autopar.ir.cluster import Cluster
from autopar.ir.graph import Graph
from autopar.ir.placement import R, S
from autopar.ir.plan import Plan
from autopar.search.follow import batch_only, batch_splits, token_splits
from autopar.search.planner import plan_graph
from tests.search.models import graph_of

CPU = Cluster.from_name("cpu:4")


def _planned(name: str, baseline: str) -> tuple[Graph, Plan, Assignment]:
    graph = graph_of(name)
    plan = plan_graph(graph, CPU, baseline=baseline)
    return graph, plan, expand(plan, graph)


def _weights(graph: Graph) -> dict[str, tuple[int, ...]]:
    return {item.fqn: graph.values[item.value].shape for item in graph.parameters}


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit"])
def test_ddp_reduces_every_gradient_once(name: str) -> None:
    graph, plan, assignment = _planned(name, "ddp")
    assert plan.mesh == {"dp": 4, "tp": 1}
    assert all(storage.stored == (R, R) for storage in assignment.storage.values())
    reduced = sum(row.bytes * row.count for row in plan.collectives if row.phase == "gradient")
    total = sum(graph.values[item.value].size_bytes for item in graph.parameters)
    tied = sum(graph.values[item.value].size_bytes for item in graph.parameters if len(graph.consumers[item.value]) > 1)
    assert total <= reduced <= total + tied
    assert {row.kind for row in plan.collectives if row.phase == "gradient"} == {"all_reduce"}


@pytest.mark.parametrize(("baseline", "gather"), [("zero1", "step"), ("fsdp", "use")])
def test_state_is_sharded(baseline: str, gather: str) -> None:
    graph, plan, assignment = _planned("gpt2", baseline)
    for fqn, shape in _weights(graph).items():
        even = any(size % 4 == 0 for size in shape)
        stored = assignment.storage[fqn].stored[0]
        assert stored.is_shard if even or baseline == "fsdp" else stored == R
        assert baseline == "zero1" or stored == S(0)  # the vocabulary of 257 in uneven parts
        assert assignment.storage[fqn].gather == gather
    whole = plan_graph(graph, CPU, baseline="ddp")
    assert plan.memory_bytes["optimizer"] <= whole.memory_bytes["optimizer"] / 3.9
    assert {row.kind for row in plan.collectives if row.phase == "gradient"} == {"reduce_scatter"}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_tensor_parallel_splits_weights_and_no_tokens(name: str) -> None:
    graph, plan, assignment = _planned(name, "tp")
    assert plan.mesh == {"dp": 1, "tp": 4}
    tokens = token_splits(graph)
    assert not any(assignment.choices[op.name][1].name in names for op, names in zip(graph.ops, tokens, strict=True))
    divisible = [fqn for fqn, shape in _weights(graph).items() if len(shape) == 2 and all(size % 4 == 0 for size in shape)]
    assert divisible and all(assignment.storage[fqn].stored[1].is_shard for fqn in divisible)
    assert all(storage.gather == "never" for storage in assignment.storage.values())


def test_sequence_parallel_norms() -> None:
    graph, plan, assignment = _planned("gpt2", "tp-sp")
    norms = [op for op in graph.ops if "layer_norm" in op.target]
    assert norms and all(assignment.output_states(op)[0][1] == S(1) for op in norms)
    assert plan.memory_bytes["activations"] < plan_graph(graph, CPU, baseline="tp").memory_bytes["activations"]


def test_convolutions_can_be_tensor_parallel() -> None:
    graph, _, assignment = _planned("resnet", "tp")
    kernels = [fqn for fqn, shape in _weights(graph).items() if len(shape) == 4]
    assert kernels and all(assignment.storage[fqn].stored[1].is_shard for fqn in kernels)


def test_the_batch_is_followed_without_names() -> None:
    """On `llama` nearly everything carries the batch; rotary tables and the like do not. Where it does not divide, nothing is split."""
    graph = graph_of("llama")
    only, all_splits = batch_only(graph, 4), batch_splits(graph)
    carried = [position for position, op in enumerate(graph.ops) if len(only[position]) == 1 and only[position] <= all_splits[position]]
    assert len(carried) > 0.7 * len(graph.ops)
    assert all(not graph.values[name].shape or graph.values[name].shape[0] % 8 == 0 for at in carried for name in graph.ops[at].outputs)
    assert not any(names & splits for names, splits in zip(batch_only(graph, 3), all_splits, strict=True))
