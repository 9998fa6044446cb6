"""Good pipelines fast: an even one to begin with, then small changes as long as one helps. What is best is proven elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf

import numpy as np

from autopar.search.simulator.quick import StageTime, quick
from autopar.search.stages.stage_bounds import Array
from autopar.search.stages.stage_costs import Devices, Group, PlacedStage, Policy
from autopar.search.stages.stage_form import Form
from autopar.search.stages.stage_space import needed_bytes

_MOST_ACTIONS = 400_000  # played through in all while looking for changes that help


@dataclass(frozen=True, slots=True)
class Draft:
    """Decisions of a whole pipeline: `sizes` and `policies` by group, `starts` and which option (`slots`) by stage; and what follows."""

    sizes: tuple[int, ...]
    policies: tuple[Policy, ...]
    starts: tuple[int, ...]
    slots: tuple[int, ...]
    stages: tuple[PlacedStage, ...]
    step_s: float


def seed(form: Form, beat_s: float = inf) -> Draft | None:
    """The best of some starts, if it is faster than `beat_s`: groups of sizes as equal as they come, or all devices but one a group in one
    group; stages as even as they come."""
    space = form.space
    best: Draft | None = None
    sizes = [] if (even := _even(space.devices.count, form.groups, space.sizes)) is None else [even]
    most = space.devices.count - (form.groups - 1)
    if form.groups > 1 and {1, most} <= set(space.sizes):
        sizes += [tuple(most if group == heavy else 1 for group in range(form.groups)) for heavy in range(form.groups)]
    for start in dict.fromkeys(sizes):
        for policy in space.policies:
            found = _balanced(form, start, (policy,) * form.groups, best.step_s if best else beat_s)
            if found is not None and found.step_s < (best.step_s if best else beat_s):
                best = found
    return best


def least_step_s(form: Form, stages: Sequence[PlacedStage]) -> float:
    """The step where transfers share no links and parameters of later stages are gathered in time: no simulator can say less."""
    times = [
        StageTime(
            stage.cost.forward_s, stage.cost.backward_s, stage.cost.weight_s, stage.cost.before_s if number == 0 else 0.0,
            stage.cost.after_s, *stage.transfer_s,
        )
        for number, stage in enumerate(stages)
    ]  # fmt: skip
    return quick(form.schedule, form.groups, times, form.microbatches).step_s


def actions(form: Form) -> int:
    """How many there are in a step: what playing it through takes time for."""
    return form.count * form.microbatches * (3 if form.facts[0].splits else 2)


def improve(form: Form, draft: Draft) -> Draft:
    """Take every change that helps, until none does or enough have been tried."""
    tries = 0
    most = max(20, _MOST_ACTIONS // actions(form))
    helped = True
    while helped:
        helped = False
        for changed in _changes(form, draft):
            tries += 1
            if changed is not None and changed.step_s < draft.step_s * (1 - 1e-9):
                draft, helped = changed, True
                break
            if tries >= most:
                return draft
    return draft


def _even(count: int, groups: int, sizes: tuple[int, ...]) -> tuple[int, ...] | None:
    """`groups` of the allowed sizes that add up to `count`, larger ones first, as equal as can be greedily."""
    found: list[int] = []
    left = count
    for place in range(groups):
        rest = groups - place - 1
        fitting = [size for size in sizes if rest * sizes[0] <= left - size <= rest * sizes[-1]]
        if not fitting:
            return None
        found.append(min(fitting, key=lambda size: abs(size - left / (rest + 1))))
        left -= found[-1]
    return tuple(found) if left == 0 else None


def _groups(form: Form, sizes: tuple[int, ...], policies: tuple[Policy, ...]) -> tuple[Group, ...]:
    return _placed(form.space.devices, sizes, policies)


@lru_cache(maxsize=4096)
def _placed(devices: Devices, sizes: tuple[int, ...], policies: tuple[Policy, ...]) -> tuple[Group, ...]:
    used: tuple[int, ...] = (0,) * devices.nodes
    found = []
    for size, policy in zip(sizes, policies, strict=True):
        group, used = devices.take(used, size, policy)
        found.append(group)
    return tuple(found)


def _balanced(form: Form, sizes: tuple[int, ...], policies: tuple[Policy, ...], beat_s: float = inf) -> Draft | None:
    """Cuts that make the longest stage as short as it can be; None if that alone takes `beat_s`. Stages that share devices and do not fit
    together have to fit in an even share of the memory each."""
    found = _balanced_within(form, sizes, policies, beat_s, form.pricing.limit_bytes)
    return found or (_balanced_within(form, sizes, policies, beat_s, form.pricing.limit_bytes / form.each) if form.each > 1 else None)


def _balanced_within(
    form: Form, sizes: tuple[int, ...], policies: tuple[Policy, ...], beat_s: float, limit_bytes: float
) -> Draft | None:  # fmt: skip
    groups = _groups(form, sizes, policies)
    pricing, units = form.pricing, form.pricing.units
    best = np.full(units + 1, np.inf)
    best[0] = 0.0
    backs = []
    loads: dict[tuple[tuple[int, ...], int], Array] = {}
    for stage in range(form.count):
        group, live = groups[form.group_of[stage]], form.facts[stage].live
        load = loads.get((group.shape, live))
        if load is None:
            load = loads[group.shape, live] = np.full((units, units + 1), np.inf)
            for option in pricing.options(group, form.microbatches, live):
                fits = option.exists & (option.fixed_bytes + live * option.live_bytes <= limit_bytes)
                seconds = form.microbatches * (option.times[0] + option.times[1]) + option.times[4]
                np.minimum(load, seconds, out=load, where=fits)
        through = np.maximum(best[:-1, None], load)
        backs.append(through.argmin(0))
        best = through.min(0)
    if not best[-1] < beat_s:
        return None
    starts: list[int] = []
    at = units
    for back in reversed(backs):
        at = int(back[at])
        starts.insert(0, at)
    return _fastest(form, sizes, policies, tuple(starts), limit_bytes)


def _fastest(
    form: Form, sizes: tuple[int, ...], policies: tuple[Policy, ...], starts: tuple[int, ...], limit_bytes: float
) -> Draft | None:  # fmt: skip
    """With the fastest option of every stage that fits."""
    slots = []
    for stage, group in enumerate(_groups(form, sizes, policies)[form.group_of[stage]] for stage in range(form.count)):
        live, stop = form.facts[stage].live, (*starts, form.pricing.units)[stage + 1]
        every = form.pricing.every(starts[stage], stop, group, form.microbatches, live)
        fitting = [(cost.forward_s + cost.backward_s, slot) for slot, cost in enumerate(every) if needed_bytes(cost, live) <= limit_bytes]
        if not fitting:
            return None
        slots.append(min(fitting)[1])
    return _draft(form, sizes, policies, starts, tuple(slots))


def _draft(
    form: Form, sizes: tuple[int, ...], policies: tuple[Policy, ...], starts: tuple[int, ...], slots: tuple[int, ...]
) -> Draft | None:
    groups = _groups(form, sizes, policies)
    stages: list[PlacedStage] = []
    for stage, start in enumerate(starts):
        stop = starts[stage + 1] if stage + 1 < form.count else form.pricing.units
        group = groups[form.group_of[stage]]
        live = form.facts[stage].live
        options = form.pricing.every(start, stop, group, form.microbatches, live) if start < stop else ()
        if slots[stage] >= len(options) or not form.pricing.fits(options[slots[stage]], live):
            return None
        moved = (0.0, 0.0)
        if stage and form.group_of[stage] != form.group_of[stage - 1]:
            row = form.pricing.transfers(stages[-1].group, group, form.microbatches)[:, start]
            moved = float(row[0]), float(row[1])
        stages.append(PlacedStage(start, stop, group, options[slots[stage]], moved))
    costs = [stage.cost for stage in stages]
    if not form.fits(costs):
        return None
    step_s = least_step_s(form, stages)
    return Draft(sizes, policies, starts, slots, tuple(stages), step_s)


def _changes(form: Form, draft: Draft) -> Iterator[Draft | None]:
    """Each cut a unit or two to either side; each option; each device to another group, with new cuts; each group placed otherwise."""
    sizes, policies, starts, slots = draft.sizes, draft.policies, draft.starts, draft.slots
    for stage in range(1, form.count):
        for move in (-1, 1, -2, 2):
            moved = (*starts[:stage], starts[stage] + move, *starts[stage + 1 :])
            if not starts[stage - 1] < moved[stage] < (*starts, form.pricing.units)[stage + 1]:
                continue
            yield _draft(form, sizes, policies, moved, slots) or _fastest(
                form, sizes, policies, moved, form.pricing.limit_bytes / form.each
            )
    for stage in range(form.count):
        for slot in (slots[stage] - 1, slots[stage] + 1):
            if slot >= 0:
                yield _draft(form, sizes, policies, starts, (*slots[:stage], slot, *slots[stage + 1 :]))
    allowed = set(form.space.sizes)
    for giver in range(form.groups):
        for taker in range(form.groups):
            changed = list(sizes)
            changed[giver], changed[taker] = changed[giver] - 1, changed[taker] + 1
            if giver != taker and {changed[giver], changed[taker]} <= allowed:
                yield _draft(form, tuple(changed), policies, starts, slots)
                yield _balanced(form, tuple(changed), policies, draft.step_s)
    for group in range(form.groups):
        for policy in form.space.policies:
            if policy != policies[group]:
                yield _draft(form, sizes, (*policies[:group], policy, *policies[group + 1 :]), starts, slots)
