"""`module.step`: a global batch in microbatches, its gradients reduced once, against one device; and evaluation under such plans."""

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
from torch.utils import _pytree as pytree

import autopar
from autopar.errors import InputError, RuntimeSetupError
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.placement import R, S
from autopar.ir.plan import InputPlan
from autopar.ir.tracing.trace import trace
from autopar.runtime.module import ParallelModule
from autopar.runtime.operators.dropout import without_dropout
from autopar.runtime.state.shards import coordinate_of, local_part
from autopar.runtime.verification.launch import RankPool
from tests.runtime.random_plans import Facts, Mesh, Wide, difference, empty_plan, example, float64, random_assignment, total, whole, widened
from tests.runtime.simulated import simulate

Make = Callable[[DeviceMesh], ParallelModule]


def module_of(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    mesh: Mesh,
    count: int,
    seed: int,
    gather: str | None = None,
    inputs: Any = "global",
    rows: Any = (),
) -> Make:
    """Makes `model` on simulated ranks, with `count` microbatches under a random assignment."""
    with float64():
        traced = widened(trace(model, args, kwargs))
    batched = microbatched(traced.graph, count)
    assignment = random_assignment(batched.body, mesh, seed)
    if gather is not None:
        assignment = replace(assignment, storage={name: replace(item, gather=gather) for name, item in assignment.storage.items()})
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def make(device_mesh: DeviceMesh) -> ParallelModule:
        coordinate = coordinate_of(device_mesh)
        local = {}
        for fqn in (*(item.fqn for item in traced.graph.parameters), *(item.fqn for item in traced.graph.buffers)):
            state = assignment.storage[fqn].stored if fqn in assignment.storage else (R, R)
            local[fqn] = local_part(tensors[fqn].detach(), state, mesh, coordinate).clone(memory_format=torch.contiguous_format)
        changes = {"microbatches": count, "inputs": tuple(rows)}
        return ParallelModule(
            traced, empty_plan(mesh).model_copy(update=changes), device_mesh, local, assignment=assignment, batched=batched, inputs=inputs
        )

    return make


def one_device(model: nn.Module, call: Callable[[nn.Module], Facts]) -> Facts:
    with float64(), without_dropout(model), Wide():
        return call(copy.deepcopy(model))


def gradients(module: nn.Module) -> Facts:
    return {f"gradient of {name}": whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}


CASES = [
    ("gpt2", (2, 2), 2, 0, None), ("llama", (2, 2), 4, 1, "use"), ("t5", (1, 2), 2, 2, "step"), ("encoder", (2, 1), 4, 3, None),
    ("vit", (2, 2), 2, 4, "step"), ("bert", (1, 1), 4, 5, None), ("convnet", (2, 2), 1, 6, None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mesh", "count", "seed", "gather"), CASES)
def test_steps_agree_with_one_device(name: str, mesh: Mesh, count: int, seed: int, gather: str | None) -> None:
    """Two steps that add up, the first under `no_sync` on the ranks, with an evaluation between them."""
    model, args, kwargs = example(name)

    def alone(model: nn.Module) -> Facts:
        first = total(model(*args, **kwargs))
        second = total(model(*args, **kwargs))
        (first + second).backward()
        return {"first": first.detach(), "second": second.detach(), **gradients(model), **dict(model.named_buffers())}

    expected = one_device(model, alone)
    make = module_of(model, args, kwargs, mesh, count, seed, gather)

    def rank(device_mesh: DeviceMesh) -> Facts:
        module = make(device_mesh)
        with without_dropout(module):
            with module.no_sync():
                first = module.step(*args, **kwargs)
            assert all(parameter.grad is None for parameter in module.parameters())
            second = module.step(*args, **kwargs)
        assert not first.requires_grad and type(first) is Tensor and not module._gatherer.holding
        assert not any(bucket.here for bucket in module._buckets)
        return {"first": first, "second": second, **gradients(module), **dict(module.named_buffers())}

    with float64():
        for found in simulate(mesh, rank):
            error, where = difference(expected, found)
            assert error < 1e-10, where


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)])
def test_a_rank_passes_its_part_of_every_microbatch(mesh: Mesh) -> None:
    model, args, kwargs = example("llama")
    kwargs = {name: torch.cat([x, x.flip(0).roll(1, 1)]) for name, x in kwargs.items()}
    placement = {"dp": "S(0)", "tp": "S(0)"}
    rows = [InputPlan(path=name, shape=tuple(x.shape), dtype="int64", placement=placement) for name, x in kwargs.items()]
    make = module_of(model, args, kwargs, mesh, 2, 1, inputs="per-rank", rows=rows)

    def alone(model: nn.Module) -> Facts:
        loss = total(model(**kwargs))
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    expected = one_device(model, alone)

    def rank(device_mesh: DeviceMesh) -> Facts:
        module = make(device_mesh)
        state = (S(0, 2), S(0, 2))
        mine = {name: local_part(x, state, mesh, coordinate_of(device_mesh)).contiguous() for name, x in kwargs.items()}
        with pytest.raises(InputError, match="this rank's part of the traced"):
            module._binder.match((), kwargs)
        loss = module.step(**mine)
        module.eval()
        with torch.no_grad():
            assert torch.allclose(total_of(module(**mine)), loss, rtol=1e-12)
        return {"loss": loss, **gradients(module)}

    with float64():
        for found in simulate(mesh, rank):
            error, where = difference(expected, found)
            assert error < 1e-10, where


