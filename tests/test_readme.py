"""The code in README.md and the tutorial runs, the examples run, and what the README shows of the command line is what it prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autopar.ir.pipelining.schedules import SCHEDULES
from autopar.ir.rules.table import RULES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import readme_output  # noqa: E402

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r'^--8<-- "(.+)"\n', re.MULTILINE)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def blocks(page: str) -> list[str]:
    """Python blocks of a page, with the files of examples/ that it quotes put in."""
    return [QUOTED.sub(lambda match: example(match[1]), text) for text in BLOCK.findall((ROOT / page).read_text("utf-8"))]


def example(name: str) -> str:
    return (ROOT / "examples" / name).read_text("utf-8")


def run_on_ranks(script: Path, ranks: int = 4) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script)]
    done = subprocess.run(command, cwd=script.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, f"{script.name} on {ranks} ranks:\n{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout


def losses(output: str) -> list[float]:
    return [float(text) for text in re.findall(r"loss ([\d.]+)", output)]


@pytest.mark.processes
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_blocks_of_a_page_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other in one namespace, as a reader would. Scripts for several ranks are files of examples/ to the letter, and
    run below; what a page goes on to speak of, model, batch and plan, is made here."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    scripts = {path.read_text("utf-8") for path in (ROOT / "examples").glob("*.py")}
    for number, text in enumerate(blocks(page), 1):
        if "destroy_process_group" in text:
            assert text in scripts, f"{page}, block {number} is no file of examples/"
            text = text[: text.index("m = autopar.parallelize")] if text.startswith("# ") else ""
        exec(compile(text, f"{page}, block {number}", "exec"), names)


@pytest.mark.parametrize(
    ("page", "table", "refuted"),
    [
        ("docs/adding-a-rule.md", RULES, "result 0, put together by P(sum), differs"),
        ("docs/adding-a-schedule.md", SCHEDULES, "group 1: 1B0 comes before 1F0, which it needs"),
    ],
)
def test_the_worked_example_is_right(page: str, table: dict[str, Any], refuted: str) -> None:
    """What a page adds to a table of ours, shows and refutes; the row is taken away again."""
    names: dict[str, object] = {}
    shown = re.findall(r"^```text\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    printed = io.StringIO()
    known = dict(table)
    try:
        with contextlib.redirect_stdout(printed):
            for number, text in enumerate(blocks(page), 1):
                exec(compile(text, f"{page}, block {number}", "exec"), names)
        assert table.keys() - known.keys()
    finally:
        table.clear()
        table.update(known)
    assert shown[0] in printed.getvalue()
    assert refuted in printed.getvalue()


@pytest.mark.processes
@pytest.mark.parametrize(("name", "most"), [("quickstart.py", 0.5), ("per_rank.py", 0.5), ("train.py", 0.98), ("pipeline.py", 0.98)])
def test_example_learns(name: str, most: float) -> None:
    found = losses(run_on_ranks(ROOT / "examples" / name))
    assert len(found) >= 3 and found[-1] < most * found[0]


@pytest.mark.processes
def test_checkpoint_example_continues_under_another_plan() -> None:
    assert "the same losses" in run_on_ranks(ROOT / "examples" / "checkpoint.py")


@pytest.mark.processes
def test_demo_trains_as_one_device_does() -> None:
    command = [sys.executable, str(ROOT / "examples" / "train_gpt2.py"), "--skip-llama", "--steps", "5"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    largest = re.search(r"Largest difference of any step: (\S+)", done.stdout)
    assert largest and float(largest[1]) < 1e-4


def test_command_line_output_in_the_readme_is_real() -> None:
    assert readme_output.current_text() == readme_output.README.read_text("utf-8"), "run: python scripts/readme_output.py"
