"""The picture of a schedule: `autopar simulate --svg`. One row a group of ranks, time to the right; what is not drawn over is idle.

The file needs nothing beside it: no script, no font, no link. Colours are those of Okabe and Ito (2008), which people of every colour
vision tell apart; forward and backward also differ in lightness, so that they stay apart in print.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, floor, log10
from statistics import median

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from autopar.ir import units
from autopar.ir.plan_stages import numbers_words
from autopar.report.timeline import KINDS, Lane, Row, Span, Timeline

# Fill, fill for the second, fourth ... stage of a group of ranks, and the colour of text on the first.
COLOURS = {
    "F": ("#0072b2", "#8cc6ec", "#fff"),
    "B": ("#e69f00", "#f6d58a", "#000"),
    "I": ("#e69f00", "#f6d58a", "#000"),
    "W": ("#f0e442", "#f8f3ae", "#000"),
    "recompute": ("#d55e00", "#d55e00", "#fff"),
    "optimizer": ("#009e73", "#009e73", "#000"),
    "other": ("#999", "#999", "#000"),
    "communication": ("#cc79a7", "#cc79a7", "#000"),
}
MARGIN, LEFT, RIGHT, TOP = 14, 160, 170, 82
COMPUTE, COMMUNICATION, MEMORY, GAP = 22, 8, 20, 10
WIDEST, NARROWEST = 6000, 900
MOST_NAMED = 20_000
"""Boxes: in pictures of more, those of one colour in a row are one path, and do not say what they are when pointed at."""
NUMBER_WIDTH = 13
"""Pixels in which a microbatch's number of two digits can be read: the picture is made as wide as that takes."""


@dataclass(frozen=True, slots=True)
class _Box:
    style: str
    x: float
    y: float
    width: float
    height: float
    label: str
    text: str
    middle: float


@dataclass(frozen=True, slots=True)
class _Drawn:
    name: str
    stages: str
    y: int
    boxes: list[_Box]
    paths: list[tuple[str, str]]
    lanes: list[tuple[str, int]]
    memory: str
    memory_y: int
    limit_y: float | None
    peak: str


def schedule_svg(timeline: Timeline) -> str:
    """`timeline` as a self-contained SVG document. Its size is bounded by the pixels it has, however many microbatches there are."""
    across = _width(timeline)
    scale = across / timeline.step_s if timeline.step_s > 0 else 0.0
    height = COMPUTE + MEMORY + GAP + max((_lanes(row) for row in timeline.rows), default=0) * COMMUNICATION
    memory = _memory_scale(timeline)
    rows = [_row(timeline, row, TOP + number * height, scale, across, memory) for number, row in enumerate(timeline.rows)]
    named = sum(len(row.boxes) for row in rows) <= MOST_NAMED
    if not named:
        rows = [replace(row, boxes=[box for box in row.boxes if box.text], paths=_paths(row.boxes)) for row in rows]
    bottom = TOP + len(rows) * height - GAP
    kinds = {span.kind for row in timeline.rows for lane in row.lanes for span in lane.spans}
    return _template().render(
        title=timeline.title,
        remark=timeline.remark,
        about=f"{len(rows)} rows, one for each group of ranks, over {units.seconds(timeline.step_s)}. {timeline.remark}",
        width=LEFT + across + RIGHT,
        height=bottom + 30,
        margin=MARGIN,
        left=LEFT,
        across=across,
        top=TOP,
        bottom=bottom,
        compute_height=COMPUTE,
        colours=COLOURS,
        legend=list(_legend(timeline, kinds, limited=memory[1] > 0)),
        ticks=list(_ticks(timeline.step_s, scale, across)),
        rows=rows,
    )


@cache
def _template() -> Template:
    loader = PackageLoader("autopar", "report")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True, finalize=_printable)
    return environment.get_template("schedule.svg.j2")


_UNPRINTABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _printable(value: object) -> object:
    """Names may hold what XML has no way to write."""
    return _UNPRINTABLE.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _lanes(row: Row) -> int:
    return sum(1 for lane in row.lanes if not lane.computes and lane.spans)


def _width(timeline: Timeline) -> int:
    """Pixels for the step: as many as let the numbers of most microbatches be read."""
    lengths = [
        action[-1].end_s - action[0].start_s
        for row in timeline.rows
        for lane in row.lanes
        if lane.computes
        for action in lane.actions()
        if action[0].microbatch is not None and action[0].kind in "FI"
    ]
    typical = median(lengths) if lengths else 0.0
    wanted = NUMBER_WIDTH * timeline.step_s / typical if typical > 0 else 0.0
    return round(min(WIDEST, max(NARROWEST, wanted)))


def _row(timeline: Timeline, row: Row, y: int, scale: float, across: int, memory: tuple[int, int]) -> _Drawn:
    boxes: list[_Box] = []
    lanes: list[tuple[str, int]] = []
    below = y + COMPUTE + 1
    order = {stage: number for number, stage in enumerate(row.stages)}
    for lane in row.lanes:
        if lane.computes:
            boxes += _boxes(lane, order, y, COMPUTE, scale)
        elif lane.spans:
            boxes += _boxes(lane, order, below, COMMUNICATION - 1, scale)
            lanes.append((lane.name, below + COMMUNICATION - 2))
            below += COMMUNICATION
    most, limit = memory
    floor_y = below + MEMORY
    share = f" of {units.size(timeline.limit_bytes)}" if timeline.limit_bytes else ""
    return _Drawn(
        name=f"rank {row.ranks}" if row.size == 1 else f"ranks {row.ranks} alike",
        stages=numbers_words("stage", sorted(row.stages)) if row.stages else "",
        y=y,
        boxes=boxes,
        paths=[],
        lanes=lanes,
        memory=_area(row, timeline.step_s, across, floor_y, (MEMORY - 2) / most if most else 0.0),
        memory_y=floor_y - 3,
        limit_y=round(floor_y - limit * (MEMORY - 2) / most, 1) if limit else None,
        peak=f"peak {units.size(row.peak_bytes)}{share}" if row.memory else "",
    )


def _paths(boxes: list[_Box]) -> list[tuple[str, str]]:
    """Boxes without text by style, each style as one SVG path of rectangles."""
    found: dict[str, list[str]] = {}
    for box in boxes:
        if not box.text:
            found.setdefault(box.style, []).append(f"M{box.x:.1f} {box.y}h{box.width:.1f}v{box.height}h-{box.width:.1f}z")
    return [(style, "".join(parts)) for style, parts in found.items()]


def _memory_scale(timeline: Timeline) -> tuple[int, int]:
    """The memory that is drawn highest, and the limit to draw: none where it is so far off that memory would be a flat line."""
    peak, limit = max((row.peak_bytes for row in timeline.rows), default=0), timeline.limit_bytes
    return (max(peak, limit), limit) if limit <= 3 * peak else (peak, 0)


