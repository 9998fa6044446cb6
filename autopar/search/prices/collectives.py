"""Times of collectives in the alpha-beta model, per mesh axis.

With `n` ranks, `a` seconds a hop and `b` bytes per second and device, for `m` bytes of the whole value on one rank, plus the launch of
a kernel and the link's `start_s`:

| collective     | algorithm | time                              |
|----------------|-----------|-----------------------------------|
| all_reduce     | ring      | `2 (n-1) a + 2 (n-1)/n m / b`     |
| all_gather     | ring      | `(n-1) a + g (n-1)/n m / b`       |
| reduce_scatter | ring      | `(n-1) a + (n-1)/n m / b`         |
| all_to_all     | pairwise  | `(n-1) a + (n-1)/n m_local / b`   |
| shift          | direct    | `a + m_local / b`                 |

Where the axis crosses machines, rings use every card of a machine, but what goes from one rank to another takes the sender's own card:
all-to-all counts `(n-g)/n m_local` at the rate of one card for the `g` ranks inside a machine, and a shift all of it.

Source: Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in MPICH"; NCCL's rings are the same.
`g` is the link's `gather_factor`, 1 but for gloo. `m` is the gathered (or unreduced) size for the first three and what one rank holds
for all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from autopar.ir.cluster import Cluster, Link

ALGORITHM = {"all_reduce": "ring", "all_gather": "ring", "reduce_scatter": "ring", "all_to_all": "pairwise", "shift": "direct"}
BUCKET_BYTES = 25 * 2**20
"""Parameter traffic goes in buckets of this size (DistributedDataParallel's default `bucket_cap_mb`)."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A mesh axis as the links see it: `size` ranks that exchange at `bytes_per_s` per rank with `latency_s` a hop."""

    name: str
    size: int
    link: str
    latency_s: float
    bytes_per_s: float
    start_s: float
    """What every collective costs once: a launch and the link's `start_s`."""
    gather_factor: float
    near: int
    """So many ranks of a group are in one machine."""
    card_bytes_per_s: float
    """What one rank alone sends to another machine."""

    def hops(self, kind: str) -> int:
        if kind == "shift":
            return 1
        return (2 if kind == "all_reduce" else 1) * (self.size - 1)

    def time_s(self, kind: str, size_bytes: float) -> float:
        """Time of one collective; see the module's table. 0 on an axis of one rank."""
        if self.size == 1:
            return 0.0
        return self.start_s + self.hops(kind) * self.latency_s + self._bytes_s(kind, size_bytes)

    def bucketed_s(self, kind: str, size_bytes: float) -> float:
        """The same inside a bucket: the fixed part is shared in proportion to the bytes, up to one bucket."""
        if self.size == 1:
            return 0.0
        fixed_s = self.start_s + self.hops(kind) * self.latency_s
        return fixed_s * min(1.0, size_bytes / BUCKET_BYTES) + self._bytes_s(kind, size_bytes)

    def _bytes_s(self, kind: str, size_bytes: float) -> float:
        far = self.size - self.near
        if kind == "shift":
            return size_bytes / (self.card_bytes_per_s if far else self.bytes_per_s)
        if kind == "all_to_all" and far:
            return size_bytes / self.size * max((self.near - 1) / self.bytes_per_s, far / self.card_bytes_per_s)
        factor = self.gather_factor if kind == "all_gather" else 1.0
        return factor * self.hops(kind) * size_bytes / self.size / self.bytes_per_s


def between(cluster: Cluster, one: tuple[int, int], other: tuple[int, int]) -> Link:
    """The link between two groups of ranks, each given as its first rank and its size: inside a machine only if both are in it."""
    first, last = min(one[0], other[0]), max(one[0] + one[1], other[0] + other[1]) - 1
    return cluster.intra if first // cluster.devices_per_node == last // cluster.devices_per_node else cluster.inter


def axes(cluster: Cluster, mesh: tuple[int, ...], names: tuple[str, ...], first_rank: int = 0) -> tuple[Axis, ...]:
    """The axes of a mesh whose last axis is consecutive ranks and each earlier one strides over the later ones.

    An axis that stays inside a machine uses `intra`. One that crosses machines uses the slower of `intra` and its share of the
    network cards: each rank of its group in one machine brings its own card, `g` of them carry `g` times one card's bytes
    (hierarchical rings, one per card). `first_rank`: where the ranks of the mesh begin.
    """
    found = []
    stride = 1
    per_node = cluster.devices_per_node
    for name, size in reversed(list(zip(names, mesh, strict=True))):
        block = size * stride
        # The mesh begins in the middle of a machine: then a group of ranks may lie on two though it is small enough for one.
        blocks = range(first_rank, first_rank + prod(mesh), block)
        apart = first_rank % per_node and any(at // per_node != (at + block - 1) // per_node for at in blocks)
        inside = (block <= per_node and not apart) or size == 1
        near = size
        if inside:
            link, rate = cluster.intra, cluster.intra.bytes_per_s
        else:
            near = min(size - 1, max(1, per_node // stride))
            cards = max(1, per_node // stride)
            link, rate = cluster.inter, min(cluster.intra.bytes_per_s, cards * cluster.inter.bytes_per_s)
        start_s = cluster.device.launch_s + link.start_s
        found.append(Axis(name, size, link.name, link.latency_s, rate, start_s, link.gather_factor, near, link.bytes_per_s))
        stride *= size
    return tuple(reversed(found))
