"""JSON for people: written so that plans diff well, read so that damage is named by line and column.

Knows nothing of plans. Reading is bounded in size, depth and digits before anything is built from the text, so that a hostile file
costs a message and not the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from autopar.errors import PlanFileError

WIDTH = 140
MAX_BYTES = 32 * 2**20
"""A folded plan of a large model is some 100 kB; a plan of thousands of unfolded operations with alternatives a few MB."""
MAX_DEPTH = 16
MAX_DIGITS = 19  # of an integer: 2**63 - 1 has 19
MAX_FLOAT_DIGITS = 400  # the longest that Python prints without an exponent has some 330

Path = tuple[str | int, ...]


def write(data: dict[str, Any]) -> str:
    """`data` as indented JSON that ends with a newline, laid out so that a change of one record is a change of one line.

    Every field of `data` itself starts a line. Every object in a list is one line, however long, but for a list of objects in it, which
    is opened below, and with it every object of numbers beside that list. All else is wrapped at `WIDTH`.
    """
    lines = [f" {_compact(key)}: {_write(item, len(key) + 5)}" for key, item in data.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _compact(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False)


def _is_records(data: object) -> bool:
    return isinstance(data, list) and any(isinstance(item, dict | list) for item in data)


def _write(data: Any, column: int) -> str:
    """A field of the whole: `column` is where it starts on its line."""
    if _is_records(data):
        return _records(data, 1)
    if isinstance(data, dict) and any(map(_is_records, data.values())):
        return _record(data, 1)
    text = _compact(data)
    if column + len(text) < WIDTH or not isinstance(data, dict | list) or not data:
        return text
    parts = (
        [f"{_compact(key)}: {_compact(item)}" for key, item in data.items()]
        if isinstance(data, dict)
        else [_compact(item) for item in data]
    )
    lines = [""]
    for part in parts:
        if lines[-1] and column + len(lines[-1]) + len(part) + 3 > WIDTH:
            lines.append("")
            column = 2
        lines[-1] += f", {part}" if lines[-1] else part
    return text[0] + ",\n  ".join(lines) + text[-1]


def _records(items: list[Any], indent: int) -> str:
    """A list, one line an item."""
    pad = "\n" + " " * (indent + 1)
    return "[" + ",".join(pad + _record(item, indent + 1) for item in items) + "\n" + " " * indent + "]"


def _record(item: Any, indent: int) -> str:
    if not isinstance(item, dict) or not any(_is_records(value) for value in item.values()):
        return _compact(item)
    text = ""
    for key, value in item.items():
        if _is_records(value):
            text += f",\n{' ' * (indent + 1)}{_compact(key)}: {_records(value, indent + 1)}"
        elif isinstance(value, dict) and not all(isinstance(part, str) for part in value.values()):  # prices apart from decisions
            text += f",\n{' ' * (indent + 1)}{_compact(key)}: {_compact(value)}"
        else:
            text += f", {_compact(key)}: {_compact(value)}"
    return "{" + text.lstrip(",\n ") + "}"


def read(text: str, source: str = "plan") -> dict[str, Any]:
    """The object that `text` holds. `source` names the text in messages.

    Raises `PlanFileError` with line and column where the text is no JSON object, is too large or too deep, holds a number JSON does
    not have or that no plan needs, or gives one key twice.
    """
    if len(text) > MAX_BYTES:
        raise PlanFileError(f"{source}: {len(text)} characters are no plan (at most {MAX_BYTES}); make it anew with `autopar plan`")
    _check_depth(text, source)
    duplicate = False

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal duplicate
        found = dict(items)
        duplicate = duplicate or len(found) != len(items)
        return found

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            raise PlanFileError(f"{_place(text, digits, source)}: a number of {len(digits)} digits; a plan needs none beyond 2**63")
        return int(digits)

    def number(digits: str) -> float:
        value = float(digits) if len(digits) <= MAX_FLOAT_DIGITS else float("inf")
        if value in (float("inf"), float("-inf")):
            raise PlanFileError(f"{_place(text, digits, source)}: the number `{digits[:24]}` is too long or too large")
        return value

    def constant(name: str) -> float:
        raise PlanFileError(f"{_place(text, name, source)}: `{name}` is not a number; every number in a plan is finite")

    try:
        data = json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=number, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise PlanFileError(
            f"{source}:{error.lineno}:{error.colno}: not JSON: {error.msg}; restore the file or make the plan anew"
        ) from None
    if duplicate:
        raise PlanFileError(_first_duplicate(text, source))
    if not isinstance(data, dict):
        raise PlanFileError(f"{source}: a plan is a JSON object, this is {_KINDS.get(type(data), 'something else')}")
    return data


_KINDS = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a truth value", type(None): "null"}

# One token of JSON: a string, a bracket or a separator. Strings first, so that brackets in them do not count. The closing quote is
# optional: a string without one must cost one pass over the text, not one for every quote in it.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}\[\]:,]|[^\s"{}\[\]:,]+', re.DOTALL)
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[{}\[\]]', re.DOTALL)


def _check_depth(text: str, source: str) -> None:
    depth = 0
    for token in _BRACKETS.finditer(text):
        character = token[0]
        if character in "{[":
            depth += 1
            if depth > MAX_DEPTH:
                line, column = _line_column(text, token.start())
                raise PlanFileError(f"{source}:{line}:{column}: nested deeper than {MAX_DEPTH} levels; no plan is")
        elif character in "}]":
            depth -= 1


def _line_column(text: str, offset: int) -> tuple[int, int]:
    return text.count("\n", 0, offset) + 1, offset - (text.rfind("\n", 0, offset) + 1) + 1


def _place(text: str, token: str, source: str) -> str:
    """`source:line:column` of the first value that reads `token`."""
    for match in _TOKEN.finditer(text):
        if match[0] == token:
            line, column = _line_column(text, match.start())
            return f"{source}:{line}:{column}"
    return source


def _walk(text: str) -> Iterator[tuple[Path, int, bool]]:
    """Path and offset of every key (True) and every value (False) of a sound JSON text, in order."""
    stack: list[str | int] = []
    kinds: list[str] = []
    expect_key = False
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word in "{[":
            yield tuple(stack), token.start(), False
            kinds.append(word)
            expect_key = word == "{"
            stack.append("" if expect_key else 0)
        elif word in "}]":
            kinds.pop()
            stack.pop()
            expect_key = False
        elif word == ",":
            if kinds[-1] == "{":
                expect_key = True
            else:
                index = stack[-1]
                assert isinstance(index, int)
                stack[-1] = index + 1
        elif word == ":":
            expect_key = False
        elif expect_key:
            stack[-1] = json.loads(word)
            yield tuple(stack), token.start(), True
        else:
            yield tuple(stack), token.start(), False


def _first_duplicate(text: str, source: str) -> str:
    seen: set[Path] = set()
    for path, offset, is_key in _walk(text):
        if is_key:
            if path in seen:
                line, column = _line_column(text, offset)
                return f"{source}:{line}:{column}: `{show_path(path)}` is given twice; keep one of the two"
            seen.add(path)
    raise AssertionError("a key was seen twice")


def locate(text: str, path: Path) -> int | None:
    """Line of the value at `path` in a sound JSON text, or of the nearest thing around it that exists."""
    best: tuple[int, int] | None = None
    for found, offset, _ in _walk(text):
        if found == path[: len(found)] and (best is None or len(found) > best[0]):
            best = (len(found), offset)
            if len(found) == len(path):
                break
    return None if best is None else _line_column(text, best[1])[0]


def show_path(path: Path) -> str:
    """`("parameters", 3, "stored", "tp")` as `parameters[3].stored.tp`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
