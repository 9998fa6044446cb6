"""What differs between the pipelines of two plans: schedule, microbatches, cuts, groups of ranks, recomputation, candidates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autopar.ir import units
from autopar.ir.plan import Plan
from autopar.ir.plan_stages import ranks_words, segments_by_stage, sizes_words, stage_seconds


@dataclass(frozen=True, slots=True)
class Change:
    """One difference: `before` in the first plan, `after` in the second; empty where a plan has nothing of the kind.

    `section` is `"model"`, `"decisions"` or `"consequences"`; `remark` is said beside (a percentage, or how many there are).
    `minor` changes are operations that only follow the heavy ones; reports sum them up.
    """

    section: str
    what: str
    before: str
    after: str
    remark: str = ""
    minor: bool = False


def stage_changes(a: Plan, b: Plan) -> Iterator[Change]:
    """Decisions about stages in which the plans differ, and what follows for each stage."""
    yield from _decision("schedule", _schedule(a), _schedule(b))
    yield from _decision("microbatches", str(a.microbatches), str(b.microbatches))
    for what, words in (("ranks", _ranks), ("cut", _cuts), ("recomputed in", _recomputed)):
        before, after = words(a), words(b)
        for key in dict.fromkeys([*before, *after]):
            yield from _decision(f"{what} {key}", before.get(key, ""), after.get(key, ""))
    yield from _times(a, b)
    before, after = _candidates(a), _candidates(b)
    for key in [key for key in before if key in after]:  # a plan that was asked for by name or mesh has none
        if before.get(key) != after.get(key):
            yield Change("consequences", f"best plan on {key}", before.get(key, ""), after.get(key, ""))


def _decision(what: str, before: str, after: str) -> Iterator[Change]:
    if before != after:
        yield Change("decisions", what, before, after)


def _schedule(plan: Plan) -> str:
    return plan.pipeline.schedule if plan.pipeline else ""


def _ranks(plan: Plan) -> dict[str, str]:
    """The mesh of each group of a pipeline; that of all ranks is told as the plan's."""
    if plan.pipeline is None:
        return {}
    return {f"of group {number}": f"{ranks_words(group)}: {sizes_words(group.mesh)}" for number, group in enumerate(plan.groups)}


def _cuts(plan: Plan) -> dict[str, str]:
    """Where each stage but the first begins."""
    if plan.pipeline is None:
        return {}
    stages = plan.pipeline.stages
    return {
        f"{number}": f"at operation {stage.start}, before {stage.name}, group {stage.group}"
        for number, stage in enumerate(stages)
        if number
    }


def _recomputed(plan: Plan) -> dict[str, str]:
    """How many repeats compute their forward pass again, by stage."""
    found = {}
    for stage, segments in segments_by_stage(plan).items():
        repeats = sum(segment.count for segment in segments if segment.count > 1 or segment.recompute)
        if done := sum(segment.recompute for segment in segments):
            found[f"stage {stage}" if plan.pipeline else "the backward pass"] = f"{done} of {repeats}"
    return found


def _times(a: Plan, b: Plan) -> Iterator[Change]:
    """Times of a microbatch and peak memory, where the plans have as many stages."""
    if a.pipeline is None or b.pipeline is None or a.stage_count != b.stage_count:
        return
    sides = [{stage: stage_seconds(segments) for stage, segments in segments_by_stage(plan).items()} for plan in (a, b)]
    for stage in range(a.stage_count):
        texts = [" + ".join(map(units.seconds, side.get(stage, (0.0, 0.0)))) for side in sides]
        if texts[0] != texts[1]:
            yield Change("consequences", f"stage {stage} forward + backward", texts[0], texts[1])
    peaks = a.predicted.stage_memory_bytes, b.predicted.stage_memory_bytes
    if len(peaks[0]) == len(peaks[1]):
        for group, (before, after) in enumerate(zip(*peaks, strict=True)):
            if units.size(before) != units.size(after):
                yield Change("consequences", f"peak memory of group {group}", units.size(before), units.size(after))


def _candidates(plan: Plan) -> dict[str, str]:
    return {
        units.times(item.groups, "group"): f"{item.what}: {units.seconds(item.cost_s)}" if item.cost_s is not None else item.why
        for item in plan.candidates
    }
