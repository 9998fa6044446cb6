"""What the search makes of long sequences, what attention over them is said to cost, and that short ones are left alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autopar.ir.cluster import resolve
from autopar.ir.graph import Graph
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import trace
from autopar.search.planner import plan_graph
from autopar.search.prices.collectives import axes
from autopar.search.prices.sequence import sequence_split

LONG = 131072
NO_LIMIT_BYTES = 1 << 50
ATTENTION = "scaled_dot_product_attention_0"


@cache
def layer(tokens: int, batch: int = 1) -> Graph:
    """One layer of Llama 3 8B between a small embedding and a small head."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8, vocab_size=1024,
        max_position_embeddings=tokens, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model, ids = LlamaForCausalLM(config).bfloat16(), torch.zeros(batch, tokens, dtype=torch.int64)
    return trace(model, (), {"input_ids": ids, "labels": ids}).graph


def planned(tokens: int, ranks: int, batch: int = 1, **options: Any) -> Plan:
    cluster = resolve(f"h100x{min(ranks, 8)}" + (f":{ranks // 8}" if ranks > 8 else ""))
    return plan_graph(layer(tokens, batch), cluster, microbatches=1, recompute="none", memory_limit_bytes=NO_LIMIT_BYTES, **options)


def ways(plan: Plan, target: str) -> set[str]:
    """The splits on the axes of more than one rank."""
    found = set()
    for segment in plan.segments:
        for row in segment.ops:
            if target in row.target:
                found |= {name for axis, name in row.split.items() if plan.mesh[axis] > 1}
    return found


def memory(plan: Plan) -> int:
    return sum(plan.memory_bytes.values())


def test_a_layer_of_128k_tokens_is_split_over_the_sequence() -> None:
    """Products, norms and all between along the tokens, attention by heads in one machine and over the sequence where heads do not do."""
    alone = memory(planned(LONG, 1))
    for ranks, least in ((4, 3.4), (8, 6.2), (16, 9.5)):
        plan = planned(LONG, ranks)
        assert ways(plan, "linear") == ways(plan, "mean") == ways(plan, "rsqrt") == {"d1"}
        assert ways(plan, "scaled_dot_product_attention") <= {"h", "l", "ring"}
        assert ranks < 16 or ways(plan, "scaled_dot_product_attention") & {"l", "ring"}  # 8 heads of keys are too few
        assert least < alone / memory(plan) < ranks
        assert plan.gap < 1e-9


def test_a_ring_holds_least_and_all_ways_are_near_each_other() -> None:
    plans = {way: planned(LONG, 8, mesh=(1, 8), pins={ATTENTION: f"{way}@tp"}) for way in ("h", "l", "ring")}
    found = {way: (plan.predicted.step_s, memory(plan)) for way, plan in plans.items()}
    assert min(found, key=lambda way: found[way][1]) == "ring"
    assert max(step_s for step_s, _ in found.values()) < 1.2 * min(step_s for step_s, _ in found.values())
    shifts = [row for row in plans["ring"].collectives if row.kind == "shift"]
    assert shifts and sum(row.exposed_s * row.count for row in shifts) < sum(row.time_s * row.count for row in shifts)
    # What is hidden behind attention is not waited for in the simulated step either.
    for plan in plans.values():
        assert plan.predicted.step_s < 1.1 * plan.predicted.cost_s


def test_short_sequences_are_split_by_the_batch() -> None:
    plan = planned(2048, 8, batch=8)
    assert ways(plan, "scaled_dot_product_attention") == {"d0"}


def test_the_wires_of_attention_add_up() -> None:
    q, k = 64 * 2**20, 16 * 2**20
    ring = sequence_split(("", "causal_ring_attention"), (2, 8), (q, k, k), (q,), "bfloat16")
    assert ring is not None and ring.axes == (1,)
    by_phase = {
        phase: sorted((wire.bytes // 2**20, wire.times, wire.hidden) for wire in ring.wires(True) if wire.phase == phase)
        for phase in ("forward", "backward")
    }
    assert by_phase["forward"] == [(32, 1, False), (32, 7, True), (48, 1, False)]
    assert by_phase["backward"] == [(32, 7, True), (48, 1, False), (64, 1, False), (64, 1, False), (64, 7, True)]
    both = sequence_split(("ring_attention",) * 2, (2, 4), (q, k, k), (q,), "float32")
    assert both is not None
    # Around the inner axis in each of two turns; two turns of three bring the inner offset to 6, two places from home.
    assert [(wire.axis, wire.times) for wire in both.wires(False)] == [(0, 1), (1, 6)]
    assert sum(wire.times for wire in both.wires(True) if not wire.hidden) == 2
    gathered = sequence_split(("causal_queries", ""), (4, 1), (q, k, k), (q,), "bfloat16")
    assert gathered is not None and [wire.hidden for wire in gathered.wires(True)] == [False] * 4
    assert sequence_split(("", ""), (4, 4), (q, k, k), (q,), "bfloat16") is None
    assert sequence_split(("ring_attention", ""), (1, 4), (q, k, k), (q,), "bfloat16") is None


def test_what_crosses_machines_point_to_point_goes_through_one_card() -> None:
    cluster = resolve("h100x8:2")
    inside, crossing = axes(cluster, (2, 8), ("dp", "tp"))[1], axes(cluster, (1, 16), ("dp", "tp"))[1]
    card, nvlink = cluster.inter.bytes_per_s, cluster.intra.bytes_per_s
    size = 2.0**30
    assert inside.time_s("shift", size) == pytest.approx(inside.start_s + inside.latency_s + size / nvlink)
    assert crossing.time_s("shift", size) == pytest.approx(crossing.start_s + crossing.latency_s + size / card)
    assert crossing.time_s("all_to_all", size) == pytest.approx(crossing.start_s + 15 * crossing.latency_s + size / 2 / card)
    assert inside.time_s("all_to_all", size) == pytest.approx(inside.start_s + 7 * inside.latency_s + size * 7 / 8 / nvlink)
