"""Following dims through a graph: which splits carry the batch, and which any dim of the tokens.

Nothing goes by name. The batch enters as dim 0 of the inputs and every operation hands it on by the split whose operands match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from autopar.ir.graph import Graph, Op
from autopar.ir.placement import Placement, R, S
from autopar.ir.rules import splits
from autopar.ir.rules.split import Split
from autopar.search.prices.work import base_name

Names = frozenset[str]
_MATRIX = frozenset(("linear", "addmm", "layer_norm", "native_layer_norm", "rms_norm"))


def whole_splits(graph: Graph, op: Op) -> Names:
    """The splits of `op` that shard nothing."""
    return frozenset(split.name for split in splits(graph, op) if not any(item.is_shard for item in (*split.inputs, *split.outputs)))


def batch_only(graph: Graph, parts: int) -> list[Names]:
    """Per operation the splits that are left when the batch, and nothing else, is split over `parts` ranks.

    An operation that can hand the batch on does so; others do not shard at all.
    """
    state: dict[str, Placement] = {}
    size = batch_size(graph)
    if size and size % parts == 0:
        state = {item.value: S(0) for item in graph.inputs if graph.values[item.value].shape[:1] == (size,)}
    found: list[Names] = []
    for op in graph.ops:
        best = _handing_on(graph, op, state, parts) if any(state.get(name, R).is_shard for name in op.operands) else None
        found.append(frozenset((best.name,)) if best else whole_splits(graph, op))
        if best:
            state |= {name: placement for name, placement in zip(op.outputs, best.outputs, strict=True) if placement.is_shard}
    return found


def batch_size(graph: Graph) -> int:
    """Leading dim of the first input that has one; 0 if none has."""
    return next((graph.values[item.value].shape[0] for item in graph.inputs if graph.values[item.value].shape), 0)


def _handing_on(graph: Graph, op: Op, state: dict[str, Placement], parts: int) -> Split | None:
    """The split in which `op` reads every operand that carries the batch as it lies."""
    for split in splits(graph, op):
        if not fits(split, parts):
            continue
        carried = [(split.inputs[slot], state[name]) for slot, name in enumerate(op.operands) if name in state]
        if all(wanted == given for wanted, given in carried):
            return split
    return None


def batch_splits(graph: Graph) -> list[Names]:
    """Per operation the splits along the batch."""
    seeds = {item.value: {S(0)} for item in graph.inputs if graph.values[item.value].shape}
    return _carrying(graph, seeds, seed_matrices=False)


def token_splits(graph: Graph) -> list[Names]:
    """Per operation the splits along a dim of tokens: the batch, any dim of integer inputs, and what linear layers and norms leave alone
    (every dim but the last)."""
    seeds: dict[str, set[Placement]] = {}
    for item in graph.inputs:
        value = graph.values[item.value]
        dims: Iterable[int] = range(len(value.shape)) if value.dtype.startswith(("int", "bool")) else range(min(1, len(value.shape)))
        seeds[item.value] = {S(dim) for dim in dims}
    return _carrying(graph, seeds, seed_matrices=True)


def _carrying(graph: Graph, seeds: dict[str, set[Placement]], seed_matrices: bool) -> list[Names]:
    tokens = dict(seeds)
    found: list[Names] = []
    for op in graph.ops:
        if seed_matrices and base_name(op.target) in _MATRIX:
            dims = range(len(graph.values[op.outputs[0]].shape) - 1)
            tokens.setdefault(op.outputs[0], set()).update(S(dim) for dim in dims)
        names = []
        for split in splits(graph, op):
            reads = any(split.inputs[slot] in tokens.get(name, ()) for slot, name in enumerate(op.operands))
            makes = any(placement in tokens.get(name, ()) for name, placement in zip(op.outputs, split.outputs, strict=True))
            if reads or makes:
                names.append(split.name)
                for name, placement in zip(op.outputs, split.outputs, strict=True):
                    if placement.is_shard:
                        tokens.setdefault(name, set()).add(placement)
        found.append(frozenset(names))
    return found


def parameter_splits(graph: Graph, parts: int, dims: Callable[[int], bool]) -> list[Names | None]:
    """Per operation that reads a parameter for whose number of dims `dims` is true, directly or through views and reshards: the splits
    that shard such a parameter (none where `parts` ranks cannot). None for operations that read no such parameter."""
    reached = {item.value for item in graph.parameters if dims(len(graph.values[item.value].shape))}
    found: list[Names | None] = []
    for op in graph.ops:
        slots = [slot for slot, name in enumerate(op.operands) if name in reached]
        if not slots:
            found.append(None)
            continue
        if len(op.operands) == 1:
            reached.update(op.outputs)
        usable = [split for split in splits(graph, op) if fits(split, parts)]
        found.append(frozenset(split.name for split in usable if any(split.inputs[slot].is_shard for slot in slots)))
    return found


def fits(split: Split, parts: int) -> bool:
    """Whether an axis of `parts` ranks can use the split."""
    return not split.size or (split.size >= parts if split.uneven else split.size % parts == 0)
