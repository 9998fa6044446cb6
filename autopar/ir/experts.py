r"""Routed experts as one operation: `autopar.experts(x (n, h), ids (n, k), weights (n, k) or None, [tensors], body) -> out (n, o)`.

    out[n] = sum over k of body(x[n], weights[n, k]; the tensors of expert ids[n, k])

`body` is the text of a graph of its own (`autopar.ir.text`): what one expert does with the row of one token, written for one row. Its
inputs are `x` `(1, h)`, `weight` `(1,)` if there are weights, `expert` `(1,)`, and `tensor_0`, `tensor_1`, ... as the operation lists
them, each with all experts along its leading dim. Two operators exist only there:

- `autopar.expert_linear(x (r, i), tensor, expert (r,), transposed)`: row `r` times the matrix of its expert; the tensor is `(e, i, o)`,
  or `(e, o, i)` where `transposed`;
- `autopar.expert_rows(tensor (e, c), expert (r,))`: for every row the row of its expert: a bias.

An id outside of `[0, e)` is an expert that is not there: it adds nothing.

A sixth argument is a capacity that the user allows (`with_capacity`): then tokens may be sent to experts in parts of a fixed size, and
what is beyond them dropped. It changes nothing on one device.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from autopar.ir.graph import Graph, Op, Ref
from autopar.ir.text import parse, to_text

EXPERTS = "autopar.experts"
LINEAR, ROWS = "autopar.expert_linear", "autopar.expert_rows"
X, WEIGHT, EXPERT = "x", "weight", "expert"


def tensor(index: int) -> str:
    """The name in the body of the tensor at `index`."""
    return f"tensor_{index}"


@lru_cache(maxsize=256)
def read(body: str) -> Graph:
    """The graph that `body` says."""
    return parse(body)


def write(body: Graph) -> str:
    return to_text(body, origins=False)


def body_of(op: Op) -> Graph:
    """The body of an `autopar.experts` operation."""
    text = op.args[4]
    assert op.target == EXPERTS and isinstance(text, str), op
    return read(text)


def with_body(op: Op, body: Graph) -> Op:
    return replace(op, args=(*op.args[:4], write(body), *op.args[5:]))


def with_capacity(graph: Graph, capacity: float | None) -> Graph:
    """`graph` whose experts may each take `capacity` times the mean of rows from every rank, and no more. None: as many as come."""
    given = () if capacity is None else (float(capacity),)
    ops = tuple(replace(op, args=(*op.args[:5], *given)) if op.target == EXPERTS else op for op in graph.ops)
    return graph if ops == graph.ops else replace(graph, ops=ops)


def capacity_of(graph: Graph) -> float | None:
    """What `with_capacity` gave."""
    found = next((op.args[5] for op in graph.ops if op.target == EXPERTS and len(op.args) > 5), None)
    return found if isinstance(found, float) else None


def tensors_of(op: Op) -> tuple[str, ...]:
    """Names of the tensors of the experts that `op` reads."""
    listed = op.args[3]
    assert isinstance(listed, tuple)
    return tuple(item.name for item in listed if isinstance(item, Ref))


def first_tensor(op: Op) -> int:
    """The slot among the operands at which the tensors begin."""
    return 2 if op.args[2] is None else 3
