"""Plan files: what is saved is read back, and what is damaged is told by place and never by a crash."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError, PlanFileError
from autopar.ir import plan_json
from autopar.ir.plan import Plan
from autopar.report.validate import contradictions
from tests.report.pipelines import pipeline_plan
from tests.report.plans import plans
from tests.report.sample import sample_plan

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SAMPLE = sample_plan()
TEXT = SAMPLE.text()
STAGED = pipeline_plan(2, 2, "interleaved-zb", 4, layers=8, recompute=1, relayed="mask_7").text()


@QUICK
@given(plans())
def test_random_plans_come_back_equal_and_print_the_same_again(plan: Plan) -> None:
    text = plan.text()
    again = Plan.parse(text)
    assert again == plan
    assert again.text() == text
    assert text.endswith("}\n")


def test_saved_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    SAMPLE.save(path)
    assert Plan.load(path) == SAMPLE
    assert path.read_text("utf-8") == TEXT
    assert list(tmp_path.iterdir()) == [path], "no temporary file is left"


def test_text_does_not_grow_with_depth() -> None:
    assert len(sample_plan(4).text().splitlines()) == len(sample_plan(128).text().splitlines())


def test_one_line_for_each_decision() -> None:
    lines = TEXT.splitlines()
    records = sum('{"name"' in line or '{"path"' in line or '{"kind"' in line or '{"stored"' in line for line in lines)
    fields = [line for line in lines if line.startswith((' "', '  "'))]
    assert max(map(len, fields)) < plan_json.WIDTH + 20
    assert len(lines) < records + len(fields) + 3 * len(SAMPLE.segments) + 12
    assert sum('"split"' in line for line in lines) == sum(segment.length for segment in SAMPLE.segments)
    assert sum('"stored"' in line and '"used"' in line for line in lines) == len(SAMPLE.parameters)


def test_a_longer_value_changes_its_own_line_only() -> None:
    before = TEXT.splitlines()
    after = Plan.parse(TEXT.replace('"dp": "batch", "tp": "heads"', '"dp": "batch", "tp": "a much longer name"')).text().splitlines()
    assert len(before) == len(after)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_saving_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    SAMPLE.save(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PlanFileError, match="cannot be written: No space left"):
        sample_plan(4).save(path)
    assert Plan.load(path) == SAMPLE
    assert list(tmp_path.iterdir()) == [path]


def test_saving_where_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(PlanFileError, match="cannot be written"):
        SAMPLE.save(tmp_path / "missing" / "plan.json")


def test_a_link_is_written_through_and_permissions_stay(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    SAMPLE.save(path)
    path.chmod(0o640)
    link = tmp_path / "link.json"
    link.symlink_to(path)
    sample_plan(4).save(link)
    assert link.is_symlink()
    assert Plan.load(path) == sample_plan(4)
    assert path.stat().st_mode & 0o777 == 0o640


def unreadable_files(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    files = {"directory": (tmp_path, "not a file"), "missing": (tmp_path / "none", "No such file")}
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    files["pipe"] = (pipe, "not a file")
    for name, data, message in [
        ("empty", b"", "not JSON"),
        ("binary", bytes(range(256)), "not UTF-8"),
        ("zeros", b"\0" * 100, "not JSON"),
        ("large", b" " * (plan_json.MAX_BYTES + 1), "larger than"),
        ("utf16", TEXT.encode("utf-16"), "not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(data)
        files[name] = (tmp_path / name, message)
    return files


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name, (path, message) in unreadable_files(tmp_path).items():
        with pytest.raises(PlanFileError, match=message):
            Plan.load(path)
        assert name
    with pytest.raises(PlanFileError):
        Plan.load("a\0b")


def test_a_byte_order_mark_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert Plan.load(path) == SAMPLE


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


@pytest.mark.parametrize(("good", "bad", "message"), DAMAGE, ids=lambda text: text[:40])
def test_damage_is_named(good: str, bad: str, message: str) -> None:
    assert good in TEXT
    with pytest.raises(PlanFileError, match=message):
        Plan.parse(TEXT.replace(good, bad, 1))


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
