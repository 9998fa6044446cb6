"""Compiled sums against numpy's, whatever the layout of the tables; and elimination that remembers against elimination that does not."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.search.solver.eliminate import Factor, Memo, eliminate, find_order
from autopar.search.solver.least_sums import least_sum


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[int, int], list[tuple[tuple[int, ...], np.ndarray]]]:
    """Sizes of up to six variables, and tables over some of them and variable 0, their axes in any order, some not dense in memory."""
    sizes = {v: draw(st.integers(1, 5)) for v in range(draw(st.integers(2, 6)))}
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    items = []
    for number in range(draw(st.integers(1, 5))):
        chosen = [v for v in list(sizes)[1:] if random.random() < 0.5 or number == 0]
        variables = tuple(int(v) for v in random.permutation([0, *chosen]))
        table = random.random([sizes[v] for v in variables])
        table[random.random(table.shape) < 0.1] = np.inf
        layout = draw(st.sampled_from(["rows", "columns", "strided", "broadcast"]))
        if layout == "columns":
            table = np.asfortranarray(table)
        elif layout == "strided":
            table = np.repeat(table, 2, -1)[..., ::2]
        elif layout == "broadcast":
            table = np.broadcast_to(table[:1], table.shape)
        items.append((variables, table))
    return sizes, items


@settings(max_examples=150, deadline=None)
@given(tables())
def test_compiled_sums_are_numpys(case: tuple[dict[int, int], list[tuple[tuple[int, ...], np.ndarray]]]) -> None:
    sizes, items = case
    scope = list(sizes)
    total = np.zeros([sizes[v] for v in scope])
    for variables, table in items:
        there = table.transpose([variables.index(v) for v in scope if v in variables])
        total = total + there[tuple(slice(None) if v in variables else None for v in scope)]
    np.testing.assert_allclose(least_sum(0, items, sizes), total.min(0), rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32))
def test_what_is_remembered_is_what_would_be_found(layers: int, seed: int) -> None:
    """Equal layers in a row, each a triangle joined to the next; and again with other costs, through the same memory."""
    random = np.random.default_rng(seed)
    sizes = dict.fromkeys(range(3 * layers), 4)
    memo = Memo()
    for _ in range(2):
        inner = [random.random((4, 4)) for _ in range(3)]
        carried, ends = random.random((4, 4)), [random.random(4) for _ in range(2)]
        factors = [Factor((0,), ends[0]), Factor((3 * layers - 1,), ends[1])]
        for first in range(0, 3 * layers, 3):
            pairs = [(first, first + 1), (first + 1, first + 2), (first, first + 2)]
            factors += [Factor(pair, table) for pair, table in zip(pairs, inner, strict=True)]
            if first:
                factors.append(Factor((first - 1, first), carried))
        order = find_order(sizes, [item.variables for item in factors])
        plain, found = eliminate(sizes, factors, order), eliminate(sizes, factors, order, memo=memo)
        assert found.constant == plain.constant and found.exact
        assert {v: values.tolist() for v, values in found.recover({}).items()} == {v: c.tolist() for v, c in plain.recover({}).items()}


def test_equal_layers_are_added_up_once() -> None:
    random = np.random.default_rng(0)
    memo, layers = Memo(), 50
    inner, carried = random.random((4, 4)), random.random((4, 4))
    factors = [Factor((2 * n, 2 * n + 1), inner) for n in range(layers)]
    factors += [Factor((2 * n, 2 * n + 2), carried) for n in range(layers - 1)]
    sizes = dict.fromkeys(range(2 * layers), 4)
    order = find_order(sizes, [item.variables for item in factors])
    eliminate(sizes, factors, order, memo=memo)
    before = len(memo)
    eliminate(sizes, factors, order, memo=memo)
    assert len(memo) == before < 2 * layers
