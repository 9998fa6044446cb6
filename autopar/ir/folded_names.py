"""Names of repeated things written once: `model.layers.{0-31}.mlp.weight` stands for 32 names.

A range in braces is `a-b`, `a-b:step`, or several of these joined by commas, as `{0-30:2}` and `{0,4-7}`. Several braces in one
name vary together, so that they must hold equally many numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import zip_longest

MAX_COUNT = 1_000_000
"""More repeats than any model has; a hostile file must not make a reader list more."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_ITEM = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?::(\d{1,9}))?)?")


def ranges(name: str) -> list[list[range]]:
    """The numbers in each pair of braces of `name`.

    Raises `ValueError` in words where a range cannot be read, or where the braces do not hold equally many numbers.
    """
    found = []
    for match in _BRACES.finditer(name):
        items = []
        for text in match[1].split(","):
            item = _ITEM.fullmatch(text.strip())
            if not item:
                raise ValueError(f"`{{{match[1]}}}` is not a range; write {{0-31}}, {{0-30:2}} or {{0,2,5-7}}")
            first, last, step = int(item[1]), int(item[2] or item[1]), int(item[3] or 1)
            if last < first or step < 1:
                raise ValueError(f"`{{{match[1]}}}` is an empty range; write the smaller number first")
            items.append(range(first, last + 1, step))
        if sum(map(len, items)) > MAX_COUNT:
            raise ValueError(f"`{{{match[1]}}}` has more than {MAX_COUNT} numbers; no model repeats that often")
        found.append(items)
    if len({sum(map(len, items)) for items in found}) > 1:
        raise ValueError(f"the ranges of `{name}` vary together and must hold equally many numbers")
    return found


def count(name: str) -> int:
    """How many names `name` stands for; 1 without braces."""
    found = ranges(name)
    return sum(map(len, found[0])) if found else 1


def expand(name: str) -> list[str]:
    """The names that `name` stands for, in order."""
    columns = [[number for item in items for number in item] for items in ranges(name)]
    if not columns:
        return [name]
    pieces = _BRACES.split(name)[::2]
    return ["".join(f"{piece}{number}" for piece, number in zip_longest(pieces, row, fillvalue="")) for row in zip(*columns, strict=True)]


def stands_for(name: str, single: str) -> bool:
    """Whether `single` is one of the names that `name` stands for."""
    if name == single:
        return True
    if "{" not in name:
        return False
    found = ranges(name)
    regex = "".join(re.escape(piece) + (r"(\d{1,9})" if i < len(found) else "") for i, piece in enumerate(_BRACES.split(name)[::2]))
    match = re.fullmatch(regex, single)
    if not match:
        return False
    places = {_position(items, int(number)) for items, number in zip(found, match.groups(), strict=True)}
    return len(places) == 1 and None not in places


def _position(items: list[range], number: int) -> int | None:
    """Place of `number` in the joined ranges."""
    before = 0
    for item in items:
        if number in item:
            return before + item.index(number)
        before += len(item)
    return None


_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)|(?<=_)\d+$")
"""A number that counts repeats: a whole part of a path, or the end of an operation's name. The 1 of `ln_1.weight` does not count."""


_ANY_NUMBER = re.compile(r"(?<![A-Za-z0-9])(\d+)(?![A-Za-z0-9])")


def pattern(name: str) -> str:
    """`name` with its counting numbers and its ranges as `#`: what repeats have in common."""
    return _NUMBER.sub("#", _BRACES.sub("#", name))


@lru_cache(maxsize=1 << 16)
def parts(name: str) -> tuple[str, ...]:
    """`name` cut at its numbers, which are every second part."""
    return tuple(_ANY_NUMBER.split(name))


def alike(names: list[str]) -> bool:
    """Whether `names` differ in their numbers only, so that `fold` makes one of them."""
    split = list(map(parts, names))
    return all(pieces[::2] == split[0][::2] for pieces in split)


def fold(names: list[str]) -> str:
    """One name for `names`, which differ in their numbers only; the inverse of `expand`."""
    split = list(map(parts, names))
    first = split[0]
    assert all(len(pieces) == len(first) for pieces in split), names
    text = ""
    for position, piece in enumerate(first):
        column = [pieces[position] for pieces in split]
        if all(item == piece for item in column):
            text += piece
        else:
            text += "{" + _range_text([int(item) for item in column]) + "}"
    return text


def _range_text(numbers: list[int]) -> str:
    """`numbers` in order as ranges: runs of at least three equal steps, or of two neighbours, and single numbers."""
    items = []
    start = 0
    while start < len(numbers):
        end = start + 1
        if end < len(numbers) and (step := numbers[end] - numbers[start]) >= 1:
            while end + 1 < len(numbers) and numbers[end + 1] - numbers[end] == step:
                end += 1
            if end - start >= 2 or step == 1 or len(numbers) == 2:
                items.append(f"{numbers[start]}-{numbers[end]}" + (f":{step}" if step > 1 else ""))
                start = end + 1
                continue
        items.append(str(numbers[start]))
        start += 1
    return ",".join(items)


def first(name: str) -> str:
    """The first of the names that a folded name stands for."""
    return re.sub(r"\{(\d+)[^{}]*\}", r"\1", name)


class Names:
    """Finds what stands under a folded name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._by_pattern: dict[str, list[str]] = {}
        for name in names:
            self._by_pattern.setdefault(pattern(name), []).append(name)

    def find(self, single: str) -> str | None:
        """The name that is `single` or stands for it."""
        return next(iter(self.find_all(single)), None)

    def find_all(self, single: str) -> list[str]:
        """The names that are `single` or stand for it."""
        return [name for name in self._by_pattern.get(pattern(single), []) if stands_for(name, single)]
