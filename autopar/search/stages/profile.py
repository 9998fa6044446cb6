"""Profiles of models by layer, as published with PipeDream and DAPPLE: text that says what each layer takes.

    node5 -- layer_0 -- forward_compute_time=2.69, backward_compute_time=4.47, activation_size=4325376, parameter_size=50384896
        node4 -- node5

A line for each layer (milliseconds and bytes for a batch of so many samples, which the name of the file tells: `bert-48-pbs-2.txt`),
then a line for each edge. Layers become units of the stage search in an order in which every value is made before it is read;
a cut is then possible anywhere, and what is read behind it has to cross.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush
from pathlib import Path

from autopar.errors import PlanError

_LAYER = re.compile(r"(?P<id>[^\s-][^\s]*) -- (?P<name>.*?) -- (?P<fields>\w+=.*?)(?: -- stage_id=\d+)?")
_EDGE = re.compile(r"(?P<source>[^\s-][^\s]*) -- (?P<target>[^\s=]+)")
_FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")
_BATCH = re.compile(r"pbs-(\d+)")
_FORM = "node1 -- NAME -- forward_compute_time=1.0, backward_compute_time=2.0, activation_size=4, parameter_size=8"


@dataclass(frozen=True, slots=True)
class ProfiledLayer:
    """Times of one pass over one sample; `activation_bytes` of its result for one sample."""

    name: str
    forward_s: float
    backward_s: float
    activation_bytes: float
    parameter_bytes: float


@dataclass(frozen=True)
class Profile:
    """`layers` in an order in which each is behind all that it reads; `readers[i]`: the layers that read the result of layer i.

    A result is *free* if it takes no parameter and no backward pass to make (inputs, masks): it need not cross a cut, since every
    stage that reads it makes it again.
    """

    name: str
    layers: tuple[ProfiledLayer, ...]
    readers: tuple[tuple[int, ...], ...]

    @cached_property
    def reads(self) -> tuple[tuple[int, ...], ...]:
        """By layer: the layers whose results it reads."""
        found: list[list[int]] = [[] for _ in self.layers]
        for source, targets in enumerate(self.readers):
            for target in targets:
                found[target].append(source)
        return tuple(tuple(sources) for sources in found)

    @cached_property
    def free(self) -> tuple[bool, ...]:
        found: list[bool] = []
        for place, layer in enumerate(self.layers):
            found.append(not layer.parameter_bytes and not layer.backward_s and all(found[source] for source in self.reads[place]))
        return tuple(found)

    def crossing(self, cut: int) -> tuple[int, ...]:
        """The layers before `cut` whose results are sent to the stage that starts there, to be read in it or behind it."""
        return tuple(place for place in range(cut) if not self.free[place] and any(reader >= cut for reader in self.readers[place]))

    def again(self, start: int, stop: int) -> tuple[int, ...]:
        """The layers before `start` that a stage of layers `start` to `stop` runs for itself, since their results are free."""
        found: set[int] = set()
        wanted = [source for place in range(start, stop) for source in self.reads[place]]
        while wanted:
            place = wanted.pop()
            if place < start and self.free[place] and place not in found:
                found.add(place)
                wanted += self.reads[place]
        return tuple(sorted(found))


def batch_of(path: str | os.PathLike[str]) -> int:
    """The batch that the name of a profile's file tells. Raises `PlanError` where it tells none."""
    found = _BATCH.search(Path(path).name)
    if not found or int(found[1]) < 1:
        raise PlanError(f"{path}: the file's name does not tell the batch it was profiled with (`pbs-32`); give it with --profile-batch")
    return int(found[1])


def read_profile(path: str | os.PathLike[str], batch: int | None = None) -> Profile:
    """The profile in the file at `path`, taken with `batch` samples (by default what `pbs-N` in the file's name says).

    Raises `PlanError` naming file, line and remedy.
    """
    batch = batch_of(path) if batch is None else batch
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {error}; give a profile's text file") from None
    return parse_profile(text, batch, Path(path).name.removesuffix(".txt"), str(path))


