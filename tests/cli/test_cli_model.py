"""The commands that read a model: plan, compare, validate against it."""

from __future__ import annotations

from pathlib import Path

import pytest

from autopar.ir.plan import Plan
from tests.cli.test_cli import run

MODEL = "tests.cli.small:net"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan that the command line made."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    from autopar.cli import main

    with pytest.raises(SystemExit) as end:
        main(["plan", MODEL, "--cluster", "cpu:4", "--mesh", "2x2", "--alternatives", "-o", str(path)])
    assert not end.value.code
    return path


def test_the_plan_made_is_a_plan_for_the_model(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    assert Plan.load(made).mesh == {"dp": 2, "tp": 2}
    assert run(capsys, "validate", str(made))[:2] == (0, f"{made}: sound\n")
    assert run(capsys, "validate", str(made), MODEL)[:2] == (0, f"{made}: sound, and a plan for {MODEL}\n")
    code, out, _ = run(capsys, "explain", str(made), "up.weight")
    assert code == 0
    assert "chosen" in out


def test_a_plan_with_a_pipeline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, svg = tmp_path / "plan.json", tmp_path / "schedule.svg"
    options = ["--mesh", "pp=2,dp=2,tp=1", "--schedule", "1f1b", "--microbatches", "4", "--recompute", "all"]
    code, out, _ = run(capsys, "plan", MODEL, "-c", "cpu:4", *options, "-o", str(path))
    assert code == 0
    assert "1f1b: 2 stages on 2 groups of ranks, 4 microbatches" in out
    assert "recomputed" in out
    plan = Plan.load(path)
    assert plan.pipeline is not None and [stage.group for stage in plan.pipeline.stages] == [0, 1]
    assert run(capsys, "validate", str(path), MODEL)[:2] == (0, f"{path}: sound, and a plan for {MODEL}\n")
    code, out, _ = run(capsys, "simulate", str(path), "--svg", str(svg))
    assert code == 0 and svg.exists()
    assert "edited" not in out, "the plan holds what the simulator says"
    assert run(capsys, "explain", str(path), "stage 1")[0] == 0
    assert run(capsys, "show", str(path), "--full")[0] == 0


def test_a_plan_with_a_precision(capsys: pytest.CaptureFixture[str], tmp_path: Path, made: Path) -> None:
    path = tmp_path / "plan.json"
    options = ["--mesh", "2x2", "--precision", "compute=bf16,reduce=bf16,by=autocast"]
    code, out, _ = run(capsys, "plan", MODEL, "-c", "cpu:4", *options, "-o", str(path))
    assert code == 0
    assert "bfloat16, by autocast; what is read so is stored in float32, and its gradients reduced in bfloat16" in " ".join(out.split())
    plan = Plan.load(path)
    assert plan.precision is not None and plan.precision.model_dump() == {
        "compute": "bfloat16", "stored": "float32", "reduce": "bfloat16", "by": "autocast",
    }  # fmt: skip
    assert run(capsys, "validate", str(path), MODEL)[:2] == (0, f"{path}: sound, and a plan for {MODEL}\n")
    code, out, _ = run(capsys, "diff", str(made), str(path))
    assert code == 1 and "precision compute" in out and "bfloat16" in out
    path.write_text(path.read_text().replace('"by": "autocast"', '"by": "autocast", "stored": "float3"'))
    code, _, err = run(capsys, "show", str(path))
    assert code == 2 and "precision.stored: `float3` is no dtype to compute in; did you mean `float32`?" in err
    code, _, err = run(capsys, "plan", MODEL, "-c", "cpu:4", "--precision", "bf15")
    assert code == 2 and "`bf15` is no dtype" in err


def test_gradients_may_add_up_over_microbatches(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, "plan", MODEL, "-c", "cpu:2", "--microbatches", "2", "-o", str(path))
    assert code == 0
    assert "2 microbatches a step, whose gradients add up" in out
    assert run(capsys, "validate", str(path), MODEL)[:2] == (0, f"{path}: sound, and a plan for {MODEL}\n")


def test_another_model_or_batch_is_refused(capsys: pytest.CaptureFixture[str], made: Path) -> None:
    for arguments in (["tests.cli.small:wider"], [MODEL, "--batch", "16"]):
        code, out, err = run(capsys, "validate", str(made), *arguments)
        assert (code, out) == (2, "")
        assert "the plan is for `Net`" in err
    assert "in the plan and 16 x" in err


def test_an_edited_plan_is_told_where_it_contradicts_itself(capsys: pytest.CaptureFixture[str], made: Path, tmp_path: Path) -> None:
    plan = Plan.load(made)
    first = plan.segments[0].ops[0]
    wrong = first.model_copy(update={"output": dict.fromkeys(plan.mesh, "P(sum)")})
    segment = plan.segments[0].model_copy(update={"ops": (wrong, *plan.segments[0].ops[1:])})
    path = tmp_path / "edited.json"
    plan.model_copy(update={"segments": (segment, *plan.segments[1:])}).save(path)
    code, out, _ = run(capsys, "validate", str(path), MODEL)
    assert code == 1
    assert f"operation `{first.name}`" in out


def test_compare_shows_the_baselines_beside_the_searched_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, err = run(capsys, "plan", MODEL, "-c", "cpu:2", "--compare", "-o", str(path))
    assert code == 0
    assert Plan.load(path).name == "searched"
    assert err == f"plan written to {path}\n"
    for name in ("searched", "ddp", "zero1", "fsdp", "tp", "tp-sp"):
        assert f"\n{name} " in out, name


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = run(capsys, "plan", MODEL, "-c", "cpu:2", "--memory-limit", "100", "-o", str(path))
    assert code == 1
    assert "does not fit" in out and "memory_limit_bytes=" in out
    assert not Plan.load(path).predicted.fits
    code, out, _ = run(capsys, "plan", MODEL, "-c", "cpu:2", "--memory-limit", "100", "--baseline", "ddp")
    assert code == 1
    assert "are missing" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.cli.small:nett", "-c", "cpu:2"], "did you mean `net`"),
        (["tests.cli.smal:net", "-c", "cpu:2"], "no module `tests.cli.smal`"),
        ([MODEL, "-c", "tpu"], "`tpu` is no cluster"),
        ([MODEL, "-c", "cpu:2", "--pin", "*.sideways=S(0)@tp"], "*.sideways"),
        ([MODEL, "-c", "cpu:2", "--dtype", "int8"], "no dtype of parameters"),
    ],
)
def test_errors_of_use(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = run(capsys, "plan", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
