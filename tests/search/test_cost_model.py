"""Clusters, collectives, work and prices, each against a number worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.errors import ClusterError, PlanError
from autopar.ir.assignment import Storage
from autopar.ir.cluster import Cluster, resolve
from autopar.ir.conversion import steps
from autopar.ir.graph import Graph, Op, Parameter, Ref, Value
from autopar.ir.placement import RP, P, R, S
from autopar.search.prices.collectives import axes
from autopar.search.prices.costs import Costs
from autopar.search.prices.work import work
from tests.search.models import graph_of

H100 = Cluster.from_name("h100x8")


@pytest.mark.parametrize(
    ("name", "shape"), [("h100x8", (1, 8)), ("a100x2", (1, 2)), ("h200x16", (2, 8)), ("h100x8:4", (4, 8)), ("cpu:4", (1, 4))]
)
def test_presets(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    cluster = resolve(name)
    assert (cluster.nodes, cluster.devices_per_node) == shape
    path = tmp_path / "cluster.toml"
    path.write_text(cluster.to_toml())
    assert resolve(path) == cluster


@pytest.mark.parametrize("name", ["h100x12", "h100x0", "h100x8:0", "b300x8", "cpu:0", "", "nowhere.toml"])
def test_bad_clusters_name_the_presets(name: str) -> None:
    with pytest.raises(ClusterError, match="h100x8"):
        resolve(name)


@pytest.mark.parametrize("line", ["nodes = 0", "nodes = 'two'", "wheels = 4", "intra = 'string'"])
def test_damaged_cluster_files(line: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(f'{line}\ndevice = "h100"\ndevices_per_node = 8\n' + ("" if "intra" in line else 'intra = "nvlink4"\n'))
    with pytest.raises(ClusterError, match=r"cluster\.toml"):
        resolve(path)


def test_running_process_group() -> None:
    cluster = Cluster.local(16, "NVIDIA H100 80GB HBM3", 85_520_809_984, 8)
    assert (cluster.nodes, cluster.devices_per_node, cluster.intra.name) == (2, 8, "NVLink4")
    assert 79e9 < cluster.device.memory_bytes < 81e9
    assert Cluster.local(4, "cpu", 10**9).device.memory_bytes == 10**9


def test_axes_use_the_slowest_link_they_cross() -> None:
    """Of 4 machines of 8: tp inside is NVLink; dp of one device a machine has one network card, of all devices eight."""
    four = Cluster.from_name("h100x8:4")
    dp, tp = axes(four, (4, 8), ("dp", "tp"))
    assert (dp.bytes_per_s, tp.bytes_per_s) == (four.inter.bytes_per_s, four.intra.bytes_per_s)
    dp, tp = axes(four, (32, 1), ("dp", "tp"))
    assert dp.bytes_per_s == min(four.intra.bytes_per_s, 8 * four.inter.bytes_per_s)
    ring = axes(H100, (1, 8), ("dp", "tp"))[1]
    assert ring.time_s("all_reduce", 8e9) == pytest.approx(2 * 7 / 8 * 8e9 / H100.intra.bytes_per_s, rel=2e-3)
    assert ring.time_s("all_gather", 8e9) == pytest.approx(ring.time_s("all_reduce", 8e9) / 2, rel=2e-3)
    assert ring.bucketed_s("all_reduce", 1000.0) < ring.time_s("all_reduce", 1000.0) / 1000


@pytest.mark.parametrize(
    ("source", "target", "count"),
    [
        ((S(0), R), (S(0), R), 0),
        ((S(0), R), (R, R), 1),
        ((S(0), S(0)), (R, S(0)), 3),  # the inner part is gathered first and cut again
        ((S(0), S(0)), (R, R), 2),
        ((S(0), S(1)), (S(1), S(0)), 3),
        ((P, P), (S(0), S(0)), 2),
    ],
)
def test_steps_lead_there_and_never_break_nesting(source: object, target: object, count: int) -> None:
    assert isinstance(source, tuple) and isinstance(target, tuple)
    found = steps(source, target)
    state = list(source)
    for step in found:
        assert state[step.axis] == step.source
        if step.axis == 0 and state[1].is_shard:
            moved = {p.dim for p in (step.source, step.target) if p.is_shard}
            assert state[1].dim not in moved
        state[step.axis] = step.target
    assert (tuple(state), len(found)) == (target, count)


def test_conversion_prices_forward_and_backward() -> None:
    """Megatron's pair: R/P costs an all-reduce backward, P(sum) one forward; without a gradient the first is free."""
    costs = Costs(H100, (1, 8), ("dp", "tp"))
    value = Value("x", (64, 1024, 1024), "bfloat16", True)
    ring = costs.axes[1].time_s("all_reduce", value.size_bytes)
    for source, target, phase in ((R, RP, "backward"), (P, R, "forward")):
        term = costs.edge_term(value, (R, source), ((R, target),), "")
        assert [(move.kind, move.phase, move.bytes) for move in term.moves] == [("all_reduce", phase, value.size_bytes)]
        assert term.cost_s == pytest.approx(ring)
    assert costs.edge_term(Value("x", value.shape, value.dtype), (R, R), ((R, RP),), "").cost_s == 0.0
    # Read twice in one placement: converted once.
    assert costs.edge_term(value, (R, P), ((R, R), (R, R)), "").cost_s == pytest.approx(ring)


