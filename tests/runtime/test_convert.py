"""Conversions: every pair of placements, forward and backward, even and uneven, on one and two axes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from autopar.ir.conversion import ACTIONS, State
from autopar.ir.placement import RP, Kind, P, Placement, R, S
from autopar.runtime.collectives import part
from autopar.runtime.convert import convert_all
from tests.runtime.simulated import place_of, simulate

Mesh = tuple[int, int]


def spread(x: Tensor, state: State, mesh: Mesh, gradient: bool = False) -> list[Tensor]:
    """What each rank of `mesh` holds of the global `x` in `state`; with `gradient` what it holds of its gradient."""
    pieces = [x]
    for placement, parts in zip(state, mesh, strict=True):
        pieces = [local for piece in pieces for local in _spread_axis(piece, placement, parts, gradient)]
    return pieces


def _spread_axis(x: Tensor, placement: Placement, parts: int, gradient: bool) -> list[Tensor]:
    if placement.is_shard:
        return [part(x, placement.dim, placement.blocks, parts, index) for index in range(parts)]
    if placement.kind is (Kind.REPLICATE_PARTIAL_GRADIENT if gradient else Kind.PARTIAL):
        terms = [torch.randn_like(x) for _ in range(parts - 1)]
        return [*terms, x - sum(terms, torch.zeros_like(x))]
    return [x] * parts


def summed(pieces: list[Tensor], state: State, mesh: Mesh, kind: Kind) -> list[Tensor]:
    """`pieces` with those of axes in `kind` replaced by their sum, so that what is left can be compared rank by rank."""
    grid = dict(zip(itertools.product(*map(range, mesh)), pieces, strict=True))
    for axis, placement in enumerate(state):
        if placement.kind is kind:
            total = {
                index: sum((grid[(*index[:axis], i, *index[axis + 1 :])] for i in range(mesh[axis])), torch.zeros(())) for index in grid
            }
            grid = total
    return list(grid.values())


def check(source: State, target: State, shape: tuple[int, ...], mesh: Mesh) -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    given, wanted = spread(x, source, mesh), spread(x, _whole(target, Kind.PARTIAL), mesh)
    given_gradient = spread(gradient, target, mesh, gradient=True)
    wanted_gradient = spread(gradient, _whole(source, Kind.REPLICATE_PARTIAL_GRADIENT), mesh, gradient=True)

    def rank(device_mesh: object) -> tuple[Tensor, Tensor]:
        place = place_of(device_mesh)  # type: ignore[arg-type]
        index = place.coordinate[0] * mesh[1] + place.coordinate[1]
        leaf = given[index].clone().requires_grad_()
        result = convert_all(leaf, source, target, shape, place)
        assert result.shape == place.local_shape(shape, target)
        result.backward(given_gradient[index])
        assert leaf.grad is not None
        return result.detach(), leaf.grad

    results = simulate(mesh, rank)
    got = summed([value for value, _ in results], target, mesh, Kind.PARTIAL)
    got_gradient = summed([grad for _, grad in results], source, mesh, Kind.REPLICATE_PARTIAL_GRADIENT)
    for one, other in itertools.chain(zip(got, wanted, strict=True), zip(got_gradient, wanted_gradient, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def _whole(state: State, kind: Kind) -> State:
    return tuple(R if placement.kind is kind else placement for placement in state)


@pytest.mark.parametrize("shape", [(4, 8), (5, 9), (2, 3)])
@pytest.mark.parametrize("source, target", ACTIONS)
def test_every_pair_on_one_axis(source: Kind, target: Kind, shape: tuple[int, ...]) -> None:
    forms = {Kind.SHARD: (S(1), S(0)), Kind.REPLICATE: (R,), Kind.REPLICATE_PARTIAL_GRADIENT: (RP,), Kind.PARTIAL: (P,)}
    for before, after in itertools.product(forms[source], forms[target]):
        if before != after:
            check((R, before), (R, after), shape, (1, 4))


@pytest.mark.parametrize("other", [R, RP, P, S(0), S(1), S(1, 2)])
def test_blocks(other: Placement) -> None:
    for shape in ((3, 12), (4, 15)):
        if shape[1] % 2 == 0 or other.blocks != 2:
            check((S(1, 3), R), (other, R), shape, (2, 1))
            if other != P:
                check((other, R), (S(1, 3), R), shape, (2, 1))


@pytest.mark.parametrize("seed", range(4))
def test_two_axes(seed: int) -> None:
    choose = random.Random(seed)
    states = [S(0), S(1), S(2), S(1, 2), R, RP, P]
    for _ in range(12):
        source, target = (tuple(choose.choices(states, k=2)) for _ in range(2))
        if any(s[0].is_shard and s[1].is_shard and s[0].dim == s[1].dim and s[0].blocks != s[1].blocks for s in (source, target)):
            continue
        if source != target:
            even = max(p.blocks for p in (*source, *target)) > 1
            check(source, target, (4, 8, 4) if even else choose.choice([(4, 8, 4), (5, 7, 3)]), (2, 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16])
def test_values_without_gradient(dtype: torch.dtype) -> None:
    x = (torch.arange(35).reshape(5, 7) % 3).to(dtype)

    def rank(device_mesh: object) -> None:
        place = place_of(device_mesh)  # type: ignore[arg-type]
        local = convert_all(x, (R, R), (R, S(1)), (5, 7), place)
        moved = convert_all(local, (R, S(1)), (R, S(0)), (5, 7), place)
        assert torch.equal(convert_all(moved, (R, S(0)), (R, R), (5, 7), place), x)

    simulate((1, 4), rank)
