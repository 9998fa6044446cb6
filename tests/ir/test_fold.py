"""Folding: equal when names are erased, right about wiring, and as good as trying everything."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from autopar.ir.fold import Segment, fold, repeats
from autopar.ir.graph import Graph, Input, Op, Output, Parameter, Ref, Value


class Builder:
    """Writes small graphs; every value is a `(4,)` float unless told otherwise."""

    def __init__(self, prefix: str = "v") -> None:
        self.prefix = prefix
        self.values: dict[str, Value] = {}
        self.parameters: list[Parameter] = []
        self.ops: list[Op] = []
        self.inputs = [Input(self._value("x", (4,)), "x"), Input(self._value("mask", (4,)), "mask")]

    def _value(self, hint: str, shape: tuple[int, ...]) -> str:
        name = f"{self.prefix}{len(self.values)}_{hint}"
        self.values[name] = Value(name, shape, "float32", True)
        return name

    def parameter(self, shape: tuple[int, ...] = (4,)) -> str:
        name = self._value("w", shape)
        self.parameters.append(Parameter(name, f"{self.prefix}.{name}"))
        return name

    def op(self, target: str, *operands: str, shape: tuple[int, ...] = (4,), module: str = "") -> str:
        out = self._value(target, shape)
        self.ops.append(Op(f"op_{out}", target, tuple(Ref(name) for name in operands), (), (out,), module))
        return out

    def graph(self, *outputs: str) -> Graph:
        returned = tuple(Output(value, str(i)) for i, value in enumerate(outputs))
        return Graph("g", self.values, tuple(self.inputs), tuple(self.parameters), (), (), tuple(self.ops), returned).verify()


def layer(b: Builder, x: str, mask: str, kind: str = "") -> str:
    h = b.op("norm", x, b.parameter())
    q = b.op("linear", h, b.parameter((4, 4)))
    k = b.op("linear", h, b.parameter((4, 4)))
    a = b.op("attention" + kind, q, k, mask)
    x = b.op("add", x, a)
    m = b.op("gelu", b.op("linear", x, b.parameter((8, 4))))
    return b.op("add", x, b.op("linear2", m, b.parameter((4, 8))))


def transformer(layers: int, prefix: str = "v", kinds: tuple[str, ...] = ("",)) -> Graph:
    b = Builder(prefix)
    x = b.op("embed", b.inputs[0].value, b.parameter())
    mask = b.op("expand", b.inputs[1].value)
    for i in range(layers):
        x = layer(b, x, mask, kinds[i % len(kinds)])
    return b.graph(b.op("head", b.op("norm", x, b.parameter()), b.parameter()))


def test_layers_fold_and_names_do_not_matter() -> None:
    folded = fold(transformer(6))
    assert folded == (Segment(0, 2, 1), Segment(2, 9, 6), Segment(56, 2, 1))
    assert fold(transformer(6, prefix="other")) == folded


def test_two_kinds_of_layer_alternate() -> None:
    assert Segment(2, 18, 3) in fold(transformer(6, kinds=("", "_local")))


def test_odd_number_of_alternating_layers_leaves_one() -> None:
    (segment,) = [s for s in fold(transformer(7, kinds=("", "_local"))) if s.count > 1]
    assert (segment.length, segment.count) == (18, 3)


def test_different_first_layer_stays_outside() -> None:
    b = Builder()
    mask = b.inputs[1].value
    x = layer(b, b.inputs[0].value, mask, "_with_bias")
    for _ in range(5):
        x = layer(b, x, mask)
    (segment,) = [s for s in fold(b.graph(x)) if s.count > 1]
    assert segment.length == 9 and segment.count == 5


def test_stages_of_different_width_are_segments_of_their_own() -> None:
    b = Builder()
    x = b.inputs[0].value
    for width, blocks in ((4, 3), (8, 4), (16, 2)):
        x = b.op("down", x, shape=(width,))
        for _ in range(blocks):
            y = x
            for _ in range(4):
                y = b.op("relu", b.op("conv", y, b.parameter((width, width)), shape=(width,)), shape=(width,))
            x = b.op("add", x, b.op("scale", y, shape=(width,)), shape=(width,))
    assert [(s.length, s.count) for s in fold(b.graph(x)) if s.count > 1] == [(10, 3), (10, 4), (10, 2)]


def test_shared_weights_are_invariant_and_partly_shared_weights_do_not_fold() -> None:
    def chain(weights: list[int]) -> Graph:
        b = Builder()
        x, known = b.inputs[0].value, {}
        for weight in weights:
            known.setdefault(weight, b.parameter()) if weight not in known else None
            for _ in range(2):
                x = b.op("linear", b.op("norm", x), known[weight])
        return b.graph(x)

    assert fold(chain([0, 0, 0, 0]), 1) == (Segment(0, 2, 8),)
    assert fold(chain([0, 1, 2, 3]), 1) == (Segment(0, 4, 4),)
    assert fold(chain([0, 0, 1, 1]), 1) == (Segment(0, 8, 2),)
    assert max(s.count for s in fold(chain([0, 1, 0, 1]), 1)) == 2


def test_one_value_read_twice_is_not_two_values() -> None:
    def graph(same: list[bool]) -> Graph:
        b = Builder()
        x = b.inputs[0].value
        for both in same:
            w = b.parameter()
            x = b.op("two", x, w, w if both else b.parameter())
        return b.graph(x)

    assert fold(graph([True] * 4), 1) == (Segment(0, 1, 4),)
    assert fold(graph([False] * 4), 1) == (Segment(0, 1, 4),)
    assert fold(graph([True, True, False, False]), 1) == (Segment(0, 1, 2), Segment(2, 1, 2))


def test_a_value_from_two_repeats_back_is_no_repeat() -> None:
    b = Builder()
    xs = [b.inputs[0].value, b.inputs[1].value]
    for _ in range(6):
        xs.append(b.op("mix", xs[-1], xs[-2]))
    folded = fold(b.graph(xs[-1]), 1)
    assert all(s.length > 1 or s.count == 1 for s in folded) and max(s.count for s in folded) >= 2


def test_a_wrong_segment_is_refused() -> None:
    graph = transformer(4)
    assert repeats(graph, Segment(2, 9, 4)) and repeats(graph, Segment(4, 9, 3))
    assert not repeats(graph, Segment(1, 9, 4))
    assert not repeats(graph, Segment(2, 8, 4))
    assert not repeats(graph, Segment(2, 9, 5))


# ---- against a naive method


def naive_repeats(graph: Graph, segment: Segment) -> bool:
    """The rules of a repeat in the plainest words, one operand at a time."""
    kind = graph.source_kind
    made = {name: i for i, op in enumerate(graph.ops) for name in op.outputs}
    bodies = [graph.ops[segment.start + r * segment.length :][: segment.length] for r in range(segment.count)]
    if any(len(body) < segment.length for body in bodies):
        return False

    def shape(op: Op) -> object:
        return (op.target, tuple(graph.values[n].shape for n in op.operands), tuple(graph.values[n].shape for n in op.outputs))

    if any([shape(op) for op in body] != [shape(op) for op in bodies[0]] for body in bodies):
        return False
    reads = [[(position, name) for position, op in enumerate(body) for name in op.operands] for body in bodies]

    def origin(repeat: int, name: str) -> tuple[int, int] | None:
        """Repeat and position that make a value inside the segment."""
        at = made.get(name, -1) - segment.start
        return divmod(at, segment.length) if 0 <= at < segment.length * segment.count else None

    earlier = {name for op in graph.ops[: segment.start] for name in op.operands}
    for column in range(len(reads[0])):
        names = [read[column][1] for read in reads]
        origins = [origin(r, name) for r, name in enumerate(names)]
        back = [None if o is None else (r - o[0], o[1]) for r, o in enumerate(origins)]
        if len(set(names)) == 1 and origins[0] is None:
            continue
        if back[1] is not None and len(set(back[1:])) == 1 and back[0] == (None if back[1][0] == 1 else back[1]) and back[1][0] <= 1:
            continue
        own = all(kind.get(name) == kind.get(names[0]) in ("parameter", "buffer", "constant") for name in names)
        pattern = [[other == name for _, other in read] for name, read in zip(names, reads, strict=True)]
        alone = all(name not in {n for q, read in enumerate(reads) if q != r for _, n in read} for r, name in enumerate(names))
        if own and alone and all(p == pattern[0] for p in pattern) and not earlier & set(names):
            continue
        return False
    return True


def naive_saved(graph: Graph) -> int:
    best, n = 0, len(graph.ops)
    for start in range(n):
        for length in range(1, n - start):
            for count in range(2, (n - start) // length + 1):
                if length * (count - 1) > best and naive_repeats(graph, Segment(start, length, count)):
                    best = length * (count - 1)
    return best


def random_graph(seed: int) -> Graph:
    """Blocks from a small alphabet, repeated and disturbed, so that repeats and near-repeats both occur."""
    rng = random.Random(seed)
    b = Builder()
    made = [b.inputs[0].value, b.inputs[1].value]
    pool = [b.parameter() for _ in range(2)]
    body = [(rng.choice("ab"), rng.choice(["own", "pool", "mask", "none", "twice"]), rng.randint(1, 3)) for _ in range(rng.randint(1, 3))]
    for _ in range(rng.randint(3, 6)):
        for target, what, back in body:
            if rng.random() < 0.08:
                target = rng.choice("abc")
            if rng.random() < 0.08:
                back = rng.randint(1, 3)
            operands = [made[-min(back, len(made))]]
            if what == "own":
                operands.append(b.parameter())
            elif what == "twice":
                operands += [b.parameter()] * 2
            elif what == "pool":
                operands.append(rng.choice(pool) if rng.random() < 0.2 else pool[0])
            elif what == "mask":
                operands.append(b.inputs[1].value)
            made.append(b.op(target + str(len(operands)), *operands))
    return b.graph(made[-1])


@pytest.mark.parametrize("block", range(10))
def test_random_sequences_fold_as_well_as_by_trying_everything(block: int) -> None:
    for seed in range(block * 30, block * 30 + 30):
        graph = random_graph(seed)
        folded = fold(graph, 1)
        assert folded[0].start == 0 and folded[-1].stop == len(graph.ops), seed
        assert all(a.stop == b.start for a, b in pairwise(folded)), seed
        for segment in folded:
            assert segment.count == 1 or naive_repeats(graph, segment), (seed, segment)
        assert max(s.length * (s.count - 1) for s in folded) == naive_saved(graph), (seed, folded)


def test_long_graphs_fold_like_short_ones() -> None:
    assert fold(transformer(120)) == (Segment(0, 2, 1), Segment(2, 9, 120), Segment(2 + 9 * 120, 2, 1))
    assert Segment(2, 18, 60) in fold(transformer(120, kinds=("", "_local")))