def parse_profile(text: str, batch: int, name: str, source: str = "profile") -> Profile:
    """As `read_profile`, from `text`; `source` stands before line numbers in messages."""
    layers: dict[str, ProfiledLayer] = {}
    edges: list[tuple[int, str, str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped:
            continue
        place = f"{source}:{number}"
        if found := _LAYER.fullmatch(stripped):
            if found["id"] in layers:
                raise PlanError(f"{place}: a second layer is called {found['id']}; give each its own")
            layers[found["id"]] = _layer(found["name"], found["fields"], batch, place)
        elif found := _EDGE.fullmatch(stripped):
            edges.append((number, found["source"], found["target"]))
        else:
            raise PlanError(f"{place}: neither a layer ({_FORM}) nor an edge (node1 -- node2): {_short(stripped)}")
    if not layers:
        raise PlanError(f"{source}: no layers; a line for each: {_FORM}")
    ids = {key: index for index, key in enumerate(layers)}
    for number, left, right in edges:
        for end in (left, right):
            if end not in ids:
                raise PlanError(f"{source}:{number}: an edge of {end}, which no line describes; add `{_FORM.replace('node1', end)}`")
    pairs = {(ids[start], ids[end]) for _, start, end in edges}
    order = _in_order(len(layers), pairs, list(layers), source)
    rank = {index: place for place, index in enumerate(order)}
    readers: list[list[int]] = [[] for _ in order]
    for made, read in pairs:
        readers[rank[made]].append(rank[read])
    rows = list(layers.values())
    return Profile(name, tuple(rows[index] for index in order), tuple(tuple(sorted(row)) for row in readers))


def _layer(name: str, text: str, batch: int, place: str) -> ProfiledLayer:
    values: dict[str, float] = {}
    for item in text.split(", "):
        key, _, value = item.partition("=")
        if key.strip() not in _FIELDS:
            raise PlanError(f"{place}: layer {name} has a field {_short(key.strip())}; it may have {', '.join(_FIELDS)}")
        try:
            # Several results are written as a list, [1.0; 2.0].
            numbers = [float(part) for part in value.strip().strip("[]").split(";") if part.strip()]
        except ValueError:
            numbers = [math.nan]
        total = sum(numbers)
        if not (math.isfinite(total) and all(number >= 0 for number in numbers) and numbers):
            raise PlanError(f"{place}: layer {name}: {key.strip()} is {_short(value.strip())}; write a number of at least 0")
        values[key.strip()] = total
    missing = [field for field in _FIELDS if field not in values]
    if missing:
        raise PlanError(f"{place}: layer {name} lacks {', '.join(missing)}; write all of {', '.join(_FIELDS)}")
    forward_ms, backward_ms, activation, parameters = (values[field] for field in _FIELDS)
    return ProfiledLayer(name, forward_ms / 1e3 / batch, backward_ms / 1e3 / batch, activation / batch, parameters)


def _in_order(count: int, edges: Iterable[tuple[int, int]], names: list[str], source: str) -> list[int]:
    """All layers, each behind what it reads, otherwise as they stand in the file."""
    waits = [0] * count
    readers: list[list[int]] = [[] for _ in range(count)]
    for start, end in edges:
        waits[end] += 1
        readers[start].append(end)
    ready = [index for index in range(count) if not waits[index]]
    heapify(ready)
    order: list[int] = []
    while ready:
        index = heappop(ready)
        order.append(index)
        for reader in readers[index]:
            waits[reader] -= 1
            if not waits[reader]:
                heappush(ready, reader)
    if len(order) < count:
        stuck = [names[index] for index in range(count) if waits[index]]
        raise PlanError(f"{source}: edges go in a circle among {', '.join(stuck[:4])}; remove one of them")
    return order


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
