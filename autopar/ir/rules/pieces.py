"""Values on the simulated ranks of a mesh: taken apart as placements say, and put together again (imports torch).

Pieces are listed by rank, the last mesh axis running fastest. Axes cut in mesh order, the first coarsest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autopar.ir.placement import Placement, chunk

State = tuple[Placement, ...]


class Refuted(Exception):
    """Something about a split is wrong; says what."""


def spread(x: Tensor, state: State, mesh: Sequence[int], summed: Placement, generator: torch.Generator) -> list[Tensor]:
    """What each rank holds of the whole `x`. Placements of the kind of `summed` give random terms that add up to it."""
    pieces = [x]
    for placement, parts in zip(state, mesh, strict=True):
        pieces = [own for piece in pieces for own in _spread(piece, placement, parts, summed, generator)]
    return pieces


def _spread(x: Tensor, placement: Placement, parts: int, summed: Placement, generator: torch.Generator) -> list[Tensor]:
    if placement.is_shard:
        return [part(x, placement, parts, index) for index in range(parts)]
    if placement.kind is not summed.kind:
        return [x] * parts
    if x.is_floating_point():
        terms = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for _ in range(parts - 1)]
    else:
        terms = [torch.randint(-3, 4, x.shape, dtype=x.dtype, generator=generator) for _ in range(parts - 1)]
    return [*terms, x - sum(terms, torch.zeros_like(x))]


def part(x: Tensor, placement: Placement, parts: int, index: int) -> Tensor:
    """Part `index` of the whole `x`."""
    dim, blocks = placement.dim, placement.blocks
    if x.shape[dim] % blocks:
        raise Refuted(f"dim {dim} of {list(x.shape)} has no {blocks} equal blocks")
    size = x.shape[dim] // blocks
    start, length = chunk(size, parts, index)
    return _blocks(x, dim, blocks).narrow(dim + 1, start, length).flatten(dim, dim + 1)


def _blocks(x: Tensor, dim: int, blocks: int) -> Tensor:
    """`x` with `dim` as two dims, blocks and what is in them."""
    return x.reshape(*x.shape[:dim], blocks, x.shape[dim] // blocks, *x.shape[dim + 1 :])


def together(what: str, pieces: Sequence[Tensor], state: State, mesh: Sequence[int], summed: Placement) -> Tensor:
    """The whole of which `pieces` are what the ranks hold. Raises `Refuted` where copies of one value differ."""
    pieces = list(pieces)
    for placement, parts in zip(reversed(state), reversed(mesh), strict=True):
        pieces = [_together(what, pieces[start : start + parts], placement, summed) for start in range(0, len(pieces), parts)]
    (whole,) = pieces
    return whole


def _together(what: str, pieces: Sequence[Tensor], placement: Placement, summed: Placement) -> Tensor:
    if placement.is_shard:
        dim, blocks = placement.dim, placement.blocks
        return torch.cat([_blocks(piece, dim, blocks) for piece in pieces], dim + 1).flatten(dim, dim + 1)
    if placement.kind is summed.kind:
        return sum(pieces[1:], pieces[0])
    for piece in pieces[1:]:
        difference(f"{what} on two ranks", pieces[0], piece)
    return pieces[0]


def difference(what: str, whole: Tensor, other: Tensor) -> float:
    """The largest difference relative to the largest element. Raises `Refuted` where it is more than rounding, in float64."""
    if other.shape != whole.shape:
        raise Refuted(f"{what} has shape {list(other.shape)}, not {list(whole.shape)}")
    if not whole.is_floating_point():
        if not torch.equal(other, whole):
            raise Refuted(f"{what} differs")
        return 0.0
    finite = torch.isfinite(whole)
    if not torch.equal(finite, torch.isfinite(other)):
        raise Refuted(f"{what} is not finite in the same places")
    if not finite.any():
        return 0.0
    scale = max(1.0, float(whole[finite].abs().max()))
    found = float((other - whole)[finite].abs().max()) / scale
    if not found <= 1e-9:
        raise Refuted(f"{what} differs by {found:.1e}")
    return found
