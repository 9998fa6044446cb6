"""Damaged plan files: what is wrong is told by place, in one error, and never by a crash."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError, PlanFileError
from autopar.ir.plan import Plan
from autopar.report.validate import contradictions
from tests.report.pipelines import pipeline_plan
from tests.report.sample import sample_plan

TEXT = sample_plan().text()
STAGES = pipeline_plan(2).text()
STAGED = pipeline_plan(2, 2, "interleaved-zb", 4, layers=8, recompute=1, relayed="mask_7").text()


# What replaces what in the sample's text, and what the message must say; a number is the line it must name.
DAMAGE = [
    ('"version": 2', '"version": 3', "plan version 3.*update autopar"),
    ('"version": 2', '"version": 0', "plan version 0.*make the plan anew"),
    ('"version": 2', '"version": true', "plan version True"),
    ('"format": "autopar-plan"', '"format": "other"', "not an autopar plan"),
    (' "version": 2,\n', "", "plan version missing"),
    ('"dp": 2, "tp": 4', '"dp": 2, "dp": 4', r"plan:7:20: `mesh.dp` is given twice"),
    ('"cost_s": 0.8', '"cost_s": NaN', "`NaN` is not a number"),
    ('"cost_s": 0.8', '"cost_s": -Infinity', "`-Infinity` is not a number"),
    ('"cost_s": 0.8', '"cost_s": 1e999', "too large"),
    ('"cost_s": 0.8', '"cost_s": 0.' + "3" * 5000, "too large"),
    ('"cost_s": 0.8', '"cost_s": -1', "predicted.cost_s: is -1; must be at least 0"),
    ('"cost_s": 0.8', '"cost_s": "0.8"', "predicted.cost_s: is '0.8'; write a valid number"),
    ('"start": 2,', '"start": ' + "9" * 5000 + ",", "5000 digits"),
    ('"start": 2,', '"start": 9223372036854775808,', "at most 9223372036854775807"),
    ('"start": 2,', '"start": 2.5,', r"segments\[1\].start: is 2.5"),
    ('"start": 2,', '"start": 3,', r"segments\[1\].start: is 3, and the segments before it end at 2"),
    ('"count": 32,\n   "ops"', '"count": 31,\n   "ops"', "segments.* end at 529"),
    ('"length": 17', '"length": 16', "lists 17 operations"),
    ('"operations": 550', '"operations": 551', "cover 550 operations"),
    ('"S(0)@tp"}', '"S(0)@tp"', "not JSON"),
    ('"pins"', '"pinz"', "pinz: unknown field"),
    ('"fits": true', '"fits": 1', "write a valid boolean"),
    ('"fits": true', '"fits": false', "does not fit, with"),
    ('"lower_bound_s": 0.7968', '"lower_bound_s": 0.9', "exceeds the cost"),
    ('"gather": "use"', '"gather": "always"', "write 'never', 'step' or 'use'"),
    ('"tp": "S(0)"}, "gather": "never"', '"tp": "S(2)"}, "gather": "never"', r"`S\(2\)` splits dim 2 of a tensor with 2 dims"),
    ('"tp": "S(0)"}, "gather": "never"', '"tp": "S(0, 3)"}, "gather": "never"', "32000 elements do not divide in 3"),
    ('"tp": "S(0)"}, "gather": "never"', '"tp": "P(sum)"}, "gather": "never"', r"not `P\(sum\)`: write R or S\(dim\)"),
    ('"tp": "S(0)"}, "gather": "never"', '"tp": "S( 0 )"}, "gather": "never"', r"write `S\(0\)` for"),
    ('"tp": "S(0)"}, "gather": "never"', '"tp": "columns"}, "gather": "never"', "not a placement"),
    ('"tp": "S(0)"}, "gather": "never"', '"xp": "S(0)"}, "gather": "never"', "axes dp, xp and must have those of the mesh"),
    ('"stored": {"dp": "R", "tp": "S(0)"}', '"stored": {"tp": "S(0)", "dp": "R"}', "in its order: dp, tp"),
    ('"dp": 2, "tp": 4}', '"dp": 2, "tp": 0}', "mesh.tp: is 0; must be at least 1"),
    ('"dp": 2, "tp": 4}', '"dp": 2, "tp": 4000000}', "at most 1048576"),
    ('"bfloat16", "trainable"', '"bf16", "trainable"', "not a dtype"),
    ('{0-31}.mlp.up_proj', '{31-0}.mlp.up_proj', "empty range"),
    ('{0-31}.mlp.up_proj', '{0-999999999}.mlp.up_proj', "more than 1000000"),
    ('{0-31}.mlp.up_proj', '{all}.mlp.up_proj', "is not a range"),
    ('"name": "lm_head.weight"', '"name": "model.embed_tokens.weight"', "listed twice"),
    ('"op": "reshard_6"', '"op": 6', "write a valid string"),
    ('"axis": "tp"', '"axis": "pp"', "`pp` is not an axis of the mesh"),
    ('"kind": "all_gather"', '"kind": "broadcast"', "write 'all_reduce', 'all_gather'"),
]  # fmt: skip


# The same of a plan with two stages.
DAMAGE_OF_STAGES = [
    ('"schedule": "1f1b"', '"schedule": "1f1bb"', r"plan:\d+: pipeline.schedule: `1f1bb` is no schedule; did you mean `1f1b`"),
    ('"schedule": "1f1b"', '"schedule": "zbv"', "takes 4 stages, and the plan has 2"),
    ('"microbatches": 8', '"microbatches": 0', "microbatches: is 0; must be at least 1"),
    ('"microbatches": 8', '"microbatches": 99999999', "at most 65536"),
    ('"mesh": {"pp": 2, "dp": 2, "tp": 2},\n', '"mesh": {"pp": 4, "dp": 2, "tp": 2},\n', "it is pp 2 and their common mesh: pp 2 x dp 2"),
    ('"mesh": {"pp": 2, "dp": 2, "tp": 2},\n', '"mesh": {"pp": 2},\n', "their common mesh"),
    ('{"first_rank": 4, ', '{"first_rank": 5, ', r"groups\[1\].first_rank: is 5, and the groups before it end at 4"),
    ('{"first_rank": 4, "mesh": {"dp": 2, "tp": 2}}', '{"first_rank": 4, "mesh": {"dp": 2, "tp": 1}}', "pp 2 alone, since"),
    ('{"first_rank": 4, "mesh": {"dp": 2, "tp": 2}}', '{"first_rank": 4, "mesh": {"dp": 2}}', "must have those of the mesh"),
    ('{"first_rank": 4, "mesh": {"dp": 2, "tp": 2}}', '{"first_rank": 4, "mesh": {}}', r"groups\[1\].mesh: has no axis"),
    ('"stop": 274, "group": 0', '"stop": 275, "group": 0', r"stages\[1\].start: is 274, and the stages before it end at 275"),
    ('"start": 274, "stop": 550', '"start": 274, "stop": 274', "a stage has at least one operation"),
    ('"stop": 550, "group": 1', '"stop": 550, "group": 0', "`1f1b` runs stage 1 on group 1"),
    ('"stop": 550, "group": 1', '"stop": 550, "group": 2', "the last group is 1"),
    ('"outputs": [\n  {"stage": 1', '"outputs": [\n  {"stage": 2', r"outputs\[0\].stage: is 2, and the last stage is 1"),
    ('{"stage": 1, "name": "model.embed_tokens.weight"', '{"stage": 7, "name": "model.embed_tokens.weight"', "stage: is 7, and the"),
    ('{"stage": 1, "name": "before"', '{"stage": 0, "name": "before"', "segments follow each other"),
    ('{"stage": 1, "name": "before", "start": 0', '{"stage": 1, "name": "before", "start": 3', "is 3, and the segments before it end at 0"),
    ('"count": 16,\n', '"count": 15,\n', "segments before it end at 257"),
    ('"count": 16,\n', '"count": 16, "recompute": 17,\n', "recompute: is 17, and `count` is 16"),
    ('"forward_comm_s": {"tp"', '"forward_comm_s": {"pp"', r"cost.forward_comm_s.pp: `pp` is not an axis"),
    ('"cost": {"forward_s"', '"cost": {"weight_s": 9.5, "forward_s"', "a part of `backward_s`"),
    ('"stage_memory_bytes": [', '"stage_memory_bytes": [1, ', "has 3 numbers, and there are 2 groups"),
    ('"candidates": [\n  {"groups": 1', '"candidates": [\n  {"groups": 0', r"candidates\[0\].groups: is 0; must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "good", "bad", "message"),
    [(text, *row) for text, rows in ((TEXT, DAMAGE), (STAGES, DAMAGE_OF_STAGES)) for row in rows],
    ids=lambda text: text[:40],
)
def test_damage_is_named(text: str, good: str, bad: str, message: str) -> None:
    assert good in text
    with pytest.raises(PlanFileError, match=message):
        Plan.parse(text.replace(good, bad, 1))


def test_stages_without_a_pipeline_are_refused() -> None:
    text = sample_plan().text()
    with pytest.raises(PlanFileError, match="is 1, and the plan has no `pipeline`"):
        Plan.parse(text.replace('{"name": "lm_head.weight"', '{"stage": 1, "name": "lm_head.weight"'))


def test_stages_hold_all_operations_where_the_batch_is_whole() -> None:
    text = pipeline_plan(2, microbatches=1).text()
    with pytest.raises(PlanFileError, match=r"is 551, and `model\.operations` is 550"):
        Plan.parse(text.replace('"stop": 550', '"stop": 551'))


def test_a_missing_stage_is_told() -> None:
    plan = pipeline_plan(2)
    with pytest.raises(PlanFileError, match="end with stage 0, and the last stage is 1"):
        Plan.parse(plan.model_copy(update={"segments": tuple(item for item in plan.segments if item.stage == 0)}).text())


def test_the_line_is_named() -> None:
    line = next(number for number, text in enumerate(TEXT.splitlines(), 1) if "lm_head.weight" in text)
    position = TEXT.index('"stored"', TEXT.index("lm_head.weight"))
    damaged = TEXT[:position] + TEXT[position:].replace('"S(0)"', '"S(7)"', 1)
    with pytest.raises(PlanFileError, match=rf"^plan:{line}: parameters\[8\].stored.tp: "):
        Plan.parse(damaged)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" * 100_000 + "]" * 100_000,
        '"' + '\\"' * 1_000_000,
        '{"' * 200_000,
        "1" * 1_000_000,
        "-" * 1_000_000,
        "[]",
        "null",
        '"autopar-plan"',
        '{"format": "autopar-plan", "version": 2}',
        '{"format": "autopar-plan", "version": 2, "name": "\\ud800"}',
        TEXT + TEXT,
    ],
    ids=lambda text: text[:12],
)
def test_hostile_texts_end_quickly_in_one_error(text: str) -> None:
    with pytest.raises(PlanFileError):
        Plan.parse(text)


def test_a_plan_damaged_everywhere_is_told_in_a_few_lines() -> None:
    with pytest.raises(PlanFileError) as error:
        Plan.parse(TEXT.replace('"S(0)"', '"S(99)"'))
    assert len(str(error.value).splitlines()) < 12
    assert "more such places" in str(error.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, len(TEXT)), st.integers(0, 40), st.text(max_size=8))
@example(0, 10_000, "")
def test_random_damage_never_raises_anything_else(start: int, length: int, new: str) -> None:
    for text in (TEXT, STAGED):
        parse_or_refuse(text[:start] + new + text[start + length :])


def parse_or_refuse(text: str) -> None:
    """A text is read or refused with a `PlanFileError`; what is read prints."""
    try:
        plan = Plan.parse(text)
    except PlanFileError as error:
        assert str(error)
    else:
        assert Plan.parse(plan.text()) == plan
        assert str(plan)
        with contextlib.suppress(PlanError):
            contradictions(plan)


def _leaves(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] + [leaf for key, value in items for leaf in _leaves(value, (*path, key))]


LEAVES = [(text, path) for text in (TEXT, STAGED) for path in _leaves(json.loads(text)) if path]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(LEAVES), JSON)
def test_random_values_in_random_fields_never_raise_anything_else(place: tuple[str, tuple[Any, ...]], value: Any) -> None:
    text, path = place
    data = json.loads(text)
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    parse_or_refuse(json.dumps(data))
