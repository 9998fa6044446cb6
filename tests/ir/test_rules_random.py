"""Sharding rules on random shapes: every family of operators, every split, 2 and 3 parts, even and uneven."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.ir.rules import splits
from tests.ir.checking import check
from tests.ir.rule_samples import T, b, call, f, i

SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12])
SHAPES = st.lists(SIZES, min_size=1, max_size=4).filter(lambda shape: math.prod(shape) <= 600).map(tuple)
EVEN = st.sampled_from([2, 3, 4, 6])

settings.register_profile("rules", max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check_call(seed: int, target: str, *args: Any, **kwargs: Any) -> None:
    graph, op = call(target, *args, **kwargs)
    for split in splits(graph, op):
        for parts in (2, 3):
            if split.fits(parts):
                check(graph, op, split, parts, seed)


@st.composite
def broadcast_pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes that broadcast to each other."""
    shape = draw(SHAPES)
    shorter = shape[draw(st.integers(0, len(shape))) :]
    one = tuple(draw(st.sampled_from([size, 1])) for size in shape)
    other = tuple(draw(st.sampled_from([size, 1])) for size in shorter)
    return (one, other) if draw(st.booleans()) else (other, one)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes with the same elements: the factors of one, regrouped."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=6).filter(lambda found: math.prod(found) <= 600))

    def grouped() -> tuple[int, ...]:
        shape: list[int] = []
        for factor in factors:
            if shape and draw(st.booleans()):
                shape[-1] *= factor
            else:
                shape.append(factor)
        return tuple(shape)

    return grouped(), grouped()


@settings(settings.get_profile("rules"))
@given(
    broadcast_pairs(),
    st.sampled_from(["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum.default", "pow.Tensor_Tensor"]),
    st.integers(0, 9),
)
def test_pointwise(shapes: tuple[tuple[int, ...], tuple[int, ...]], name: str, seed: int) -> None:
    check_call(seed, f"aten.{name}", f(*shapes[0]), f(*shapes[1]))


@settings(settings.get_profile("rules"))
@given(broadcast_pairs(), st.integers(0, 9))
def test_where(shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    check_call(seed, "aten.where.self", b(*shapes[0]), f(*shapes[1]), f(*shapes[0]))


@settings(settings.get_profile("rules"), max_examples=60)
@given(reshapes(), st.integers(0, 9))
def test_view(shapes: tuple[tuple[int, ...], tuple[int, ...]], seed: int) -> None:
    check_call(seed, "aten.view.default", f(*shapes[0]), shapes[1])


@settings(settings.get_profile("rules"))
@given(SHAPES, st.data())
def test_permute_and_expand(shape: tuple[int, ...], data: st.DataObject) -> None:
    check_call(0, "aten.permute.default", f(*shape), tuple(data.draw(st.permutations(range(len(shape))))))
    small = tuple(data.draw(st.sampled_from([size, 1])) for size in shape)
    check_call(0, "aten.expand.default", f(*small), (data.draw(EVEN), *shape))


@settings(settings.get_profile("rules"))
@given(st.lists(SIZES, max_size=2), SIZES, SIZES, SIZES, st.booleans(), st.integers(0, 9))
def test_linear_and_matmul(lead: list[int], m: int, k: int, n: int, bias: bool, seed: int) -> None:
    check_call(seed, "aten.linear.default", f(*lead, m, k), f(n, k), *([f(n)] if bias else []))
    check_call(seed, "aten.matmul.default", f(*lead, m, k), f(*lead[:1], k, n) if len(lead) == 1 else f(k, n))
    check_call(seed, "aten.addmm.default", f(n), f(m, k), f(k, n))


@settings(settings.get_profile("rules"))
@given(SHAPES, st.data(), st.booleans())
def test_reductions(shape: tuple[int, ...], data: st.DataObject, keep: bool) -> None:
    over = tuple(data.draw(st.sets(st.integers(-len(shape), -1), min_size=1)))
    for name in ("sum.dim_IntList", "mean.dim", "amax.default"):
        check_call(0, f"aten.{name}", f(*shape), over, keep)
    check_call(0, "aten.softmax.int", f(*shape), over[0])
    check_call(0, "aten.cumsum.default", f(*shape), over[0])


@settings(settings.get_profile("rules"))
@given(SHAPES, st.data())
def test_cutting_and_joining(shape: tuple[int, ...], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[dim]
    check_call(0, "aten.split.Tensor", f(*shape), data.draw(st.integers(1, size)), dim)
    start = data.draw(st.integers(0, size - 1))
    check_call(0, "aten.slice.Tensor", f(*shape), dim, start, data.draw(st.integers(start + 1, size + 3)))
    check_call(0, "aten.select.int", f(*shape), dim, start)
    check_call(0, "aten.cat.default", (f(*shape), f(*shape)), dim)
    check_call(0, "aten.stack.default", (f(*shape), f(*shape)), dim)


@settings(settings.get_profile("rules"))
@given(EVEN, EVEN, EVEN, EVEN, st.sampled_from([1, 2, 3]), st.booleans(), st.sampled_from(["none", "full", "row", "head", "key"]))
def test_attention(batch: int, heads: int, queries: int, keys: int, group: int, causal: bool, form: str) -> None:
    masks: dict[str, list[T]] = {
        "none": [],
        "full": [f(batch, heads * group, queries, keys)],
        "row": [b(queries, keys)],
        "head": [f(1, heads * group, 1, keys)],
        "key": [b(batch, 1, 1, keys)],
    }
    mask: list[Any] = masks[form]
    args = (*mask, 0.0) if mask else (None, 0.0, causal)
    q, k = f(batch, heads * group, queries, 4), f(batch, heads, keys, 4)
    check_call(0, "aten.scaled_dot_product_attention.default", q, k, k, *args, enable_gqa=group > 1)


@settings(settings.get_profile("rules"), max_examples=10)
@given(st.integers(2, 13), st.integers(1, 8), st.sampled_from([0.0, 0.2]), st.integers(0, 9))
def test_vocabulary(classes: int, rows: int, smoothing: float, seed: int) -> None:
    check_call(seed, "autopar.cross_entropy", f(rows, classes), i(rows), -100, smoothing)
    check_call(seed, "aten.embedding.default", f(classes, 4), i(rows, 3), seed % classes)


@settings(settings.get_profile("rules"), max_examples=10)
@given(EVEN, EVEN, EVEN, st.booleans(), st.integers(0, 9))
def test_batch_norm(batch: int, channels: int, space: int, affine: bool, seed: int) -> None:
    weights = [f(channels), f(channels)] if affine else [None, None]
    check_call(seed, "autopar.batch_norm", f(batch, channels, space), *weights, f(channels), f(channels), 0.1, 1e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
@settings(settings.get_profile("rules"), max_examples=6)
@given(EVEN, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3]))
def test_convolution(groups: int, batch: int, inside: int, outside: int) -> None:
    check_call(
        0,
        "aten.conv1d.default",
        f(batch, groups * inside, 6),
        f(groups * outside, inside, 3),
        f(groups * outside),
        (1,),
        (1,),
        (1,),
        groups,
    )
