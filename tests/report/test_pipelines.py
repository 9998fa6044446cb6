"""Plans with stages: what a reader finds in every report of one, and how its file is written. Damage in it: `test_plan_damage`."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from autopar.errors import PlanError
from autopar.ir import units
from autopar.ir.plan import Plan
from autopar.ir.plan_stages import crossings
from autopar.report.diff import changes, diff
from autopar.report.explain import explain
from autopar.report.show import show
from autopar.report.terminal import console
from autopar.report.validate import contradictions
from tests.report.pipelines import pipeline_plan
from tests.report.sample import sample_plan

FOUR = pipeline_plan(4, recompute=3, relayed="mask_7")
TEXT = pipeline_plan(2).text()
UNEVEN = pipeline_plan(meshes=({"dp": 2, "tp": 2}, {"dp": 4, "tp": 1}))


def shown(plan: Plan, width: int = 160, full: bool = False) -> str:
    file = io.StringIO()
    show(plan, console(file, width), full)
    return file.getvalue()


def explained(plan: Plan, name: str) -> str:
    file = io.StringIO()
    explain(plan, name, console(file))
    return file.getvalue()


@pytest.mark.parametrize("text", [str(FOUR), shown(FOUR)], ids=["print", "show"])
def test_the_facts_are_there(text: str) -> None:
    for fact in [
        "pp 4 x dp 2 x tp 2 = 16 ranks",
        "1f1b: 4 stages on 4 groups of ranks, 8 microbatches",
        "12 of 32 repeats",
        f"bubble {units.percent(FOUR.predicted.bubble)} of computing",
        "model.layers.{24-31}, head",
        "12-15",
        "16.9 ms",
        "39.1 ms",
        "3 of 8",
        "16.0 MiB in 0.400 ms: add_273, mask_7",
        "made in stage 0 and needed up to stage 3; stages 1-2 hand it on",
        "chosen",
        "25% slower",
        "32 groups are more than there are ranks",
        "stages 0-3 model.layers.{0-31} (x8 each, 3 recomputed)",
        "(tied: stages 0, 3)",
        "all stages",
    ]:
        assert fact in text, fact


def test_one_line_a_stage() -> None:
    lines = str(FOUR).splitlines()
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("stages, times")) + 2 :]
    assert [line.split()[0] for line in table[:5]] == ["0", "1", "2", "3", "handed"]


def test_many_stages_that_are_alike_are_one_row() -> None:
    plan = pipeline_plan(64, microbatches=128, layers=128)
    for text in (str(plan), shown(plan)):
        assert "0-62   embed, model.layers.{0-1} .. model.layers.{124-125}  0-251" in text
        assert "63     model.layers.{126-127}, head" in text
        assert len(text.splitlines()) < 90
    assert "16.0 MiB in 0.400 ms each" in shown(plan)
    assert "62     model.layers.{124-125}" in shown(plan, full=True)


def test_groups_with_meshes_of_their_own() -> None:
    for text in (str(UNEVEN), shown(UNEVEN)):
        assert "dp 2 x tp 2 + dp 4 = 8 ranks" in text
        assert "stage 1 model.layers.{16-31}" in text


def test_stages_that_use_an_axis_differently_are_told_apart() -> None:
    plan = pipeline_plan(2)
    swapped = re.sub(r'("stage": 1, .*)', lambda line: line[1].replace('"S(0)"', '"R"'), plan.text())
    plan = Plan.parse(swapped)
    segments = [
        item.model_copy(
            update={"ops": tuple(op.model_copy(update={"split": {**op.split, "dp": "replicate"}}) for op in item.ops)}
        )
        if item.stage == 1
        else item
        for item in plan.segments
    ]  # fmt: skip
    text = str(plan.model_copy(update={"segments": tuple(segments)}))
    assert re.search(r"^  dp +stage 0: batch", text, re.MULTILINE)
    assert re.search(r"^  dp +stage 1: .*gathered per use", text, re.MULTILINE)


def test_stages_of_the_same_ranks() -> None:
    text = shown(pipeline_plan(2, 2, "interleaved-1f1b"))
    assert "4 stages on 2 groups of ranks, 2 on each" in text
    text = explained(pipeline_plan(2, 2, "zbv"), "stage 3")
    assert "0-3, which also run stage 0" in text


def test_gradients_of_microbatches_add_up_without_a_pipeline() -> None:
    plan = sample_plan()
    segments = (plan.segments[0], plan.segments[1].model_copy(update={"recompute": 12}), plan.segments[2])
    plan = Plan.parse(plan.model_copy(update={"microbatches": 8, "segments": segments}).text())
    for text in (str(plan), shown(plan)):
        assert "8 microbatches a step, whose gradients add up" in text
        assert "12 of 32 model.layers.{0-31}" in text
        assert "(x32, 12 recomputed)" in text


@pytest.mark.parametrize("width", [80, 120, 200])
@pytest.mark.parametrize("full", [False, True])
def test_lines_keep_to_the_width(width: int, full: bool) -> None:
    text = shown(FOUR, width, full)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_crossings_say_who_makes_and_who_reads() -> None:
    found = {item.value: item for item in crossings(FOUR)}
    assert found["mask_7"].stages == (0, 1, 2, 3)
    assert found["mask_7"].module == "model.relay"
    assert found["add_137"].stages == (0, 1)
    assert found["add_137"].module == "model.layers.{0-7}"


@pytest.mark.parametrize("name", ["stage 1", "stage1", "Stage 1", "pipeline.stages[1]"])
def test_a_stage_is_explained(name: str) -> None:
    text = explained(FOUR, name)
    for fact in [
        "139 to 274",
        "4-7",
        "16.9 ms forward, 39.1 ms backward",
        "2.6% less than the busiest",
        "3 of 8 repeats",
        "receives",
        "add_137 of model.layers.{0-7}: made in stage 0 and read in stage 1",
        "stages 1-2 hand it on",
        "gradients come back in 0.400 ms",
    ]:
        assert fact in text, fact


def test_parameters_and_operations_say_their_stage() -> None:
    text = explained(FOUR, "model.layers.9.mlp.up_proj.weight")
    assert "stage 1 on ranks 4-7" in text
    assert "1792" not in text and "7168 x 2048 on each rank" in text
    assert "priced for plans without a pipeline" in text
    assert "also read by stage 3" in explained(FOUR, "model.embed_tokens.weight")
    text = explained(FOUR, "mask_7")
    assert "stages 1-2 hand it on" in text
    assert "in the first 3 of the 8 repeats" in explained(FOUR, "model.layers.8.self_attn.o_proj")
    assert "receives S(0)" in explained(FOUR, "receive_mask_7")


def test_stages_that_are_not_there() -> None:
    with pytest.raises(PlanError, match="stages 0 to 3"):
        explained(FOUR, "stage 4")
    with pytest.raises(PlanError, match="no pipeline"):
        explained(sample_plan(), "stage 0")


def told(a: Plan, b: Plan) -> str:
    file = io.StringIO()
    diff(a, b, Console(file=file, width=200, highlight=False, markup=False))
    return file.getvalue()


def test_diff_of_settings_of_the_pipeline() -> None:
    plan = pipeline_plan(2)
    text = told(plan, pipeline_plan(2, schedule="gpipe", microbatches=16, recompute=4))
    for words in [r"schedule +1f1b +gpipe", r"microbatches +8 +16", r"recomputed in stage 1 +- +4 of 16", r"bubble +\d"]:
        assert re.search(words, text), words
    assert "cut 1" not in text


def test_diff_of_a_moved_cut_is_the_cut_alone() -> None:
    """Operations that only went to another stage are as they were."""
    plan, moved = pipeline_plan(2), pipeline_plan(2, layers=32)
    uneven = _moved_cut(moved)
    found = [item.what for item in changes(plan, uneven) if item.section == "decisions"]
    assert found == ["cut 1"], found


def test_diff_across_a_moved_cut_tells_changed_splits() -> None:
    plan, moved = pipeline_plan(2), _moved_cut(pipeline_plan(2))
    other = Plan.parse(moved.text().replace('"dp": "batch", "tp": "heads"', '"dp": "batch", "tp": "replicate"', 1))
    found = {item.what: (item.before, item.after) for item in changes(plan, other) if item.section == "decisions"}
    assert found.pop("attention in model.layers.*.self_attn") == (
        "batch@dp heads@tp",
        "batch@dp replicate@tp (x15), batch@dp heads@tp (x17)",
    )
    assert list(found) == ["cut 1"]


def _moved_cut(plan: Plan) -> Plan:
    """The same decisions with 15 layers in the first stage and 17 in the second."""
    assert plan.pipeline is not None
    first, second = plan.pipeline.stages
    length = next(item.length for item in plan.segments if item.count > 1)
    cut = first.stop - length
    stages = (first.model_copy(update={"stop": cut}), second.model_copy(update={"start": cut, "name": "model.layers.{15-31}, head"}))
    segments = []
    for item in plan.segments:
        change = -1 if item.stage == 0 else 1
        update: dict[str, object] = {}
        if item.count > 1:
            update = {"count": item.count + change, "name": "model.layers.{0-14}" if item.stage == 0 else "model.layers.{15-31}"}
        elif item.name == "after":
            update = {"start": item.start + change * length}
        segments.append(item.model_copy(update=update))
    return plan.model_copy(
        update={"pipeline": plan.pipeline.model_copy(update={"stages": stages}), "segments": tuple(segments)}
    )  # fmt: skip


def test_diff_of_a_pipeline_with_none() -> None:
    text = told(pipeline_plan(2), sample_plan())
    for words in [
        r"mesh +pp 2 x dp 2 x tp 2 +dp 2 x tp 4",
        r"schedule +1f1b +-",
        r"ranks of group 1 +4-7: dp 2 x tp 2 +-",
        r"cut 1 +at op",
    ]:
        assert re.search(words, text), words


def test_sound_plans_contradict_nothing() -> None:
    for plan in (FOUR, UNEVEN, pipeline_plan(2, 2, "zbv"), pipeline_plan(2, 2, "interleaved-zb", 4)):
        assert contradictions(Plan.parse(plan.text())) == []


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (r'"step_s": [\d.]+', '"step_s": 7.0', "the simulator makes it"),
        (r'"stage_memory_bytes": \[\d+', '"stage_memory_bytes": [900000000000000', "needs 819 TiB"),
        (r'"stage": 1, (.*)"gather": "use"', r'"stage": 1, \1"gather": "never"', "in stage 1 is stored split on `dp`"),
    ],
)
def test_contradictions_are_told(good: str, bad: str, message: str) -> None:
    text = re.sub(good, bad, TEXT, count=1)
    assert text != TEXT
    found = contradictions(Plan.parse(text))
    assert any(message in line for line in found), found


def test_one_line_for_each_decision() -> None:
    lines = TEXT.splitlines()
    assert sum('"first_rank"' in line for line in lines) == 2
    assert sum('"sends_bytes"' in line or '"receives_s"' in line for line in lines) == 2
    costs = [line for line in lines if '"cost": ' in line]
    assert len(costs) == 5, "one line a cost, none for a segment that costs nothing"
    assert all(line.startswith('   "cost": {') for line in costs)
    assert not any('"weight_s"' in line or '"step_gather_s"' in line for line in costs), "what is zero is left out"
    changed = pipeline_plan(2, recompute=4).text().splitlines()
    segments = [(a, b) for a, b in zip(lines, changed, strict=True) if a != b and '"length"' in a]
    assert [b.replace(', "recompute": 4', "") for _, b in segments] == [a for a, _ in segments]
