"""Plans with stages and microbatches: what is claimed adds up stage by stage, and the winner is the fastest that fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.ir.assignment import expand_stages
from autopar.ir.cluster import Cluster
from autopar.ir.fold import fold
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.pipelining.schedule_check import live_by_stage
from autopar.ir.pipelining.schedules import named
from autopar.ir.pipelining.stages import candidates, cut
from autopar.ir.placement import S
from autopar.ir.plan import Plan
from autopar.report.validate import contradictions
from autopar.search.account import account
from autopar.search.build import build
from autopar.search.pins import read_pins
from autopar.search.planner import plan_graph
from autopar.search.prices.costs import Costs
from autopar.search.simulator.quick import StageTime, quick
from autopar.search.simulator.simulate import simulate
from autopar.search.stages.alike import form
from autopar.search.stages.pipeline import Pipeline, Pipelined
from autopar.search.stages.place import Settings
from autopar.search.stages.propose import Proposals
from autopar.search.stages.short import KEPT, shortened
from autopar.search.structure import Structure
from tests.search.models import graph_of

CPU4, CPU8 = Cluster.from_name("cpu:4"), Cluster.from_name("cpu:8")


FORCED = [
    ("gpt2", {"pp": 2, "dp": 2, "tp": 2}, "1f1b"),
    ("gpt2", [{"dp": 4}, {"dp": 2, "tp": 2}], "zbv"),
    ("llama", {"pp": 4, "dp": 2}, "gpipe"),
    ("t5", {"pp": 2, "tp": 4}, "interleaved-1f1b"),
    ("t5", [{"dp": 2}, {"dp": 2}, {"tp": 4}], "interleaved-zb"),
    ("unet", {"pp": 2, "dp": 4}, "1f1b"),
]


@pytest.mark.parametrize(("name", "mesh", "schedule"), FORCED)
def test_forced_pipelines_add_up_stage_by_stage(name: str, mesh: Any, schedule: str) -> None:
    graph = graph_of(name, layers=2 if name == "unet" else 4)
    plan = plan_graph(graph, CPU8, mesh=mesh, schedule=schedule, microbatches=4)
    assert plan.pipeline is not None and plan.pipeline.schedule == schedule and plan.world_size == 8
    assert Plan.parse(plan.text()) == plan
    assert not contradictions(plan)
    simulation = simulate(plan)
    predicted = plan.predicted
    assert (predicted.cost_s, predicted.step_s, predicted.bubble) == (simulation.step_s, simulation.step_s, simulation.bubble)
    assert predicted.stage_memory_bytes == pytest.approx(simulation.peak_bytes, abs=8)
    assert 0 < predicted.lower_bound_s <= predicted.cost_s
    _adds_up(plan, graph)


def _adds_up(plan: Plan, graph: Any) -> None:
    """Every stage, expanded from the file, costs what its rows say: computing, collectives, and memory of parameters."""
    assert plan.pipeline is not None
    expanded = expand_stages(plan, graph)
    per_group = len(plan.pipeline.stages) // len(plan.groups)
    orders = named(plan.pipeline.schedule).orders(len(plan.groups), per_group, plan.microbatches)
    live = live_by_stage(orders)
    for stage, assignment in zip(expanded.stages, expanded.assignments, strict=True):
        group = plan.groups[plan.pipeline.stages[stage.index].group]
        structure = Structure(stage.graph)
        costs = Costs(
            CPU8, tuple(group.mesh.values()), tuple(group.mesh), "adamw", True, microbatches=plan.microbatches, live=live[stage.index],
            first_rank=group.first_rank,
        )  # fmt: skip
        segments = [segment for segment in plan.segments if segment.stage == stage.index]
        recompute = tuple(0 for _ in structure.op_segments)
        total = account(structure, costs, assignment, recompute)
        m = plan.microbatches
        compute_s = sum((row.cost.forward_s + row.cost.backward_s) * row.count * m + row.cost.optimizer_s * row.count for row in segments)
        assert compute_s == pytest.approx(total.compute_s, rel=1e-9)
        rows = [row for row in plan.collectives if row.stage == stage.index]
        moves = [move for run in total.runs for move in run.moves]
        assert sum(row.time_s * row.count for row in rows) == pytest.approx(sum(move.time_s * move.times for move in moves), rel=1e-9)
        held = sum((row.cost.parameter_bytes + row.cost.gradient_bytes + row.cost.optimizer_bytes) * row.count for row in segments)
        kinds = ("parameters", "gradients", "optimizer", "buffers")
        assert held == pytest.approx(sum(total.summed[kind] for kind in kinds), rel=1e-6, abs=64 * len(segments))


def test_one_group_is_the_plan_without_a_pipeline() -> None:
    graph = graph_of("gpt2")
    assert plan_graph(graph, CPU4, mesh={"pp": 1, "dp": 2, "tp": 2}) == plan_graph(graph, CPU4, mesh=(2, 2))
    assert plan_graph(graph, CPU4, mesh=(2, 2), microbatches=1) == plan_graph(graph, CPU4, mesh=(2, 2))


def test_microbatches_accumulate() -> None:
    """The optimizer and reductions once, computing as often; activations of one microbatch."""
    graph = graph_of("gpt2")
    once, often = (plan_graph(graph, CPU4, baseline="ddp", microbatches=count) for count in (1, 2))
    assert often.microbatches == 2 and often.pipeline is None
    step = [sum(row.cost.optimizer_s * row.count for row in plan.segments) for plan in (once, often)]
    assert step[0] == pytest.approx(step[1], rel=1e-9)
    kept = [sum(row.cost.activation_bytes * row.count for row in plan.segments) for plan in (once, often)]
    assert 0.4 < kept[1] / kept[0] < 0.6
    reduced = [sum(row.count * row.bytes for row in plan.collectives if row.phase == "gradient") for plan in (once, often)]
    assert reduced[0] == reduced[1] > 0
    assert [row.shape for row in often.inputs] == [row.shape for row in once.inputs]


@pytest.mark.parametrize(("options", "message"), [
    ({"mesh": {"pp": 9}}, "must be equal"),
    ({"mesh": {"pp": 8}, "stages": 12}, "multiple of 8"),
    ({"mesh": {"pp": 8}, "stages": 64}, "at most"),
    ({"mesh": {"pp": 2, "dp": 4}, "microbatches": 3}, "divisor"),
    ({"mesh": {"pp": 2, "dp": 4}, "schedule": "2f2b"}, "1f1b"),
    ({"mesh": (8, 1), "schedule": "1f1b"}, "has none"),
    ({"mesh": {"pp": 2, "dp": 4}, "cuts": (40, 20, 60)}, "ascend"),
    ({"cuts": (40,)}, "how many groups"),
    ({"mesh": [{"dp": 2}, (2, 1)]}, "every group"),
    ({"mesh": {"pp": 2, "dp": 4}, "baseline": "ddp"}, "without a pipeline"),
    ({"recompute": "some"}, "auto"),
    ({"microbatches": 0}, "at least 1"),
])  # fmt: skip
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_graph(graph_of("gpt2"), CPU8, **options)


def test_a_pipeline_needs_a_loss() -> None:
    with pytest.raises(PlanError, match="no loss"):
        plan_graph(graph_of("mlp"), CPU4, mesh={"pp": 2, "dp": 2})
    with pytest.raises(PlanError, match="no loss"):
        plan_graph(graph_of("gpt2", training=False), CPU4, mesh={"pp": 2, "dp": 2})


def test_pins_hold_in_every_stage() -> None:
    graph = graph_of("llama", layers=4)
    pins = {"model.layers.*.mlp.up_proj.weight": "S(1)@tp"}
    plan = plan_graph(graph, CPU8, mesh={"pp": 2, "dp": 2, "tp": 2}, microbatches=4, pins=pins)
    stored = [one.storage for one in expand_stages(plan, graph).assignments]
    found = [storage.stored[1] for one in stored for name, storage in one.items() if "up_proj" in name]
    assert found == [S(1)] * 4


def test_cuts_are_where_they_are_asked_for() -> None:
    graph = graph_of("gpt2", layers=4)
    body = microbatched(graph, 2).body
    places = candidates(body)
    plan = plan_graph(graph, CPU4, mesh={"pp": 2, "dp": 2}, microbatches=2, cuts=places[:1])
    assert plan.pipeline is not None and [stage.start for stage in plan.pipeline.stages] == [0, places[0]]
    even = plan_graph(graph, CPU4, mesh={"pp": 2, "dp": 2}, microbatches=2)
    assert even.predicted.step_s <= plan.predicted.step_s


# ---- recomputation ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("llama", 1), ("t5", 2), ("gpt2", 4)])
def test_recomputation_adds_up_on_the_graph(name: str, count: int) -> None:
    """Tables and account price recomputed repeats alike, whatever is chosen."""
    random = np.random.default_rng(0)
    structure = Structure(microbatched(graph_of(name, layers=4), count).body)
    costs = Costs(Cluster.from_name("h100x4"), (2, 2), ("dp", "tp"), microbatches=count, live=min(count, 2))
    plain = None
    for share in (0.0, 0.5, 1.0):
        recompute = tuple(int(segment.count * share) for segment in structure.op_segments)
        built = build(structure, costs, recompute=recompute)
        choice = tuple(0 for _ in built.options) if plain is None else tuple(int(random.integers(len(row))) for row in built.options)
        cost_s, _ = built.problem.evaluate(choice)
        at_loss, at_end, _ = built.problem.usage(choice)[1]
        total = account(structure, costs, built.assignment(choice), built.recompute)
        late = total.summed["gradients"] if count == 1 else 0.0
        assert total.cost_s == pytest.approx(cost_s, rel=1e-9)
        assert sum(total.summed.values()) - late == pytest.approx(at_loss, rel=1e-9)
        assert sum(total.summed.values()) - total.summed["activations"] == pytest.approx(at_end, rel=1e-9)
        same = account(structure, costs, built.assignment(choice))
        assert share == 0.0 or (total.compute_s > same.compute_s and total.summed["activations"] < same.summed["activations"])
        plain = total


def test_memory_asks_for_recomputation() -> None:
    graph = graph_of("llama", layers=6, batch=64)
    free = plan_graph(graph, CPU4, mesh=(4, 1))
    assert not any(row.recompute for row in free.segments)
    before = free.cost_s
    for share in (0.8, 0.5):
        limit = int(sum(free.memory_bytes.values()) * share)
        tight = plan_graph(graph, CPU4, mesh=(4, 1), memory_limit_bytes=limit)
        assert tight.predicted.fits and sum(tight.memory_bytes.values()) <= limit
        assert any(0 < row.recompute <= row.count for row in tight.segments)
        assert tight.cost_s >= before * (1 - 1e-9) and free.cost_s * (1 - 1e-9) <= tight.lower_bound_s <= tight.cost_s
        none = plan_graph(graph, CPU4, mesh=(4, 1), memory_limit_bytes=limit, recompute="none")
        assert not none.predicted.fits or none.cost_s >= tight.cost_s * (1 - 1e-9)
        before = tight.cost_s
    every = plan_graph(graph, CPU4, mesh=(4, 1), recompute="all")
    assert all(row.recompute == row.count for row in every.segments if row.count > 1)


# ---- the search -------------------------------------------------------------------------------------------------------------------


def test_a_pipeline_wins_where_gradients_are_dear() -> None:
    graph = graph_of("gpt2", layers=4, batch=16)
    base = Cluster.from_name("h100x8")
    device = replace(base.device, flops_per_s=(("float32", 1e11),), launch_s=1e-8)
    link = replace(base.inter, bytes_per_s=1e8, latency_s=1e-7, start_s=0.0)
    cluster = replace(base, name="slow", nodes=2, devices_per_node=1, device=device, inter=link)
    plan = plan_graph(graph, cluster)
    flat = plan_graph(graph, cluster, mesh=(2, 1))
    assert plan.pipeline is not None and len(plan.groups) == 2
    assert plan.predicted.step_s < flat.predicted.step_s
    assert [row.groups for row in plan.candidates] == [1, 2]
    solved = [row.cost_s for row in plan.candidates if row.cost_s is not None and not row.why]
    assert plan.cost_s == pytest.approx(min(solved))
    assert plan.lower_bound_s <= plan.cost_s
    _ = expand_stages(plan, graph)
    only = plan_graph(graph, cluster, schedule="gpipe")
    assert only.pipeline is not None and only.pipeline.schedule == "gpipe"


@pytest.mark.parametrize(("nodes", "per_node", "bytes_per_s"), [(2, 2, 1e8), (4, 1, 1e8)])
def test_no_forced_plan_beats_the_search_by_much(nodes: int, per_node: int, bytes_per_s: float) -> None:
    """Meshes x schedules x microbatches x cuts, each forced: none is below the bound that the search claims, nor a tenth below its plan."""
    graph = graph_of("gpt2", batch=8)
    base = Cluster.from_name("h100x8")
    device = replace(base.device, flops_per_s=(("float32", 1e11),), launch_s=1e-8)
    link = replace(base.inter, bytes_per_s=bytes_per_s, latency_s=1e-7, start_s=0.0)
    cluster = replace(base, name="slow", nodes=nodes, devices_per_node=per_node, device=device, inter=link)
    free = plan_graph(graph, cluster)
    forced = [plan_graph(graph, cluster, mesh=mesh, microbatches=count) for mesh in ((4, 1), (2, 2)) for count in (1, 2)]
    for count in (2, 4):
        cuts = candidates(microbatched(graph, count).body)
        for mesh in ({"pp": 2, "dp": 2}, {"pp": 2, "tp": 2}):
            for schedule in ("1f1b", "gpipe"):
                forced += [plan_graph(graph, cluster, mesh=mesh, schedule=schedule, microbatches=count, cuts=(cut,)) for cut in cuts[2::5]]
    best_s = min(plan.predicted.step_s for plan in forced)
    assert free.predicted.lower_bound_s <= best_s * (1 + 1e-9)
    assert free.predicted.step_s <= 1.1 * best_s


def test_microbatches_divide_by_the_mesh_and_every_number_of_groups_is_told() -> None:
    graph = graph_of("gpt2", layers=4, batch=16)
    guesses = Proposals(graph, Settings(CPU8, CPU8.device.memory_bytes, "adamw", "fast"), read_pins(None, graph)).guesses
    best = guesses.best(2)[0]
    assert 16 % (best.microbatches * (4 // best.tensor)) == 0
    plan = plan_graph(graph, Cluster.from_name("h100x8"))
    assert [row.groups for row in plan.candidates] == [1, 2, 4, 8]
    assert all(row.cost_s is not None or row.why for row in plan.candidates)


def test_groups_of_equal_meshes_are_told_in_runs() -> None:
    meshes = ((16, 2),) * 30 + ((32, 1),) * 2
    assert str(Pipeline("1f1b", 256, tuple(range(32)), meshes)) == "30 x (dp 16, tp 2) + 2 x (dp 32), 1f1b, 256 microbatches"
    assert str(Pipeline("zbv", 8, tuple(range(4)), ((2, 1),) * 2)) == "2 x (dp 2), zbv with 2 stages a group, 8 microbatches"


def test_no_pipeline_where_it_does_not_pay() -> None:
    plan = plan_graph(graph_of("gpt2"), Cluster.from_name("h100x4"))
    assert plan.pipeline is None and plan.microbatches == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 12), st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6), st.sampled_from(["gpipe", "1f1b"]))
def test_no_schedule_beats_the_bound(groups: int, count: int, shares: list[float], schedule: str) -> None:
    stages = [StageTime(share / 3, share * 2 / 3) for share in shares[:groups]]
    whole_s = sum(shares[:groups])
    assert quick(schedule, groups, stages, count).step_s >= whole_s / (1 - (1 - 1 / count) ** groups) * (1 - 1e-9)


def test_shortened_models_are_priced_as_whole_ones() -> None:
    """Per-unit prices of a short model add up to what the whole model costs, and depth makes no difference to what is solved."""
    graphs = [graph_of("gpt2", layers=layers) for layers in (8, 12)]
    shorts = [shortened(graph) for graph in graphs]
    assert len(shorts[0].graph.ops) == len(shorts[1].graph.ops)
    assert max(segment.count for segment in fold(shorts[0].graph.verify())) == KEPT
    asked = Settings(CPU4, CPU4.device.memory_bytes, "adamw", "fast")
    for graph in graphs:
        prices = Proposals(graph, asked, read_pins(None, graph)).prices
        (priced, *_) = prices.solved((2, 2), 2, 1)
        stage = priced.all_units
        plan = plan_graph(graph, CPU4, mesh=(2, 2), microbatches=2)
        forward_s = sum((row.cost.forward_s + sum(row.cost.forward_comm_s.values())) * row.count for row in plan.segments)
        assert stage.forward_s == pytest.approx(forward_s, rel=0.05)


def test_stages_that_are_alike_are_decided_alike() -> None:
    graph = graph_of("gpt2", layers=8)
    body = microbatched(graph, 4).body
    pipeline = Pipeline("1f1b", 4, (0, *candidates(body)[6:15:4]), ((2, 1),) * 4)
    forms = [form(stage.graph) for stage in cut(body, pipeline.starts)]
    assert forms[1] == forms[2] and forms[0] != forms[1] != forms[3]
    asked = Settings(CPU8, CPU8.device.memory_bytes, "adamw", "fast")
    found = Pipelined(graph, asked, read_pins(None, graph), pipeline).found
    assert found[1].choices == found[2].choices
    fresh = asked.solve(found[2].place)
    assert fresh.cost_s == pytest.approx(found[2].cost_s, rel=1e-9)
