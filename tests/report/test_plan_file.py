"""Plan files: what is saved is read back, and what cannot be read is told. Damage in them: `test_plan_damage`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from autopar.errors import PlanFileError
from autopar.ir import plan_json
from autopar.ir.plan import Plan
from tests.report.plans import plans
from tests.report.sample import sample_plan

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SAMPLE = sample_plan()
TEXT = SAMPLE.text()


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
