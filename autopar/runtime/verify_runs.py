"""The two sides that `verify` compares: the same training, of the eager model on one device and of the plan's program on every rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.errors import VerifyError
from autopar.ir.assignment import Assignment
from autopar.ir.plan import Plan
from autopar.ir.trace import TracedModel, leaf_paths
from autopar.runtime.checkpoint import whole_tensor
from autopar.runtime.dropout import without_dropout
from autopar.runtime.module import ParallelModule
from autopar.runtime.one_dtype import computing_in
from autopar.runtime.process_mesh import mesh_for
from autopar.runtime.shards import coordinate_of, local_part
from autopar.runtime.verify_report import Facts, Key, distance

Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class Job:
    """What both sides do: `steps` training steps with each of `optimizers`, the inputs of step `i` being `batches[i]` (in the order of
    `traced.graph.inputs`). `state`: values of all parameters and buffers by name, whole.

    `traced` takes its tensors by position and returns its outputs as a tuple, so that no class of the user's goes to the ranks.
    """

    traced: TracedModel
    plan: Plan
    assignment: Assignment
    state: dict[str, Tensor]
    batches: tuple[tuple[Tensor, ...], ...]
    optimizers: tuple[Optimizer, ...]
    dtype: torch.dtype
    training: bool


def on_one_device(job: Job, model: nn.Module, traced: TracedModel) -> Facts:
    """All numbers of `job` from the eager `model`, which has `job.state`. Raises `VerifyError` where the model itself fails."""
    literals = traced.literals

    def call(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
        tensors = dict(zip((item.path for item in traced.graph.inputs), batch, strict=True))
        leaves = [literals[path] if path in literals else tensors[path] for path in traced.input_paths]
        args, kwargs = pytree.tree_unflatten(leaves, traced.in_spec)
        results, spec = pytree.tree_flatten(model(*args, **kwargs))
        by_path = dict(zip(leaf_paths(spec), results, strict=True))
        missing = [item.path for item in traced.graph.outputs if not isinstance(by_path.get(item.path), Tensor)]
        if missing:
            raise VerifyError(f"the traced model returns `{missing[0]}`, which the model itself does not: it returns {', '.join(by_path)}")
        return [by_path[item.path] for item in traced.graph.outputs]

    found: Facts = {}
    model.train(job.training)
    try:
        with computing_in(job.dtype), without_dropout(model):
            for kind in job.optimizers:
                found |= _train(job, kind, copy.deepcopy(model), call)
    except VerifyError:
        raise
    except Exception as error:
        raise VerifyError(f"the model itself fails on one device in {job.dtype}: {type(error).__name__}: {error}") from error
    return found


def on_a_rank(job: Job) -> tuple[Facts | None, dict[Key, float]]:
    """All numbers of `job` under its plan, whole, from rank 0 (None from others); and how far this rank's are from rank 0's (norms).

    Runs on every rank of a job of `job.plan.world_size` processes.
    """
    mesh = mesh_for(job.plan.mesh, "cpu")
    coordinate, sizes = coordinate_of(mesh), tuple(mesh.shape)
    found: Facts = {}
    with _default_dtype(job.dtype):
        for kind in job.optimizers:
            local = {}
            for name, tensor in job.state.items():
                part = tensor
                if name in job.assignment.storage:
                    part = local_part(tensor, job.assignment.storage[name].stored, sizes, coordinate)
                local[name] = part.clone(memory_format=torch.contiguous_format)
            module = ParallelModule(job.traced, job.plan, mesh, local, assignment=job.assignment)
            module.train(job.training)
            with without_dropout(module):
                found |= _train(job, kind, module, lambda module, batch: list(module(*batch)))
    distances = {}
    for key, tensor in found.items():
        theirs = tensor.clone()
        if dist.get_world_size() > 1 and theirs.numel():
            dist.broadcast(theirs.view(-1).view(torch.uint8), src=0)
        distances[key] = distance(tensor, theirs)
    return (found if dist.get_rank() == 0 else None), distances


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _train(job: Job, kind: Optimizer, module: nn.Module, call: Callable[[Any, tuple[Tensor, ...]], list[Tensor]]) -> Facts:
    """Train `module` and note every number, whole, under `(optimizer, kind of tensor, name)`."""
    found: Facts = {}

    def note(what: str, name: str, tensor: Tensor) -> None:
        found[kind, what, name] = whole_tensor(tensor).contiguous().clone()

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = _optimizer(kind, trained)
    for step, batch in enumerate(job.batches):
        results = call(module, batch)
        for item, result in zip(job.traced.graph.outputs, results, strict=True):
            note("output", f"{item.path}, step {step + 1}", result)
        loss = loss_of(results)
        if loss is None or optimizer is None:
            continue
        note("loss", f"step {step + 1}", loss)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                note("gradient", f"{name}, step {step + 1}", parameter.grad)
        optimizer.step()
    for name, parameter in module.named_parameters():
        note("parameter", name, parameter)
    for name, buffer in module.named_buffers():
        note("buffer", name, buffer)
    return found


def _optimizer(kind: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """With steps large enough that a wrong gradient shows in the parameters. AdamW divides by the gradient's own size: `eps` stands well
    above rounding noise, so that a gradient which is zero but for rounding (a key bias) moves nothing."""
    if not parameters:
        return None
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4)


def loss_of(results: list[Tensor]) -> Tensor | None:
    """The first floating scalar that carries a gradient; else all outputs that do, weighted by fixed random numbers and added up; a
    plain tensor. None where nothing carries one."""
    carrying = [result for result in results if result.requires_grad and result.is_floating_point()]
    scalars = [result for result in carrying if not result.dim()]
    if scalars:
        return _plain(scalars[0])
    if not carrying:
        return None
    total: Tensor | None = None
    for index, result in enumerate(carrying):
        result = _plain(result)
        weights = torch.randn(result.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(index)).to(result.dtype)
        term = (result * weights).sum() / result.numel() ** 0.5
        total = term if total is None else total + term
    return total


def _plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
