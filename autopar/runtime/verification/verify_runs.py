"""The two sides that `verify` compares: the same training, of the eager model on one device and of the plan's program on every rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.errors import VerifyError
from autopar.ir.assignment import Expanded
from autopar.ir.conversion import State
from autopar.ir.placement import R
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import TracedModel, leaf_paths
from autopar.runtime.loss import NO_LOSS
from autopar.runtime.module import ParallelModule
from autopar.runtime.operators.alike import drawing_alike, eagerly_alike
from autopar.runtime.operators.dropout import without_dropout
from autopar.runtime.operators.leaf import leaves_run_within
from autopar.runtime.pipelining.pipeline import PipelineModule, held_by, storage_of
from autopar.runtime.precision import Dtypes
from autopar.runtime.process_mesh import group_mesh_for, mesh_for
from autopar.runtime.state.checkpoint import whole_tensor
from autopar.runtime.state.shards import coordinate_of, local_part
from autopar.runtime.verification.one_dtype import EveryDtype, computing_in
from autopar.runtime.verification.verify_report import Facts, Key, distance

Optimizer = Literal["sgd", "adamw"]


@dataclass(frozen=True)
class Job:
    """What both sides do: `steps` training steps with each of `optimizers`, the inputs of step `i` being `batches[i]` (in the order of
    `traced.graph.inputs`). `state`: values of all parameters and buffers by name, whole.

    `expanded`: the decisions of `plan` for `traced`, in its dtype. `dtypes`: of parameters that are copied before they are read.
    `random`: whether the model draws random numbers other than dropout's.
    `traced` takes its tensors by position and returns its outputs as a tuple, so that no class of the user's goes to the ranks.
    """

    traced: TracedModel
    plan: Plan
    expanded: Expanded
    state: dict[str, Tensor]
    batches: tuple[tuple[Tensor, ...], ...]
    optimizers: tuple[Optimizer, ...]
    dtype: torch.dtype
    training: bool
    dtypes: Dtypes
    random: bool = False

    @property
    def stepping(self) -> bool:
        """Whether the plan trains through `module.step`, which returns nothing but the loss."""
        return self.plan.pipeline is not None or self.plan.microbatches > 1


Call = Callable[[Any, tuple[Tensor, ...]], list[Tensor]]


def on_one_device(job: Job, model: nn.Module, traced: TracedModel) -> Facts:
    """All numbers of `job` from the eager `model`, which has `job.state`. Raises `VerifyError` where the model itself fails."""
    literals = traced.literals

    def call(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
        tensors = dict(zip((item.path for item in traced.graph.inputs), batch, strict=True))
        leaves = [literals[path] if path in literals else tensors[path] for path in traced.input_paths]
        args, kwargs = pytree.tree_unflatten(leaves, traced.in_spec)
        with eagerly_alike(model) if job.random else nullcontext():
            called = model(*args, **kwargs)
        results, spec = pytree.tree_flatten(called)
        by_path = dict(zip(leaf_paths(spec), results, strict=True))
        missing = [item.path for item in traced.graph.outputs if not isinstance(by_path.get(item.path), Tensor)]
        if missing:
            raise VerifyError(f"the traced model returns `{missing[0]}`, which the model itself does not: it returns {', '.join(by_path)}")
        return [by_path[item.path] for item in traced.graph.outputs]

    found: Facts = {}
    try:
        with computing_in(job.dtype), without_dropout(model):
            for kind in job.optimizers:
                found |= _train(job, kind, copy_of(model), call)
    except VerifyError:
        raise
    except Exception as error:
        raise VerifyError(f"the model itself fails on one device in {job.dtype}: {type(error).__name__}: {error}") from error
    return found


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy. Of tensors that `copy.deepcopy` refuses, those with a gradient history that a module keeps as a plain attribute
    (`torch.nn.utils.weight_norm`'s weight, a recurrent layer's last state), it has the values."""
    kept = (item for module in model.modules() for item in vars(module).values() if isinstance(item, Tensor))
    return copy.deepcopy(model, {id(item): item.detach().clone() for item in kept if not item.is_leaf})


