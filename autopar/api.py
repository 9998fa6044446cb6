"""The whole flow on one page: trace, plan, parallelize, verify.

    nn.Module + example inputs ──trace──► Graph ──plan_graph──► Plan ──build──► ParallelModule

Each arrow is a function of the layers below; nothing is decided here.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from autopar.errors import AutoparError, InfeasibleError, PlanError, TraceError
from autopar.ir.cluster import Cluster, resolve
from autopar.ir.plan import Plan
from autopar.ir.precision import Precision
from autopar.ir.rules.complete import with_rules
from autopar.ir.tracing.leaf_modules import Chosen
from autopar.ir.tracing.trace import TracedModel, split_example, trace
from autopar.ir.tracing.trace_precision import precision_of
from autopar.search.baselines import BASELINES
from autopar.search.planner import plan_graph

if TYPE_CHECKING:
    from autopar.runtime.module import ParallelModule
    from autopar.runtime.pipelining.pipeline import PipelineModule
    from autopar.runtime.verification.verify_report import VerifyReport
    from autopar.search.solver.solve import Progress

Mesh = Mapping[str, int] | Sequence[int] | Sequence[Mapping[str, int]]
Effort = Literal["fast", "exact"]


def plan(
    model: nn.Module,
    example_inputs: Any,
    cluster: Cluster | str | Path,
    *,
    mesh: Mesh | None = None,
    schedule: str | None = None,
    microbatches: int | None = None,
    stages: int | None = None,
    cuts: Sequence[int] | None = None,
    recompute: Literal["auto", "none", "all"] = "auto",
    baseline: str | None = None,
    pins: Mapping[str, str] | None = None,
    effort: Effort = "fast",
    optimizer: str = "adamw",
    expert_imbalance: float | None = None,
    expert_capacity: float | None = None,
    memory_limit_bytes: int | None = None,
    time_limit_s: float | None = None,
    alternatives: bool = False,
    precision: Precision | Mapping[str, str] | str | None = None,
    leaf_modules: Chosen = (),
    progress: Callable[[Progress], None] | None = None,
) -> Plan:
    """Search the best way to run `model` on `cluster`. Needs no GPU and no process group; computes nothing of the model.

    `model`: any module, parameters real or on `meta`, in training or evaluation mode as it is to be run.
    `example_inputs`: one *global* batch: a tensor, a tuple of positional or a dict of keyword arguments, or any pytree; only shapes
    and dtypes count, so `meta` tensors do.
    `cluster`: a `Cluster`, a preset such as `"h100x8"`, `"h100x8:4"` (4 machines) or `"cpu:4"`, or the path of a TOML file.
    `mesh`: forces `{"dp": 2, "tp": 4}` or `(2, 4)`; `{"pp": 2, "dp": 2, "tp": 2}` a pipeline of two groups of ranks with such a mesh each,
    `[{"dp": 2}, {"tp": 2}]` one of groups with different meshes, in rank order. By default every factorisation is searched.
    `schedule`: of the pipeline: `"gpipe"`, `"1f1b"`, `"interleaved-1f1b"`, `"interleaved-zb"` or `"zbv"`.
    `microbatches`: into how many equal parts a step divides the batch, with a pipeline or without (gradients add up).
    `stages`: of the pipeline, in all; `cuts`: at which operations of one microbatch's graph they begin, see `autopar.ir.pipelining.stages`.
    `recompute`: of repeated layers, instead of keeping their activations: `"none"`, `"all"`, or as many as memory asks for.
    `baseline`: a well-known plan instead of the best: `"ddp"`, `"zero1"`, `"fsdp"`, `"tp"` or `"tp-sp"`.
    `pins`: glob over parameter names -> placement, `{"model.layers.*.up_proj.weight": "S(0)@tp"}`; over operations ->
    placement or split, `{"linear_0": "n@tp"}`.
    `effort`: `"fast"` (Lagrange multipliers under a memory limit; the gap is reported) or `"exact"` (proven by HiGHS).
    `optimizer`: whose state is counted: `"adamw"`, `"sgd-momentum"` or `"sgd"`.
    `expert_imbalance`: rows of the fullest rank over their mean where routed experts are split; by default the cluster's (1.04).
    `expert_capacity`: allow that routed experts take at most so many times the mean of rows from every rank and drop what is beyond
    (GShard, Switch); then tokens can be sent in parts of a fixed size. By default nothing is ever dropped.
    `memory_limit_bytes`: per device; by default what the device has, less a reserve.
    `alternatives`: also price every other storage of every parameter, for `autopar explain`.
    `precision`: `"bfloat16"` to compute in it with parameters, gradients and optimizer in float32, or a dict (`autopar.ir.precision`);
    by default as the model's dtypes say, or under the `torch.autocast` that is on around the call.
    `leaf_modules`: modules that are not traced into, by path, glob over paths, or class: `["layers.*.router"]`. Each runs as it is, whole
    on every rank, and may look at values of tensors. A mapping gives a function of its inputs that returns tensors like its results, for
    modules on `meta` whose shapes only values show.

    Where nothing fits, the plan of least memory comes with `predicted.fits` false; its notes say what is missing and what would fit.

    Raises `TraceError` (the model cannot be read), `ClusterError`, `PinError`, `InfeasibleError` (no way to run it under these pins).
    """
    return _plan_traced(
        _trace(model, example_inputs, precision, leaf_modules),
        resolve(cluster),
        mesh=mesh,
        schedule=schedule,
        microbatches=microbatches,
        stages=stages,
        cuts=cuts,
        recompute=recompute,
        baseline=baseline,
        pins=pins,
        effort=effort,
        optimizer=optimizer,
        expert_imbalance=expert_imbalance,
        expert_capacity=expert_capacity,
        memory_limit_bytes=memory_limit_bytes,
        time_limit_s=time_limit_s,
        alternatives=alternatives,
        progress=progress,
    )


def compare(
    model: nn.Module, example_inputs: Any, cluster: Cluster | str | Path, *, leaf_modules: Chosen = (), **options: Any
) -> dict[str, Plan | PlanError]:
    """The searched plan and every baseline for the same model and cluster, by name; an error where there is no such plan.

    `options` are those of `plan`, but for `baseline`. A baseline that does not fit the memory is a plan whose `predicted.fits` is false.
    """
    traced, cluster = _trace(model, example_inputs, options.pop("precision", None), leaf_modules), resolve(cluster)
    found: dict[str, Plan | PlanError] = {}
    for name in (None, *BASELINES):
        try:
            found[name or "searched"] = _plan_traced(traced, cluster, baseline=name, **options)
        except PlanError as error:
            if name is None and not isinstance(error, InfeasibleError):
                raise
            found[name or "searched"] = error
    return found


def parallelize(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    cluster: Cluster | str | Path | None = None,
    inputs: Literal["global", "per-rank"] = "global",
    device: torch.device | str | None = None,
    timeout_s: float = 600.0,
    sync_module_states: bool = True,
    **plan_options: Any,
) -> nn.Module:
    """The distributed `model`: call it on every rank, under `torchrun` or in any process group.

    Without `plan`, rank 0 makes one (`plan_options` as in `plan`; `cluster` defaults to the running process group) and every rank gets it.
    Without `example_inputs`, the first call's inputs serve, and parameters become sharded at that call, in place: an optimizer made
    before it stays valid. With one rank the model itself is returned, with a `step` unless it has one.
    `inputs`: `"global"` when every rank passes the whole batch, `"per-rank"` when each passes its own part (see `Plan.sampler`).
    Under a plan with a `precision` parameters are stored, updated and saved in its `stored` dtype. Inside of `torch.autocast` the module
    may be called where it was planned so, and computes as planned outside of it, too; elsewhere that is an error.
    A model on `meta` is materialised shard by shard with its own initialisation. `sync_module_states`: start from rank 0's values.
    `timeout_s`: limit of every collective; a rank that dies or disagrees ends the others with an error instead of a hang.

    The result has the call signature and outputs of the model and the original parameter names; its parameters are DTensors. Under a
    plan with microbatches or a pipeline `loss = m.step(...)` stands for `loss = m(...)` and `loss.backward()`; with a pipeline each rank
    has the parameters of its own stages only, and `example_inputs` must be given.
    Raises `PlanMismatchError` and `RankDisagreementError` on every rank alike, before any training step.
    """
    from autopar.runtime.build import build, device_for
    from autopar.runtime.deferred import DeferredModule
    from autopar.runtime.handshake import agree
    from autopar.runtime.handshake import compare as compare_ranks
    from autopar.runtime.pipelining.pipeline import PipelineModule
    from autopar.runtime.process_mesh import ensure_process_group, mesh_for

    _check_types(model, plan)
    if unknown := plan_options.keys() - _PLAN_OPTIONS:
        raise PlanError(f"parallelize has no option `{min(unknown)}`; options for planning are {', '.join(sorted(_PLAN_OPTIONS))}")
    leaf_modules = plan_options.pop("leaf_modules", () if plan is None else plan.leaf_modules)
    world_size = ensure_process_group(device, timeout_s)
    wanted = plan.precision if plan is not None else precision_of(model, plan_options.pop("precision", None))
    if world_size == 1 and (plan is None or plan.world_size == 1) and wanted is None and not _in_parts(plan, plan_options):
        return _on_one_device(model, device)

    def build_for(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ParallelModule | PipelineModule:
        traced, problem = None, None
        try:
            traced = trace(model, args, kwargs, precision=wanted, leaf_modules=leaf_modules)
        except AutoparError as error:
            problem = error
        compare_ranks({}, problem, timeout_s)  # what one rank cannot trace, no rank runs
        assert traced is not None
        chosen = plan
        if chosen is None:
            target = resolve(cluster) if cluster is not None else _running_cluster()
            chosen = agree(lambda: _plan_traced(traced, target, **plan_options), timeout_s=timeout_s)
            if not chosen.predicted.fits:
                missing_bytes = sum(chosen.memory_bytes.values()) - chosen.predicted.memory_limit_bytes
                raise InfeasibleError("\n".join(chosen.notes), missing_bytes, chosen.notes[1:])
        if example_inputs is None:
            _refuse_late_pipeline(chosen)
        return build(model, traced, chosen, inputs=inputs, device=device, timeout_s=timeout_s, sync_module_states=sync_module_states)

    def build_late(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ParallelModule:
        module = build_for(args, kwargs)
        assert not isinstance(module, PipelineModule)
        return module

    if example_inputs is None:
        if plan is not None:
            _refuse_late_pipeline(plan)
        mesh = mesh_for({"dp": world_size, "tp": 1}, device_for(model, device), timeout_s)
        return DeferredModule(model, mesh, build_late)
    return build_for(*split_example(example_inputs))


def _in_parts(plan: Plan | None, options: Mapping[str, Any]) -> bool:
    """Whether a step on one device takes more than the model itself: microbatches, stages or repeats that are recomputed."""
    if plan is None:
        return options.get("microbatches") not in (None, 1)
    return plan.microbatches > 1 or plan.pipeline is not None or any(segment.recompute for segment in plan.segments)


def _refuse_late_pipeline(plan: Plan) -> None:
    if plan.pipeline is not None:
        raise PlanError(
            "a plan with a pipeline gives each rank only the parameters of its own stages, which must be known before an optimizer is "
            "made: pass `example_inputs` to parallelize"
        )


def verify(model: nn.Module, example_inputs: Any, plan: Plan, **options: Any) -> VerifyReport:
    """Is it still my model? Runs `model` on one device and under `plan` on local processes, in float64, and compares.

    Losses, outputs, gradients, and parameters and buffers after 3 optimizer steps must agree to 1e-10 relative to their norms.
    `options`: see `autopar.runtime.verification.verify.verify`. Dropout is off on both sides, since its masks are random.
    Raises `PlanMismatchError` for another model's plan, `VerifyError` where the comparison itself could not run.
    """
    from autopar.runtime.verification.verify import verify as run

    _check_types(model, plan)
    return run(model, example_inputs, plan, **options)


def _check_types(model: Any, plan: Any = None) -> None:
    """What Python does not check: the two arguments that are easily given in another form."""
    if not isinstance(model, nn.Module):
        raise TraceError(f"the model is a {type(model).__name__}; give an instance of `torch.nn.Module`")
    if plan is not None and not isinstance(plan, Plan):
        raise PlanError(f"the plan is a {type(plan).__name__}; give a `Plan`, such as `autopar.Plan.load(path)` reads from a file")


def _trace(
    model: nn.Module, example_inputs: Any, precision: Precision | Mapping[str, str] | str | None, leaf_modules: Chosen
) -> TracedModel:
    _check_types(model)
    args, kwargs = split_example(example_inputs)
    return trace(model, args, kwargs, precision=precision_of(model, precision), leaf_modules=leaf_modules)


_PLAN_OPTIONS = inspect.signature(plan).parameters.keys() - {"model", "example_inputs", "cluster"}


def _plan_traced(traced: TracedModel, cluster: Cluster, **options: Any) -> Plan:
    return plan_graph(with_rules(traced.graph, traced.leaf_modules), cluster, precision=traced.precision, **options)


def _running_cluster() -> Cluster:
    """The cluster that the running process group spans, as far as this process can see it."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Cluster.local(world, properties.name, properties.total_memory, local)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local
    return Cluster.local(world, "cpu", memory_bytes, local)


def _on_one_device(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        from autopar.runtime.state.materialize import materialize_whole

        model = materialize_whole(model, torch.device(device or "cpu"))
    from autopar.runtime.one_device import with_step

    return with_step(model if device is None else model.to(device))
