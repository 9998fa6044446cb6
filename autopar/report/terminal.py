"""The one place that makes consoles and tables, so that all reports look alike: coloured and as wide as the terminal, plain when piped."""

from __future__ import annotations

import sys
from typing import TextIO, cast

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 160
"""Columns where the output is no terminal: wide enough that no row of a usual plan wraps, so that `grep` works."""

STYLES = {"S": "cyan", "P": "magenta", "R": "default"}


def console(file: TextIO | None = None, width: int | None = None) -> Console:
    """A console on `file` (stdout), as wide as the terminal or `width`. Names may hold brackets: nothing is read as markup."""
    target = file or sys.stdout
    if target.isatty():
        return Console(file=target, width=width, highlight=False, markup=False, emoji=False)
    return Console(file=cast(TextIO, _Trimmed(target)), width=width or PIPED_WIDTH, highlight=False, markup=False, emoji=False)


class _Trimmed:
    """A file for other programs: no blanks at line ends, no blanks that do not break. What is written to it ends with a whole line."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        self._file.write("\n".join(line.rstrip(" ") for line in text.replace("\u00a0", " ").split("\n")))
        return len(text)

    def flush(self) -> None:
        self._file.flush()

    def isatty(self) -> bool:
        return False


def table(*columns: str, right: tuple[str, ...] = (), fold: tuple[str, ...] = ()) -> Table:
    """A table without frame. Columns in `right` are flush right; those in `fold` give way first on a narrow terminal."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for column in columns:
        if column in right:
            made.add_column(column, justify="right", no_wrap=True)
        else:
            made.add_column(column, overflow="fold", no_wrap=column not in fold)
    return made


def hold(made: Table, width: int) -> Table:
    """`made` with its first column kept whole where it takes no more than half of `width`, so that the columns behind it wrap."""
    longest = max((len(str(cell)) for cell in made.columns[0].cells), default=0)
    made.columns[0].no_wrap = longest <= width // 2
    return made


def heading(text: str, remark: str = "") -> Text:
    made = Text(text, style="bold")
    if remark:
        made.append(f"  {remark}", style="not bold dim")
    return made


def placed(text: str) -> Text:
    """A placement, or several such as `S(0)@tp R/P@dp` with words between, each in the colour of its kind."""
    made = Text()
    for number, word in enumerate(text.split(" ")):
        made.append(" " if number else "")
        bare = word.split("@")[0]
        is_placement = bare in ("R", "R/P", "P(sum)") or (bare.startswith("S(") and bare[2:3].isdigit())
        made.append(word, style=STYLES[bare[0]] if is_placement else "default")
    return made
