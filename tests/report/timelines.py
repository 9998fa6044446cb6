"""Timelines of schedules as they run when a forward pass takes 1 ms, a backward pass 2 ms, and transfers nothing."""

from __future__ import annotations

from autopar.ir.pipelining.schedules import named
from autopar.report.timeline import Lane, Row, Span, Timeline

GIB = 2**30
SECONDS = {"F": 1e-3, "B": 2e-3, "I": 1e-3, "W": 1e-3}


def schedule_timeline(schedule: str, groups: int, per_group: int, microbatches: int) -> Timeline:
    orders = named(schedule).orders(groups, per_group, microbatches)
    stages = groups * per_group
    ends: dict[tuple[str, int, int], float] = {}
    at, place = [0.0] * groups, [0] * groups
    spans: list[list[Span]] = [[] for _ in orders]
    sends: list[list[Span]] = [[] for _ in orders]
    while any(place[group] < len(order) for group, order in enumerate(orders)):
        for group, order in enumerate(orders):
            while place[group] < len(order):
                kind, stage, microbatch = order[place[group]]
                needed = {"F": ("F", stage - 1), "W": ("B", stage)}.get(kind, ("B", stage + 1))
                if 0 <= needed[1] < stages and kind != "W" and (*needed, microbatch) not in ends:
                    break
                start = max(at[group], ends.get((*needed, microbatch), 0.0) if kind != "W" else 0.0)
                at[group] = start + SECONDS[kind]
                ends["F" if kind == "F" else "B" if kind != "W" else "W", stage, microbatch] = at[group]
                label = f"{stage}{kind}{microbatch}"
                spans[group].append(Span(start, at[group], kind, "", stage, microbatch))
                sends[group].append(Span(at[group], at[group] + 2e-4, "communication", f"send {label}", stage, microbatch))
                place[group] += 1
    step_s = max(at)
    rows = []
    for group in range(groups):
        own = tuple(sorted({span.stage for span in spans[group] if span.stage is not None}))
        memory, held = [(0.0, {"state": 20 * GIB, "activations": 0})], 0
        for span in spans[group]:
            held += {"F": 1, "B": -1, "I": 0, "W": -1}[span.kind]
            memory.append((span.end_s, {"state": 20 * GIB, "activations": held * GIB // 2}))
        lanes = (Lane("compute", True, tuple(spans[group])), Lane("to next", False, _apart(sends[group])))
        rows.append(Row(group, f"{group * 4}-{group * 4 + 3}", 4, own, lanes, tuple(memory)))
    return Timeline(f"{schedule} <{groups} x {microbatches}>", "made by hand & exact", step_s + 2e-4, 72 * GIB, tuple(rows))


def _apart(spans: list[Span]) -> tuple[Span, ...]:
    return tuple(span for span, after in zip(spans, [*spans[1:], None], strict=True) if after is None or span.end_s <= after.start_s)
