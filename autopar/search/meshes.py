"""Which meshes to search: factorisations of the rank count into two axes, `dp` outside and `tp` inside."""

from __future__ import annotations

from collections.abc import Mapping

from autopar.errors import PlanError
from autopar.ir.cluster import Cluster
from autopar.search.collectives import axes

AXES = ("dp", "tp")
Mesh = tuple[int, int]


def candidates(cluster: Cluster, forced: Mapping[str, int] | tuple[int, ...] | None, named: bool = False) -> tuple[Mesh, ...]:
    """Axis sizes to search. `forced`: `{"dp": 2, "tp": 4}` or `(2, 4)`; a missing axis has size 1.

    `named`: whether something names an axis; otherwise meshes that differ in the name of their only axis are one.
    Raises `PlanError` where the forced mesh does not have as many ranks as the cluster.
    """
    world = cluster.world_size
    if forced is not None:
        return (_forced(forced, world, cluster.name),)
    found: dict[object, Mesh] = {}
    for tp in range(1, world + 1):
        if world % tp == 0:
            mesh = (world // tp, tp)
            looks = [(axis.size, axis.latency_s, axis.bytes_per_s) for axis in axes(cluster, mesh, AXES) if axis.size > 1]
            found.setdefault(mesh if named else tuple(looks) if len(looks) < 2 else mesh, mesh)
    return tuple(found.values())


def _forced(mesh: Mapping[str, int] | tuple[int, ...], world: int, name: str) -> Mesh:
    if isinstance(mesh, Mapping):
        if unknown := set(mesh) - set(AXES):
            raise PlanError(f"mesh axes are {' and '.join(AXES)}, not {', '.join(sorted(map(str, unknown)))}")
        sizes = tuple(mesh.get(axis, 1) for axis in AXES)
    else:
        sizes = tuple(mesh) if len(mesh) != 1 else (*mesh, 1)
    if len(sizes) != 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise PlanError(f"mesh {mesh} must be two sizes of at least 1, such as (2, 4) or {{'dp': 2, 'tp': 4}}")
    if sizes[0] * sizes[1] != world:
        raise PlanError(f"mesh {sizes[0]} x {sizes[1]} has {sizes[0] * sizes[1]} ranks, cluster `{name}` has {world}; they must be equal")
    return sizes[0], sizes[1]
