"""What routed experts cost (`autopar.ir.experts`): products of the rows that a rank computes, and tokens on their way to other ranks.

A rank's rows are its tokens times experts a token. Where experts are split (splits `e` and `n+e`) the fullest rank has `imbalance` times
the mean: how much more is the cluster's `expert_imbalance`. Where tokens travel (`n+e`), each goes once to every rank that holds one of
its experts: with experts chosen evenly, a rank that holds `m` of `e` experts has one of a token's `k` with probability
`1 - C(e - m, k) / C(e, k)`. Forward its row, ids and weights go, and a row of the result comes back; backward the gradients of these.
What is kept for the backward pass is what the operations of the body would keep, each row by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from autopar.ir import experts as routed
from autopar.ir.assignment import Choice
from autopar.ir.graph import DTYPE_BYTES, Graph, Op, Value
from autopar.search.prices import work as works

ROUTING_KERNELS = 12
"""Sorting, counting, and moving rows there and back on one device (`autopar.ir.rules.expert_operators`)."""
INDEX_BYTES = 8
POSITIONS = 3
"""Indices kept for every row: its expert, its token and its place."""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of a row: `outer`, what every rank has whole, and `inner`, what the ranks share that split the inside of the experts."""

    outer: float = 0.0
    inner: float = 0.0

    def __add__(self, other: Size) -> Size:
        return Size(self.outer + other.outer, self.inner + other.inner)

    def on(self, inside: float) -> float:
        """Bytes on one of the ranks of which each has the share `inside`."""
        return self.outer + self.inner * inside


@dataclass(frozen=True, slots=True)
class Experts:
    """An `autopar.experts` operation, for pricing: `tokens` with `slots` experts each of `count`; bytes of a row.

    `flops`: of a row forward; `trained`: how many times that backward. `moved`, `moved_backward`: bytes of a row that are read or
    written; `kept`: bytes of a row that the backward pass reads; `moment`: what else is there of a row at once. `token_bytes`: what travels
    of a token to its experts, `result_bytes` what comes back, and which of both has a gradient (`back_bytes`). `first_tensor`: the slot
    from which on operands are tensors of the experts."""

    tokens: int
    slots: int
    count: int
    first_tensor: int
    flops: float
    trained: float
    moved: Size
    moved_backward: Size
    kept: Size
    moment: Size
    token_bytes: int
    back_bytes: int
    result_bytes: int
    kernels: int

    def hit(self, cells: int) -> float:
        """How probably a token has an expert on a given one of `cells` equal groups of ranks."""
        held = self.count / cells
        missed = 1.0
        for chosen in range(min(self.slots, self.count)):
            missed *= max(0.0, 1.0 - held / (self.count - chosen))
        return 1.0 - missed


@dataclass(frozen=True, slots=True)
class Share:
    """On the fullest rank: `rows` it computes, `inside` its share of every expert, `sent` by axis over which tokens travel how many it
    sends or gets."""

    rows: float
    inside: float
    sent: tuple[tuple[int, float], ...]

    def kept_bytes(self, experts: Experts) -> float:
        """What its rows keep for the backward pass."""
        return self.rows * experts.kept.on(self.inside) + sum(copies for _, copies in self.sent) * POSITIONS * INDEX_BYTES

    def moment_bytes(self, experts: Experts) -> float:
        """What is there for a moment beside operands, results and what is kept: rows, and tokens that travel with what comes back."""
        held = max((copies for _, copies in self.sent), default=0.0)
        return self.rows * experts.moment.on(self.inside) + 2 * held * max(experts.token_bytes, experts.result_bytes)


