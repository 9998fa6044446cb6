"""What the search makes of routed experts: expert parallelism where it pays, the dense plan with one expert, and words for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from autopar.errors import ClusterError
from autopar.ir.cluster import Cluster
from autopar.ir.experts import EXPERTS
from autopar.ir.graph import Graph
from autopar.ir.plan import Plan
from autopar.ir.plan_roles import Roles
from autopar.ir.rules import splits
from autopar.ir.rules.nest import Call, Nest
from autopar.ir.rules.table import RULES
from autopar.ir.tracing.trace import trace
from autopar.search.planner import plan_graph
from autopar.search.prices.costs import Costs
from autopar.search.prices.work import work


def graph_of(kind: str, batch: int = 16, seq: int = 1024, **sizes: Any) -> Graph:
    config = AutoConfig.for_model(
        kind,
        hidden_size=1024,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=2,
        vocab_size=8192,
        use_cache=False,
        **sizes,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        ids = torch.zeros(batch, seq, dtype=torch.long)
    return trace(model, (), {"input_ids": ids, "labels": ids}).graph


def expert_splits(plan: Plan) -> set[tuple[str, ...]]:
    return {tuple(op.split.values()) for segment in plan.segments for op in segment.ops if op.target == EXPERTS}


def test_many_experts_are_put_on_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    many = {"intermediate_size": 2048, "num_local_experts": 32, "num_experts_per_tok": 2}
    plan = plan_graph(graph_of("mixtral", **many), Cluster.from_name("h100x8:2"), mesh=(2, 8))
    assert expert_splits(plan) == {("n", "n+e")}
    assert "tokens and experts" in Roles.of(plan).axis("tp")
    assert {row.kind for row in plan.collectives if row.kind == "all_to_all"}
    family = RULES[EXPERTS]

    def narrowed(call: Call) -> Nest | None:
        nest = family(call)
        return None if nest is None else replace(nest, whole=nest.whole | {"e"}, joint=())

    monkeypatch.setitem(RULES, EXPERTS, narrowed)
    without = plan_graph(graph_of("mixtral", batch=16, seq=1025, **many), Cluster.from_name("h100x8:2"), mesh=(2, 8))
    assert plan.predicted.step_s < without.predicted.step_s


def test_one_expert_is_planned_as_the_dense_layer_is() -> None:
    cluster = Cluster.from_name("h100x8")
    one = plan_graph(graph_of("mixtral", intermediate_size=4096, num_local_experts=1, num_experts_per_tok=1), cluster, mesh=(4, 2))
    dense = plan_graph(graph_of("mistral", intermediate_size=4096, head_dim=64), cluster, mesh=(4, 2))
    assert expert_splits(one) == {("n", "n")}
    assert one.predicted.step_s == pytest.approx(dense.predicted.step_s, rel=0.15)  # the router is left
    stored = {row.name: row.stored for row in one.parameters if "mlp" not in row.name}
    assert stored == {row.name: row.stored for row in dense.parameters if "mlp" not in row.name}


class Switch(nn.Module):
    """Experts with a capacity by dense dispatch: Fedus et al. 2021, "Switch Transformers", appendix F."""

    def __init__(self, width: int, inner: int, experts: int, capacity: int) -> None:
        super().__init__()
        self.experts, self.capacity = experts, capacity
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, inner) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, inner, width) * 0.1)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        chosen = F.one_hot(gates.argmax(-1), self.experts).to(x.dtype)
        place = (chosen.cumsum(1) - 1) * chosen
        kept = chosen * (place < self.capacity)
        slot = F.one_hot((place * kept).sum(-1).long(), self.capacity).to(x.dtype)
        dispatch = torch.einsum("gse,gsc->gsec", kept, slot)
        rows = torch.einsum("gsec,gsm->egcm", dispatch, x)
        rows = torch.einsum("egcm,emf->egcf", rows, self.up).relu()
        rows = torch.einsum("egcf,efm->egcm", rows, self.down)
        combine = dispatch * (gates * kept).sum(-1)[..., None, None]
        return self.head(torch.einsum("gsec,egcm->gsm", combine, rows)).square().mean()


def test_dense_dispatch_gets_an_even_all_to_all() -> None:
    with torch.device("meta"):
        model, x = Switch(1024, 4096, 16, 160).bfloat16(), torch.zeros(16, 2048, 1024, dtype=torch.bfloat16)
    graph = trace(model, (x,)).graph
    plan = plan_graph(graph, Cluster.from_name("h100x8"), mesh=(1, 8))
    layers = [op for segment in plan.segments for op in segment.ops if op.target == "aten.einsum.default"]
    assert [op.split["tp"] for op in layers] == ["g", "g", "e", "e", "g"]
    assert {row.axis for row in plan.collectives if row.kind == "all_to_all"} == {"tp"}


def test_the_fullest_rank_is_charged() -> None:
    graph = graph_of("mixtral", intermediate_size=2048, num_local_experts=8, num_experts_per_tok=2)
    op = next(op for op in graph.ops if op.target == EXPERTS)
    operands = tuple(graph.values[name] for name in op.operands)
    outputs = tuple(graph.values[name] for name in op.outputs)
    by_name = {split.name: (split, splits(graph, op)[0]) for split in splits(graph, op)}
    even, uneven = (Costs(replace(Cluster.from_name("h100x8"), expert_imbalance=factor), (8, 1), ("dp", "tp")) for factor in (1.0, 1.5))
    done = work(graph, op)
    assert done.experts is not None and done.forward_flops == 2 * 16 * 1024 * 2 * 3 * 1024 * 2048
    for name in ("n", "f"):
        assert even.op_times(done, operands, outputs, by_name[name]) == uneven.op_times(done, operands, outputs, by_name[name])
    for name in ("e", "n+e"):
        before, after = even.op_times(done, operands, outputs, by_name[name]), uneven.op_times(done, operands, outputs, by_name[name])
        assert 1.2 < after[0] / before[0] <= 1.5


def test_an_imbalance_below_one_is_refused() -> None:
    with pytest.raises(ClusterError, match="expert_imbalance"):
        plan_graph(Graph("nothing", {}, (), (), (), (), (), ()), Cluster.from_name("h100x8"), expert_imbalance=0.5)
