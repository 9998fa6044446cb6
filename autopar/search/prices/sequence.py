"""What attention costs whose sequence is split, beside its flops: trading halves, the ring, merging blocks, and what is held meanwhile.

It says of `autopar.runtime.operators.ring_attention` what that does. `m` are bytes on one rank, in the dtype of the operands, `w` the size
of a number in the dtype of sums (at least float32) over that of the operands, `n` the ranks:

| implementation          | on the wire forward             | backward                                              |
|-------------------------|---------------------------------|-------------------------------------------------------|
| `causal_queries`        | trade q, out                    | trade out, its gradient; that of q                    |
| `ring_attention`        | n-1 shifts of k and v           | as many, and n of their gradients, `w` times as large |
| `causal_ring_attention` | the same; trade q, k, v, out    | the same; trade out, gradients of out, q, k, v        |

A shift runs beside the computing of one step; a trade is waited for. Where keys and values are gathered, the conversions of these
operands say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from autopar.ir.graph import DTYPE_BYTES

RINGS = frozenset({"ring_attention", "causal_ring_attention"})
TRADES = frozenset({"causal_queries", "causal_ring_attention"})
IMPLEMENTATIONS = RINGS | TRADES
_KERNELS = (8, 10)
"""Launches for one block forward (attention, merging: `attention_blocks.Merged.add`) and backward (attention, adding three gradients)."""


@dataclass(frozen=True, slots=True)
class Wire:
    """`times` shifts along `axis` (by index) of `bytes` on one rank, in `phase`; `hidden` behind the computing of the steps of a ring."""

    axis: int
    phase: str
    bytes: int
    times: int
    hidden: bool


@dataclass(frozen=True, slots=True)
class SequenceSplit:
    """One attention on the ranks of `axes` (indices) of `sizes`, outermost first. `q`, `kv`, `out`: local bytes of queries, of keys and
    values together, and of the result; `wide`: see the module."""

    implementation: str
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    q: int
    kv: int
    out: int
    wide: float

    @property
    def steps(self) -> int:
        """Blocks that are merged."""
        return prod(self.sizes) if self.implementation in RINGS else 4

    @property
    def hidden_share(self) -> float:
        """The part of computing during which something travels: all steps of the ring but the last."""
        return (self.steps - 1) / self.steps if self.implementation in RINGS else 0.0

    def wires(self, trains: bool) -> tuple[Wire, ...]:
        found: list[Wire] = []
        if self.implementation in TRADES:
            moved = self.kv if self.implementation in RINGS else 0
            found += self._trades("forward", self.q + moved, self.out)
            if trains:
                found += self._trades("backward", 2 * self.out, self.q + moved)
        if self.implementation in RINGS:
            for number, axis in enumerate(self.axes):
                shifts = (self.sizes[number] - 1) * prod(self.sizes[:number])
                found.append(Wire(axis, "forward", self.kv, shifts, True))
                if trains:
                    home = int(shifts % self.sizes[number] != 0)
                    found.append(Wire(axis, "backward", self.kv, shifts, True))
                    found.append(Wire(axis, "backward", int(self.kv * self.wide), shifts, True))
                    found.append(Wire(axis, "backward", int(self.kv * self.wide), home, False))
        return tuple(wire for wire in found if wire.times)

    def _trades(self, phase: str, one: int, other: int) -> list[Wire]:
        """Half of every block goes to the mirrored place, along one axis after the other."""
        return [Wire(axis, phase, size // 2, 1, False) for axis in self.axes for size in (one, other)]

    def merging_bytes(self) -> tuple[float, float]:
        """Bytes read and written to merge results of blocks forward, to add up gradients backward."""
        forward = self.steps * self.out * (1 + 4 * self.wide)  # the block's result becomes wide, and is interpolated with the sum
        travelling = 3 * self.wide if self.implementation in RINGS else 0
        backward = self.steps * (self.q * (1 + 2 * self.wide) + self.kv * (1 + 2 * self.wide + travelling) * self._keys_share)
        return forward, backward

    @property
    def _keys_share(self) -> float:
        """The part of the keys at hand that one block is about: of gathered keys a rank's four blocks see each key once, or less."""
        return 1.0 if self.implementation in RINGS else 0.25

    def kernels(self) -> tuple[int, int]:
        return self.steps * _KERNELS[0], self.steps * _KERNELS[1]

    def held_bytes(self) -> tuple[float, float]:
        """Held for a moment beside operands, result and their gradients, forward and backward."""
        sums_forward, sums_backward = self.wide * self.out, self.wide * self.q
        if self.implementation not in RINGS:
            return sums_forward + self.out, sums_backward + self.wide * self.kv + 2 * self.out
        traded = 2 * self.out if self.implementation in TRADES else 0
        # Two blocks of keys and values; backward also two of their gradients.
        return 2 * self.kv + sums_forward + self.out, 2 * self.kv + 2 * self.wide * self.kv + sums_backward + traded


def sequence_split(
    implementations: Sequence[str], mesh: Sequence[int], operand_bytes: Sequence[int], output_bytes: Sequence[int], dtype: str
) -> SequenceSplit | None:
    """The split of one attention whose axes run `implementations` (`""`: the operator itself), or None where no axis of more than one
    rank runs one of these. `operand_bytes`, `output_bytes`: on one rank."""
    axes = tuple(axis for axis, name in enumerate(implementations) if name in IMPLEMENTATIONS and mesh[axis] > 1)
    if not axes:
        return None
    size = DTYPE_BYTES[dtype]
    q, k, v = operand_bytes[:3]
    return SequenceSplit(implementations[axes[0]], axes, tuple(mesh[axis] for axis in axes), q, k + v, output_bytes[0], max(4, size) / size)
