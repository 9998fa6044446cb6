"""`build`: a model, its trace and a plan become this rank's distributed module; what does not fit ends every rank before anything runs."""

from __future__ import annotations

import hashlib
import inspect
import math
from functools import partial
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import nn

import autopar
from autopar.errors import AutoparError, PlanError, PlanMismatchError
from autopar.ir.assignment import Assignment, Expanded, expand_stages
from autopar.ir.plan import Plan
from autopar.ir.rules.complete import confirm
from autopar.ir.tracing.trace import TracedModel
from autopar.runtime import handshake
from autopar.runtime.distributed import Options
from autopar.runtime.evaluation import EvaluationCheck
from autopar.runtime.inputs import Mode, given_states
from autopar.runtime.module import ParallelModule
from autopar.runtime.pipelining.pipeline import PipelineModule, held_by, storage_of
from autopar.runtime.precision import stored_dtypes
from autopar.runtime.process_mesh import check_fits, check_groups_fit, ensure_process_group, group_mesh_for, mesh_for
from autopar.runtime.state.checkpoint import accept_whole_tensors
from autopar.runtime.state.materialize import local_state


def build(
    model: nn.Module,
    traced: TracedModel,
    plan: Plan,
    *,
    inputs: Mode = "global",
    device: torch.device | str | None = None,
    timeout_s: float = 600.0,
    sync_module_states: bool = True,
) -> ParallelModule | PipelineModule:
    """The distributed `model`, traced as `traced`, under `plan`, for this rank. A collective call; works for a job of one rank too.

    A `PipelineModule` where the plan has a pipeline, else a `ParallelModule`.

    `device` is by default the model's own, or for one on `meta` the current accelerator or the CPU. The result shares no memory
    with `model`. Raises, on every rank or on none, `PlanMismatchError`, `PlanError`, `InputError` for what does not fit here, and
    `RankDisagreementError` where ranks differ in plan, model, versions or mode, or do not come within `timeout_s`.
    """
    target = device_for(model, device)
    world_size = ensure_process_group(target, timeout_s)
    problem: AutoparError | None = None
    expanded: Expanded | None = None
    try:
        if plan.pipeline is None:
            check_fits(plan.mesh, world_size)
        else:
            check_groups_fit([group.mesh for group in plan.groups], world_size)
        expanded = expand_stages(plan, traced.graph)
        confirm(plan.given_rules, traced.graph)
        for assignment in expanded.assignments:
            _check_storage(assignment, traced)
        for group in range(len(plan.groups)):
            given_states(plan, inputs, group)
        _check_tensors(model, traced)
    except AutoparError as error:
        problem = error
    notes = {
        "the plan": hashlib.sha256(plan.text().encode()).hexdigest()[:12],
        "the model": f"{traced.graph.name} {traced.graph.fingerprint()[:12]}",
        "torch": torch.__version__,
        "autopar": autopar.__version__,
        "the kind of device": target.type,
        "`inputs`": inputs,
        "`sync_module_states`": str(sync_module_states),
    }
    handshake.compare(notes, problem, timeout_s)
    assert expanded is not None
    module = _module(
        model,
        traced,
        plan,
        expanded,
        sync_module_states,
        device=target,
        timeout_s=timeout_s,
        inputs=inputs,
        signature=_signature(model),
        evaluation=EvaluationCheck(model, traced),
    )
    module.register_load_state_dict_pre_hook(accept_whole_tensors)  # type: ignore[no-untyped-call]
    return module


def _module(
    model: nn.Module, traced: TracedModel, plan: Plan, expanded: Expanded, sync_module_states: bool, **options: Unpack[Options]
) -> ParallelModule | PipelineModule:
    """This rank's module, with its part of the model's values."""
    device, timeout_s = options["device"], options["timeout_s"]
    assert device is not None
    dtypes = stored_dtypes(plan.precision, traced.graph)
    held = partial(
        local_state, model, traced.graph, device=device, dtypes=dtypes, sync_module_states=sync_module_states, timeout_s=timeout_s
    )
    if plan.pipeline is None:
        mesh = mesh_for(plan.mesh, device, timeout_s)
        [assignment] = expanded.assignments
        state = held({fqn: storage.stored for fqn, storage in assignment.storage.items()}, mesh)
        return ParallelModule(traced, plan, mesh, state, assignment=assignment, batched=expanded.microbatched, **options)
    group = group_mesh_for([item.mesh for item in plan.groups], device, timeout_s)
    mine = [index for index, stage in enumerate(plan.pipeline.stages) if stage.group == group.index]
    state = held(storage_of(expanded, mine), group.mesh, keep=held_by(expanded, mine))
    return PipelineModule(traced, plan, group, state, expanded=expanded, **options)


def device_for(model: nn.Module, device: torch.device | str | None = None) -> torch.device:
    """Where this rank computes: `device`; or where the model's values are; or, on `meta`, what the job's backend is for."""
    if device is not None:
        found = torch.device(device)
    else:
        kinds = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta}
        if kinds:
            found = next(iter(kinds))
        elif dist.is_initialized():
            found = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        else:
            found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found


def _check_storage(assignment: Assignment, traced: TracedModel) -> None:
    """Refuse storages for which DTensor has no name: parts of parts that have blocks or are not all equal."""
    shapes = {item.fqn: traced.graph.values[item.value].shape for item in traced.graph.parameters}
    for fqn, storage in assignment.storage.items():
        shards = [(item, size) for item, size in zip(storage.stored, assignment.mesh, strict=True) if item.is_shard and size > 1]
        if len(shards) < 2 or len({item.dim for item, _ in shards}) > 1:
            continue
        dim, parts = shards[0][0].dim, math.prod(size for _, size in shards)
        if any(item.blocks > 1 for item, _ in shards) or shapes[fqn][dim] % parts:
            raise PlanError(
                f"parameter `{fqn}` {list(shapes[fqn])} is stored as {', '.join(map(str, storage.stored))}: both axes can split dim {dim} "
                f"only in {parts} equal parts and without blocks; store it whole on one axis, or split another dim"
            )


def _check_tensors(model: nn.Module, traced: TracedModel) -> None:
    """The fingerprint speaks of the trace; the model at hand must still be the one that was traced."""
    graph = traced.graph
    tensors: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named = [(item.fqn, item.value) for item in graph.parameters] + [(item.fqn, item.value) for item in graph.buffers]
    cast = stored_dtypes(traced.precision, graph)  # whatever floating-point dtype these have in the model
    for fqn, name in named:
        value, tensor = graph.values[name], tensors.get(fqn)
        same = tensor is not None and (str(tensor.dtype) == f"torch.{value.dtype}" or (fqn in cast and tensor.is_floating_point()))
        if tensor is None or tuple(tensor.shape) != value.shape or not same:
            found = "missing" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
            raise PlanMismatchError(
                f"`{fqn}` was traced as {list(value.shape)} of torch.{value.dtype} and is now {found}; trace and plan this model again"
            )


def _signature(model: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward written in C
        return None
