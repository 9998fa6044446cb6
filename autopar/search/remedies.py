"""What would make a plan fit that does not: each remedy is added up, those that do not help are not named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from autopar.ir.cluster import Cluster
from autopar.search.follow import batch_size
from autopar.search.prices.costs import OPTIMIZER_STATES
from autopar.search.structure import Structure

_MOST_TIMES_NODES = 16


def remedies(
    structure: Structure, cluster: Cluster, limit_bytes: int, optimizer: str, memory: Mapping[str, int],
    on_cluster: Callable[[Cluster], int | None],
) -> tuple[str, ...]:  # fmt: skip
    """Numbered by the caller; `memory` is that of the plan of least memory found, at its peak by kind; `on_cluster(cluster)` the bytes per
    rank that the same plan needs on another cluster, None where it cannot run there."""
    found = []
    needed: int | None
    states = OPTIMIZER_STATES[optimizer]
    for other in sorted(OPTIMIZER_STATES, key=lambda name: -OPTIMIZER_STATES[name]):
        if structure.graph.training and OPTIMIZER_STATES[other] < states:
            needed = sum(memory.values()) - memory["optimizer"] * (states - OPTIMIZER_STATES[other]) // states
            if needed <= limit_bytes:
                found.append(f'optimizer="{other}" instead of "{optimizer}": needs {_gib(needed)} per rank')
                break
    if text := _smaller_batch(structure, limit_bytes, memory):
        found.append(text)
    nodes = cluster.nodes * 2
    while nodes <= cluster.nodes * _MOST_TIMES_NODES:
        larger = replace(cluster, nodes=nodes, name=f"{cluster.name} with {nodes} nodes")
        needed = on_cluster(larger)
        if needed is not None and needed <= limit_bytes:
            found.append(f"{nodes} nodes instead of {cluster.nodes} ({larger.world_size} devices): needs {_gib(needed)} per rank")
            break
        nodes *= 2
    total = sum(memory.values())
    found.append(f"memory_limit_bytes={total}: devices with {_gib(total)} for each rank")
    return tuple(found)


def _smaller_batch(structure: Structure, limit_bytes: int, memory: Mapping[str, int]) -> str:
    """Activations and workspace shrink with the batch, the rest stays."""
    batch = batch_size(structure.graph)
    fixed = memory["parameters"] + memory["gradients"] + memory["optimizer"]
    moving = sum(memory.values()) - fixed
    smaller = batch // 2
    while smaller >= 1:
        needed = int(fixed + moving * smaller / batch)
        if needed <= limit_bytes:
            return f"global batch {smaller} instead of {batch}: needs about {_gib(needed)} per rank"
        smaller //= 2
    return ""


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