def describe(op: Op, operands: list[Value], outputs: list[Value]) -> Experts:
    body = routed.body_of(op)
    first = routed.first_tensor(op)
    (tokens, width), slots = operands[0].shape, operands[1].shape[1]
    layers = [item for item in body.ops if item.target == routed.LINEAR]
    forward = backward = 0.0
    for layer in layers:
        matrix = body.values[layer.operands[1]]
        flops = 2.0 * prod(matrix.shape[1:])
        forward += flops
        backward += flops * sum(body.values[name].requires_grad for name in layer.operands[:2])
    inner = _inner(body)

    def size(names: set[str]) -> Size:
        found = Size()
        for name in names:
            value = body.values[name]
            found += Size(0.0, value.size_bytes) if name in inner else Size(value.size_bytes)
        return found

    root, moved, moved_backward, kept = _passes(body)
    weight = 0 if first == 2 else slots * DTYPE_BYTES[operands[2].dtype]
    row_bytes = width * DTYPE_BYTES[operands[0].dtype]
    result_bytes = outputs[0].size_bytes // max(outputs[0].shape[0], 1)
    alone = operands[first].shape[0] == slots == 1  # nothing is sorted: a dense layer
    if alone:
        kept.discard(next(item.value for item in body.inputs if item.path == routed.X))  # as the operand that it is
    # Rows are taken, and brought back by way of a place of their own.
    travelling = Size() if alone else Size(2.0 * row_bytes + 2.0 * result_bytes)
    total, total_backward = travelling, travelling
    for name, times in moved.items():
        total += _times(size({name}), times)
    for name, times in moved_backward.items():
        total_backward += _times(size({name}), times)
    largest = max((size({name}) for name in root), key=lambda item: item.outer + item.inner)
    kernels = (0 if alone else ROUTING_KERNELS) + sum(not works.is_view(item) for item in body.ops)
    return Experts(
        tokens, slots, operands[first].shape[0], first, forward, backward, total, total_backward,
        size(kept) + Size(0.0 if alone else float(POSITIONS * INDEX_BYTES)), largest + Size(float(row_bytes + 2 * result_bytes)),
        row_bytes + slots * INDEX_BYTES + weight,
        (row_bytes if operands[0].requires_grad else 0) + (weight if first == 3 and operands[2].requires_grad else 0),
        result_bytes, kernels,
    )  # fmt: skip


def _times(size: Size, times: int) -> Size:
    return Size(size.outer * times, size.inner * times)


def _inner(body: Graph) -> set[str]:
    """Values between the first and the last layer of the experts."""
    after: set[str] = set()
    for op in body.ops:
        if op.target == routed.LINEAR or any(name in after for name in op.operands):
            after.update(op.outputs)
    before: set[str] = set()
    for op in reversed(body.ops):
        if op.target == routed.LINEAR:
            before.add(op.operands[0])
        elif any(name in before for name in op.outputs):
            before.update(op.operands)
    return after & before


def _passes(body: Graph) -> tuple[set[str], dict[str, int], dict[str, int], set[str]]:
    """Values of rows that have storage of their own; how often each is read or written forward, and backward (as its gradient or itself);
    and which the backward pass reads."""
    sources = {item.value for item in body.inputs if item.path not in (routed.X, routed.WEIGHT)}
    base: dict[str, str] = {}
    roots: set[str] = {item.value for item in body.inputs} - sources
    moved: dict[str, int] = {}
    moved_backward: dict[str, int] = {}
    kept: set[str] = set()
    for op in body.ops:
        done = works.work(body, op)
        operands = [(slot, base.get(name, name)) for slot, name in enumerate(op.operands) if name not in sources]
        kept.update(name for slot, name in operands if slot in done.keeps)
        if done.view:
            base.update(dict.fromkeys(op.outputs, operands[0][1]))
            continue
        roots.update(op.outputs)
        kept.update(op.outputs[slot] for slot in done.keeps_outputs)
        own = [(slot, name) for slot, name in operands]
        for name in (*dict.fromkeys(name for _, name in own), *op.outputs):
            moved[name] = moved.get(name, 0) + 1
            moved_backward[name] = moved_backward.get(name, 0) + 1
        for name in {name for slot, name in own if slot in done.keeps}:
            moved_backward[name] += 1
    return roots, moved, moved_backward, kept


def share(experts: Experts, choice: Choice, mesh: tuple[int, ...], imbalance: float) -> Share:
    """What the fullest rank of `mesh` has to do under `choice`."""
    tokens, inside = float(experts.tokens), 1.0
    parts = travelling = 1
    allowed = ""
    exchanging = []
    for axis, (split, size) in enumerate(zip(choice, mesh, strict=True)):
        if size == 1 or split.work != "split":
            continue
        kind = split.name.partition(":")[0]
        kind, _, allowed = kind.partition("/")
        if allowed:
            imbalance = float(allowed)  # as many rows are computed and sent, full or not
        if kind in ("n", "n+e"):
            tokens /= size
        if kind in ("e", "n+e"):
            parts *= size
        if kind == "n+e":
            exchanging.append((axis, size))
            travelling *= size
        elif kind.startswith("f"):
            inside /= size
    fuller = imbalance if parts > 1 else 1.0
    # The tokens of all ranks that exchange, of which this one computes its part.
    rows = tokens * experts.slots * travelling / parts * fuller
    masked = parts // travelling
    sent, cells = [], 1
    for axis, size in exchanging:
        cells *= size
        copies = experts.slots if allowed else cells * experts.hit(cells * masked)
        sent.append((axis, tokens * copies * fuller))
    return Share(rows, inside, tuple(sent))