def test_storage_is_where_gradient_and_state_live() -> None:
    costs = Costs(H100, (8, 1), ("dp", "tp"))
    value = Value("w", (1024, 1024), "bfloat16", True)
    for stored, share in (((R, R), 1), ((S(0), R), 8)):
        memory = dict(costs.parameter_term(value, Storage(stored, "use")).memory)
        assert memory == {"parameters": 2**21 / share, "gradients": 2**21 / share, "optimizer": 2**22 / share}
    use = (RP, R)
    ddp = costs.use_term(value, Storage((R, R), "never"), (use,), (0.0, 0.0), True)
    zero1 = costs.use_term(value, Storage((S(0), R), "step"), (use,), (0.0, 0.0), True)
    fsdp = costs.use_term(value, Storage((S(0), R), "use"), (use,), (0.0, 0.0), True)
    assert [(m.kind, m.phase) for m in ddp.moves] == [("all_reduce", "gradient")]
    assert [(m.kind, m.phase) for m in zero1.moves] == [("all_gather", "forward"), ("reduce_scatter", "gradient")]
    assert [(m.kind, m.phase) for m in fsdp.moves][1:] == [("reduce_scatter", "gradient"), ("all_gather", "backward")]
    # Ring: an all-reduce is as long as a reduce-scatter and an all-gather, but for the start of each.
    assert ddp.cost_s == pytest.approx(zero1.cost_s, rel=0.1)
    assert fsdp.cost_s == pytest.approx(1.5 * zero1.cost_s)
    assert (zero1.memory_bytes, fsdp.memory_bytes) == (2**21, 0)
    # Computing hides it, all but a share.
    assert 0 < costs.use_term(value, Storage((R, R), "never"), (use,), (1.0, 1.0), True).exposed_s < 0.2 * ddp.exposed_s
    assert dict(Costs(H100, (8, 1), ("dp", "tp"), "sgd").parameter_term(value, Storage((R, R), "never")).memory)["optimizer"] == 0
    with pytest.raises(PlanError, match="adamw"):
        Costs(H100, (8, 1), ("dp", "tp"), "adam9")


def test_work_of_a_linear_layer() -> None:
    """2 m n k flops forward, twice that backward, once where the input has no gradient; kept: both factors, not the bias."""
    for grad in (True, False):
        values = [Value("x", (32, 64), "float32", grad), Value("w", (16, 64), "float32", True), Value("b", (16,), "float32", True)]
        op = Op("y", "aten.linear.default", (Ref("x"), Ref("w"), Ref("b")), (), ("y",))
        all_values = {value.name: value for value in (*values, Value("y", (32, 16), "float32", True))}
        graph = Graph("g", all_values, (), (Parameter("w", "w"), Parameter("b", "b")), (), (), (op,), ())
        found = work(graph, op)
        assert found.forward_flops == 2 * 32 * 16 * 64
        assert found.backward_flops == found.forward_flops * (2 if grad else 1)
        assert found.keeps == ({0, 1} if grad else {0})


def test_evaluation_keeps_nothing() -> None:
    graph = graph_of("gpt2", training=False)
    for op in graph.ops:
        found = work(graph, op)
        assert not (found.trains or found.keeps or found.keeps_outputs or found.extra or found.backward_flops), op