def _boxes(lane: Lane, order: dict[int, int], y: int, height: int, scale: float) -> Iterator[_Box]:
    """The spans of a lane, action by action: pieces of one action too thin to be told apart are one box; a box of its own is numbered."""
    pixel = -1
    for action in lane.actions():
        first, x, end = action[0], action[0].start_s * scale, action[-1].end_s * scale
        if end - x < 1.5:  # of many that are hardly a pixel wide, one a pixel
            if int(x) == pixel:
                continue
            pixel = int(x)
        parts = _joined(action, scale) if end - x >= THIN * len(action) else [(_main(action), x, end, len(action))]
        for span, start, stop, count in parts:
            style = span.kind + ("2" if span.stage is not None and order.get(span.stage, 0) % 2 else "")
            what = f"{KINDS[span.kind]}, {span.words}" if span.kind not in span.passes else span.words
            what += f", {span.what}" if count == 1 and span.what else ""
            # A hair between neighbours, so that equal boxes are told apart.
            width = max(0.3, stop - start - (0.6 if stop - start > 3 and stop == end else 0.0))
            times = f"{units.seconds(start / scale)} to {units.seconds(stop / scale)}"
            yield _Box(style, round(LEFT + start, 2), y, round(width, 2), height, f"{what}: {times}", "", 0.0)
        text = str(first.microbatch)
        if lane.computes and first.microbatch is not None and end - x >= 5.2 * len(text) + 2:
            under = next(span for span, _, stop, _ in parts if stop >= (x + end) / 2)
            style = under.kind + ("2" if under.stage is not None and order.get(under.stage, 0) % 2 else "")
            yield _Box(style, 0.0, y, 0.0, 0, "", text, round(LEFT + (x + end) / 2, 2))


THIN = 3
"""Pixels: pieces that are thinner on average are drawn as one."""


def _main(action: list[Span]) -> Span:
    """The span whose kind takes most of the action."""
    spent: dict[str, float] = {}
    for span in action:
        spent[span.kind] = spent.get(span.kind, 0.0) + span.end_s - span.start_s
    kind = max(spent, key=lambda kind: spent[kind])
    return next(span for span in action if span.kind == kind)


def _joined(action: list[Span], scale: float) -> list[tuple[Span, float, float, int]]:
    """Spans with start and end in pixels, those of one kind without a gap that is seen between them joined."""
    joined: list[tuple[Span, float, float, int]] = []
    for span in action:
        x, end = span.start_s * scale, span.end_s * scale
        if joined and joined[-1][0].kind == span.kind and x - joined[-1][2] < 0.5:
            last, start, _, count = joined[-1]
            joined[-1] = (last, start, end, count + 1)
        else:
            joined.append((span, x, end, 1))
    return joined


def _area(row: Row, step_s: float, across: int, floor_y: int, scale: float) -> str:
    """The memory over time as an SVG path, two pixels a step."""
    if not row.memory or not scale:
        return ""
    count = across // 2
    path, last = f"M{LEFT} {floor_y}", None
    for place, level in enumerate(row.level(count, step_s)):
        if level != last:
            x = round(LEFT + place * across / count, 1)
            path += f"H{x}V{round(floor_y - level * scale, 1)}"
            last = level
    return path + f"H{LEFT + across}V{floor_y}Z"


def _legend(timeline: Timeline, kinds: set[str], limited: bool) -> Iterator[dict[str, object]]:
    x = MARGIN
    entries = [(kind, words) for kind, words in KINDS.items() if kind in kinds] + [("idle", "idle")]
    if any(len(row.stages) > 1 for row in timeline.rows):
        entries.append(("F2", "lighter: every second stage of the same ranks"))
    if any(row.memory for row in timeline.rows):
        entries.append(("memory", "memory, dashed: its limit" if limited else "memory"))
    for style, text in entries:
        yield {"style": style, "text": text, "x": x, "outlined": style == "idle"}
        x += 36 + round(6.6 * len(text))


def _ticks(step_s: float, scale: float, across: int) -> Iterator[dict[str, object]]:
    """Round times, some 100 pixels apart, with one unit for all."""
    if step_s <= 0 or not scale:
        return
    rough = step_s * 100 / across
    power = 10.0 ** floor(log10(rough))
    spacing = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * 0.999)
    unit, factor = next(((unit, factor) for unit, factor in (("s", 1.0), ("ms", 1e3)) if step_s * factor >= 2), ("us", 1e6))
    decimals = max(0, ceil(-log10(spacing * factor) - 1e-9))
    for number in range(floor(step_s / spacing + 1e-9) + 1):
        time_s = number * spacing
        yield {"x": round(LEFT + time_s * scale, 2), "text": f"{time_s * factor:.{decimals}f} {unit}"}
