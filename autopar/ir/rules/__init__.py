"""Sharding rules: for every operator, the ways to run it on the ranks of one mesh axis.

`splits(graph, op)` is what search and runtime ask; `table.py` holds the rules, `nest.py` turns them into splits. Rules that came with the
graph (`given.py`) stand above the table's.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from autopar.ir.graph import Arg, Graph, Op, Ref
from autopar.ir.placement import RP, P, Placement, R
from autopar.ir.rules.given import GivenRule
from autopar.ir.rules.neighbours import RECEIVE, RESHARD, SEND, blocks_by_op
from autopar.ir.rules.nest import FLOATS, Blocks, Call, Nest, nest_splits, replicate, replicate_partial_gradient
from autopar.ir.rules.split import PARTIAL, REPLICATE, REPLICATE_PARTIAL_GRADIENT, Split
from autopar.ir.rules.table import RULES

__all__ = ["PARTIAL", "REPLICATE", "REPLICATE_PARTIAL_GRADIENT", "Split", "has_rule", "splits", "unruled", "unruled_kinds"]

_HERE = object()
_STRUCTURES: dict[tuple[Any, ...], int] = {}
_NESTS: dict[Any, Nest | None] = {}
_SPLITS: dict[Any, tuple[Split, ...]] = {}


def has_rule(target: str) -> bool:
    """Whether the operator named `target` has a rule; `replicated on purpose` is one."""
    return target in RULES or target == RESHARD


def unruled(graph: Graph) -> tuple[str, ...]:
    """Operators of `graph` that run replicated because nobody wrote a rule for them, or because their rule does not cover their form."""
    return tuple(sorted({op.target for op in unruled_kinds(graph)}))


def unruled_kinds(graph: Graph) -> tuple[Op, ...]:
    """The first of every kind of operations (equal in all but names) that run replicated for want of a rule, in order."""
    kinds: dict[int, Op] = {}
    for op in graph.ops:
        kinds.setdefault(_structure(graph, op), op)
    return tuple(op for op in kinds.values() if op.target != RESHARD and _nest(graph, op) is None)


def given_rule(graph: Graph, op: Op) -> GivenRule | None:
    """The rule for `op` that came with the graph, if one did."""
    return next((rule for rule in graph.rules if rule.fits(op, graph.values)), None) if graph.rules else None


def splits(graph: Graph, op: Op) -> tuple[Split, ...]:
    """All ways to run `op` on one mesh axis. The first is `replicate` (for `autopar.reshard`: `R`).

    Each is right for any values of the operands. An operator without a rule has only `replicate`.
    """
    if op.target == RESHARD:
        return _reshard(graph, op)
    facts = _facts(graph)
    wire = op.target in (RECEIVE, SEND)
    blocks = facts.blocks.get(op.name, ()) if not wire else ()  # the wire carries parts in one piece
    # What is sent back for a value on the wire is its gradient, not a term of it.
    weight_side = op.name in facts.weight_side and not wire
    key = (_structure(graph, op), blocks, weight_side)
    found = _SPLITS.get(key)
    if found is None:
        call = _call(graph, op)
        nest = _nest(graph, op)
        found = (replicate(call),) if nest is None else nest_splits(nest, call, blocks)
        if weight_side:
            found = (*found, replicate_partial_gradient(call))
        found = tuple(split for split in found if _consistent(op, split))
        _SPLITS[key] = found
    return found


def _consistent(op: Op, split: Split) -> bool:
    """Whether a value that the operation reads twice is read in one placement."""
    seen: dict[str, Placement] = {}
    return all(seen.setdefault(name, placement) == placement for name, placement in zip(op.operands, split.inputs, strict=True))


def _call(graph: Graph, op: Op) -> Call:
    values = graph.values
    return Call(op, tuple(values[name] for name in op.operands), tuple(values[name] for name in op.outputs))


def _masked(arg: Arg) -> Any:
    """`arg` without the names of values: what equal layers share."""
    if isinstance(arg, Ref):
        return Ref
    return tuple(map(_masked, arg)) if isinstance(arg, tuple) else arg


def _structure(graph: Graph, op: Op) -> int:
    """A number that is equal for operations that differ only in names; worked out once for the operations of a graph."""
    kept: tuple[object, dict[str, int]] | None = graph.__dict__.get("_rule_structures")
    if kept is None or kept[0] is not _HERE:  # numbers of another process came with a pickled graph
        kept = graph.__dict__["_rule_structures"] = (_HERE, _structures(graph))
    number = kept[1].get(op.name)
    if number is None:
        number = kept[1][op.name] = _STRUCTURES.setdefault(_facts_of_structure(graph, op), len(_STRUCTURES))
    return number


def _structures(graph: Graph) -> dict[str, int]:
    """The numbers of all operations; operations of one token that read equally many different values are looked at once."""
    from autopar.ir.fold import tokens  # with numpy, which reading a plan file does without

    known: dict[object, int] = {}
    found: dict[str, int] = {}
    for op, token in zip(graph.ops, tokens(graph).tolist(), strict=True):
        operands = op.operands
        twice = len(operands) > 1 and len(set(operands)) < len(operands)
        key = (token, tuple(map(operands.index, operands))) if twice else token
        number = known.get(key)
        if number is None:
            number = known[key] = _STRUCTURES.setdefault(_facts_of_structure(graph, op), len(_STRUCTURES))
        found[op.name] = number
    return found


def _facts_of_structure(graph: Graph, op: Op) -> tuple[Any, ...]:
    values = graph.values
    operands = op.operands
    return (
        op.target,
        given_rule(graph, op),
        # One value read twice must be read in one placement.
        tuple(map(operands.index, operands)) if len(set(operands)) < len(operands) else None,
        tuple(map(_masked, op.args)),
        tuple((key, _masked(arg)) for key, arg in op.kwargs) if op.kwargs else (),
        tuple((value.shape, value.dtype) for value in (values[name] for name in operands)),
        tuple((value.shape, value.dtype) for value in (values[name] for name in op.outputs)),
    )


def _nest(graph: Graph, op: Op) -> Nest | None:
    family = RULES.get(op.target)
    if family is None and not graph.rules:
        return None
    key = _structure(graph, op)
    if key not in _NESTS:
        given, call = given_rule(graph, op), _call(graph, op)
        _NESTS[key] = given.nest(call) if given is not None else family(call) if family is not None else None
    return _NESTS[key]


class _Facts:
    """What splits need to know of the whole graph: wishes of neighbours, and which operations depend on no input of the user's."""

    __slots__ = ("blocks", "weight_side")

    def __init__(self, graph: Graph) -> None:
        self.blocks: dict[str, Blocks] = blocks_by_op(graph, lambda op: _nest(graph, op))
        self.weight_side = _weight_side(graph)


