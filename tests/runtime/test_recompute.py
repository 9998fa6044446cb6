"""Repeats that are computed again: the same numbers to the last bit, dropout and gathered parameters included, in less memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import autopar
from autopar.ir.fold import fold
from autopar.ir.graph import Graph
from autopar.ir.plan import Plan, SegmentPlan
from autopar.ir.tracing.trace import trace
from autopar.runtime.module import ParallelModule
from autopar.runtime.recompute import regions_of
from autopar.runtime.state.checkpoint import whole_tensor
from autopar.runtime.verification.launch import RankPool
from benchmarks.memory import measure
from tests.runtime import pipelined, random_plans
from tests.runtime.random_plans import Facts, Mesh, difference, example, facts, float64, random_assignment, total, whole, widened
from tests.runtime.simulated import simulate


def segments(graph: Graph, repeats: int) -> tuple[SegmentPlan, ...]:
    """The segments of `graph`, of which the first `repeats` repeats (all of fewer) are recomputed."""
    return tuple(
        SegmentPlan.model_construct(
            name=str(index), start=item.start, length=item.length, count=item.count, recompute=min(repeats, item.count), ops=()
        )
        for index, item in enumerate(fold(graph))
    )


@contextmanager
def recomputing(graph: Graph, repeats: int) -> Iterator[None]:
    """Modules made within recompute `repeats` repeats of every segment."""
    original = random_plans.empty_plan
    random_plans.empty_plan = lambda mesh: original(mesh).model_copy(update={"segments": segments(graph, repeats)})
    try:
        yield
    finally:
        random_plans.empty_plan = original


def trained(module: ParallelModule, args: Any, kwargs: Any) -> Facts:
    """Two forward passes before the first backward pass, then a step: what dropout and gathering could get wrong."""
    torch.manual_seed(5)
    first = total(module(*args, **kwargs))
    second = total(module(*args, **kwargs))
    (first + 2 * second).backward()
    result = module(*args, **kwargs)
    loss = total(result)
    loss.backward()
    return facts(module, result, whole(loss))


# Simulated ranks are threads and share the generator that attention draws from: where there are several, attention drops nothing.
CASES: list[tuple[str, Mesh, int, dict[str, float]]] = [
    ("gpt2", (1, 1), 0, {}), ("gpt2", (2, 2), 1, {"attn_pdrop": 0.0}), ("llama", (2, 2), 1, {}), ("t5", (2, 1), 3, {"dropout_rate": 0.0}),
    ("convnet", (2, 2), 4, {}), ("bert", (1, 2), 5, {"attention_probs_dropout_prob": 0.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mesh", "seed", "sizes"), CASES)
def test_the_same_numbers_with_dropout_and_gathered_parameters(name: str, mesh: Mesh, seed: int, sizes: dict[str, float]) -> None:
    model, args, kwargs = example(name, layers=3, **sizes)
    with float64():
        traced = widened(trace(model, args, kwargs))
        assignment = random_assignment(traced.graph, mesh, seed)
        if seed == 1:
            assignment = replace(assignment, storage={k: replace(item, gather="use") for k, item in assignment.storage.items()})

        def rank(device_mesh: DeviceMesh) -> Facts:
            torch.manual_seed(3)
            return trained(random_plans.parallel_module(model, traced, assignment, device_mesh), args, kwargs)

        expected = simulate(mesh, rank)
        for repeats in (1, 99):
            with recomputing(traced.graph, repeats):
                assert regions_of(segments(traced.graph, repeats))
                found = simulate(mesh, rank)
            for one, other in zip(expected, found, strict=True):
                error, where = difference(one, other)
                assert error == 0.0, (repeats, where, error)


def test_the_graph_kept_frozen_parameters_and_evaluation() -> None:
    model, args, kwargs = example("llama", layers=3)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    with float64():
        traced = widened(trace(model, args, kwargs))
        assignment = random_assignment(traced.graph, (2, 2), 7)

        def rank(device_mesh: DeviceMesh) -> Facts:
            module = random_plans.parallel_module(model, traced, assignment, device_mesh)
            with torch.no_grad():
                evaluated = total(module.eval()(*args, **kwargs))
            loss = total(module.train()(*args, **kwargs))
            loss.backward(retain_graph=True)
            with module.no_sync():
                total(module(*args, **kwargs)).backward()
            loss.backward()
            assert not any(bucket.here or bucket.flying for bucket in module._buckets)
            return facts(module, None, whole(loss)) | {"evaluated": whole(evaluated)}

        expected = simulate((2, 2), rank)
        with recomputing(traced.graph, 99):
            found = simulate((2, 2), rank)
    for one, other in zip(expected, found, strict=True):
        error, where = difference(one, other)
        assert error < 1e-14, where


def compiled(module: ParallelModule, args: Any, kwargs: Any) -> Facts:
    call = torch.compile(module, backend="aot_eager")
    result = call(*args, **kwargs)
    loss = total(result)
    loss.backward()
    return facts(module, result, whole(loss))


def test_compiled() -> None:
    model, args, kwargs = example("gpt2", layers=3, attn_pdrop=0.0)
    with float64():
        traced = widened(trace(model, args, kwargs))
        assignment = random_assignment(traced.graph, (1, 1), 0)
        found = []
        for repeats in (0, 2):
            with recomputing(traced.graph, repeats):
                found += simulate(
                    (1, 1), lambda mesh: compiled(random_plans.parallel_module(model, traced, assignment, mesh), args, kwargs)
                )
    error, where = difference(*found)
    assert error < 1e-12, where


def peak_bytes(repeats: int, gather: str) -> int:
    model, args, kwargs = example("llama", layers=4)
    with float64():
        kwargs = {name: tensor.repeat(4, 2) for name, tensor in kwargs.items()}
        traced = widened(trace(model, args, kwargs))
        assignment = random_assignment(traced.graph, (1, 1), 0)
        assignment = replace(assignment, storage={name: replace(item, gather=gather) for name, item in assignment.storage.items()})

        def rank(mesh: DeviceMesh) -> int:
            module = random_plans.parallel_module(model, traced, assignment, mesh)

            def owned() -> Iterator[Tensor | None]:
                for parameter in module.parameters():
                    yield parameter
                    yield parameter.grad
                yield from module.buffers()

            return measure(lambda: module.step(*args, **kwargs), owned)

        with recomputing(traced.graph, repeats):
            return simulate((1, 1), rank)[0]


def test_peak_memory_falls_with_every_repeat() -> None:
    peaks = [peak_bytes(repeats, "use") for repeats in (0, 2, 4)]
    drops = [one - other for one, other in pairwise(peaks)]
    assert all(drop > 0.2 * peaks[0] for drop in drops) and peaks[-1] < 0.5 * peaks[0], peaks


def stepped(plans: list[Plan], name: str) -> list[Facts]:
    """On a rank: loss and gradients of two steps with dropout under each plan."""
    found = []
    for plan in plans:
        model, inputs = pipelined.example(name, layers=4, dropout=0.1)
        torch.manual_seed(7)
        with float64():
            module = autopar.parallelize(model, inputs, plan=plan)
            losses = [module.step(**inputs) for _ in range(2)]
        gradients = {f"gradient of {n}": whole_tensor(p.grad) for n, p in module.named_parameters() if p.grad is not None}
        found.append({"first": losses[0], "second": losses[1], **gradients})
    return found


@pytest.mark.processes
@pytest.mark.parametrize(("schedule", "microbatches"), [("1f1b", 2), ("zbv", 4)])
def test_in_a_pipeline(ranks2: RankPool, schedule: str, microbatches: int) -> None:
    mesh = {"pp": 2, "dp": 1, "tp": 1}
    plans = [pipelined.planned("gpt2", mesh, microbatches, schedule, repeats, layers=4, dropout=0.1) for repeats in (0, 99)]
    assert any(item.recompute for item in plans[1].segments)
    for kept, again in ranks2.run(stepped, plans, "gpt2"):
        assert not torch.equal(kept["first"], kept["second"])  # other masks in each step
        error, where = difference(kept, again)
        assert error == 0.0, where
