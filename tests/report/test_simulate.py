"""`autopar simulate`: what it prints, the Chrome trace against the format that viewers read, the picture against XML and its own pixels."""

from __future__ import annotations

import io
import json
import re
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from autopar.errors import PlanError
from autopar.ir import units
from autopar.ir.pipelining.schedules import SCHEDULES
from autopar.ir.plan import Plan, SegmentCost
from autopar.report.chrome_trace import chrome_trace
from autopar.report.schedule_svg import COLOURS, schedule_svg
from autopar.report.simulate import simulate, timeline_of
from autopar.report.terminal import console
from autopar.report.timeline import Row, Timeline
from autopar.search.simulator.simulate import simulate as run_simulator
from tests.report.pipelines import pipeline_plan
from tests.report.sample import sample_plan
from tests.report.timelines import schedule_timeline

PLAN = pipeline_plan(4, recompute=3)
PEAK = max(PLAN.predicted.stage_memory_bytes)


def told(plan: Plan, width: int = 160, full: bool = False) -> str:
    file = io.StringIO()
    simulate(plan, console(file, width), full)
    return file.getvalue()


def timeline(plan: Plan = PLAN) -> Timeline:
    return timeline_of(plan, run_simulator(plan))


def flat_plan(microbatches: int = 1) -> Plan:
    plan = sample_plan()
    cost = SegmentCost(forward_s=2e-3, backward_s=4e-3, forward_comm_s={"tp": 1e-3}, activation_bytes=2**30, parameter_bytes=2**28)
    segments = tuple(item.model_copy(update={"cost": cost}) for item in plan.segments)
    return plan.model_copy(update={"segments": segments, "microbatches": microbatches})


def test_the_facts_are_there() -> None:
    text = told(PLAN)
    for fact in [
        "1f1b: 4 stages on 4 groups of ranks, 8 microbatches",
        "pp 4 x dp 2 x tp 2 = 16 ranks",
        "12 of 32 repeats",
        units.seconds(PLAN.predicted.step_s),
        "38% if all stages took as long and transfers nothing",
        f"fits, {units.size(PLAN.predicted.memory_limit_bytes - PEAK)} to spare",
        "activations",
        "12-15",
        "bubble",
    ]:
        assert fact in text, fact
    assert "edited" not in text


def test_a_row_for_each_group_with_memory_over_time() -> None:
    rows = [line for line in told(PLAN).splitlines() if "▁" in line]
    assert len(rows) == 4
    assert all("█" in row for row in rows[:1])


def test_without_a_pipeline() -> None:
    for plan in (flat_plan(), flat_plan(4)):
        text = told(plan)
        assert "0-7" in text and "want of work" not in text
    assert "4 microbatches a step" in text


def test_what_does_not_fit_is_told() -> None:
    predicted = PLAN.predicted.model_copy(update={"memory_limit_bytes": 10 * 2**30, "fits": False})
    assert f"does not fit: {units.size(PEAK - 10 * 2**30)} are missing" in told(PLAN.model_copy(update={"predicted": predicted}))


def test_an_edited_plan_is_told_beside_what_its_file_says() -> None:
    predicted = PLAN.predicted.model_copy(update={"step_s": 0.5})
    text = told(PLAN.model_copy(update={"predicted": predicted}))
    assert f"{units.seconds(PLAN.predicted.step_s)} (the file says 500 ms: it was edited)" in text


