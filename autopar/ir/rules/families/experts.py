"""Routed experts: tokens apart, experts apart, both with an exchange of tokens, and the inside of every expert.

`autopar.experts(x (n, h), ids (n, k), weights (n, k), [tensors (e, ...)], body) -> out (n, o)` splits along

- `n`: every rank has its tokens and all experts;
- `e`: every rank has all tokens and its experts; what the others' add is a term of a sum;
- `n+e`: tokens and experts both; tokens travel to their experts and back (expert parallelism: Lepikhin et al. 2020, "GShard");
- `n+e/1.25`: the same in parts of a fixed size, only where the user allows such a capacity, since rows beyond it are dropped;
- `f`: dims inside of the experts, as tensor parallelism splits a dense layer. Which these are is read off the body, whose operations
  have rules like all others: a split of each, such that what one makes is what the next one reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from autopar.ir import experts as routed
from autopar.ir.graph import Graph, Op
from autopar.ir.placement import RP, P, Placement, R, S
from autopar.ir.rules.local_args import LOCAL_ARGS
from autopar.ir.rules.nest import Call, Nest, Term, replicate_partial_gradient
from autopar.ir.rules.split import Split

SLICE = "aten.slice.Tensor"
_AT_MOST = 4
"""So many ways to split the inside of experts: they differ in blocks."""


def linear(call: Call) -> Nest | None:
    """`expert_linear(rows (r, i), matrix, expert (r,), transposed)`."""
    rows, matrix, _ = (value.shape for value in call.operands)
    transposed = bool(call.op.args[3])
    outer, inner = ("o", "i") if transposed else ("i", "o")
    loops = {"r": rows[0], "i": rows[1], "o": matrix[1 if transposed else 2], "e": matrix[0]}
    return Nest(
        loops, ((("r",), ("i",)), (("e",), (outer,), (inner,)), (("r",),)), ((("r",), ("o",)),), whole=frozenset({"e"}), linear=((0,),)
    )


def experts(call: Call) -> Nest | None:
    """The nest of loops `n` and `e`, with the splits of the inside as `extra`."""
    first = routed.first_tensor(call.op)
    count = call.operands[first].shape[0]
    loops = {"n": call.operands[0].shape[0], "e": count}

    def per_token(rank: int) -> Term:
        return (("n",), *((),) * (rank - 1))

    tensors: list[Term] = [(("e",), *((),) * (len(value.shape) - 1)) for value in call.operands[first:]]
    return Nest(
        loops,
        (*(per_token(2) for _ in range(first)), *tensors),
        (per_token(2),),
        uneven=frozenset(loops),
        implementations={"e": "experts"},
        extra=(*_even(call, first), *_inside(call, first)),
        joint=(("n", "e"),),
    )


def _even(call: Call, first: int) -> Iterator[Split]:
    """Split `n+e/1.25`, where the user allows that capacity: parts of equal size are sent, whatever the router says."""
    if len(call.op.args) < 6:
        return
    size = gcd(call.operands[0].shape[0], call.operands[first].shape[0])
    if size > 1:
        states = tuple(S(0) for _ in call.operands)
        yield Split(f"n+e/{call.op.args[5]:g}", states, (S(0),), size, implementation="experts_even")


def _inside(call: Call, first: int) -> Iterator[Split]:
    """Splits of the inside: `f`, and `f1`, ... where there are several."""
    body = routed.body_of(call.op)
    known: set[tuple[Placement, ...]] = set()
    for states, size in _ways(body):
        result = states[body.outputs[0].value]
        inputs = {item.path: states.get(item.value, R) for item in body.inputs}
        weight = inputs.get(routed.WEIGHT, RP)
        tensors = [inputs[routed.tensor(index)] for index in range(len(call.operands) - first)]
        rows = [inputs[routed.X], R, weight][:first]
        if (*rows, *tensors, result) in known or result == R:
            continue
        known.add((*rows, *tensors, result))
        yield Split("f" if len(known) == 1 else f"f{len(known) - 1}", (*rows, *tensors), (result,), size)
        if len(known) == _AT_MOST:
            return


def _ways(body: Graph) -> Iterator[tuple[dict[str, Placement], int]]:
    """Placements of all values of `body` under which every layer of the experts runs split and nothing is converted, and the greatest
    common divisor of what is split."""
    from autopar.ir.rules import splits  # the table of rules, which knows this family

    def options(op: Op) -> list[Split]:
        call = Call(op, tuple(body.values[name] for name in op.operands), tuple(body.values[name] for name in op.outputs))
        found = [*splits(body, op), replicate_partial_gradient(call)]
        if op.target == routed.LINEAR:
            return [split for split in found if split.work == "split"]
        if op.target in LOCAL_ARGS and op.target != SLICE:  # its arguments speak of sizes, and a body has no others for a rank
            return [split for split in found if split.work == "whole"]
        return found

    choices = [options(op) for op in body.ops]
    sources = {item.value: body.values[item.value] for item in body.inputs}
    fixed = {item.value: (RP,) for item in body.inputs if item.path == routed.WEIGHT}
    fixed |= {item.value: (R,) for item in body.inputs if item.path == routed.EXPERT}

    def extend(index: int, states: dict[str, Placement], size: int) -> Iterator[tuple[dict[str, Placement], int]]:
        if index == len(body.ops):
            yield states, size
            return
        op = body.ops[index]
        for split in choices[index]:
            found = dict(states)
            for name, state in zip(op.operands, split.inputs, strict=True):
                if name in fixed and state not in fixed[name]:
                    break
                if name in sources and name not in found:
                    found[name] = state
                elif found[name] != state:
                    break
            else:
                found |= zip(op.outputs, split.outputs, strict=True)
                yield from extend(index + 1, found, gcd(size, split.size))

    for states, size in extend(0, {}, 0):
        made = states[body.outputs[0].value]
        if made == P or made.is_shard:
            yield states, size
