"""The command line: what it prints, its exit codes, and what it must not import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autopar.cli import _mesh, main
from autopar.ir.plan import Plan
from tests.report.pipelines import pipeline_plan
from tests.report.sample import sample_plan


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one call."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture
def plan(tmp_path: Path) -> str:
    path = tmp_path / "plan.json"
    sample_plan().save(path)
    return str(path)


@pytest.fixture
def other(tmp_path: Path) -> str:
    path = tmp_path / "other.json"
    sample_plan(fits=False).save(path)
    return str(path)


def test_show(capsys: pytest.CaptureFixture[str], plan: str) -> None:
    code, out, err = run(capsys, "show", plan)
    assert (code, err) == (0, "")
    assert "LlamaForCausalLM" in out
    code, full, _ = run(capsys, "show", plan, "--full")
    assert code == 0
    assert "linear_13" in full


def test_explain(capsys: pytest.CaptureFixture[str], plan: str) -> None:
    code, out, _ = run(capsys, "explain", plan, "*.up_proj.weight", "--instead", "R@dp")
    assert code == 0
    assert "810 ms" in out


def test_diff(capsys: pytest.CaptureFixture[str], plan: str, other: str) -> None:
    assert run(capsys, "diff", plan, plan)[:2] == (0, "The plans are equal.\n")
    code, out, _ = run(capsys, "diff", plan, other)
    assert code == 1
    assert "memory limit" in out
    code, out, err = run(capsys, "diff", plan, plan + "x")
    assert (code, out) == (2, "")
    assert "cannot be read" in err


def test_validate(capsys: pytest.CaptureFixture[str], plan: str, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "validate", plan)
    assert (code, out) == (0, f"{plan}: sound\n")
    wrong = tmp_path / "wrong.json"
    wrong.write_text(Path(plan).read_text().replace('"cost_s": 0.8', '"cost_s": 0.9'))
    code, out, _ = run(capsys, "validate", str(wrong))
    assert code == 1
    assert "add up to" in out


def test_rules(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "rules", "aten::m*m*")
    assert code == 0 and "m k, k n -> m n" in printed and "aten::matmul" in printed and "aten::linear" not in printed


def test_clusters_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "clusters")
    assert code == 0
    assert "h100x8" in out
    code, out, _ = run(capsys, "schema")
    assert code == 0
    assert json.loads(out) == Plan.model_json_schema()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{tmp}/none.json"], "cannot be read: No such file"),
        (["show", "{tmp}"], "not a file"),
        (["explain", "{plan}", "no_such_name"], "no parameter, operation or module"),
        (["explain", "{plan}", "lm_head.weight", "--instead", "S(0)@pp"], "not an axis"),
        (["plan", "m:f", "--cluster", "cpu:4", "--mesh", "two"], "--mesh two: write two sizes"),
        (["plan", "m:f", "--cluster", "cpu:4", "--mesh", "dp=2,tp"], "or name the axes"),
        (["plan", "m:f", "--cluster", "cpu:4", "--mesh", "dp=2,dp=2"], "or name the axes"),
        (["plan", "m:f", "--cluster", "cpu:4", "--mesh", "pp=2,dp=2+tp=2"], "for two groups of ranks with a mesh each"),
        (["plan", "m:f", "--cluster", "cpu:4", "--schedule", "1F1B"], "did you mean `1f1b`"),
        (["plan", "m:f", "--cluster", "cpu:4", "--schedule", "qqq"], "There are gpipe, 1f1b, "),
        (["plan", "m:f", "--cluster", "cpu:4", "--cuts", "1;2"], "such as 120,240"),
        (["plan", "m:f", "--cluster", "cpu:4", "--microbatches", "0"], "Invalid value"),
        (["plan", "m:f", "--cluster", "cpu:4", "--recompute", "some"], "Invalid value"),
        (["simulate", "{plan}"], "holds no times of its segments"),
        (["simulate", "{plan}", "--svg", "{tmp}"], "--svg {tmp}: is a directory"),
        (["simulate", "{plan}", "--trace", "{tmp}/no/t.json"], "does not exist"),
        (["explain", "{plan}", "stage 3"], "no pipeline"),
        (["plan", "m:f", "--cluster", "cpu:4", "--pin", "x"], "GLOB=PLACEMENT"),
        (["plan", "m:f", "--cluster", "cpu:4", "--memory-limit", "lots"], "write a size"),
        (["plan", "m:f", "--cluster", "cpu:4", "-o", "{tmp}"], "is a directory"),
        (["plan", "m:f", "--cluster", "cpu:4", "-o", "{tmp}/no/plan.json"], "does not exist"),
        (["plan", "m:f", "--cluster", "cpu:4", "--compare", "--baseline", "ddp"], "leave --baseline away"),
        (["plan", "m:f"], "Missing option"),
        (["plan", "m:f", "--cluster", "cpu:4", "--baseline", "best"], "Invalid value"),
        (["launch"], "No such command"),
    ],
)
def test_errors_of_use_are_one_message_and_exit_2(
    capsys: pytest.CaptureFixture[str], plan: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run(capsys, *(text.replace("{tmp}", str(tmp_path)).replace("{plan}", plan) for text in arguments))
    assert (code, out) == (2, "")
    assert message.replace("{tmp}", str(tmp_path)) in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("2x4", (2, 4)),
        (" 2 , 4 ", (2, 4)),
        ("dp=2,tp=4", {"dp": 2, "tp": 4}),
        ("pp=2, dp=2, tp=2", {"pp": 2, "dp": 2, "tp": 2}),
        ("dp=4+dp=2,tp=2", [{"dp": 4}, {"dp": 2, "tp": 2}]),
    ],
)
def test_meshes_are_written_in_several_ways(text: str, mesh: object) -> None:
    assert _mesh(text) == mesh


def test_simulate_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, trace, svg = (tmp_path / name for name in ("plan.json", "trace.json", "schedule.svg"))
    pipeline_plan(2).save(path)
    code, out, err = run(capsys, "simulate", str(path), "--trace", str(trace), "--svg", str(svg))
    assert code == 0
    assert "1f1b: 2 stages on 2 groups of ranks" in out
    assert err == f"trace written to {trace}\npicture written to {svg}\n"
    assert json.loads(trace.read_text("utf-8"))["traceEvents"]
    assert svg.read_text("utf-8").startswith("<?xml")


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTOPAR_DEBUG", "1")
    with pytest.raises(Exception, match="cannot be read"):
        main(["show", str(tmp_path / "none.json")])


@pytest.mark.parametrize(
    "arguments",
    [
        *("show PLAN", "diff PLAN PLAN", "validate PLAN", "explain PLAN lm_head.weight", "clusters", "schema", "--help"),
        *("show STAGED", "explain STAGED stage1", "simulate STAGED --trace OUT --svg OUT"),
    ],
)
def test_reading_plans_does_not_import_what_is_heavy(plan: str, arguments: str) -> None:
    staged = Path(plan).with_name("staged.json")
    pipeline_plan().save(staged)
    names = {"PLAN": plan, "STAGED": str(staged), "OUT": str(staged.with_suffix(".out"))}
    words = [names.get(word, word) for word in arguments.split()]
    code = f"""
