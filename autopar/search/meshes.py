"""Which meshes to search: factorisations of the rank count into two axes, `dp` outside and `tp` inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from autopar.errors import PlanError
from autopar.ir.cluster import Cluster
from autopar.search.prices.collectives import axes

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


def _forced(mesh: Mapping[str, int] | Sequence[int], world: int, name: str) -> Mesh:
    sizes = _sizes(mesh)
    if sizes[0] * sizes[1] != world:
        raise PlanError(f"mesh {sizes[0]} x {sizes[1]} has {sizes[0] * sizes[1]} ranks, cluster `{name}` has {world}; they must be equal")
    return sizes


def _sizes(mesh: Mapping[str, int] | Sequence[int]) -> Mesh:
    if isinstance(mesh, Mapping):
        if unknown := set(mesh) - set(AXES):
            raise PlanError(f"mesh axes are {' and '.join(AXES)}, not {', '.join(sorted(map(str, unknown)))}")
        sizes = tuple(mesh.get(axis, 1) for axis in AXES)
    else:
        sizes = tuple(mesh) if len(mesh) != 1 else (*mesh, 1)
    if len(sizes) != 2 or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise PlanError(f"mesh {mesh} must be two sizes of at least 1, such as (2, 4) or {{'dp': 2, 'tp': 4}}")
    return sizes[0], sizes[1]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `mesh` asks for: one mesh of all ranks (`flat`), a mesh for each group of a pipeline (`groups`), or neither: search all."""

    flat: Mesh | None = None
    groups: tuple[Mesh, ...] | None = None


def read_mesh(mesh: Mapping[str, int] | Sequence[int] | Sequence[Mapping[str, int]] | None, cluster: Cluster) -> Wanted:
    """`{"dp": 2, "tp": 4}` and `(2, 4)` are meshes of all ranks; `{"pp": 2, "dp": 2, "tp": 2}` is a pipeline of two groups of 2 x 2;
    `[{"dp": 2}, {"tp": 2}]` one of two groups with a mesh each, in rank order.

    Raises `PlanError` where it is none of these, or has not as many ranks as the cluster.
    """
    if mesh is None:
        return Wanted()
    groups: tuple[Mesh, ...]
    if isinstance(mesh, Mapping) and "pp" in mesh:
        count = mesh["pp"]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise PlanError(f"mesh {dict(mesh)}: `pp` is the number of groups in the pipeline, a whole number of at least 1")
        groups = (_sizes({axis: size for axis, size in mesh.items() if axis != "pp"}),) * count
    elif not isinstance(mesh, Mapping) and any(isinstance(one, Mapping) for one in mesh):
        if not all(isinstance(one, Mapping) for one in mesh):
            raise PlanError(f"mesh {mesh}: give every group of the pipeline a mesh, such as [{{'dp': 2}}, {{'tp': 2}}]")
        groups = tuple(_sizes(one) for one in mesh)  # type: ignore[arg-type]
    else:
        return Wanted(flat=_forced(mesh, cluster.world_size, cluster.name))  # type: ignore[arg-type]
    ranks = sum(dp * tp for dp, tp in groups)
    if ranks != cluster.world_size:
        runs = [(f"({dp} x {tp})", len(list(run))) for (dp, tp), run in groupby(groups)]
        sizes = " + ".join(f"{count} x {words}" if count > 1 else words for words, count in runs)
        raise PlanError(f"mesh {sizes} has {ranks} ranks, cluster `{cluster.name}` has {cluster.world_size}; they must be equal")
    return Wanted(flat=groups[0]) if len(groups) == 1 else Wanted(groups=groups)
