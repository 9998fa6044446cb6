"""`ParallelModule` on simulated ranks: what users do with a module, under random plans, against the model on one device."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.errors import RuntimeSetupError
from autopar.ir.tracing.trace import trace
from autopar.runtime.module import ParallelModule
from autopar.runtime.operators.dropout import without_dropout
from tests.runtime import random_plans
from tests.runtime.random_plans import (
    Facts,
    Mesh,
    Wide,
    compare,
    difference,
    example,
    facts,
    float64,
    output_states,
    parallel_module,
    random_assignment,
    reference,
    total,
    whole,
    widened,
)  # fmt: skip
from tests.runtime.simulated import simulate

CASES = [
    ("gpt2", (2, 2), 0), ("llama", (2, 2), 1), ("t5", (1, 4), 2), ("convnet", (2, 2), 3), ("resnet", (4, 1), 4), ("encoder", (2, 2), 5),
    ("bert", (1, 2), 6), ("vit", (3, 1), 7), ("mlp", (1, 1), 8), ("qwen3", (2, 4), 9),
]  # fmt: skip


@pytest.mark.parametrize("name, mesh, seed", CASES)
def test_random_plans_agree_with_one_device(name: str, mesh: Mesh, seed: int) -> None:
    error, where = compare(name, mesh, seed)
    assert error < 1e-10, where


Story = Callable[[nn.Module, Callable[[], Any]], Facts]
"""What a user does with a module, given a way to call it; returns what must agree."""


def agrees(story: Story, name: str, mesh: Mesh = (2, 2), seeds: range = range(2)) -> None:
    """`story` on one device and on simulated ranks under random plans."""
    model, args, kwargs = example(name)
    with float64():
        one = copy.deepcopy(model)
        with without_dropout(one), Wide():
            expected = story(one, lambda: one(*args, **kwargs))
        traced = widened(trace(model, args, kwargs))
        for seed in seeds:
            assignment = random_assignment(traced.graph, mesh, seed)

            def rank(device_mesh: DeviceMesh) -> Facts:
                module = parallel_module(model, traced, assignment, device_mesh, output_states(traced, assignment))  # noqa: B023
                with without_dropout(module):
                    return story(module, lambda: module(*args, **kwargs))

            for found in simulate(mesh, rank):
                error, where = difference(expected, found)
                assert error < 1e-10, f"seed {seed}: {where}"


def steps(module: nn.Module, call: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Facts:
    for _ in range(3):
        optimizer.zero_grad()
        result = call()
        loss = total(result)
        loss.backward()
        optimizer.step()
    found = facts(module, result, whole(loss))
    return found | {f"gradient-trained {name}": whole(parameter.detach()) for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", ["gpt2", "convnet"])
def test_optimizers(name: str) -> None:
    agrees(lambda m, call: steps(m, call, torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)), name)
    agrees(lambda m, call: steps(m, call, torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-4)), name, seeds=range(2, 3))


def test_gradients_accumulate() -> None:
    def story(module: nn.Module, call: Callable[[], Any]) -> Facts:
        for _ in range(2):
            total(call()).backward()
        module.zero_grad(set_to_none=False)
        for _ in range(2):
            result = call()
            loss = total(result)
            loss.backward()
        return facts(module, result, whole(loss))

    agrees(story, "llama")


def test_no_sync_adds_up_later() -> None:
    def story(module: nn.Module, call: Callable[[], Any]) -> Facts:
        if isinstance(module, ParallelModule):
            with module.no_sync():
                total(call()).backward()
            assert all(parameter.grad is None for parameter in module.parameters())
        else:
            total(call()).backward()
        result = call()
        loss = total(result)
        loss.backward()
        return facts(module, result, whole(loss))

    agrees(story, "llama")


def test_two_forwards_one_backward_and_the_graph_kept() -> None:
    def story(module: nn.Module, call: Callable[[], Any]) -> Facts:
        first, second = call(), call()
        loss = total(first) + 2 * total(second)
        loss.backward(retain_graph=True)
        loss.backward()
        return facts(module, second, whole(loss))

    agrees(story, "gpt2")


def test_evaluation_between_training_steps() -> None:
    def story(module: nn.Module, call: Callable[[], Any]) -> Facts:
        total(call()).backward()
        module.eval()
        with torch.no_grad():
            evaluated = total(call())
        result = call()
        total(result).backward()
        module.train()
        return facts(module, result, whole(evaluated))

    agrees(story, "convnet")
    agrees(story, "encoder")


def test_frozen_parameters() -> None:
    def story(module: nn.Module, call: Callable[[], Any]) -> Facts:
        result = call()
        loss = total(result)
        loss.backward()
        assert all(parameter.grad is None for parameter in module.parameters() if not parameter.requires_grad)
        return facts(module, result, whole(loss))

    original = random_plans.example

    def frozen(name: str, **sizes: Any) -> Any:
        model, args, kwargs = original(name, **sizes)
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index % 3 != 0)
        return model, args, kwargs

    globals()["example"] = frozen
    try:
        agrees(story, "llama")
    finally:
        globals()["example"] = original


def _storage_bytes(module: ParallelModule) -> list[int]:
    return [leaf.tensor.untyped_storage().nbytes() for leaf in module._leaves if leaf.use.gather == "use"]


def test_gathered_parameters_are_freed() -> None:
    model, args, kwargs = example("llama")
    with float64():
        traced = widened(trace(model, args, kwargs))
        assignment = random_assignment(traced.graph, (2, 2), 0)
        storage = {fqn: replace(item, gather="use") for fqn, item in assignment.storage.items()}
        assignment = replace(assignment, storage=storage)

        def rank(device_mesh: DeviceMesh) -> None:
            module = parallel_module(model, traced, assignment, device_mesh)
            with torch.no_grad():
                module(*args, **kwargs)
            assert _storage_bytes(module) and not any(_storage_bytes(module))
            loss = total(module(*args, **kwargs))
            # The last bucket stays for the backward pass, which begins with it.
            last = module._buckets[-1]
            assert sum(_storage_bytes(module)) == sum(leaf.tensor.untyped_storage().nbytes() for leaf in last.leaves)
            loss.backward()
            assert not any(_storage_bytes(module))

        simulate((2, 2), rank)


def test_a_backward_pass_that_raised_leaves_nothing_behind() -> None:
    def story(module: nn.Module, call: Callable[[], Any]) -> Facts:
        if isinstance(module, ParallelModule):
            taken, count = module._reducer._take, iter(range(100))

            def take(leaf: Any, gradient: Tensor) -> None:
                if next(count) == 2:
                    raise KeyboardInterrupt
                taken(leaf, gradient)

            module._reducer._take = take  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                total(call()).backward()
            module._reducer._take = taken  # type: ignore[method-assign]
            module.zero_grad()
        result = call()
        loss = total(result)
        loss.backward()
        return facts(module, result, whole(loss))

    agrees(story, "mlp")


def test_compiled_on_one_rank() -> None:
    model, args, kwargs = example("llama")
    expected = reference(model, args, kwargs)
    with float64():
        traced = widened(trace(model, args, kwargs))
        assignment = random_assignment(traced.graph, (1, 1), 0)

        def rank(device_mesh: DeviceMesh) -> Facts:
            module = parallel_module(model, traced, assignment, device_mesh)
            compiled = torch.compile(module, backend="aot_eager")
            with without_dropout(module):
                result = compiled(*args, **kwargs)
                loss = total(result)
                loss.backward()
            return facts(module, result, whole(loss))

        (found,) = simulate((1, 1), rank)
    error, where = difference(expected, found)
    assert error < 1e-10, where


def test_what_would_break_the_program_is_refused() -> None:
    model, args, kwargs = example("mlp")
    with float64():
        traced = trace(model, args, kwargs)
    assignment = random_assignment(traced.graph, (1, 1), 0)

    def rank(device_mesh: DeviceMesh) -> None:
        module = parallel_module(model, traced, assignment, device_mesh)
        for change in (module.half, module.float, lambda: module.to(torch.bfloat16), lambda: module.to("meta")):
            with pytest.raises(RuntimeSetupError, match="convert the model first"):
                change()
        assert module.to("cpu") is module and module.double()(*args, **kwargs).dtype == torch.float64
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeSetupError, match="state_dict"):
                copied(module)

    simulate((1, 1), rank)
