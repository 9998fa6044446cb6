"""Recomputation: repeats of a segment whose activations are dropped after the forward pass and computed again for the backward pass.

A region is one repeat of a segment. The straight-line program of a rank is cut at the regions' ends, and each region becomes a function
of the tensors that it reads from outside, run under `torch.utils.checkpoint` without reentrance: of a region only these inputs and what
later operations read of it live on. Dropout repeats its masks, which depend on the counter that a program is given and on nothing else.

After Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from autopar.ir.plan import SegmentPlan

Around = Callable[[], AbstractContextManager[None]]


def regions_of(segments: Sequence[SegmentPlan], stage: int = 0) -> tuple[range, ...]:
    """The positions in the graph of `stage` of each repeat that its plan recomputes."""
    return tuple(
        range(start, start + segment.length)
        for segment in segments
        if segment.stage == stage
        for start in range(segment.start, segment.start + segment.recompute * segment.length, segment.length)
    )


def folded(program: fx.Graph, region: Mapping[fx.Node, int], around: Around | None = None) -> fx.GraphModule:
    """`program` with the nodes of each `region` (those with the same number, one behind the other) as one call that recomputes.

    `around`: entered around every recomputation, for what must know that a forward pass is not one.
    """
    whole = fx.Graph()
    moved: dict[fx.Node, fx.Node] = {}
    for number, group in groupby(list(program.nodes), region.get):  # their own iterator begins anew behind its end
        nodes = list(group)
        if number is None:
            for node in nodes:
                moved[node] = whole.node_copy(node, moved.__getitem__)
            continue
        inside = set(nodes)
        reads = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside))
        gives = [node for node in nodes if any(user not in inside for user in node.users)]
        call = whole.call_function(_recomputed(_body(nodes, reads, gives), number, around), tuple(moved[source] for source in reads))
        for position, node in enumerate(gives):
            moved[node] = whole.call_function(getitem, (call, position))
    return fx.GraphModule(torch.nn.Module(), whole)


def _body(nodes: Sequence[fx.Node], reads: Sequence[fx.Node], gives: Sequence[fx.Node]) -> fx.GraphModule:
    """`nodes` as a program of their own, from `reads` to `gives`."""
    graph = fx.Graph()
    inner = {source: graph.placeholder(source.name) for source in reads}
    for node in nodes:
        inner[node] = graph.node_copy(node, inner.__getitem__)
    graph.output(tuple(inner[node] for node in gives))
    return fx.GraphModule(torch.nn.Module(), graph)


def _recomputed(body: fx.GraphModule, number: int, around: Around | None) -> Callable[..., Any]:
    # A compiler takes no other context than its own; what it compiles has no hooks, so nothing needs to know.
    contexts: dict[str, Any] = {} if around is None else {"context_fn": lambda: (nullcontext(), around())}

    def region(*tensors: Any) -> Any:
        # Nothing in a program draws from the default generators: their states need not be kept.
        return checkpoint(body, *tensors, use_reentrant=False, preserve_rng_state=False, **contexts)

    region.__name__ = f"recomputed_{number}"
    return region
