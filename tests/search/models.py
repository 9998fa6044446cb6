"""Graphs that the tests of the search share, traced once."""

from __future__ import annotations

from functools import cache

from autopar.ir.graph import Graph
from autopar.ir.tracing.trace import split_example, trace
from tests.zoo import ZOO


@cache
def graph_of(name: str, layers: int = 2, batch: int = 8, training: bool = True) -> Graph:
    """The graph of a small model of the zoo; `batch` inputs, on `meta`."""
    entry = ZOO[name]
    model = entry.build(layers=layers, device="meta").train(training)
    args, kwargs = split_example(entry.inputs(model, batch=batch, device="meta"))
    return trace(model, args, kwargs).graph