def total_of(result: Any) -> Tensor:
    return result["loss"] if isinstance(result, dict) else result[0]


@pytest.mark.parametrize(("name", "mesh", "count"), [("llama", (2, 2), 2), ("vit", (1, 2), 4), ("mlp", (2, 1), 2)])
def test_evaluation_joins_the_microbatches(name: str, mesh: Mesh, count: int) -> None:
    model, args, kwargs = example(name)
    model.eval()

    def alone(model: nn.Module) -> Facts:
        leaves = [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
        return {str(index): leaf.detach() for index, leaf in enumerate(leaves)}

    expected = one_device(model, alone)
    model.train()
    make = module_of(model, args, kwargs, mesh, count, 0)

    def rank(device_mesh: DeviceMesh) -> Facts:
        module = make(device_mesh)
        with pytest.raises(RuntimeSetupError, match=r"module\.step"):
            module(*args, **kwargs)
        with torch.no_grad():
            module(*args, **kwargs)
        return alone(module.eval())  # type: ignore[arg-type]

    with float64():
        for found in simulate(mesh, rank):
            error, where = difference(expected, found)
            assert error < 1e-10, where


def test_what_cannot_be_stepped_says_so() -> None:
    model, args, kwargs = example("mlp")
    make = module_of(model, args, kwargs, (1, 1), 2, 0)

    def rank(device_mesh: DeviceMesh) -> None:
        module = make(device_mesh)
        with pytest.raises(RuntimeSetupError, match=r"returns no floating-point scalar.*return the loss"):
            module.step(*args, **kwargs)

    simulate((1, 1), rank)
    model, args, kwargs = example("llama")
    make = module_of(model, args, kwargs, (1, 1), 2, 0)

    def unable(device_mesh: DeviceMesh) -> None:
        module = make(device_mesh)
        with torch.no_grad(), pytest.raises(RuntimeSetupError, match="no_grad"):
            module.step(*args, **kwargs)

    with float64():
        simulate((1, 1), unable)


def test_a_step_that_raised_leaves_nothing_behind() -> None:
    model, args, kwargs = example("llama")
    make = module_of(model, args, kwargs, (2, 1), 4, 0, "step")

    def rank(device_mesh: DeviceMesh) -> Facts:
        clean, module = make(device_mesh), make(device_mesh)
        loss = clean.step(*args, **kwargs)
        run, count = module._run, iter(range(100))

        def failing(*args: Any, **kwargs: Any) -> Any:
            if next(count) == 2:
                raise KeyboardInterrupt
            return run(*args, **kwargs)

        module._run = failing  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            module.step(*args, **kwargs)
        module._run = run  # type: ignore[method-assign]
        assert all(parameter.grad is None for parameter in module.parameters()) and module._reducer.enabled
        assert difference({"loss": loss, **gradients(clean)}, {"loss": module.step(*args, **kwargs), **gradients(module)})[0] < 1e-14
        return {}

    with float64():
        simulate((2, 1), rank)


class Scaled(nn.Linear):
    """A model with a loss, and with a `step` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()

    def step(self) -> str:
        return "its own"


def test_on_one_device() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Loss())
    x = torch.randn(2, 4)
    names = set(model.state_dict())
    module: Any = autopar.parallelize(model, x)
    assert module is model and type(module) is nn.Sequential and set(module.state_dict()) == names
    loss = module.step(x)
    assert not loss.requires_grad and torch.equal(loss, model(x)) and all(p.grad is not None for p in model.parameters())
    copied = copy.deepcopy(module)
    copied.step(x)
    for one, other in zip(module.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)  # a copy has its own gradients
    assert pickle.loads(pickle.dumps(module)).step(x) == loss
    with torch.no_grad(), pytest.raises(RuntimeSetupError, match="no_grad"):
        module.step(x)
    with pytest.raises(RuntimeSetupError, match="return the loss"):
        autopar.parallelize(nn.Linear(4, 4)).step(x)  # type: ignore[operator]
    own: Any = autopar.parallelize(Scaled(4, 4))
    assert own.step() == "its own"


def first_call_is_a_step() -> tuple[float, bool]:
    torch.manual_seed(0)
    model = Loss()
    x = torch.randn(4, 4)
    expected = model(x)
    module: Any = autopar.parallelize(model, microbatches=2, mesh={"dp": 2, "tp": 1})
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    loss = module.step(x)
    optimizer.step()
    with torch.no_grad():
        return abs(float(loss) - float(expected)), bool(module(x) < loss)


class Loss(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


@pytest.mark.processes
def test_planned_at_the_first_step(ranks2: RankPool) -> None:
    for error, falls in ranks2.run(first_call_is_a_step):
        assert error < 1e-6 and falls
