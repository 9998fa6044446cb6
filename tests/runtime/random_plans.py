"""Random legal plans, and the comparison of a model under one with itself on one device. Also a command:

    python -m tests.runtime.random_plans llama --seeds 0-99 --mesh 2x2

runs many seeds and prints those that disagree.
"""

from __future__ import annotations

import argparse
import copy
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autopar.ir.assignment import Assignment, Choice, Storage, conflict, state_conflict
from autopar.ir.conversion import State
from autopar.ir.graph import Graph, Symbol
from autopar.ir.placement import R, S
from autopar.ir.plan import Plan
from autopar.ir.rules import splits
from autopar.ir.tracing.trace import TracedModel, split_example, trace
from autopar.runtime.module import ParallelModule
from autopar.runtime.operators.dropout import without_dropout
from autopar.runtime.state.shards import coordinate_of, local_part
from tests.runtime.simulated import simulate
from tests.zoo import ZOO

Mesh = tuple[int, int]
AXES = ("dp", "tp")


def random_assignment(graph: Graph, mesh: Mesh, seed: int, whole_share: float = 0.1) -> Assignment:
    """For every operation splits chosen at random among those that are legal; for every parameter a random storage.

    `replicate` is taken with `whole_share` where there is another choice, so that most work is really split.
    """
    choose = random.Random(seed)
    choices: dict[str, Choice] = {}
    for op in graph.ops:
        options = splits(graph, op)
        for _ in range(100):
            choice = tuple(options[0] if size == 1 or choose.random() < whole_share else choose.choice(options) for size in mesh)
            if conflict(graph, op, choice, AXES, mesh) is None:
                break
        else:
            choice = (options[0],) * len(mesh)
        choices[op.name] = choice
    storage = {}
    for parameter in graph.parameters:
        value = graph.values[parameter.value]
        while True:
            state: State = tuple(choose.choice([R, *(S(dim) for dim in range(len(value.shape)))]) for _ in mesh)
            twice = state[0] == state[1] and state[0].is_shard
            # DTensor cannot put together what two axes split unevenly along one dim.
            if state_conflict(state, value.shape) is None and not (twice and value.shape[state[0].dim] % (mesh[0] * mesh[1])):
                break
        storage[parameter.fqn] = Storage(state, choose.choice(["step", "use"]))
    return Assignment(AXES, mesh, choices, storage)


def outputs_whole(graph: Graph) -> tuple[State, ...]:
    return tuple((R, R) for _ in graph.outputs)


def output_states(traced: TracedModel, assignment: Assignment) -> tuple[State, ...]:
    """A floating scalar whole, anything else as it is computed (sums reduced)."""
    made = assignment.states(traced.graph)

    def state(name: str) -> State:
        if not traced.graph.values[name].shape:
            return (R, R)
        return tuple(p if p.is_shard else R for p in made[name])

    return tuple(state(output.value) for output in traced.graph.outputs)


def empty_plan(mesh: Mesh) -> Plan:
    """A plan that says nothing but the mesh, for modules that are given their assignment directly."""
    return Plan.model_construct(inputs=(), outputs=(), segments=(), parameters=(), mesh=dict(zip(AXES, mesh, strict=True)))


def parallel_module(
    model: nn.Module, traced: TracedModel, assignment: Assignment, device_mesh: DeviceMesh, outputs: tuple[State, ...] | None = None
) -> ParallelModule:
    """`model`, which is not changed, under `assignment`."""
    graph = traced.graph
    sources: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    coordinate = coordinate_of(device_mesh)
    local = {}
    for fqn in (*(item.fqn for item in graph.parameters), *(item.fqn for item in graph.buffers)):
        state = assignment.storage[fqn].stored if fqn in assignment.storage else (R, R)
        local[fqn] = local_part(sources[fqn].detach(), state, assignment.mesh, coordinate).clone(memory_format=torch.contiguous_format)
    return ParallelModule(
        traced, empty_plan(assignment.mesh), device_mesh, local, assignment=assignment, outputs=outputs or outputs_whole(graph)
    )


def total(result: Any) -> Tensor:
    """A scalar that depends on all floating tensors of a model's result; on the loss alone where there is one."""
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad]
    scalars = [tensor for tensor in tensors if not tensor.dim()]
    return scalars[0] if scalars else sum((tensor.square().mean() for tensor in tensors), torch.zeros(()))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


Facts = dict[str, Tensor]


def facts(model: nn.Module, result: Any, loss: Tensor) -> Facts:
    """All that must agree: loss, outputs, gradients, buffers, whole."""
    found = {"loss": loss.detach()}
    for index, leaf in enumerate(pytree.tree_leaves(result)):
        if isinstance(leaf, Tensor):
            found[f"output {index}"] = whole(leaf.detach())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient of {name}"] = whole(parameter.grad)
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = buffer.detach().clone()
    return found


