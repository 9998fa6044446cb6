"""Well-known plans as restrictions of the search: what a name fixes is fixed, the rest is chosen as well as it can be.

To add one, add a line to `BASELINES` and a row to its test.
"""

from __future__ import annotations

from collections.abc import Callable

from autopar.errors import PlanError
from autopar.ir.graph import Graph, Value
from autopar.ir.placement import Placement, R, S
from autopar.ir.rules import splits
from autopar.search.build import Restriction
from autopar.search.follow import batch_only, batch_splits, fits, parameter_splits, token_splits
from autopar.search.strategies import Allowed

Mesh = tuple[int, int]


def _data_parallel(graph: Graph, parts: int, stored: Callable[[Value, int], Placement], gathers: tuple[str, ...]) -> Restriction:
    """The batch is split over `dp`, and every parameter is stored as `stored(value, parts)` says."""
    allowed: dict[int, Allowed] = {position: (names, None) for position, names in enumerate(batch_only(graph, parts))}
    rows = {index: ((stored(graph.values[item.value], parts),), None) for index, item in enumerate(graph.parameters)}
    return Restriction(splits=allowed, stored=rows, gathers=gathers)


def ddp(graph: Graph, parts: int) -> Restriction:
    """Li et al. 2020, "PyTorch Distributed": parameters and optimizer state whole on every rank, gradients all-reduced."""
    return _data_parallel(graph, parts, lambda value, parts: R, ("step",))


def zero1(graph: Graph, parts: int) -> Restriction:
    """Rajbhandari et al. 2020, "ZeRO", stages 1 and 2: state and gradients split, parameters gathered once a step."""

    def stored(value: Value, parts: int) -> Placement:
        return next((S(dim) for dim, size in enumerate(value.shape) if size and size % parts == 0), R)

    return _data_parallel(graph, parts, stored, ("step",))


def fsdp(graph: Graph, parts: int) -> Restriction:
    """ZeRO stage 3 as `torch.distributed.fsdp.fully_shard` does it: everything split along dim 0, gathered for each use."""
    return _data_parallel(graph, parts, lambda value, parts: S(0) if value.shape and value.shape[0] >= parts else R, ("use",))


def tp(graph: Graph, parts: int) -> Restriction:
    """Shoeybi et al. 2019, "Megatron-LM": every weight matrix is split as it is used, activations between blocks are whole."""
    tokens = token_splits(graph)
    allowed: dict[int, Allowed] = {}
    for position, (op, sharding) in enumerate(zip(graph.ops, _matrix_splits(graph, parts, tokens), strict=True)):
        names = frozenset(split.name for split in splits(graph, op)) - tokens[position]
        allowed[position] = (None, sharding or names)
    return Restriction(splits=allowed, gather=False)


def tp_sp(graph: Graph, parts: int) -> Restriction:
    """Korthikanti et al. 2022, "Reducing Activation Recomputation": as `tp`, but norms, and what lies between blocks where that helps,
    are split along the sequence."""
    tokens, batch = token_splits(graph), batch_splits(graph)
    norms = parameter_splits(graph, parts, lambda dims: dims == 1)
    allowed: dict[int, Allowed] = {}
    for position, (op, sharding) in enumerate(zip(graph.ops, _matrix_splits(graph, parts, tokens), strict=True)):
        options = splits(graph, op)
        names = frozenset(split.name for split in options) - batch[position]
        sequence = frozenset(split.name for split in options if split.name in tokens[position] and fits(split, parts)) - batch[position]
        norm = sequence if norms[position] is not None and len(op.operands) > 1 else frozenset[str]()
        if sharding is not None:
            names -= tokens[position]
        allowed[position] = (None, sharding or norm or names)
    return Restriction(splits=allowed, gather=False)


def _matrix_splits(graph: Graph, parts: int, tokens: list[frozenset[str]]) -> list[frozenset[str] | None]:
    """Per operation that reads a weight of two or more dims the splits that shard it; None for others."""
    found = parameter_splits(graph, parts, lambda dims: dims >= 2)
    return [None if names is None else names - other for names, other in zip(found, tokens, strict=True)]


BASELINES: dict[str, tuple[Callable[[Graph, int], Restriction], int]] = {
    "ddp": (ddp, 0), "zero1": (zero1, 0), "fsdp": (fsdp, 0), "tp": (tp, 1), "tp-sp": (tp_sp, 1),
}  # fmt: skip
"""Restriction, and the mesh axis that all ranks lie on."""


def baseline(name: str, graph: Graph, world_size: int) -> tuple[Mesh, Restriction]:
    """Mesh and restriction of the baseline called `name`. Raises `PlanError` with the list of names."""
    if name not in BASELINES:
        raise PlanError(f"`{name}` is no baseline; known: {', '.join(BASELINES)}")
    make, axis = BASELINES[name]
    mesh = (1, world_size) if axis else (world_size, 1)
    return mesh, make(graph, world_size)
