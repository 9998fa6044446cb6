"""Stages run one after the other do what the graph does, wherever it is cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.pipelining.stages import RECEIVE, SEND, candidates, crossing, cut
from tests.ir.interpreter import run
from tests.ir.parts import microbatch, prologue_of, run_stages
from tests.ir.test_microbatch import traced_in_float64, traced_with
from tests.zoo import ZOO

NAMES = [name for name in ("gpt2", "llama", "t5", "bart", "vit", "unet-groups", "encoder") if name in ZOO]
MADE = {}


def traced_once(name: str):  # type: ignore[no-untyped-def]
    if name not in MADE:
        model, _, _ = traced_in_float64(name)
        model.eval()  # without dropout in attention either
        MADE[name] = traced_with(model, ZOO[name].inputs(model, batch=4))
    return MADE[name]


def agree(name: str, starts: tuple[int, ...], count: int = 1) -> None:
    model, traced, inputs = traced_once(name)
    parts = microbatched(traced.graph, count)
    known = microbatch(parts, prologue_of(parts, traced, model, inputs), 0)
    body = parts.body
    expected, _ = run(replace(traced, graph=body), model, [known[item.path] for item in body.inputs])
    stages = cut(body, starts)
    for stage in stages:
        stage.graph.verify()
    found = run_stages(stages, traced, model, known)
    assert found.keys() == {item.path for item in body.outputs}
    for item, tensor in zip(body.outputs, expected, strict=True):
        torch.testing.assert_close(found[item.path], tensor, rtol=0, atol=0, msg=item.path)
    weights = list(model.parameters())
    losses = [(tensor, found[item.path]) for item, tensor in zip(body.outputs, expected, strict=True) if not tensor.dim()]
    for whole, staged in losses:
        wanted = torch.autograd.grad(whole, weights, allow_unused=True)
        torch.testing.assert_close(torch.autograd.grad(staged, weights, allow_unused=True), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_alone(name: str) -> None:
    _, traced, _ = traced_once(name)
    places = candidates(traced.graph)
    assert places == tuple(sorted(set(places))) and places
    for place in places[:: max(1, len(places) // 6)]:
        agree(name, (0, place))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_cuts(name: str, data: st.DataObject) -> None:
    _, traced, _ = traced_once(name)
    body = microbatched(traced.graph, 2).body
    places = data.draw(st.sets(st.integers(1, len(body.ops) - 1), min_size=1, max_size=4))
    agree(name, (0, *sorted(places)), count=2)


def test_masks_and_tied_weights_do_not_travel() -> None:
    _, traced, _ = traced_once("gpt2")
    graph = traced.graph
    stages = cut(graph, (0, candidates(graph)[len(candidates(graph)) // 2]))
    assert len(stages[0].sends) == 1 and graph.values[stages[0].sends[0]].requires_grad
    tied = [{item.fqn for item in stage.graph.parameters} for stage in stages]
    assert tied[0] & tied[1] == {"transformer.wte.weight"}


def test_what_is_read_stages_later_is_relayed() -> None:
    _, traced, _ = traced_once("unet-groups")
    body = traced.graph
    middle = len(body.ops) // 2
    stages = cut(body, (0, middle - 2, middle, middle + 2))
    for before, after in pairwise(stages):
        assert before.sends == after.receives == crossing(body, after.start)
        assert [op.outputs[0] for op in after.graph.ops if op.target == RECEIVE] == list(after.receives)
        assert [op.operands[0] for op in before.graph.ops if op.target == SEND] == list(before.sends)
    assert set(stages[1].receives) & set(stages[1].sends), "a long skip passes through"


@pytest.mark.parametrize("starts", ((), (1,), (0, 0), (0, 5, 3), (0, 10**6)))
def test_starts_that_are_none(starts: tuple[int, ...]) -> None:
    _, traced, _ = traced_once("encoder")
    with pytest.raises(PlanError, match="ascend from 0"):
        cut(traced.graph, starts)