def on_a_rank(job: Job) -> tuple[Facts | None, dict[Key, float]]:
    """All numbers of `job` under its plan that this rank's group of ranks holds, whole, from the first rank of the group (None from
    others); and how far this rank's are from those (norms). Without a pipeline all ranks are one group.

    Runs on every rank of a job of `job.plan.world_size` processes.
    """
    groups = [range(item.first_rank, item.first_rank + math.prod(item.mesh.values())) for item in job.plan.groups]
    found: Facts = {}
    with _default_dtype(job.dtype):
        for kind in job.optimizers:
            module = _module(job)
            module.train(job.training)
            own = EveryDtype() if _grouped(job) else nullcontext()
            with without_dropout(module), drawing_alike(), leaves_run_within(lambda: computing_in(job.dtype)), own:
                found |= _train(job, kind, module, lambda module, batch: list(module(*batch)))
    distances = {}
    handles = [dist.new_group(list(ranks)) for ranks in groups] if len(groups) > 1 else [dist.group.WORLD]
    [(ranks, handle)] = [item for item in zip(groups, handles, strict=True) if dist.get_rank() in item[0]]
    for key, tensor in found.items():
        theirs = tensor.clone()
        if len(ranks) > 1 and theirs.numel():
            dist.broadcast(theirs.view(-1).view(torch.uint8), src=ranks[0], group=handle)
        distances[key] = distance(tensor, theirs)
    if len(groups) > 1:
        dist.destroy_process_group(handle)
    return (found if dist.get_rank() == ranks[0] else None), distances


def _grouped(job: Job) -> bool:
    """Whether the program has products that PyTorch has no kernel for in float64."""
    return any("grouped_mm" in op.target for op in job.traced.graph.ops)


def _module(job: Job) -> ParallelModule | PipelineModule:
    """The module of this rank, with its part of `job.state`."""
    plan, expanded = job.plan, job.expanded
    if plan.pipeline is None:
        mesh = mesh_for(plan.mesh, "cpu")
        stored = {name: item.stored for name, item in expanded.assignments[0].storage.items()}
        local = _parts(job, mesh, stored, job.state)
        assignment, batched = expanded.assignments[0], expanded.microbatched
        return ParallelModule(job.traced, plan, mesh, local, assignment=assignment, batched=batched, dtypes=job.dtypes)
    group = group_mesh_for([item.mesh for item in plan.groups], "cpu")
    mine = [index for index, stage in enumerate(plan.pipeline.stages) if stage.group == group.index]
    local = _parts(job, group.mesh, storage_of(expanded, mine), held_by(expanded, mine))
    return PipelineModule(job.traced, plan, group, local, expanded=expanded, dtypes=job.dtypes)


def _parts(job: Job, mesh: DeviceMesh, stored: Mapping[str, State], held: Container[str]) -> dict[str, Tensor]:
    """This rank's part of the parameters and buffers that it holds."""
    coordinate, whole = coordinate_of(mesh), (R,) * mesh.ndim
    return {
        name: local_part(tensor, stored.get(name, whole), mesh.shape, coordinate).clone(memory_format=torch.contiguous_format)
        for name, tensor in job.state.items()
        if name in held
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _train(job: Job, kind: Optimizer, module: nn.Module, call: Call) -> Facts:
    """Train `module` and note every number, whole, under `(optimizer, kind of tensor, name)`.

    Where the plan trains through `step`, both sides first run the model without gradients for its outputs.
    """
    found: Facts = {}

    def note(what: str, name: str, tensor: Tensor) -> None:
        found[kind, what, name] = whole_tensor(tensor).contiguous().clone()

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = _optimizer(kind, trained)
    for step, batch in enumerate(job.batches):
        with torch.no_grad() if job.stepping else nullcontext():
            results = call(module, batch)
        for item, result in zip(job.traced.graph.outputs, results, strict=True):
            note("output", f"{item.path}, step {step + 1}", result)
        if optimizer is not None:
            optimizer.zero_grad()
        loss = _backward(job, module, batch, results, call)
        if loss is None:
            continue
        note("loss", f"step {step + 1}", loss)
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                note("gradient", f"{name}, step {step + 1}", parameter.grad)
        if optimizer is not None:
            optimizer.step()
    for name, parameter in module.named_parameters():
        note("parameter", name, parameter)
    for name, buffer in module.named_buffers():
        note("buffer", name, buffer)
    return found


def _backward(job: Job, module: nn.Module, batch: tuple[Tensor, ...], results: list[Tensor], call: Call) -> Tensor | None:
    """The backward pass, of a forward pass that has given `results`; its loss, detached, or None where there is nothing to train."""
    if isinstance(module, ParallelModule | PipelineModule) and job.stepping:
        return module.step(*batch)
    if job.stepping:
        results = call(module, batch)
        if not any(result.requires_grad and result.is_floating_point() and not result.dim() for result in results):
            raise VerifyError(NO_LOSS)
    loss = loss_of(results)
    if loss is None or not any(parameter.requires_grad for parameter in module.parameters()):
        return None
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


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
