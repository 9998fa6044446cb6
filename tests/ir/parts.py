"""Runs the graphs of microbatches and stages on whole tensors, to compare them with the graph that they were made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from autopar.ir.graph import Graph, Input, Output, refs
from autopar.ir.pipelining.microbatch import Microbatched
from autopar.ir.pipelining.stages import RECEIVE, SEND, Stage
from autopar.ir.tracing.trace import TracedModel
from tests.ir.interpreter import run


def prologue_of(parts: Microbatched, traced: TracedModel, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` by path, and what the prologue computes of them."""
    if parts.prologue is None:
        return inputs
    given = [inputs[item.path] for item in parts.prologue.inputs]
    found, _ = run(replace(traced, graph=parts.prologue), model, given)
    return inputs | dict(zip((item.path for item in parts.prologue.outputs), found, strict=True))


def microbatch(parts: Microbatched, known: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Inputs of the body by path, as microbatch `index` takes them."""
    return {
        path: known[path].chunk(parts.count, placement.dim)[index] if placement.is_shard else known[path]
        for path, placement in parts.inputs.items()
    }


def joined(parts: Microbatched, results: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The whole outputs of the bodies' `results`, by microbatch."""
    found = []
    for position, state in enumerate(parts.outputs):
        pieces = [result[position] for result in results]
        found.append(torch.cat(pieces, state.dim) if state.is_shard else pieces[0] if state.is_replicated else torch.stack(pieces).sum(0))
    return found


def run_stages(stages: Iterable[Stage], traced: TracedModel, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by path, of all stages one after the other; what a stage sends the next receives, and nothing else."""
    outputs: dict[str, Tensor] = {}
    wire: dict[str, Tensor] = {}
    for stage in stages:
        graph = _open(stage.graph)
        assert tuple(wire) == stage.receives
        given = [wire[item.path[1:]] if item.path.startswith("<") else inputs[item.path] for item in graph.inputs]
        found, _ = run(replace(traced, graph=graph), model, given)
        by_path = dict(zip((item.path for item in graph.outputs), found, strict=True))
        wire = {path[1:]: tensor for path, tensor in by_path.items() if path.startswith(">")}
        assert tuple(wire) == stage.sends
        outputs |= {path: tensor for path, tensor in by_path.items() if not path.startswith(">")}
    assert not wire
    return outputs


def _open(graph: Graph) -> Graph:
    """Received values as inputs `<name`, sent ones as outputs `>name`."""
    received = [name for op in graph.ops if op.target == RECEIVE for name in op.outputs]
    sent = [name for op in graph.ops if op.target == SEND for name in refs(op.args[0])]
    return replace(
        graph,
        inputs=(*graph.inputs, *(Input(name, f"<{name}") for name in received)),
        outputs=(*graph.outputs, *(Output(name, f">{name}") for name in sent)),
        ops=tuple(op for op in graph.ops if op.target not in (RECEIVE, SEND)),
    )
