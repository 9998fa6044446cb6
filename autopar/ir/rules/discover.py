"""Splits of operators that nobody wrote a rule for, found by trial (imports torch). Off unless asked for: nothing calls this by itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from autopar.ir.graph import Graph, Op
from autopar.ir.placement import P, S
from autopar.ir.rules.check import check_split
from autopar.ir.rules.nest import lacking
from autopar.ir.rules.split import Split


def discover_splits(op: Op, graph: Graph, seeds: Sequence[int] = (0, 1), parts: Sequence[int] = (2, 3)) -> tuple[Split, ...]:
    """Every choice of one dim (or none) of each operand and result, of equal size, that passes the numerical check for all `seeds` and
    numbers of `parts`, with the split dim made longer so that they divide it. Works on `torch.library` operators of the user's too.

    Random values refute what is wrong in general; they are no proof for special values. A `Split` found here is a candidate for a
    rule, and is right for the arguments of `op` only.
    """
    operands = [graph.values[name] for name in op.operands]
    results = [graph.values[name] for name in op.outputs]
    found: list[Split] = []
    for size in sorted({size for value in operands for size in value.shape if size > 1}):
        inputs = [[*(S(dim) for dim, length in enumerate(value.shape) if length == size), lacking(value)] for value in operands]
        outputs = [[*(S(dim) for dim, length in enumerate(value.shape) if length == size), P] for value in results]
        for given in itertools.product(*inputs):
            if not any(placement.is_shard for placement in given):
                continue
            for made in itertools.product(*outputs):
                split = Split(f"found{len(found)}", given, made, size=size)
                if all(_passes(op, graph, split, count, seed) for count in parts for seed in seeds):
                    found.append(split)
    return tuple(found)


def _passes(op: Op, graph: Graph, split: Split, parts: int, seed: int) -> bool:
    """Whether the check passes with the split dim made `parts` times as long."""
    values = dict(graph.values)
    for name, placement in zip(op.operands, split.inputs, strict=True):
        if placement.is_shard:
            shape, dim = graph.values[name].shape, placement.dim
            values[name] = replace(values[name], shape=(*shape[:dim], shape[dim] * parts, *shape[dim + 1 :]))
    try:
        return check_split(op, replace(graph, values=values), split, parts, seed).ok
    except (RuntimeError, IndexError, ValueError, TypeError):  # the operator refuses such shapes even whole
        return False
