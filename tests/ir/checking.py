"""The numerical checker of sharding rules with the runtime's local implementations, on simulated ranks that talk where they must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autopar.ir.graph import Graph, Op
from autopar.ir.rules.check import check_split, one_after_the_other
from autopar.ir.rules.split import Split
from autopar.runtime.operators.local_ops import LOCAL_OPS
from tests.counting import CHECKED
from tests.runtime.simulated import simulate

TALKING = {
    "vocab_cross_entropy", "sync_batch_norm", "split_softmax", "split_logsumexp", "split_amax", "split_max", "split_argmax",
    "split_cross_entropy", "causal_queries", "ring_attention", "causal_ring_attention", "experts", "experts_even",
}  # fmt: skip


def threads(mesh: tuple[int, ...], function: Callable[[tuple[int, ...], tuple[str, ...]], Any]) -> list[Any]:
    """Every rank of a mesh of one or two axes in a thread of its own, with process groups between them."""
    first = 2 - len(mesh)

    def rank(device_mesh: Any) -> Any:
        coordinate = device_mesh.get_coordinate()
        return function(tuple(coordinate[first:]), tuple(device_mesh.get_group(axis).group_name for axis in range(first, 2)))

    return simulate((1,) * first + mesh, rank)  # type: ignore[arg-type]


def check(graph: Graph, op: Op, split: Split | tuple[Split, ...], parts: int | tuple[int, ...], seed: int = 0) -> None:
    """Assert that `split` of `op` is right over so many `parts`, and count it."""
    chosen = (split,) if isinstance(split, Split) else split
    ranks = threads if any(item.implementation in TALKING for item in chosen) else one_after_the_other
    result = check_split(op, graph, split, parts, seed, LOCAL_OPS, ranks)
    assert result.ok, f"{result.why}\n{op}\n{split}"
    CHECKED[op.target] += 1