def test_a_plan_without_times_is_refused() -> None:
    with pytest.raises(PlanError, match="make it anew"):
        told(sample_plan())


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_lines_keep_to_the_width_and_nothing_is_cut(width: int) -> None:
    text = told(PLAN, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_of_many_groups_some_are_listed() -> None:
    plan = pipeline_plan(64, microbatches=64, layers=64)
    text = told(plan)
    assert "14 of 64, --full lists all" in text and " 63     252-255" in text and " 62     248-251" not in text
    assert " 62     248-251" in told(plan, full=True)


# ---- the Chrome trace ----------------------------------------------------------------------------------------------------------------


def events(text: str) -> list[dict[str, Any]]:
    data = json.loads(text)
    assert data["displayTimeUnit"] == "ms"
    found: list[dict[str, Any]] = data["traceEvents"]
    return found


@pytest.mark.parametrize("plan", [PLAN, pipeline_plan(2, 2, "interleaved-zb"), flat_plan(2)], ids=["1f1b", "interleaved-zb", "flat"])
def test_the_trace_is_in_the_format(plan: Plan) -> None:
    found = events(chrome_trace(timeline(plan)))
    assert {event["ph"] for event in found} == {"M", "X", "C"}
    names = {(event["pid"], event["name"]): event["args"] for event in found if event["ph"] == "M" and event["tid"] == 0}
    assert {pid for pid, _ in names} == set(range(len(plan.groups)))
    assert names[0, "process_name"]["name"].startswith("ranks 0-")
    threads = {(event["pid"], event["tid"]) for event in found if event["name"] == "thread_name"}
    timed = [event for event in found if event["ph"] != "M"]
    assert all(a["ts"] <= b["ts"] for a, b in pairwise(timed)), "in the order of time"
    for event in timed:
        assert isinstance(event["ts"], float) and event["ts"] >= 0
        assert isinstance(event["name"], str) and event["name"]
        if event["ph"] == "X":
            assert event["dur"] >= 0 and (event["pid"], event["tid"]) in threads
        else:
            assert event["args"] and all(isinstance(value, int) for value in event["args"].values())
    last = max(event["ts"] + event.get("dur", 0) for event in timed)
    assert last == pytest.approx(timeline(plan).step_s * 1e6, abs=0.01), "microseconds"


def test_spans_of_a_thread_nest() -> None:
    """Viewers drop a span that begins in one and ends outside of it."""
    found = [event for event in events(chrome_trace(timeline())) if event["ph"] == "X"]
    for thread in {(event["pid"], event["tid"]) for event in found}:
        stack: list[float] = []
        for event in found:
            if (event["pid"], event["tid"]) != thread:
                continue
            end = event["ts"] + event["dur"]
            while stack and event["ts"] >= stack[-1] - 5e-4:
                stack.pop()
            assert not stack or end <= stack[-1] + 1e-3
            stack.append(end)


def test_the_counter_ends_as_the_simulator_says() -> None:
    simulation = run_simulator(PLAN)
    peaks = [0.0] * 4
    for event in events(chrome_trace(timeline())):
        if event["ph"] == "C":
            peaks[event["pid"]] = max(peaks[event["pid"]], sum(event["args"].values()))
    assert peaks == pytest.approx(list(simulation.peak_bytes), rel=1e-6)


def test_names_with_odd_characters_survive() -> None:
    odd = PLAN.model_copy(update={"model": PLAN.model.model_copy(update={"name": 'N<e>&"t\x1f'})})
    assert json.loads(chrome_trace(timeline(odd)))["otherData"]["plan"].startswith('N<e>&"t')
    assert "N<e>&" in "".join(ElementTree.fromstring(schedule_svg(timeline(odd))).itertext())


# ---- the picture ---------------------------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def drawn(text: str) -> ElementTree.Element:
    """The root of a well-formed picture that needs nothing beside itself."""
    root = ElementTree.fromstring(text.encode())
    assert root.tag == f"{SVG}svg"
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert not any(word in text for word in ("<script", "<image", "href", "url(", "@import", "<foreignObject"))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    assert root.attrib["viewBox"] == f"0 0 {root.attrib['width']} {root.attrib['height']}"
    for box in root.iter(f"{SVG}rect"):
        if "x" in box.attrib:
            assert float(box.attrib["x"]) >= 0 and float(box.attrib["x"]) + float(box.attrib["width"]) <= width + 0.5
            assert float(box.attrib["y"]) >= 0 and float(box.attrib["y"]) + float(box.attrib["height"]) <= height
    return root


def boxes(root: ElementTree.Element, kind: str) -> list[ElementTree.Element]:
    return [
        box for box in root.iter(f"{SVG}rect") if box.attrib.get("class", "").rstrip("2") == kind and box.find(f"{SVG}title") is not None
    ]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_every_action_is_drawn_and_numbered(schedule: str) -> None:
    each = SCHEDULES[schedule].stages_per_group or 2
    root = drawn(schedule_svg(schedule_timeline(schedule, 4, each, 8)))
    backward = "I" if SCHEDULES[schedule].splits_backward else "B"
    for kind in ["F", backward, *(["W"] if backward == "I" else [])]:
        assert len(boxes(root, kind)) == 4 * each * 8
    numbers = [text.text for text in root.iter(f"{SVG}text") if text.attrib.get("class", "").startswith("number")]
    assert sorted(set(map(int, filter(None, numbers)))) == list(range(8))
    assert len(numbers) == 4 * each * 8 * (3 if backward == "I" else 2)


def test_boxes_of_a_row_do_not_overlap() -> None:
    root = drawn(schedule_svg(schedule_timeline("zbv", 4, 2, 8)))
    rows: dict[float, list[tuple[float, float]]] = {}
    for kind in "FIW":
        for box in boxes(root, kind):
            x = float(box.attrib["x"])
            rows.setdefault(float(box.attrib["y"]), []).append((x, x + float(box.attrib["width"])))
    assert len(rows) == 4
    for spans in rows.values():
        assert all(a[1] <= b[0] + 0.02 for a, b in pairwise(sorted(spans)))


def test_many_groups_and_microbatches_stay_readable() -> None:
    root = drawn(text := schedule_svg(schedule_timeline("1f1b", 16, 1, 64)))
    numbers = [item for item in root.iter(f"{SVG}text") if item.attrib.get("class", "").startswith("number")]
    assert len(numbers) == 16 * 64 * 2
    assert len(text) < 2_000_000
    assert float(root.attrib["width"]) < 6500 and float(root.attrib["height"]) < 1300


def test_the_size_is_bounded_by_the_pixels() -> None:
    root = drawn(schedule_svg(schedule_timeline("1f1b", 2, 1, 4000)))
    assert len(list(root.iter(f"{SVG}rect"))) < 4 * float(root.attrib["width"]), "two rows of two lanes"


def test_pictures_of_many_boxes_draw_a_colour_of_a_row_at_once() -> None:
    root = drawn(text := schedule_svg(schedule_timeline("1f1b", 20, 1, 400)))
    paths = [item for item in root.iter(f"{SVG}path") if item.attrib["class"] in ("F", "B")]
    assert len(paths) == 20 * 2
    assert sum(item.attrib["d"].count("M") for item in paths) == 20 * 400 * 2, "every action is in one"
    assert not boxes(root, "F") and len(text) < 2_500_000


def test_the_picture_of_a_plan() -> None:
    root = drawn(schedule_svg(timeline()))
    words = " ".join(root.itertext())
    for fact in [
        "ranks 4-7 alike",
        "stage 1",
        "forward again",
        "optimizer",
        "communication",
        "idle",
        "to group 1",
        f"peak {units.size(PEAK)} of ",
    ]:
        assert fact in words, fact
    assert re.search(r"backward of microbatch 3, stage 2, .*: \d+ ms to \d+ ms", words)


def test_a_step_without_length_is_drawn_empty() -> None:
    drawn(schedule_svg(Timeline("t", "", 0.0, 0, (Row(0, "0", 1, (), (), ()),))))
    drawn(schedule_svg(Timeline("t", "", 1e-7, 0, (Row(0, "0", 1, (), (), ((0.0, {"a": 1}),)),))))


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(digit * 2 for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_numbers_can_be_read_on_their_boxes() -> None:
    """Contrast as WCAG 2 computes it; 3 is enough for bold or large, 4.5 for all text."""
    for kind, (fill, lighter, text) in COLOURS.items():
        for ground, ink in ((fill, text), (lighter, text if lighter == fill else "#000")):
            light, dark = sorted((luminance(ground), luminance(ink)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= (4.5 if kind in "FBIW" else 3), (kind, ground)
