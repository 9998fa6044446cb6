"""Whole plans of small models: what is claimed is what adds up, pins hold, what cannot fit says so."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from autopar.errors import PinError, PlanError, PlanMismatchError
from autopar.ir.assignment import expand
from autopar.ir.cluster import Cluster
from autopar.ir.placement import R, S
from autopar.ir.plan import Plan
from autopar.report.validate import contradictions
from autopar.search.account import account
from autopar.search.baselines import BASELINES
from autopar.search.planner import plan_graph
from autopar.search.prices.costs import Costs
from autopar.search.structure import Structure
from tests.search.models import graph_of
from tests.zoo import ZOO

CPU = Cluster.from_name("cpu:4")
H100 = Cluster.from_name("h100x8")
MODELS = ("gpt2", "llama", "qwen3", "bert", "t5", "vit", "resnet", "mlp")


def recomputed_s(plan: Plan, name: str, cluster: Cluster, **options: int) -> float:
    """The cost of the expanded plan, added up on the unfolded graph."""
    graph = graph_of(name, **options)
    structure = Structure(graph)
    costs = Costs(cluster, tuple(plan.mesh.values()), tuple(plan.mesh), plan.predicted.optimizer, graph.training)
    return account(structure, costs, expand(plan, graph)).cost_s


@pytest.mark.parametrize("name", MODELS)
def test_claimed_cost_is_the_cost_of_the_expanded_plan(name: str) -> None:
    plan = plan_graph(graph_of(name), CPU, mesh=(2, 2))
    assert recomputed_s(plan, name, CPU) == pytest.approx(plan.cost_s, rel=1e-9)
    assert plan.gap <= 1e-9
    assert plan.predicted.compute_s + plan.predicted.communication_s == pytest.approx(plan.cost_s, rel=1e-12)
    assert sum(row.exposed_s * row.count for row in plan.collectives) == pytest.approx(plan.predicted.communication_s, rel=1e-9)


@pytest.mark.parametrize("baseline", BASELINES)
def test_search_is_never_worse_than_a_baseline(baseline: str) -> None:
    for name in ("gpt2", "resnet"):
        forced = plan_graph(graph_of(name), CPU, baseline=baseline)
        free = plan_graph(graph_of(name), CPU, mesh=forced.mesh)
        assert forced.name == baseline
        assert free.cost_s <= forced.cost_s * (1 + 1e-9)
        assert recomputed_s(forced, name, CPU) == pytest.approx(forced.cost_s, rel=1e-9)


def test_depth_is_folded() -> None:
    """Each further layer costs the same, but for those at the ends, and twelve layers make no longer a plan than ten."""
    plans = [plan_graph(graph_of("gpt2", layers=layers), CPU, mesh=(2, 2)) for layers in (8, 10, 12)]
    steps = [after.cost_s - before.cost_s for before, after in pairwise(plans)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-6)
    rows = [(len(plan.parameters), sum(len(segment.ops) for segment in plan.segments), len(plan.collectives)) for plan in plans]
    assert rows[1] == rows[2]
    assert any(segment.count >= 6 for segment in plans[2].segments)
    assert any("{" in row.name for row in plans[2].parameters)


def test_plan_survives_saving() -> None:
    graph = graph_of("llama")
    plan = plan_graph(graph, CPU)
    again = Plan.model_validate_json(plan.model_dump_json())
    assert expand(again, graph) == expand(plan, graph)


def test_megatron_arises_where_the_batch_cannot_be_split() -> None:
    """Batch 1 on 8 devices with NVLink, GPT-3's width: per layer two all-reduces, or pairs of reduce-scatter and all-gather of the
    same bytes, forward and as many backward (Shoeybi et al. 2019, figure 4; Korthikanti et al. 2022, figure 5)."""
    layers, hidden, sequence = 3, 4096, 512
    graph = _wide_gpt2(layers, hidden, sequence)
    plan = plan_graph(graph, H100, mesh=(1, 8))
    size = hidden * sequence * 2
    inside = [row for row in plan.collectives if row.phase in ("forward", "backward") and row.bytes >= size and row.count == layers]
    moved = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}
    for phase in ("forward", "backward"):
        assert sum(moved[row.kind] * row.bytes for row in inside if row.phase == phase) <= 2 * 2 * size
        assert sum(moved[row.kind] for row in inside if row.phase == phase) == 4.0
    weights = [row for row in plan.parameters if len(row.shape) == 2 and ".h." in row.name]
    assert weights and all(row.stored["tp"].startswith("S") and row.gather == "never" for row in weights)


def _wide_gpt2(layers: int, hidden: int, sequence: int):  # type: ignore[no-untyped-def]
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from autopar.ir.tracing.trace import trace

    config = GPT2Config(n_layer=layers, n_embd=hidden, n_head=hidden // 128, n_positions=sequence)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config).to(torch.bfloat16).train()
    ids = torch.zeros(1, sequence, dtype=torch.long, device="meta")
    return trace(model, (), {"input_ids": ids, "labels": ids}).graph


def test_memory_limit_is_kept_and_infeasible_says_what_fits() -> None:
    graph = graph_of("llama")
    free = plan_graph(graph, CPU, mesh=(4, 1))
    limit = int(sum(free.memory_bytes.values()) * 0.999)
    tight = plan_graph(graph, CPU, mesh=(4, 1), memory_limit_bytes=limit)
    assert tight.predicted.fits and sum(tight.memory_bytes.values()) <= limit
    assert tight.cost_s >= free.cost_s * (1 - 1e-9)
    short = plan_graph(graph, CPU, mesh=(4, 1), memory_limit_bytes=900_000)
    assert not short.predicted.fits
    missing = sum(short.memory_bytes.values()) - 900_000
    assert f"({missing} bytes)" in short.notes[0]
    # The remedies are true: that much memory does fit, and so does the plan with the optimizer named.
    assert f"memory_limit_bytes={sum(short.memory_bytes.values())}" in short.notes[-1]
    assert plan_graph(graph, CPU, mesh=(4, 1), memory_limit_bytes=900_000 + missing).predicted.fits
    without_its_state = sum(short.memory_bytes.values()) - short.memory_bytes["optimizer"] // 2
    between = plan_graph(graph, CPU, mesh=(4, 1), memory_limit_bytes=without_its_state)
    assert not between.predicted.fits and any('optimizer="sgd' in note for note in between.notes)
    assert plan_graph(graph, CPU, mesh=(4, 1), memory_limit_bytes=without_its_state, optimizer="sgd").predicted.fits
    assert not plan_graph(graph, CPU, baseline="ddp", memory_limit_bytes=900_000).predicted.fits


def test_one_rank_and_evaluation() -> None:
    one = plan_graph(graph_of("mlp"), Cluster.from_name("cpu:1"))
    assert one.world_size == 1 and not one.collectives and one.predicted.communication_s == 0
    evaluation = plan_graph(graph_of("gpt2", training=False), CPU)
    assert evaluation.memory_bytes["gradients"] == evaluation.memory_bytes["optimizer"] == 0
    assert all(row.phase == "forward" for row in evaluation.collectives)


# ---- pins ------------------------------------------------------------------------------------------------------------------------


def test_pins_hold() -> None:
    graph = graph_of("llama")
    pins = {"model.layers.*.mlp.up_proj.weight": "S(1)@tp", "lm_head.weight": "R@dp, S(0)@tp"}
    plan = plan_graph(graph, CPU, mesh=(2, 2), pins=pins)
    storage = expand(plan, graph).storage
    assert all(storage[f"model.layers.{i}.mlp.up_proj.weight"].stored[1] == S(1) for i in range(2))
    assert storage["lm_head.weight"].stored == (R, S(0))
    assert plan.pins == pins
    assert plan.cost_s >= plan_graph(graph, CPU, mesh=(2, 2)).cost_s * (1 - 1e-9)


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        ({"model.layer.*.up_proj.weight": "S(0)@tp"}, "did you mean"),
        ({"*.up_proj.weight": "S(0)@tp", "*.mlp.up*": "S(1)@tp"}, "differ on axis"),
        ({"*.up_proj.weight": "S(5)@tp"}, "does not fit"),
        ({"*.up_proj.weight": "S(0)"}, "placement@axis"),
        ({"*.up_proj.weight": "S(0)@pp"}, "placement@axis"),
        ({"*.up_proj.weight": "Q@tp"}, "not a placement"),
        ({"*.up_proj.weight": "P(sum)@tp"}, "stored as"),
        ({"*.up_proj.weight": "ring@tp"}, "no placement"),
        ({"linear_0": "ring@tp"}, "has no split `ring`; it has replicate"),
    ],
)
def test_bad_pins_are_named(pins: dict[str, str], message: str) -> None:
    with pytest.raises(PinError, match=message):
        plan_graph(graph_of("llama"), CPU, mesh=(2, 2), pins=pins)


def test_a_pin_on_an_operation_names_a_placement_or_a_split() -> None:
    for wanted, name in [("ring@tp", "ring"), ("l@tp", "l"), ("S(0)@tp", "d0")]:
        plan = plan_graph(graph_of("llama"), CPU, mesh=(1, 4), pins={"scaled_dot_product_attention_*": wanted})
        attention = [row for segment in plan.segments for row in segment.ops if "scaled_dot" in row.target]
        assert attention and all(row.split["tp"] == name for row in attention)


# ---- plans that were edited or belong elsewhere ----------------------------------------------------------------------------------


def test_expand_refuses_what_cannot_run() -> None:
    graph = graph_of("mlp")
    plan = plan_graph(graph, CPU, mesh=(2, 2))
    with pytest.raises(PlanMismatchError, match="fingerprint"):
        expand(plan, graph_of("mlp", layers=3))

    def with_op(**changes: object) -> Plan:
        first = plan.segments[0]
        op = first.ops[0].model_copy(update=changes)
        segment = first.model_copy(update={"ops": (op, *first.ops[1:])})
        return plan.model_copy(update={"segments": (segment, *plan.segments[1:])})

    def with_parameter(**changes: object) -> Plan:
        return plan.model_copy(update={"parameters": (plan.parameters[0].model_copy(update=changes), *plan.parameters[1:])})

    bad = [
        (with_op(split={"dp": "nowhere", "tp": "replicate"}), "no split `nowhere`"),
        (with_op(split={"dp": "replicate"}), "name each axis once"),
        (with_op(target="aten.mm.default"), "plan again"),
        (with_parameter(stored={"dp": "S(7)", "tp": "R"}), "needs dim 7"),
        (with_parameter(stored={"dp": "R/P", "tp": "R"}), "stored as"),
        (with_parameter(name="ups.weight"), "no parameter `ups.weight`"),
        (plan.model_copy(update={"parameters": plan.parameters[1:]}), "no row for parameter"),
        (plan.model_copy(update={"segments": plan.segments[:-1]}), "segments end at"),
    ]
    for damaged, message in bad:
        with pytest.raises(PlanError, match=message):
            expand(damaged, graph)


def test_mesh_must_have_the_ranks() -> None:
    graph = graph_of("mlp")
    for mesh, message in (((3, 1), "must be equal"), ({"dp": 2, "sp": 2}, "mesh axes are"), ((2, 2, 1), "two sizes")):
        with pytest.raises(PlanError, match=message):
            plan_graph(graph, CPU, mesh=mesh)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="baseline"):
        plan_graph(graph, CPU, baseline="ddp2")


def test_alternatives_are_priced() -> None:
    plan = plan_graph(graph_of("mlp"), CPU, mesh=(4, 1), alternatives=True)
    found = [item for row in plan.parameters for item in row.alternatives]
    assert found and all(item.cost_s is None or item.cost_s >= plan.cost_s * (1 - 1e-9) for item in found)
    assert any(item.cost_s for item in found)


def test_two_meshes_do_not_disturb_each_other() -> None:
    graph = graph_of("gpt2")
    first = plan_graph(graph, CPU, mesh=(2, 2))
    plan_graph(graph, CPU, mesh=(4, 1))
    plan_graph(graph, replace(CPU, name="other", nodes=2, devices_per_node=2), mesh=(1, 4))
    assert plan_graph(graph, CPU, mesh=(2, 2)) == first


@pytest.mark.parametrize("name", ZOO)
def test_plans_do_not_contradict_themselves(name: str) -> None:
    graph = graph_of(name)
    for baseline in (None, "fsdp", "tp"):
        assert not list(contradictions(plan_graph(graph, Cluster.from_name("h100x4"), baseline=baseline)))


@pytest.mark.parametrize("pins", [["a"], {"*.weight": 3}, "S(0)@tp"])
def test_pins_of_other_types_are_refused(pins: Any) -> None:
    with pytest.raises(PinError, match="pins are a dict"):
        plan_graph(graph_of("mlp"), CPU, pins=pins)


def test_memory_limit_of_another_type_is_refused() -> None:
    with pytest.raises(PlanError, match="'1GB'"):
        plan_graph(graph_of("mlp"), CPU, memory_limit_bytes="1GB")  # type: ignore[arg-type]
