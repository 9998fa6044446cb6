"""How neighbours would have a value split in blocks.

A linear layer knows of its output columns only that there are `3 n`. That they are three times `n`, to be split within each third, is
known to the `split` that follows it. Here such wishes, `S(d, blocks)` with more than one block, travel through the graph until
every operation on the way can offer them; `nest_splits` makes splits named `n:3` of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from autopar.ir.graph import Graph, Op
from autopar.ir.rules.nest import Blocks, Nest, Term

RESHARD = "autopar.reshard"
RECEIVE, SEND = "autopar.receive", "autopar.send"
LEAF = "autopar.leaf"
"""A module of the user's that is not traced into; see `autopar.ir.tracing.leaf_modules`."""

Wish = tuple[int, int]
AT_MOST = 3
"""So many wishes a value; further ones are dropped."""


def blocks_by_op(graph: Graph, nest_of: Callable[[Op], Nest | None]) -> dict[str, Blocks]:
    """For every operation (by name) that neighbours would have split in blocks: its loops and numbers of blocks."""
    reading = {op.outputs[0]: op.operands[0] for op in graph.ops if op.target == RESHARD}  # through a reshard as if it were not there
    nests: dict[str, Nest] = {}
    merging: dict[int, bool] = {}  # by nest; equal operations share theirs
    waiting: deque[Op] = deque()
    for op in graph.ops:
        nest = nest_of(op) if op.target != RESHARD else None
        if nest is None or not nest.loops:
            continue
        nests[op.name] = nest
        merges = merging.get(id(nest))
        if merges is None:
            merges = merging[id(nest)] = any(len(group) > 1 for term in (*nest.operands, *nest.outputs) for group in term)
        if merges:
            waiting.append(op)
    touching = _Touching(graph, nests, reading)
    wishes: dict[str, dict[Wish, None]] = {}
    found: dict[str, dict[tuple[str, int], None]] = {}
    wanted: dict[object, tuple[tuple[Wish, ...], ...]] = {}  # by nest and its loops in blocks: the wishes for each tensor
    while waiting:
        op = waiting.popleft()
        nest = nests[op.name]
        terms = (*nest.operands, *nest.outputs)
        names = [reading.get(name, name) for name in (*op.operands, *op.outputs)]
        own = found.setdefault(op.name, {})
        for name, term in zip(names, terms, strict=True):
            for wish in wishes.get(name, ()):
                if (pair := _blocked_loop(nest, term, wish)) and sum(loop == pair[0] for loop, _ in own) < AT_MOST:
                    own[pair] = None
        key = (id(nest), *own)
        if key not in wanted:
            wanted[key] = tuple(tuple(_wanted(nest, term, own)) for term in terms)
        for name, wanted_here in zip(names, wanted[key], strict=True):
            for wish in wanted_here:
                known = wishes.setdefault(name, {})
                if wish not in known and len(known) < AT_MOST:
                    known[wish] = None
                    waiting.extend(other for other in touching.ops(name) if other is not op)
    return {name: tuple(pairs) for name, pairs in found.items() if pairs}


class _Touching:
    """Which operations with loops make or read a value, directly or through a reshard, in order; once for each way they do."""

    def __init__(self, graph: Graph, nests: Mapping[str, Nest], reading: Mapping[str, str]) -> None:
        self.graph, self.nests, self.reading = graph, nests, reading
        self.known: dict[str, list[Op]] = {}

    def ops(self, name: str) -> list[Op]:
        if name not in self.known:
            graph, reading = self.graph, self.reading
            names = [name] if name not in reading else []
            names += [op.outputs[0] for op in graph.consumers[name] if op.target == RESHARD]
            found: list[Op] = []
            for each in names:
                maker = graph.producers.get(each)
                found += [op for op in ((maker,) if maker is not None else ()) + graph.consumers[each] if op.name in self.nests]
            self.known[name] = sorted(found, key=lambda op: graph.op_index[op.name])
        return self.known[name]


def _blocked_loop(nest: Nest, term: Term, wish: Wish) -> tuple[str, int] | None:
    """The loop that `wish` splits in a tensor of `term`, and the number of its own blocks; None where it is no block of a loop."""
    dim, wanted = wish
    outside = 1
    for loop in term[dim]:
        size = nest.loops[loop]
        if wanted > outside and wanted % outside == 0 and wanted < outside * size:
            own = wanted // outside
            return (loop, own) if size % own == 0 and loop not in nest.whole else None
        outside *= size
    return None


def _wanted(nest: Nest, term: Term, own: Iterable[tuple[str, int]]) -> Iterator[Wish]:
    """Blocks in which the operation would have a tensor of `term`: from its merged dims, and from wishes that came to it."""
    natural = [
        (loop, 1) for group in term if len(group) > 1 for loop in group if loop not in nest.whole | nest.inner and nest.loops[loop] > 1
    ]
    for loop, blocks in (*natural, *own):
        if (place := nest.place(term, loop)) and place[1] * blocks > 1:
            yield place[0], place[1] * blocks
