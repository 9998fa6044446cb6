"""One live line while planning: phase, best cost, bound, gap, seconds. Silent where there is no terminal to show it on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from autopar.ir import units


class Step(Protocol):
    """What the search tells: see `autopar.search.solver.solve.Progress`."""

    @property
    def phase(self) -> str: ...
    @property
    def best_cost_s(self) -> float | None: ...
    @property
    def lower_bound_s(self) -> float | None: ...
    @property
    def gap(self) -> float | None: ...


@contextmanager
def live_line(phase: str) -> Iterator[tuple[Callable[[str], None], Callable[[Step], None] | None]]:
    """A line on stderr that begins with `phase` and goes away at the end.

    Yields two callables: one that takes the name of the next phase, and one that takes the search's steps (`None` where stderr is no
    terminal, so that the search does not even make them).
    """
    if not sys.stderr.isatty():
        yield lambda phase: None, None
        return
    line = _Line(phase)
    with Live(line, console=Console(stderr=True), refresh_per_second=8, transient=True):
        yield line.enter, line.step


class _Line:
    def __init__(self, phase: str) -> None:
        self._phase = phase
        self._facts = ""
        self._began = time.monotonic()
        self._spinner = Spinner("dots")

    def enter(self, phase: str) -> None:
        self._phase, self._facts = phase, ""

    def step(self, step: Step) -> None:
        self._phase = step.phase
        facts = []
        if step.best_cost_s is not None and step.best_cost_s < float("inf"):
            facts.append(f"best {units.seconds(step.best_cost_s)}")
        if step.lower_bound_s is not None and step.lower_bound_s > 0:
            facts.append(f"bound {units.seconds(step.lower_bound_s)}")
        if step.gap is not None and step.gap < float("inf"):
            facts.append(f"gap {units.percent(step.gap)}")
        self._facts = "  ".join(facts)

    def __rich__(self) -> Spinner:
        seconds = time.monotonic() - self._began
        facts = f"  {self._facts}" if self._facts else ""
        self._spinner.update(text=Text.assemble((self._phase, "bold"), facts, (f"  {seconds:.1f} s", "dim")))
        return self._spinner
