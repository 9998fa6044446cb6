"""Placements: how one value lies on the ranks of one mesh axis, forward and backward.

A value has one placement per mesh axis. Each says where the value is in the forward pass *and* where its gradient is in the
backward pass, because the two are tied by the chain rule and a plan that forgets the second is silently wrong:

| printed    | forward                                  | gradient                              |
|------------|------------------------------------------|---------------------------------------|
| `S(d)`     | split along tensor dim `d`               | split the same way                    |
| `S(d, b)`  | dim `d` in `b` equal blocks, each split  | split the same way                    |
| `R`        | the same on every rank                   | the same, complete, on every rank     |
| `R/P`      | the same on every rank                   | a term of a sum over the ranks        |
| `P(sum)`   | a term of a sum over the ranks           | the same, complete, on every rank     |

`R/P` is what an operand sees that every rank reads but of which every rank uses it for its own part of the work (a weight under
data parallelism, the input of a column-parallel linear layer): Megatron's `f`. Turning `R` into `R/P` costs nothing forward and
an all-reduce backward; turning `P(sum)` into `R` costs the all-reduce forward and nothing backward (Megatron's `g`).
Source: Shoeybi et al. 2019, "Megatron-LM", section 3; the pairing is the transpose of the forward collective.

`S(d, b)` cuts dim `d` into `b` equal blocks and splits every block, so that rank `i` holds the `i`-th part of each: the columns of
a fused query-key-value weight stay with their heads. It is DTensor's `_StridedShard(d, split_factor=b)`.
When several axes split one dim, the axes are applied in mesh order, the first axis coarsest.
Splits are `torch.chunk`'s: parts of `ceil(size / n)`, the last ones smaller or empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """The four kinds of placement; the value is what is printed."""

    SHARD = "S"
    REPLICATE = "R"
    REPLICATE_PARTIAL_GRADIENT = "R/P"
    PARTIAL = "P(sum)"

    # Members are singletons; Enum's own hash of the name runs in Python, and planning hashes placements by the million.
    __hash__ = object.__hash__


_KNOWN: dict[tuple[Kind, int, int], Placement] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """One value on one mesh axis. Build with `S(dim)`, `R`, `RP`, `P`; print with `str`, read back with `parse`.

    Equal placements are one object, so that they are compared and hashed by identity: planning does so by the million.
    """

    kind: Kind
    dim: int = 0
    blocks: int = 1

    def __new__(cls, kind: Kind, dim: int = 0, blocks: int = 1) -> Placement:
        found = _KNOWN.get((kind, dim, blocks))
        return found if found is not None else _KNOWN.setdefault((kind, dim, blocks), object.__new__(cls))

    def __reduce__(self) -> tuple[type[Placement], tuple[Kind, int, int]]:
        return Placement, (self.kind, self.dim, self.blocks)

    def __str__(self) -> str:
        if self.kind is not Kind.SHARD:
            return str(self.kind.value)
        return f"S({self.dim})" if self.blocks == 1 else f"S({self.dim}, {self.blocks})"

    @property
    def is_shard(self) -> bool:
        return self.kind is Kind.SHARD

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds the whole value in the forward pass (`R` or `R/P`)."""
        return self.kind in (Kind.REPLICATE, Kind.REPLICATE_PARTIAL_GRADIENT)

    @property
    def is_partial(self) -> bool:
        return self.kind is Kind.PARTIAL


def S(dim: int, blocks: int = 1) -> Placement:
    """Split along tensor dim `dim` (counted from the front), in `blocks` equal blocks."""
    assert dim >= 0 and blocks >= 1
    return Placement(Kind.SHARD, dim, blocks)


R = Placement(Kind.REPLICATE)
RP = Placement(Kind.REPLICATE_PARTIAL_GRADIENT)
P = Placement(Kind.PARTIAL)

_SHARD_TEXT = re.compile(r"S\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)")
_OTHER_TEXT = {str(R): R, str(RP): RP, str(P): P, "P": P, "Replicate": R}


def parse(text: str) -> Placement:
    """The placement that prints as `text`. Raises `ValueError` naming the forms that are understood."""
    text = text.strip()
    if text in _OTHER_TEXT:
        return _OTHER_TEXT[text]
    match = _SHARD_TEXT.fullmatch(text)
    if match and (match[2] is None or int(match[2]) >= 1):
        return S(int(match[1]), int(match[2] or 1))
    raise ValueError(f"`{text}` is not a placement; write S(0), S(1, 3), R, R/P or P(sum)")


def chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of part `index` when `size` elements are split in `parts` as `torch.chunk` does."""
    step = -(-size // parts)
    start = min(index * step, size)
    return start, min(step, size - start)


def local_shape(
    shape: tuple[int, ...], placements: tuple[Placement, ...], mesh: tuple[int, ...], coordinate: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Shape of the part that the rank at `coordinate` holds; without a coordinate the largest part (that of rank 0).

    `placements` and `mesh` (axis sizes) have one entry per mesh axis.
    """
    sizes = list(shape)
    for axis, (placement, parts) in enumerate(zip(placements, mesh, strict=True)):
        if placement.is_shard and parts > 1:
            index = 0 if coordinate is None else coordinate[axis]
            block = sizes[placement.dim] // placement.blocks
            sizes[placement.dim] = placement.blocks * chunk(block, parts, index)[1]
    return tuple(sizes)
