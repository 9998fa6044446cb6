"""`Split`: one way to run one operation on the ranks of one mesh axis. The common word of rules, search and runtime."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.ir.placement import Placement, chunk


@dataclass(frozen=True, slots=True)
class Split:
    """How an operation runs on one mesh axis.

    `name` is unique among an operation's splits and is what a plan file says: the loop dim that is split (`"m"`, `"k"`),
    `"replicate"` (every rank does all of the work) or `"partial"` (the operation is linear and maps terms of a sum to terms of a sum).
    `inputs` has one placement per entry of `op.operands`, `outputs` one per entry of `op.outputs`.
    `size` is the number of elements of the loop dim: an axis of `n` ranks needs `size % n == 0` unless `uneven`; 0 means any `n`.
    A dim split over several axes needs the product of their sizes to divide `size`.
    `work` is the fraction of the whole work that one of `n` ranks does: `"split"` (1/n) or `"whole"`.
    `implementation` names the local implementation to call instead of the operator itself (it may talk to the other ranks of the
    axis); empty for the operator itself on local operands.
    """

    name: str
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    size: int = 0
    uneven: bool = False
    work: str = "split"
    implementation: str = ""

    def fits(self, *parts: int) -> bool:
        """Whether axes of so many ranks, outermost first, can all split this loop, one within the other, so that no rank is left empty."""
        smallest = self.size
        if smallest == 0:
            return True
        for count in parts:
            if smallest % count and not self.uneven:
                return False
            smallest = chunk(smallest, count, count - 1)[1]
        return smallest > 0


REPLICATE = "replicate"
REPLICATE_PARTIAL_GRADIENT = "replicate/P"
PARTIAL = "partial"
