"""What prints parses back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import GraphError
from autopar.ir.graph import DTYPE_BYTES, Buffer, Constant, Graph, Input, Op, Output, Parameter, Ref, Symbol, Value
from autopar.ir.text import parse, to_text

EXAMPLE = """\
graph MLP training
input %x: float32[4, 16] = "0"
parameter %up.weight: float32[32, 16] grad = "up.weight" also "tied.weight"
buffer %seen: int64[] = "seen" persistent updated %add_1
constant %constant_0: float32[]
%linear_0: float32[4, 32] grad = aten.linear.default(%x, %up.weight) in "up" at "model.py:7"
%split_0.0: float32[2, 32] grad, %split_0.1: float32[2, 32] grad = aten.split.Tensor(%linear_0, 2, dim=0) as split_0
%add_1: int64[] = aten.add.Tensor(%seen, -1, [inf, nan, -inf, 1e-05, None, True, torch.float32, "a \\"b\\""], alpha=[])
output %split_0.0 = "loss"
"""


def test_prints_what_it_parsed() -> None:
    assert to_text(parse(EXAMPLE)) == EXAMPLE


def test_fingerprint_ignores_where_the_user_wrote_it_but_not_what() -> None:
    graph = parse(EXAMPLE)
    assert graph.fingerprint() == parse(EXAMPLE.replace("model.py:7", "model.py:8").replace(' in "up"', "")).fingerprint()
    for old, new in (("float32[4, 16]", "float32[4, 17]"), ("training", "evaluation"), ('"up.weight"', '"down.weight"'), ("-1", "-2")):
        assert graph.fingerprint() != parse(EXAMPLE.replace(old, new)).fingerprint()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("graph MLP training", "graph MLP", "line 1: expected `training` or `evaluation`"),
        ("input %x", "inputs %x", "line 2: `inputs` is no kind of statement"),
        ("float32[4, 16]", "float32[4, -16]", "line 2: the shape of `%x`"),
        ('"up.weight" also', '"up.weight also', "line 3: "),
        ("persistent updated", "persistent updates", "line 4: did not expect `updates`"),
        ("(%x, %up.weight)", "(%x, %up.weight", "line 6: "),
        (" as split_0", "", "line 7: an operation with 2 results needs a name"),
        ("dim=0)", "dim=0, 3)", "line 7: a positional argument follows"),
        ("%linear_0, 2", "%linear_1, 2", "reads `linear_1` before it is defined"),
        ("%add_1: int64", "%x: int64", "line 8: `%x` is defined a second time"),
        ('output %split_0.0 = "loss"', "output %split_0.0", "line 9: expected `=`"),
        ("[4, 16]", "[4; 16]", "line 2: cannot read `; 16]"),
    ],
)
def test_errors_name_the_line(old: str, new: str, words: str) -> None:
    with pytest.raises(GraphError) as caught:
        parse(EXAMPLE.replace(old, new, 1))
    assert words in str(caught.value)


def test_empty_text() -> None:
    with pytest.raises(GraphError, match="line 1"):
        parse("# nothing\n")


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=6) | st.from_regex(
    r"[a-z0-9_][a-z0-9_.]{0,8}", fullmatch=True
)
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.sampled_from([Symbol("torch.float32"), Symbol("torch.contiguous_format"), 2**63 - 1, math.inf])
)


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random graphs with hostile names."""
    fresh = iter(draw(st.lists(names, min_size=12, max_size=30, unique=True)))
    values: dict[str, Value] = {}

    def value() -> str:
        name = next(fresh)
        values[name] = Value(name, draw(shapes), draw(st.sampled_from(sorted(DTYPE_BYTES))), draw(st.booleans()))
        return name

    inputs = tuple(Input(value(), draw(names)) for _ in range(draw(st.integers(1, 2))))
    parameters = tuple(Parameter(value(), draw(names), tuple(draw(st.lists(names, max_size=2)))) for _ in range(draw(st.integers(0, 2))))
    constants = tuple(Constant(value()) for _ in range(draw(st.integers(0, 1))))
    buffer = value()
    ops: list[Op] = []
    for _ in range(draw(st.integers(0, 3))):
        arguments = st.recursive(
            scalars | st.sampled_from(sorted(values)).map(Ref), lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5
        )
        args = tuple(draw(st.lists(arguments, max_size=3)))
        kwargs = tuple((key, draw(arguments)) for key in draw(st.lists(st.sampled_from(["dim", "p", "inf_ok"]), max_size=2, unique=True)))
        outputs = tuple(value() for _ in range(draw(st.integers(0, 2))))
        name = outputs[0] if len(outputs) == 1 and draw(st.booleans()) else f"op {len(ops)}"
        ops.append(
            Op(name, draw(st.sampled_from(["aten.a.b", "x"])), args, kwargs, outputs, draw(st.just("") | names), draw(st.just("") | names))
        )
    buffers = (Buffer(buffer, draw(names), draw(st.booleans()), draw(st.none() | st.sampled_from(sorted(values)))),)
    outputs = tuple(Output(draw(st.sampled_from(sorted(values))), draw(names)) for _ in range(draw(st.integers(0, 2))))
    return Graph(draw(names), values, inputs, parameters, buffers, constants, tuple(ops), outputs, draw(st.booleans())).verify()


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_round_trip(graph: Graph) -> None:
    text = to_text(graph)
    assert parse(text) == graph
    assert to_text(parse(text)) == text