import sys
from autopar.cli import _mesh, main
try:
    main({words!r})
except SystemExit as end:
    assert not end.code, end.code
heavy = [name for name in ("torch", "transformers", "ortools", "networkx", "numpy") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "autopar", "clusters"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "h100x8" in done.stdout


@pytest.mark.parametrize("ok", [True, False])
def test_verify_exits_with_the_verdict(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, plan: str, ok: bool) -> None:
    """The comparison itself is tested with the runtime; here only what the command makes of it."""

    class Report:
        def __init__(self) -> None:
            self.ok = ok

        def __str__(self) -> str:
            return "the table"

    monkeypatch.setattr("autopar.cli._load", lambda *_: (None, None))
    monkeypatch.setattr("autopar.verify", lambda *_: Report(), raising=False)
    assert run(capsys, "verify", "m:f", plan) == (0 if ok else 1, "the table\n", "")


def test_verify_says_what_it_ran(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Report:
        ok = True

        def __str__(self) -> str:
            return "the table"

    path = tmp_path / "plan.json"
    pipeline_plan(2, recompute=3).save(path)
    monkeypatch.setattr("autopar.cli._load", lambda *_: (None, None))
    monkeypatch.setattr("autopar.verify", lambda *_: Report(), raising=False)
    _, out, _ = run(capsys, "verify", "m:f", str(path))
    assert out.splitlines() == [
        "mesh        pp 2 x dp 2 x tp 2 = 8 ranks",
        "pipeline    1f1b: 2 stages on 2 groups of ranks, 8 microbatches",
        "recomputed  6 of 32 repeats",
        "the table",
    ]
