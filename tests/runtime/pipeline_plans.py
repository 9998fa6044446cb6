"""Random legal plans with stages, and the comparison of a model under one with itself on one device, on every real rank.

Also a command:

    python -m tests.runtime.pipeline_plans llama --seeds 0-9 --meshes 1x1,1x1 --schedule 1f1b --microbatches 4
"""

from __future__ import annotations

import argparse
import copy
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from autopar.ir.assignment import Expanded, Storage
from autopar.ir.fold import fold
from autopar.ir.graph import Graph
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.pipelining.schedules import named
from autopar.ir.pipelining.stages import candidates, cut
from autopar.ir.placement import R, parse
from autopar.ir.plan import GroupPlan, PipelinePlan, Plan, SegmentPlan, StagePlan
from autopar.ir.tracing.trace import TracedModel, trace
from autopar.runtime.operators.dropout import without_dropout
from autopar.runtime.pipelining.pipeline import PipelineModule, held_by, storage_of
from autopar.runtime.process_mesh import group_mesh_for
from autopar.runtime.state.checkpoint import whole_tensor
from autopar.runtime.state.shards import coordinate_of, local_part
from autopar.runtime.verification.launch import RankPool
from tests.runtime.random_plans import AXES, Facts, Mesh, Wide, difference, example, float64, random_assignment, total, widened


@dataclass(frozen=True)
class Case:
    """A zoo `model` (built with `sizes`) in stages on groups of `meshes`, cut at random places that make sense.

    `stored`: how all parameters are stored on `dp`, whole on `tp`; by default at random.
    """

    model: str
    meshes: tuple[Mesh, ...] = ((1, 1), (1, 1))
    schedule: str = "1f1b"
    microbatches: int = 2
    stages_per_group: int = 1
    seed: int = 0
    stored: str | None = None
    sizes: tuple[tuple[str, Any], ...] = ()

    @property
    def world_size(self) -> int:
        return sum(dp * tp for dp, tp in self.meshes)


def plan_of(case: Case, graph: Graph) -> tuple[Plan, Expanded]:
    """A random plan; only what runs a pipeline is in it."""
    groups, first = [], 0
    for mesh in case.meshes:
        groups.append(GroupPlan(first_rank=first, mesh=dict(zip(AXES, mesh, strict=True))))
        first += mesh[0] * mesh[1]
    count = len(groups) * case.stages_per_group
    parts = microbatched(graph, case.microbatches)
    starts = _spread(candidates(parts.body), count, random.Random(case.seed))
    stages = cut(parts.body, starts)
    schedule = named(case.schedule)
    rows = tuple(
        StagePlan(name=f"stage{stage.index}", start=stage.start, stop=stage.stop, group=schedule.group_of(stage.index, len(groups)))
        for stage in stages
    )
    assignments = tuple(
        random_assignment(stage.graph, case.meshes[row.group], case.seed + stage.index) for stage, row in zip(stages, rows, strict=True)
    )
    if case.stored is not None:
        storage = Storage((parse(case.stored), R), "use")
        assignments = tuple(replace(item, storage=dict.fromkeys(item.storage, storage)) for item in assignments)
    pipeline = PipelinePlan(schedule=case.schedule, groups=tuple(groups), stages=rows)
    segments = tuple(
        SegmentPlan.model_construct(stage=stage.index, start=part.start, length=part.length, count=part.count, recompute=0)
        for stage in stages
        for part in fold(stage.graph)
    )
    plan = Plan.model_construct(
        inputs=(), outputs=(), segments=segments, parameters=(), mesh={"pp": len(groups)}, microbatches=case.microbatches, pipeline=pipeline
    )
    return plan, Expanded(parts, stages, assignments)


def _spread(places: tuple[int, ...], count: int, choose: random.Random) -> tuple[int, ...]:
    """`count` starts, at 0 and at random places."""
    return (0, *sorted(choose.sample(places, count - 1)))


