"""Transfers between groups, against whole arrays: every element arrives once, from one that has it, and replicas share the work."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.ir.placement import Placement, R, S
from autopar.runtime.pipelining.pipeline_transfer import Layout, messages
from autopar.runtime.state.shards import local_part


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], first_rank: int) -> Layout:
    mesh = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 4), (4, 2), (3,)]))
    shards = [S(dim, blocks) for dim, size in enumerate(shape) for blocks in (1, 2, 3) if size % blocks == 0]
    state: list[Placement] = []
    for _ in mesh:
        choices = [R, *(s for s in shards if all(not p.is_shard or p.dim != s.dim or p.blocks == s.blocks == 1 for p in state))]
        state.append(draw(st.sampled_from(choices)))
    return Layout(tuple(state), mesh, first_rank)


@st.composite
def transfers(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout, Layout]:
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=0, max_size=3)))
    source = draw(layouts(shape, 0))
    return shape, source, draw(layouts(shape, source.size))


def parts(whole: np.ndarray, layout: Layout) -> Iterator[tuple[int, np.ndarray]]:
    for rank in range(layout.first_rank, layout.first_rank + layout.size):
        yield rank, local_part(torch.from_numpy(whole), layout.state, layout.mesh, layout.coordinate(rank)).numpy()


@settings(max_examples=400, deadline=None)
@given(transfers())
def test_every_element_arrives_once(case: tuple[tuple[int, ...], Layout, Layout]) -> None:
    shape, source, target = case
    whole = np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)
    sent = dict(parts(whole, source))
    wanted = dict(parts(whole, target))
    got = {rank: np.full(part.shape, -1, dtype=np.int64) for rank, part in wanted.items()}
    for message in messages(shape, source, target):
        assert message.numel > 0
        for box in message.boxes:
            into = tuple(slice(start, start + length) for start, length in zip(box.target, box.lengths, strict=True))
            out = tuple(slice(start, start + length) for start, length in zip(box.source, box.lengths, strict=True))
            assert (got[message.target][into] == -1).all()
            got[message.target][into] = sent[message.source][out]
    for rank, part in wanted.items():
        np.testing.assert_array_equal(got[rank], part)


@settings(max_examples=200, deadline=None)
@given(transfers())
def test_one_message_between_two_ranks(case: tuple[tuple[int, ...], Layout, Layout]) -> None:
    pairs = [(message.source, message.target) for message in messages(*case)]
    assert len(pairs) == len(set(pairs))


def test_equal_groups_send_rank_to_rank() -> None:
    for state in ((S(0), R), (R, S(1)), (R, R), (S(0), S(1)), (S(0), S(0))):
        found = messages((8, 4), Layout(state, (2, 2), 0), Layout(state, (2, 2), 4))
        assert [(m.source, m.target) for m in found] == [(0, 4), (1, 5), (2, 6), (3, 7)]
        assert all(len(m.boxes) == 1 and not any(m.boxes[0].source) for m in found)


def test_replicas_share_the_sending() -> None:
    found = messages((8, 4), Layout((R, R), (2, 2), 0), Layout((S(0), R), (4, 1), 4))
    assert [(m.source, m.target, m.numel) for m in found] == [(0, 4, 8), (1, 5, 8), (2, 6, 8), (3, 7, 8)]
    found = messages((8, 4), Layout((R, R), (1, 3), 0), Layout((R, R), (1, 7), 3))
    counts = [sum(m.source == rank for m in found) for rank in range(3)]
    assert sorted(counts) == [2, 2, 3]


def test_a_group_of_one_sends_to_many_and_back() -> None:
    one, many = Layout((R, R), (1, 1), 0), Layout((S(0), S(1, 2)), (2, 2), 1)
    there, back = messages((4, 8), one, many), messages((4, 8), many, one)
    assert [m.numel for m in there] == [8] * 4
    assert {(m.target, box.target, box.source) for m in there for box in m.boxes} == {
        (m.source, box.source, box.target) for m in back for box in m.boxes
    }
