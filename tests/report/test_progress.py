"""The live line: there on a terminal, silent elsewhere."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import pytest
from rich.console import Console

from autopar.report.progress import _Line, live_line


@dataclass(frozen=True, slots=True)
class Step:
    phase: str
    best_cost_s: float
    lower_bound_s: float
    gap: float


def drawn(line: _Line) -> str:
    file = io.StringIO()
    Console(file=file, width=100).print(line)
    return file.getvalue()


def test_silent_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with live_line("tracing") as (enter, step):
        enter("searching")
        assert step is None
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_line_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with live_line("tracing") as (enter, step):
        enter("searching")
        assert step is not None
        step(Step("memory", 0.8, 0.79, 0.0127))
    assert "tracing" in screen.getvalue()
    assert "\x1b[2K" in screen.getvalue(), "the line is erased"


def test_the_line_tells_phase_best_bound_gap_and_seconds() -> None:
    line = _Line("tracing")
    assert "tracing  0.0 s" in drawn(line)
    line.step(Step("memory", 0.8, 0.79, 0.0127))
    assert "memory  best 800 ms  bound 790 ms  gap 1.3%  0" in drawn(line)
    line.step(Step("meshes", float("inf"), 0.0, float("inf")))
    assert "meshes  0" in drawn(line)