def pipeline_module(model: nn.Module, traced: TracedModel, plan: Plan, expanded: Expanded, timeout_s: float = 120.0) -> PipelineModule:
    """This rank's part of `model`, which is not changed. A collective call."""
    assert plan.pipeline is not None
    group = group_mesh_for([item.mesh for item in plan.pipeline.groups], "cpu", timeout_s)
    mine = [index for index, stage in enumerate(plan.pipeline.stages) if stage.group == group.index]
    stored = storage_of(expanded, mine)
    sources: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    coordinate, sizes = coordinate_of(group.mesh), tuple(group.mesh.shape)
    local = {
        fqn: local_part(sources[fqn].detach(), stored.get(fqn, (R, R)), sizes, coordinate).clone(memory_format=torch.contiguous_format)
        for fqn in held_by(expanded, mine)
    }
    return PipelineModule(traced, plan, group, local, expanded=expanded, timeout_s=timeout_s)


@lru_cache(maxsize=8)
def _prepared(name: str, sizes: tuple[tuple[str, Any], ...]) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], TracedModel]:
    model, args, kwargs = example(name, **dict(sizes))
    with float64():
        return model, args, kwargs, widened(trace(model, args, kwargs))


def prepared(case: Case) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], TracedModel]:
    """The model, which must not be changed, its arguments, and its trace."""
    return _prepared(case.model, case.sizes)


@lru_cache(maxsize=8)
def _reference(name: str, sizes: tuple[tuple[str, Any], ...]) -> Facts:
    model, args, kwargs, _ = _prepared(name, sizes)
    model = copy.deepcopy(model)
    with float64(), without_dropout(model), Wide():
        loss = total(model(*args, **kwargs))
        loss.backward()  # type: ignore[no-untyped-call]
    found = {"loss": loss.detach()}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    return found | {f"buffer {name}": buffer.detach().clone() for name, buffer in model.named_buffers()}


def made(case: Case, timeout_s: float = 120.0) -> PipelineModule:
    """This rank's module of `case`, without values of its own making."""
    torch.manual_seed(0)
    model, _, _, traced = prepared(case)
    plan, expanded = plan_of(case, traced.graph)
    with float64():
        return pipeline_module(model, traced, plan, expanded, timeout_s)


def run_case(case: Case) -> tuple[float, str]:
    """The difference between this rank's loss, gradients and buffers and those of the model on one device. Runs on every rank."""
    _, args, kwargs, _ = prepared(case)
    module = made(case)
    with float64(), without_dropout(module):
        found = facts_of(module, module.step(*args, **kwargs))
    expected = _reference(case.model, case.sizes)
    held = {f"gradient of {name}" for name, _ in module.named_parameters()} | {f"buffer {name}" for name, _ in module.named_buffers()}
    if missing := (expected.keys() - found.keys()) & held:
        return float("inf"), f"missing: {sorted(missing)}"
    error, where = difference(expected, expected | found)
    return (error if error == error else float("inf")), where


def facts_of(module: PipelineModule, loss: Tensor) -> Facts:
    found = {"loss": loss}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.grad is not None:
            found[f"gradient of {name}"] = whole_tensor(parameter.grad)
    return found | {f"buffer {name}": buffer.detach().clone() for name, buffer in module.named_buffers()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare models under random plans with stages with themselves on one device.")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--seeds", default="0-3")
    parser.add_argument("--meshes", default="1x1,1x1")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--microbatches", type=int, default=2)
    parser.add_argument("--stages-per-group", type=int, default=1)
    options = parser.parse_args()
    first, last = (options.seeds.split("-") * 2)[:2]
    meshes = tuple((int(mesh.split("x")[0]), int(mesh.split("x")[1])) for mesh in options.meshes.split(","))
    world = sum(dp * tp for dp, tp in meshes)
    with RankPool(world, threads=1, collective_timeout_s=60) as pool:
        for name in options.models:
            for seed in range(int(first), int(last) + 1):
                case = Case(name, meshes, options.schedule, options.microbatches, options.stages_per_group, seed)
                try:
                    error, where = max(pool.run(run_case, case, timeout_s=180))
                    print(f"{name} seed {seed}: {error:.1e} {where}{'' if error < 1e-10 else '   <----'}", flush=True)
                except Exception as failure:
                    print(f"{name} seed {seed}: {type(failure).__name__}: {failure!s}", flush=True)


if __name__ == "__main__":
    main()
