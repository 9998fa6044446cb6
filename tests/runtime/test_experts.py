"""Routed experts on several axes at once, and a whole model whose tokens travel to their experts on real processes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import autopar
from autopar.ir.assignment import conflict
from autopar.ir.experts import EXPERTS
from autopar.ir.placement import chunk
from autopar.ir.rules import splits
from autopar.runtime.operators.experts import owners
from autopar.runtime.operators.experts_even import places
from autopar.runtime.verification.launch import RankPool
from tests.ir.checking import check
from tests.ir.rule_samples import samples
from tests.zoo import talkative


def test_every_pair_of_splits_is_right() -> None:
    tried, mesh = set(), (2, 2)
    for graph, op in samples(EXPERTS):
        for pair in itertools.product(splits(graph, op), repeat=2):
            fits = all(split.fits(size) for split, size in zip(pair, mesh, strict=True))
            if fits and conflict(graph, op, pair, ("dp", "tp"), mesh) is None:
                check(graph, op, pair, mesh)
                tried.add(tuple(split.name for split in pair))
    assert {("n+e", "n+e"), ("n+e", "e"), ("n+e", "f"), ("n", "n+e"), ("e", "n+e"), ("f", "e")} <= tried
    assert {("n+e/4", "n+e/4"), ("n", "n+e/4"), ("n+e/4", "f")} <= tried
    assert ("n+e/4", "n+e") not in tried


def test_first_choices_and_earlier_tokens_are_kept() -> None:
    ids = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 2]])
    # Expert 0 is the first choice of tokens 0, 1, 3 and the second of 2; each expert takes two.
    assert places(ids, 3, 2).tolist() == [[0, 3], [1, 6], [2, 6], [6, 4]]
    assert places(torch.full((2, 2), -1), 3, 2).tolist() == [[6, 6], [6, 6]]


@pytest.mark.parametrize(("count", "sizes"), [(8, (2, 2)), (7, (2, 3)), (5, (4,)), (16, (3, 2))])
def test_the_owner_of_an_expert_is_the_rank_that_holds_its_tensors(count: int, sizes: tuple[int, ...]) -> None:
    coordinates = list(zip(*(owners(count, sizes, position) for position in range(len(sizes))), strict=True))
    for coordinate in itertools.product(*map(range, sizes)):
        start, length = 0, count
        for size, index in zip(sizes, coordinate, strict=True):
            offset, length = chunk(length, size, index)
            start += offset
        assert [expert for expert, owner in enumerate(coordinates) if owner == coordinate] == list(range(start, start + length))


def mixtral(**sizes: Any) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    small = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "use_cache": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **{**small, **sizes})).double().train()
    ids = torch.randint(0, 48, (8, 8))
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.processes
def test_a_capacity_that_drops_nothing_is_the_same_model(ranks2: RankPool) -> None:
    model, example = mixtral()
    plan = autopar.plan(model, example, talkative(2), mesh=(2, 1), expert_capacity=4.0, pins={"experts_*": "n+e/4@dp"})
    assert "may drop rows: each takes at most 4 times" in str(plan)
    report = autopar.verify(model, example, autopar.Plan.parse(plan.text()), ranks=ranks2, steps=2, optimizer="sgd")
    assert report.ok and report.max_relative_error < 1e-10, report


@pytest.mark.processes
@pytest.mark.parametrize(
    "options",
    [
        {"mesh": (2, 2), "pins": {"experts_*": "n+e@dp, f@tp"}},
        {"mesh": {"pp": 2, "dp": 2, "tp": 1}, "microbatches": 2, "schedule": "1f1b", "pins": {"experts_*": "n+e@dp"}, "recompute": "all"},
    ],
    ids=["tensor-split experts", "pipeline"],
)
def test_expert_parallelism_is_the_same_model(ranks4: RankPool, options: dict[str, Any]) -> None:
    model, example = mixtral()
    plan = autopar.plan(model, example, talkative(4), **options)
    assert {op.split["dp"] for segment in plan.segments for op in segment.ops if op.target == EXPERTS} == {"n+e"}
    report = autopar.verify(model, example, plan, ranks=ranks4, steps=2, optimizer="sgd")
    assert report.ok and report.max_relative_error < 1e-10, report
