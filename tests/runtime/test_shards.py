"""Cutting whole tensors, and saying where the parts lie."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.ir.conversion import State
from autopar.ir.placement import R, S, local_shape
from autopar.runtime.state.shards import chunks, local_part, runs

STATES = [R, S(0), S(1), S(0, 2), S(1, 3)]


@settings(max_examples=60, deadline=None)
@given(rows=st.sampled_from([2, 6, 8]), columns=st.sampled_from([3, 9, 12]), first=st.sampled_from(STATES), second=st.sampled_from(STATES))
def test_chunks_hold_every_element_where_the_part_has_it(rows: int, columns: int, first: object, second: object) -> None:
    state: State = (first, second)  # type: ignore[assignment]
    if state[0].is_shard and state[1].is_shard and state[0].dim == state[1].dim and state[0].blocks != state[1].blocks:
        return  # no plan has these
    whole = torch.arange(rows * columns).view(rows, columns)
    held: list[int] = []
    for coordinate in product(range(2), range(3)):
        part = local_part(whole, state, (2, 3), coordinate)
        assert tuple(part.shape) == local_shape((rows, columns), state, (2, 3), coordinate)
        rebuilt = torch.full_like(part, -1)
        for offset, local, lengths in chunks((rows, columns), state, (2, 3), coordinate):
            box = tuple(slice(start, start + length) for start, length in zip(offset, lengths, strict=True))
            rebuilt[tuple(slice(start, start + length) for start, length in zip(local, lengths, strict=True))] = whole[box]
        assert torch.equal(rebuilt, part)
        held += part.flatten().tolist()
    replicas = (1 if state[0].is_shard else 2) * (1 if state[1].is_shard else 3)
    assert sorted(held) == sorted(whole.flatten().tolist() * replicas)


@pytest.mark.parametrize(
    ("state", "coordinate", "expected"),
    [
        ((S(0),), (1,), [(4, 0, 4)]),
        ((S(0, 2),), (0,), [(0, 0, 2), (4, 2, 2)]),
        ((S(0, 8),), (0,), [(0, 0, 8)]),  # a block of one element has nothing to give to the second rank
        ((S(0, 8),), (1,), []),
    ],
)
def test_runs(state: State, coordinate: tuple[int, ...], expected: list[tuple[int, int, int]]) -> None:
    assert runs(8, 0, state, (2,), coordinate) == expected
