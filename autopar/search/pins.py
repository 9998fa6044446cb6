"""Pins: what the user fixes, by glob over parameter or operation names.

    {"model.layers.*.mlp.up_proj.weight": "S(0)@tp", "model.embed_tokens.weight": "S(0)@dp, S(1)@tp"}
    {"scaled_dot_product_attention_*": "ring@tp"}

A pin on a parameter fixes where it is stored on that axis; one on an operation (by its name in the plan) the placement of its first
result, or by name the split that it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from autopar.errors import PinError
from autopar.ir.graph import Graph, Op
from autopar.ir.placement import P, Placement, R, parse
from autopar.ir.rules import PARTIAL, REPLICATE, REPLICATE_PARTIAL_GRADIENT, splits
from autopar.search.build import Built, Restriction, empty_nodes
from autopar.search.meshes import AXES
from autopar.search.strategies import Allowed

_NAME = re.compile(r"[a-z][\w.:/+]*")
_WHOLE = (REPLICATE, REPLICATE_PARTIAL_GRADIENT, PARTIAL)

Wanted = Placement | str
"""A placement, or the name of a split of an operation."""


@dataclass(frozen=True, slots=True)
class Pins:
    """Pins read against a graph: placement (or split) by axis and, for the message, the pattern it came from."""

    given: dict[str, str]
    parameters: dict[int, dict[int, tuple[Wanted, str]]]
    ops: dict[int, dict[int, tuple[Wanted, str]]]

    def fits(self, mesh: tuple[int, ...]) -> bool:
        """Whether every axis that a pin splits has more than one rank."""
        rows = [*self.parameters.values(), *self.ops.values()]
        return all(mesh[axis] > 1 for row in rows for axis, (wanted, _) in row.items() if _splits(wanted))

    def patterns_of(self, kind: str, index: int) -> list[str]:
        row = (self.parameters if kind == "parameter" else self.ops).get(index, {})
        return list(dict.fromkeys(pattern for _, pattern in row.values()))


def read_pins(pins: Mapping[str, str] | None, graph: Graph) -> Pins:
    """Match pins with the parameters and operations of a graph.

    Raises `PinError` where a pattern matches nothing, a placement cannot be read or does not fit the shape, or two pins contradict.
    """
    if not isinstance(pins or {}, Mapping) or not all(isinstance(text, str) for pair in dict(pins or {}).items() for text in pair):
        raise PinError('pins are a dict from patterns to placements, {"model.layers.*.up_proj.weight": "S(0)@tp"}')
    found = Pins(dict(pins or {}), {}, {})
    parameters: dict[str, int] = {name: i for i, item in enumerate(graph.parameters) for name in (item.fqn, *item.aliases)}
    ops = {op.name: position for position, op in enumerate(graph.ops)}
    for pattern, text in found.given.items():
        wanted = _placements(pattern, text)
        matched = {index for name, index in parameters.items() if fnmatchcase(name, pattern)}
        matched_ops = {position for name, position in ops.items() if fnmatchcase(name, pattern)} if not matched else set()
        if not matched and not matched_ops:
            near = get_close_matches(pattern, [*parameters, *ops], 1, 0.4)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise PinError(f"pin `{pattern}` matches no parameter and no operation of `{graph.name}`{hint}")
        for index in sorted(matched):
            item = graph.parameters[index]
            if named := next((name for name in wanted.values() if isinstance(name, str)), None):
                raise PinError(f"pin `{pattern}`: `{named}` is no placement; a parameter is stored as S(dim) or R")
            _fix(found.parameters.setdefault(index, {}), wanted, pattern, f"parameter `{item.fqn}`", graph.values[item.value].shape)
            if any(placement == P for placement in wanted.values()):
                raise PinError(f"pin `{pattern}`: a parameter is stored as S(dim) or R, not as P(sum)")
        for position in sorted(matched_ops):
            op = graph.ops[position]
            _check_names(graph, op, wanted, pattern)
            _fix(found.ops.setdefault(position, {}), wanted, pattern, f"operation `{op.name}`", graph.values[op.outputs[0]].shape)
    return found


def pins_for(pins: Pins, whole: Graph, graph: Graph) -> Pins:
    """Those of `pins` that concern `graph`, a stage of the graph `whole` against which they were read; by name."""
    if not pins.given or whole is graph:
        return pins
    parameters = {item.fqn: index for index, item in enumerate(graph.parameters)}
    of_parameters = {whole.parameters[index].fqn: row for index, row in pins.parameters.items()}
    of_ops = {whole.ops[position].name: row for position, row in pins.ops.items()}
    return Pins(
        pins.given,
        {parameters[name]: row for name, row in of_parameters.items() if name in parameters},
        {graph.op_index[name]: row for name, row in of_ops.items() if name in graph.op_index},
    )


def _splits(wanted: Wanted) -> bool:
    """Whether an axis of one rank could not do as pinned."""
    return wanted not in _WHOLE if isinstance(wanted, str) else wanted.is_shard


def _check_names(graph: Graph, op: Op, wanted: dict[int, Wanted], pattern: str) -> None:
    known = [split.name for split in splits(graph, op)]
    for name in wanted.values():
        if isinstance(name, str) and name not in known:
            raise PinError(f"pin `{pattern}`: operation `{op.name}` ({op.target}) has no split `{name}`; it has {', '.join(known)}")


def _placements(pattern: str, text: str) -> dict[int, Wanted]:
    found: dict[int, Wanted] = {}
    # The commas inside of `S(0, 3)` do not separate.
    for part in text.replace("),", ")\n").replace("@dp,", "@dp\n").replace("@tp,", "@tp\n").split("\n"):
        placement, at, axis = part.partition("@")
        if not at or axis.strip() not in AXES:
            raise PinError(
                f"pin `{pattern}`: `{text}` must be placement@axis, such as S(0)@tp or `R@dp, S(1)@tp`; axes are {', '.join(AXES)}"
            )
        read: Wanted = placement.strip()
        try:
            read = parse(placement)
        except ValueError as error:
            if not _NAME.fullmatch(placement.strip()):
                raise PinError(f"pin `{pattern}`: {error}") from None
        if not isinstance(read, str) and not (read.is_shard or read in (R, P)):
            raise PinError(f"pin `{pattern}`: pin to S(dim), R or P(sum), not to {read}")
        index = AXES.index(axis.strip())
        if found.setdefault(index, read) != read:
            raise PinError(f"pin `{pattern}`: `{text}` says two things about axis `{AXES[index]}`")
    return found


def _fix(row: dict[int, tuple[Wanted, str]], wanted: dict[int, Wanted], pattern: str, where: str, shape: tuple[int, ...]) -> None:
    for axis, placement in wanted.items():
        if (
            not isinstance(placement, str)
            and placement.is_shard
            and (placement.dim >= len(shape) or shape[placement.dim] % placement.blocks)
        ):
            raise PinError(f"pin `{pattern}`: {placement} does not fit {where} of shape {list(shape)}")
        known = row.setdefault(axis, (placement, pattern))
        if known[0] != placement:
            raise PinError(f"{where}: pins `{known[1]}` ({known[0]}) and `{pattern}` ({placement}) differ on axis `{AXES[axis]}`; keep one")


def _placement(wanted: Wanted) -> Placement:
    assert not isinstance(wanted, str)
    return wanted


def apply_pins(pins: Pins, graph: Graph, restriction: Restriction) -> Restriction:
    """The restriction with the pins on top."""
    rows: dict[int, tuple[Placement | None, ...]] = {
        index: tuple(_placement(row[axis][0]) if axis in row else None for axis in range(len(AXES)))
        for index, row in pins.parameters.items()
    }
    allowed: dict[int, Allowed] = dict(restriction.splits)
    for position, row in pins.ops.items():
        options = splits(graph, graph.ops[position])
        before = allowed.get(position, (None,) * len(AXES))
        after = []
        for axis, names in enumerate(before):
            if axis in row:
                wanted = row[axis][0]
                fitting = frozenset(split.name for split in options if wanted in (split.name, split.outputs[0]))
                names = fitting if names is None else names & fitting
            after.append(names)
        allowed[position] = tuple(after)
    return replace(restriction, pins={**restriction.pins, **rows}, splits=allowed)


def check_options(built: Built, pins: Pins) -> None:
    """Raise `PinError` where the pins leave a parameter or an operation nothing to choose."""
    for node in empty_nodes(built):
        kind, index = built.structure.order[node]
        graph = built.structure.graph
        name = graph.parameters[index].fqn if kind == "parameter" else graph.ops[index].name
        mesh = " x ".join(map(str, built.costs.mesh))
        patterns = " and ".join(f"`{pattern}` ({pins.given[pattern]})" for pattern in pins.patterns_of(kind, index)) or "the baseline"
        raise PinError(f"{kind} `{name}`: nothing is left to choose on mesh {mesh} under {patterns}; remove a pin or change its placement")
