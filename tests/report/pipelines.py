"""Plans with stages, built by hand from the layers of `sample`: the weight of the embedding is tied to the head's on the last stage."""

from __future__ import annotations

import math
from typing import Any

from autopar.ir import folded_names
from autopar.ir.pipelining.schedules import named
from autopar.ir.plan import (
    Candidate,
    ClusterInfo,
    CollectivePlan,
    GroupPlan,
    InputPlan,
    ModelInfo,
    OpPlan,
    OutputPlan,
    ParameterPlan,
    PipelinePlan,
    Plan,
    Predicted,
    SegmentCost,
    SegmentPlan,
    StagePlan,
)
from autopar.search.simulator.simulate import simulate
from tests.report.sample import _AFTER, _BEFORE, _LAYER, _PARAMETERS, GIB

MIB = 2**20
HEAD = "model.embed_tokens.weight"  # tied


def pipeline_plan(
    groups: int = 2, per_group: int = 1, schedule: str = "1f1b", microbatches: int = 8, *, layers: int = 32,
    meshes: tuple[dict[str, int], ...] | None = None, recompute: int = 0, relayed: str = "", fits: bool = True,
) -> Plan:  # fmt: skip
    """A sound plan for `layers` layers, dealt out evenly. `recompute` of the layers of each stage compute their forward pass again.

    `relayed` names a value that the first stage makes and the last reads.
    """
    stages = groups * per_group
    meshes = meshes or ({"dp": 2, "tp": 2},) * groups
    shared = meshes[0] if all(mesh == meshes[0] for mesh in meshes) else {}
    per_stage, rest = divmod(layers, stages)
    counts = [per_stage + (stage < rest) for stage in range(stages)]
    placed = [named(schedule).group_of(stage, groups) for stage in range(stages)]
    parts = [
        _stage(stage, stages, sum(counts[:stage]), counts[stage], meshes[placed[stage]], recompute, relayed) for stage in range(stages)
    ]
    position, rows = 0, []
    for stage, (segments, _, own) in enumerate(parts):
        name = next(segment.name for segment in segments if segment.name.startswith("model"))
        sends = 0 if stage == stages - 1 else 16 * MIB
        rows.append(
            StagePlan(
                name=("embed, " if stage == 0 else "") + name + (", head" if stage == stages - 1 else ""),
                start=position,
                stop=position + own,
                group=placed[stage],
                sends_bytes=sends,
                receives_s=4e-4 if stage else 0.0,
                returns_s=4e-4 if stage else 0.0,
            )
        )
        position += own
    parameters = tuple(item for _, found, _ in parts for item in found)
    numel = {name: math.prod(item.shape) for item in parameters for name in folded_names.expand(item.name)}
    axes = dict.fromkeys(meshes[0], "R")
    last = dict.fromkeys(meshes[placed[-1]], "R")
    plan = Plan(
        name="searched",
        model=ModelInfo(
            name="LlamaForCausalLM", fingerprint="0123456789abcdef", training=True, parameters=sum(numel.values()), operations=position
        ),
        cluster=ClusterInfo(name="h100x8:2", device="H100", devices_per_node=8, nodes=max(2, groups), memory_bytes=80 * GIB),
        mesh={"pp": groups, **shared},
        microbatches=microbatches,
        pipeline=PipelinePlan(
            schedule=schedule,
            groups=tuple(
                GroupPlan(first_rank=sum(math.prod(m.values()) for m in meshes[:group]), mesh=meshes[group]) for group in range(groups)
            ),
            stages=tuple(rows),
        ),
        inputs=(InputPlan(path="input_ids", shape=(64, 8192), dtype="int64", placement={**axes, "dp": "S(0)"}),),
        outputs=(OutputPlan(stage=stages - 1, path="loss", shape=(), dtype="float32", placement=last),),
        pins={},
        predicted=Predicted(
            cost_s=0.0, lower_bound_s=0.0, compute_s=0.0, communication_s=0.0, memory_bytes={}, memory_limit_bytes=72 * GIB, fits=True,
            optimizer="adamw", effort="fast",
        ),
        replicated=(),
        parameters=parameters,
        segments=tuple(segment for segments, _, _ in parts for segment in segments),
        collectives=tuple(
            CollectivePlan(
                stage=stage, kind=kind, axis="tp", phase=phase, value="mul_5", op=f"reshard_{6 + sum(counts[:stage]) * len(_LAYER)}",
                bytes=16 * MIB,
                count=counts[stage] * microbatches, time_s=4e-4, exposed_s=4e-4,
            )
            for stage in range(stages)
            for kind, phase in (("all_gather", "forward"), ("reduce_scatter", "backward"))
        ),
    )  # fmt: skip
    return _predicted(plan, fits)


