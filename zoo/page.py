"""What was found about the rows, as the tables of docs/models.md."""

from __future__ import annotations

import datetime
import math
import platform
import re
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from zoo.run import WAYS, Found, Trial

BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"
_SHORTEST = {"batch": "batch", "sequence": "sequence", "tokens": "tokens", "attention heads": "heads", "queries": "queries"}
_FEATURES = ("out features", "in features", "channels", "hidden", "kernel")


def table(found: Iterable[Found]) -> str:
    """One line a model."""
    heads = ("model", "operations", "folds", *(way.title for way in WAYS), "what the 4 ranks split", "stayed whole", "notes")
    lines = [_line(heads), _line("---" for _ in heads), *map(line, found)]
    return "\n".join(lines) + "\n"


def line(found: Found) -> str:
    """The line of one model."""
    return _line(_cells(found))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(found: Found) -> list[str]:
    by_title = {trial.way.title: trial for trial in found.trials}
    four = by_title.get("searched on 4")
    return [
        found.row.name,
        str(found.operations or ""),
        ", ".join(found.folds) or "none",
        *(_numbers(by_title.get(way.title)) for way in WAYS),
        _axes(four) if four else "",
        _whole(found.trials),
        _escaped("; ".join(filter(None, (found.row.note, _leaves(found), *_refusals(found.trials))))),
    ]


def _numbers(trial: Trial | None) -> str:
    """`1e-15, 50%`: the largest relative error, and what one rank does of the work."""
    if trial is None:
        return ""
    if trial.error:
        return "**error**"
    if not trial.ok:
        return f"**{trial.worst:.0e}**"
    return f"{trial.worst:.0e}, {trial.share:.0%}" if trial.worst else f"0, {trial.share:.0%}"


def _axes(trial: Trial) -> str:
    """`dp: batch, features; tp: heads, features`."""
    return "; ".join(f"{axis}: {', '.join(dict.fromkeys(_shorter(words)))}" for axis, words in trial.axes.items())


def _shorter(words: str) -> list[str]:
    return ["features" if word in _FEATURES else _SHORTEST.get(word, word) for word in words.split(", ")]


def _whole(trials: Sequence[Trial]) -> str:
    """Operators that every rank ran whole: those without a rule, and those that a way's plan left so, with their share of the work."""
    unruled = sorted({name for trial in trials for name in trial.unruled})
    parts = [f"no rule: {', '.join(f'`{name}`' for name in unruled)}"] if unruled else []
    for trial in trials:
        if trial.whole:
            parts.append(f"{trial.way.title}: {', '.join(f'`{name}` {share:.0%}' for name, share in trial.whole)}")
    return "; ".join(parts) or "none"


def _leaves(found: Found) -> str:
    """Which modules are leaves of the trace."""
    return f"leaf modules: {', '.join(f'`{name}`' for name in found.row.leaf_modules)}" if found.row.leaf_modules else ""


def _refusals(trials: Sequence[Trial]) -> list[str]:
    """What is wrong, by way; ways with the same error together."""
    by_error: dict[str, list[str]] = {}
    for trial in trials:
        if trial.error:
            by_error.setdefault(_short(trial.error), []).append(trial.way.title)
        elif not trial.ok:
            by_error.setdefault(f"off by {trial.worst:.1e} in {trial.where}", []).append(trial.way.title)
    return [f"{', '.join(titles)}: {error}" for error, titles in by_error.items()]


def _short(error: str) -> str:
    """The first line, and of failed ranks what the first of them says."""
    lines = error.splitlines()
    return " ".join((lines[0], *(text.strip() for text in lines[1:] if text.startswith("  rank "))))[:400] if len(lines) > 2 else lines[0]


def _escaped(text: str) -> str:
    text = re.sub(r"(?<![\w.])/(?:[^\s`:/]+/)+", "", text)  # of paths the file's name
    return text.replace("|", "\\|").replace("<", "&lt;")


def summary(found: Sequence[Found], seconds: float) -> str:
    """A sentence on the whole table, and what it was made with."""
    trials = [trial for item in found for trial in item.trials]
    right = [trial for trial in trials if trial.ok]
    worst = max((trial.worst for trial in right), default=math.nan)
    versions = ", ".join(f"{name} {version(name)}" for name in ("autopar", "torch", "transformers"))
    date, minutes = datetime.date.today().isoformat(), max(1, round(seconds / 60))
    return (
        f"{sum(item.ok for item in found)} of {len(found)} models are right in every column, {len(right)} of {len(trials)} plans; the "
        f"largest relative error of those is {worst:.1e}. Made on {date} in {minutes} min with {versions}, "
        f"Python {platform.python_version()}, {platform.machine()}.\n"
    )


def replaced(page: str, name: str, text: str) -> str:
    """`page` with `text` between the markers of part `name`."""
    begin, end = BEGIN.format(name), END.format(name)
    head, rest = page.split(begin)
    return f"{head}{begin}\n\n{text}\n{end}{rest.split(end)[1]}"
