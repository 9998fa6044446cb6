"""Microbatches: from the graph of a global batch to the graph of one of `count` equal parts of it, and what joins their results.

Microbatching is one more split, over time instead of over ranks, so the sharding rules say how every operation takes part in it, and their
numerical proof covers it. Over time a value is `S(d)` (each microbatch has its part), `P(sum)` (each has a term of a sum) or `R` (the
same in each). Gradients of what is `R` are always terms of a sum over the microbatches, because every microbatch runs its own backward
pass; so an operand in state `R` that requires a gradient meets splits that read `R/P`, or is read by an operation that runs whole.

Nothing is sent between microbatches, so a value has only the states in which it can be *made*:

* by its operation, in a split that reads its operands in states they can be made in;
* as a term of a sum of equal terms, `x / count`, where it is `R`;
* in the *prologue*, where it depends on no parameter: computed once from the whole batch and handed to every microbatch, whole (`R`) or
  cut in parts (`S(d)`). So what needs to know the whole batch (the number of tokens that count in the loss) knows the whole batch.

What is made is decided from the results backwards: a value that different readers need in different states is made once in each.
Where there is no way, rows of the batch depend on each other through parameters (batch norm in training, a contrastive loss): `PlanError`.
"""

from __future__ import annotations

from dataclasses import dataclass

from autopar.errors import PlanError
from autopar.ir.graph import Graph
from autopar.ir.pipelining.microbatch_ways import Choices
from autopar.ir.pipelining.microbatch_write import PROLOGUE, Writer
from autopar.ir.placement import Placement, R

__all__ = ["PROLOGUE", "Microbatched", "microbatched"]


@dataclass(frozen=True, slots=True)
class Microbatched:
    """`count` runs of `body`, one a microbatch, do what one run of the graph does.

    `prologue`, if any, runs first, once, on the whole batch; its outputs have the paths (`"@..."`) of the inputs of `body` that take them.
    `inputs`: by path, how microbatches take the inputs of `body`, the user's and the prologue's: `S(d)` in `count` equal parts along dim
    `d`, `R` whole. `outputs`: per output of `body`, how the whole is joined: `S(d)` concatenated, `P(sum)` summed, `R` equal in all.
    Gradients of the parameters are summed.
    """

    count: int
    prologue: Graph | None
    body: Graph
    inputs: dict[str, Placement]
    outputs: tuple[Placement, ...]


def microbatched(graph: Graph, count: int) -> Microbatched:
    """The graph of one of `count` equal parts of the batch; with `count` 1 the graph itself.

    Values and operations keep their names and order. A value made in a second state, and what is made for the prologue, gets a name of
    its own. The batch is the leading dim of the inputs (the most frequent size, should they differ).
    Raises `PlanError` where the batch cannot be divided, where its rows depend on each other, and where buffers are updated.
    """
    if count < 1:
        raise PlanError(f"microbatches={count}: a batch has at least one microbatch")
    if count == 1:
        return Microbatched(1, None, graph, {item.path: R for item in graph.inputs}, (R,) * len(graph.outputs))
    kept: dict[int, Microbatched | PlanError] = graph.__dict__.setdefault("_microbatched", {})
    found = kept.get(count)
    if found is None:
        try:
            found = _microbatched(graph, count)
        except PlanError as error:
            found = error
        kept[count] = found
    if isinstance(found, PlanError):
        raise PlanError(*found.args)
    return found


def _microbatched(graph: Graph, count: int) -> Microbatched:
    first: PlanError | None = None
    sizes = _batch_sizes(graph)
    if not sizes:
        raise PlanError(f"microbatches={count}: no input has a batch dim; use microbatches=1")
    for batch in sizes:
        if batch % count:
            error = PlanError(
                f"microbatches={count}: the batch has {batch} rows, which {count} equal microbatches cannot share; use a divisor of {batch}"
            )
        else:
            try:
                choices = Choices(graph, count, batch)
                choices.decide()
                prologue, body, inputs = Writer(choices).write()
                return Microbatched(count, prologue, body, inputs, choices.joined)
            except PlanError as raised:
                error = raised
        first = first or error
    assert first is not None
    raise first


def _batch_sizes(graph: Graph) -> list[int]:
    """Leading dims of inputs that may be the batch, the likeliest first: the most frequent, then the first."""
    sizes = [graph.values[item.value].shape[0] for item in graph.inputs if graph.values[item.value].shape]
    likely = sorted(dict.fromkeys(sizes), key=lambda size: -sizes.count(size))
    return [size for size in likely if size > 1] or likely