def _facts(graph: Graph) -> _Facts:
    facts = graph.__dict__.get("_rule_facts")
    if facts is None:
        facts = graph.__dict__["_rule_facts"] = _Facts(graph)
    assert isinstance(facts, _Facts)
    return facts


def _weight_side(graph: Graph) -> frozenset[str]:
    """Operations that only prepare parameters: they read no input, directly or through others, and carry a gradient.

    Their work is small and the same on every rank, while their consumers split the batch. `replicate/P` lets the gradient pass through
    them as a term of a sum, so that it is summed once, at the parameter, with all others.
    """
    dependent = {item.value for item in graph.inputs}
    found = []
    for op in graph.ops:
        if op.target == RECEIVE or any(name in dependent for name in op.operands):
            dependent.update(op.outputs)
        elif op.target != RESHARD and any(graph.values[name].requires_grad for name in op.operands):
            found.append(op.name)
    return frozenset(found)


def _reshard(graph: Graph, op: Op) -> tuple[Split, ...]:
    """Every state that the producer can give or that a consumer wants, in a stable order."""
    (source,) = op.operands
    (result,) = op.outputs
    states: dict[Placement, None] = {R: None}
    producer = graph.producers.get(source)
    if producer is not None:
        position = producer.outputs.index(source)
        states.update((split.outputs[position], None) for split in splits(graph, producer))
    for consumer in graph.consumers[result]:
        slots = [slot for slot, name in enumerate(consumer.operands) if name == result]
        states.update((split.inputs[slot], None) for split in splits(graph, consumer) for slot in slots)
    value = graph.values[source]
    return _reshard_splits(tuple(states), value.shape, value.dtype in FLOATS, value.dtype != "bool")


@lru_cache(maxsize=4096)
def _reshard_splits(states: tuple[Placement, ...], shape: tuple[int, ...], differentiable: bool, summable: bool) -> tuple[Split, ...]:
    def useful(state: Placement) -> bool:
        if state == RP:
            return differentiable
        if state == P:
            return summable
        return not state.is_shard or shape[state.dim] // state.blocks > 1

    return tuple(
        Split(
            name=str(state),
            inputs=(state,),
            outputs=(state,),
            size=shape[state.dim] // state.blocks if state.is_shard else 0,
            uneven=state.is_shard and state.blocks == 1,
        )
        for state in sorted(filter(useful, states), key=_order)
    )


def _order(state: Placement) -> tuple[int, int, int]:
    return ((R, RP, P).index(state) if not state.is_shard else 3, state.dim, state.blocks)
