"""A step as a Chrome trace: what Perfetto (ui.perfetto.dev) and chrome://tracing open.

A group of ranks is a process, a stream a thread, memory a counter of the process. The format: "Trace Event Format", Google 2016; of its
events there are `M` (names), `X` (a span with a duration) and `C` (a counter), with times in microseconds, in the order of time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from autopar.ir.plan_stages import numbers_words
from autopar.report.timeline import KINDS, Row, Span, Timeline

Event = dict[str, Any]


def chrome_trace(timeline: Timeline) -> str:
    """`timeline` as JSON text, one event a line."""
    names = [event for row in timeline.rows for event in _names(row)]
    timed = [event for row in timeline.rows for event in (*_spans(row), *_memory(row, timeline))]
    timed.sort(key=lambda event: float(event["ts"]))
    lines = ",\n".join(json.dumps(event, ensure_ascii=False) for event in (*names, *timed))
    about = {"plan": timeline.title, "step": timeline.remark, "memory limit in bytes": timeline.limit_bytes}
    return f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(about, ensure_ascii=False)}, "traceEvents": [\n{lines}\n]}}\n'


def _microseconds(time_s: float) -> float:
    """To the nanosecond, so that what ends where another begins does so in the file too."""
    return round(time_s * 1e6, 3)


def _names(row: Row) -> Iterator[Event]:
    stages = f", {numbers_words('stage', sorted(row.stages))}" if row.stages else ""
    title = f"{'rank' if row.size == 1 else 'ranks'} {row.ranks}{stages}"
    yield {"ph": "M", "name": "process_name", "pid": row.group, "tid": 0, "args": {"name": title}}
    yield {"ph": "M", "name": "process_sort_index", "pid": row.group, "tid": 0, "args": {"sort_index": row.group}}
    for number, lane in enumerate(row.lanes):
        yield {"ph": "M", "name": "thread_name", "pid": row.group, "tid": number, "args": {"name": lane.name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": row.group, "tid": number, "args": {"sort_index": number}}


def _spans(row: Row) -> Iterator[Event]:
    """A pass of a microbatch as a span, and what it consists of as spans inside it."""
    for number, lane in enumerate(row.lanes):
        for action in lane.actions():
            whole = replace(action[0], end_s=action[-1].end_s)
            what = whole.what if len(action) == 1 and lane.computes else ""
            name = KINDS[whole.passes] if whole.microbatch is None else f"{KINDS[whole.passes]} {whole.microbatch}"
            yield _span(row, number, whole, name if lane.computes else whole.what, what)
            for span in action if len(action) > 1 else ():
                again = KINDS[span.kind] + ": " if span.kind == "recompute" else ""
                yield _span(row, number, span, again + (span.what or KINDS[span.kind]), "")


def _span(row: Row, lane: int, span: Span, name: str, what: str) -> Event:
    start = _microseconds(span.start_s)
    about = {"stage": span.stage, "microbatch": span.microbatch, "what": what or None}
    return {
        "ph": "X",
        "name": name,
        "cat": KINDS[span.kind],
        "pid": row.group,
        "tid": lane,
        "ts": start,
        "dur": round(max(0.0, _microseconds(span.end_s) - start), 3),
        "args": {key: value for key, value in about.items() if value is not None},
    }


def _memory(row: Row, timeline: Timeline) -> Iterator[Event]:
    """Memory by kind, stacked by the viewer."""
    last: dict[str, int] = {}
    for time_s, kinds in row.memory:
        if kinds == last:
            continue
        last = kinds
        yield {"ph": "C", "name": "memory in bytes", "pid": row.group, "tid": 0, "ts": _microseconds(time_s), "args": kinds}
    if last:
        yield {"ph": "C", "name": "memory in bytes", "pid": row.group, "tid": 0, "ts": _microseconds(timeline.step_s), "args": last}