def difference(one: Facts, other: Facts) -> tuple[float, str]:
    """The largest relative difference and where it is; a missing tensor is an infinite one. Relative to the tensor's norm, but where
    that is rounding noise, to 1e-6 of the norm of all gradients."""
    if one.keys() != other.keys():
        return float("inf"), f"only one side has {sorted(one.keys() ^ other.keys())[:3]}"
    everything = sum(float(tensor.double().norm()) ** 2 for name, tensor in one.items() if name.startswith("gradient")) ** 0.5
    worst, where = 0.0, ""
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            return float("inf"), f"{name} has shapes {tuple(tensor.shape)} and {tuple(other[name].shape)}"
        if not tensor.is_floating_point():
            error = 0.0 if torch.equal(tensor, other[name]) else float("inf")
        else:
            scale = max(float(tensor.double().norm()), 1e-6 * everything, 1e-300)
            error = float((tensor.double() - other[name].double()).norm()) / scale
        if not error <= worst:
            worst, where = error, name
    return worst, where


@contextmanager
def float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def example(name: str, **sizes: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A small model of the zoo in float64, and arguments to call it with."""
    entry = ZOO[name]
    with float64():
        model = entry.build(**sizes).double()
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.use_cache = False  # as it is while tracing
        args, kwargs = split_example(entry.inputs(model))
    return model, args, kwargs


class Wide(TorchFunctionMode):
    """Models that compute in float32 whatever their parameters' dtype (norms, rotary angles, losses) compute in float64 within."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "float":
            return args[0].double()
        args, kwargs = pytree.tree_map(lambda item: torch.float64 if item is torch.float32 else item, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def widened(traced: TracedModel) -> TracedModel:
    """The same change to a traced model."""

    def argument(arg: Any) -> Any:
        if arg == Symbol("torch.float32"):
            return Symbol("torch.float64")
        return tuple(map(argument, arg)) if isinstance(arg, tuple) else arg

    graph = traced.graph
    ops = tuple(replace(op, args=argument(op.args), kwargs=tuple((key, argument(arg)) for key, arg in op.kwargs)) for op in graph.ops)
    values = {name: replace(value, dtype="float64") if value.dtype == "float32" else value for name, value in graph.values.items()}
    constants = {name: tensor.double() if tensor.dtype == torch.float32 else tensor for name, tensor in traced.constants.items()}
    return replace(traced, graph=replace(graph, ops=ops, values=values), constants=constants)


def reference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts:
    """One training step of a copy of `model` on one device, without dropout."""
    model = copy.deepcopy(model)
    with without_dropout(model), Wide():
        result = model(*args, **kwargs)
        loss = total(result)
        loss.backward()
    return facts(model, result, loss)


def compare(
    name: str,
    mesh: Mesh,
    seed: int,
    *,
    run: Callable[[Mesh, Callable[[DeviceMesh], Any]], list[Any]] = simulate,
    assign: Callable[[Graph, Mesh, int], Assignment] = random_assignment,
) -> tuple[float, str]:
    """The difference between zoo model `name` on one device and under a random assignment, on every simulated rank of `mesh`."""
    model, args, kwargs = example(name)
    expected = reference(model, args, kwargs)
    with float64():
        traced = widened(trace(model, args, kwargs))
    assignment = assign(traced.graph, mesh, seed)

    def rank(device_mesh: DeviceMesh) -> Facts:
        module = parallel_module(model, traced, assignment, device_mesh, output_states(traced, assignment) if seed % 2 else None)
        with without_dropout(module):
            result = module(*args, **kwargs)
            loss = total(result)
            loss.backward()
        return facts(module, result, whole(loss))

    with float64():
        found = run(mesh, rank)
    return max(difference(expected, one) for one in found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare models under random plans with themselves on one device.")
    parser.add_argument("models", nargs="*", default=list(ZOO))
    parser.add_argument("--seeds", default="0-9")
    parser.add_argument("--mesh", default="2x2")
    options = parser.parse_args()
    first, last = (options.seeds.split("-") * 2)[:2]
    mesh = tuple(int(size) for size in options.mesh.split("x"))
    for name in options.models:
        for seed in range(int(first), int(last) + 1):
            try:
                error, where = compare(name, (mesh[0], mesh[1]), seed)
            except Exception as failure:
                print(
                    f"{name} {options.mesh} seed {seed}: {type(failure).__name__}: {failure}\n{traceback.format_exc(limit=-4)}", flush=True
                )
                continue
            print(f"{name} {options.mesh} seed {seed}: {error:.1e} {where}{'' if error < 1e-10 else '   <----'}", flush=True)


if __name__ == "__main__":
    main()