def _predicted(plan: Plan, fits: bool) -> Plan:
    """`plan` with what the simulator says of it, and what it won against."""
    found = simulate(plan)
    peaks = tuple(map(round, found.peak_bytes))
    worst = found.memory[peaks.index(max(peaks))]
    memory = {kind: round(count) for kind, count in worst.at_peak().items()}
    limit = sum(memory.values()) * 3 // (2 if fits else 4)
    predicted = Predicted(
        cost_s=found.step_s, lower_bound_s=0.9 * found.step_s, compute_s=max(group.compute_s for group in found.groups),
        communication_s=found.communication_s, memory_bytes=memory, memory_limit_bytes=limit, fits=fits, optimizer="adamw", effort="fast",
        step_s=found.step_s, bubble=found.bubble, stage_memory_bytes=peaks,
    )  # fmt: skip
    assert plan.pipeline is not None
    words = f"{plan.stage_count} stages, dp 2 x tp 2, {plan.pipeline.schedule}, {plan.microbatches} microbatches"
    candidates = (
        Candidate(groups=1, what="dp 4 x tp 2", cost_s=1.25 * found.step_s, bubble=0.0, communication_s=0.9, memory_bytes=limit + GIB),
        Candidate(
            groups=len(plan.groups), what=words, cost_s=found.step_s, bubble=found.bubble, communication_s=found.communication_s,
            memory_bytes=max(peaks),
        ),
        Candidate(groups=32, what="", why="32 groups are more than there are ranks"),
    )  # fmt: skip
    return plan.model_copy(update={"predicted": predicted, "candidates": candidates})


def _stage(
    stage: int, stages: int, before: int, count: int, mesh: dict[str, int], recompute: int, relayed: str
) -> tuple[list[SegmentPlan], list[ParameterPlan], int]:
    """Segments and parameters of one stage, and how many of its operations are the model's."""
    first, last = stage == 0, stage == stages - 1
    inner = tuple(mesh)[-1]

    def axes(dp: str, tp: str) -> dict[str, str]:
        given = {"dp": dp, inner: tp}
        return {axis: given.get(axis, "R") for axis in mesh}

    def op(name: str, target: str, module: str, a: str, b: str, c: str, d: str) -> OpPlan:
        return OpPlan(name=name, target=target, module=module, split=axes(a, b), output=axes(c, d))

    def ops(table: list[tuple[str, str, str, str, str, str]], start: int) -> tuple[OpPlan, ...]:
        return tuple(
            op(f"{target.split('.')[1]}_{start + place}", target, module.replace("layers.0", f"layers.{before}"), *rest)
            for place, (target, module, *rest) in enumerate(table)
        )

    wire = [f"add_{before * len(_LAYER) + 1}", *([relayed] if relayed else [])]
    sent = [f"add_{(before + count) * len(_LAYER) + 1}", *([relayed] if relayed else [])]
    head: tuple[OpPlan, ...] = tuple(op(f"receive_{name}", "autopar.receive", "", "S(0)", "S(1)", "S(0)", "S(1)") for name in wire)
    if first:
        head = ops(_BEFORE, 0) + ((op(relayed, "aten.add.Tensor", "model.relay", "0", "1", "S(0)", "S(1)"),) if relayed else ())
    start = len(_BEFORE) + before * len(_LAYER)
    tail = ops(_AFTER, start + count * len(_LAYER))
    if not last:
        tail = tuple(op(f"send_{name}", "autopar.send", "", "S(0)", "S(1)", "S(0)", "S(1)") for name in sent)
    numbers = f"{{{before}-{before + count - 1}}}" if count > 1 else str(before)
    comm = {inner: 1e-4}
    cost = SegmentCost(
        forward_s=2e-3, backward_s=4e-3, forward_comm_s=comm, backward_comm_s=comm, reduce_s={next(iter(mesh)): 5e-4}, optimizer_s=1e-4,
        activation_bytes=GIB, checkpoint_bytes=16 * MIB, parameter_bytes=100 * MIB, gradient_bytes=100 * MIB,
        optimizer_bytes=800 * MIB, workspace_bytes=50 * MIB,
    )  # fmt: skip
    layer = f"model.layers.{numbers}"
    segments = [
        SegmentPlan(stage=stage, name="before", start=0, length=len(head), count=1, ops=head, cost=SegmentCost(forward_s=1e-4)),
        SegmentPlan(
            stage=stage, name=layer, start=len(head), length=len(_LAYER), count=count, recompute=min(recompute, count), cost=cost,
            ops=ops(_LAYER, start),
        ),
        SegmentPlan(
            stage=stage, name="after", start=len(head) + count * len(_LAYER), length=len(tail), count=1, ops=tail,
            cost=SegmentCost(forward_s=5e-4, backward_s=1e-3) if last else SegmentCost(),
        ),
    ]  # fmt: skip
    parameters = []
    for template, shape, *places in _PARAMETERS:
        name = HEAD if template == "lm_head.weight" else template.replace("{layers}", numbers)
        if "{layers}" in template or (first and template == HEAD) or (last and not first and template == "lm_head.weight"):
            parameters.append(
                ParameterPlan(
                    stage=stage,
                    name=name,
                    shape=shape,
                    dtype="bfloat16",
                    trainable=True,
                    stored=axes(*places[:2]),
                    gather="use" if axes(*places[:2])["dp"] != "R" else "never",
                    used=axes(*places[2:]),
                )
            )
    own = (len(head) if first else 0) + count * len(_LAYER) + (len(tail) if last else 0)
    return segments, parameters, own


def edited(plan: Plan, **parts: Any) -> Plan:
    return plan.model_copy(update=parts)
