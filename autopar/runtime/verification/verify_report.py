"""What `verify` found: every tensor's relative error, judged and told."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from autopar.ir.plan import Plan

Key = tuple[str, str, str]
"""Optimizer, kind of tensor (`"loss"`, `"output"`, `"gradient"`, `"parameter"`, `"buffer"`), and name (with its step, if any)."""

Facts = dict[Key, Tensor]

NOISE = 1e-4
"""A tensor whose norm is below this share of the whole gradient's is compared with that share: its own digits are rounding noise."""

LAST_DIGITS = 100
"""A difference is rounding if it is at most so many times what the last digits of parameters, buffers and inputs move the tensor by, on
one device. Sums in another order were seen to move tensors up to 5 times as far."""

KINDS = ("loss", "output", "gradient", "parameter", "buffer", "between ranks")
SHOWN = 12


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor: `relative_error` is the norm of the difference over the norm of the tensor (see `NOISE`); `inf` where one side lacks it,
    has another shape, or is not a number. `kind` may also be `"between ranks"`: a rank's copy against that of the first rank that holds it.
    `stages`: under a pipeline, those that hold the parameter or buffer."""

    optimizer: str
    kind: str
    name: str
    relative_error: float
    ok: bool
    stages: tuple[int, ...] = ()

    @property
    def where(self) -> str:
        """`name`, the stages that hold it, and the optimizer."""
        stages = f"stage{'s' * (len(self.stages) > 1)} {', '.join(map(str, self.stages))}, " if self.stages else ""
        return f"{self.name} ({stages}{self.optimizer})"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`ok` if no tensor is off by more than `tolerance`; `rows` has them all, the worst first. Printed, it is a table."""

    ok: bool
    max_relative_error: float
    tolerance: float
    rows: tuple[Row, ...]
    plan_name: str
    mesh: dict[str, int]
    steps: int
    optimizers: tuple[str, ...]
    dtype: str
    notes: tuple[str, ...]
    seconds: float
    groups: tuple[dict[str, int], ...] = ()
    """Under a pipeline, the mesh of each group of ranks."""
    schedule: str = ""
    microbatches: int = 1

    @property
    def worst(self) -> Row:
        """The tensor that is off the most."""
        return self.rows[0]

    def __str__(self) -> str:
        meshes = self.groups or (self.mesh,)
        ranks = sum(math.prod(mesh.values()) for mesh in meshes)
        even = all(mesh == meshes[0] for mesh in meshes)
        sizes = _sizes(self.mesh) if even else " | ".join(map(_sizes, meshes))
        if self.schedule:
            sizes += f", {self.schedule}"
        if self.microbatches > 1:
            sizes += f", {self.microbatches} microbatches"
        how = f"{self.steps} steps each of {' and '.join(self.optimizers)} in {self.dtype}"
        lines = [
            f"plan `{self.plan_name}` on {ranks} rank{'s' * (ranks != 1)} ({sizes}) against one device: {how}, {self.seconds:.1f} s",
            f"{'':14}{'tensors':>8}  {'worst error':>11}  where",
        ]
        for kind in KINDS:
            rows = [row for row in self.rows if row.kind == kind]
            if rows:
                lines.append(f"{kind:14}{len(rows):>8}  {rows[0].relative_error:>11.1e}  {rows[0].where}")
        wrong = [row for row in self.rows if not row.ok]
        if wrong:
            lines.append(f"NOT OK: {len(wrong)} of {len(self.rows)} tensors are off by more than {self.tolerance:.0e}; the worst:")
            lines += [f"  {row.relative_error:>8.1e}  {row.kind} {row.where}" for row in wrong[:SHOWN]]
        else:
            lines.append(f"ok: no tensor is off by more than {self.tolerance:.0e}; worst is {self.worst.kind} {self.worst.where}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _sizes(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.items())


def judge(
    expected: Facts,
    ranks: list[tuple[Facts | None, dict[Key, float]]],
    tolerance: float,
    *,
    plan: Plan,
    holders: dict[str, tuple[int, ...]],
    steps: int,
    optimizers: tuple[str, ...],
    dtype: str,
    notes: tuple[str, ...] = (),
    seconds: float = 0.0,
    moved: Facts | None = None,
) -> VerifyReport:
    """The report on what one device computed (`expected`) and what each rank did: of the first rank of each group its numbers, of all
    ranks their distances from those. A number that several groups have is compared between them. `holders`: stages by name. `moved`: what
    one device computes with the last digits of parameters, buffers and inputs changed, where that is known."""
    scales = _scales(expected)
    if moved is not None:
        raised = _scales_of_rounding(expected, moved, tolerance)
        notes += _rounding_note({key: scale for key, scale in raised.items() if scale > scales[key]}, scales)
        scales = {key: max(scale, raised[key]) for key, scale in scales.items()}
    found: Facts = {}
    rows = []

    def add(key: Key, error: float, between: str = "") -> None:
        optimizer, kind, name = key
        stages = holders.get(name.partition(", step ")[0], ()) if plan.pipeline is not None and kind not in ("loss", "output") else ()
        if between:
            kind, name = "between ranks", f"{kind} {name} on {between}"
        rows.append(Row(optimizer, kind, name, error, error <= tolerance, stages))

    for rank, (facts, distances) in enumerate(ranks):
        for key, tensor in (facts or {}).items():
            if key in found:
                add(key, relative_error(found[key], tensor, scales.get(key, 1.0)), f"rank {rank}")
        if facts is None:
            for key, apart in distances.items():
                add(key, apart / scales.get(key, 1.0), f"rank {rank}")
        found = (facts or {}) | found
    for key in dict.fromkeys((*expected, *found)):
        add(key, relative_error(expected.get(key), found.get(key), scales[key]) if key in scales else math.inf)
    rows.sort(key=lambda row: -row.relative_error)
    assert rows, "a model without outputs, parameters and buffers"
    return VerifyReport(
        ok=all(row.ok for row in rows),
        max_relative_error=rows[0].relative_error,
        tolerance=tolerance,
        rows=tuple(rows),
        plan_name=plan.name,
        mesh=dict(plan.mesh),
        steps=steps,
        optimizers=optimizers,
        dtype=dtype,
        notes=notes,
        seconds=seconds,
        groups=tuple(dict(group.mesh) for group in plan.groups) if plan.pipeline else (),
        schedule=plan.pipeline.schedule if plan.pipeline else "",
        microbatches=plan.microbatches,
    )


def _scales(expected: Facts) -> dict[Key, float]:
    """What each tensor's error is relative to: its norm, but no less than `NOISE` of the norm of the whole gradient."""
    wholes = _wholes(expected)
    noise = NOISE * max((whole for (_, kind), whole in wholes.items() if kind == "gradient"), default=0.0)
    return {key: max(_norm(tensor), noise, 1e-300) for key, tensor in expected.items()}


def _scales_of_rounding(expected: Facts, moved: Facts, tolerance: float) -> dict[Key, float]:
    """Scales by which a difference of `LAST_DIGITS` times the distance from `moved` is just within `tolerance`.

    A gradient that is exactly zero, such as that of a bias before batch norm, is a sum of large terms that cancel; what is left is
    rounding, and in proportion to the terms. How large that is shows when the model is computed with other last digits. It excuses nothing
    above `tolerance` of the whole: of all gradients, parameters, ... together, so that models which rounding throws far off, such as
    those that choose experts, are not excused by that."""
    wholes = _wholes(expected)
    return {
        key: min(LAST_DIGITS * distance(tensor, moved[key]) / tolerance, wholes[key[0], key[1]]) if tensor.is_floating_point() else 0.0
        for key, tensor in expected.items()
        if key in moved and moved[key].shape == tensor.shape
    } | {key: 0.0 for key in expected if key not in moved or moved[key].shape != expected[key].shape}


def _rounding_note(raised: dict[Key, float], scales: dict[Key, float]) -> tuple[str, ...]:
    worst_first = sorted(raised, key=lambda key: scales[key] / raised[key])
    names = list(dict.fromkeys(f"`{name.partition(', ')[0]}`" for _, _, name in worst_first))
    if not names:
        return ()
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (f"rounding is much of {', '.join(names[:3])}{more}: compared with what last digits move",)


def _norm(tensor: Tensor) -> float:
    return float(torch.where(tensor.isfinite(), tensor, 0).double().norm())


def _wholes(expected: Facts) -> dict[tuple[str, str], float]:
    """Norms of all tensors of a kind together, by optimizer and kind; of the step where that is largest."""
    squares: dict[tuple[str, str, str], float] = {}
    for (optimizer, kind, name), tensor in expected.items():
        key = (optimizer, kind, name.rpartition(", step ")[2] if ", step " in name else "")
        squares[key] = squares.get(key, 0.0) + _norm(tensor) ** 2
    found: dict[tuple[str, str], float] = {}
    for (optimizer, kind, _), square in squares.items():
        found[optimizer, kind] = max(found.get((optimizer, kind), 0.0), math.sqrt(square))
    return found


def relative_error(expected: Tensor | None, found: Tensor | None, scale: float) -> float:
    """Norm of the difference over `scale`; infinite where they cannot be compared."""
    if expected is None or found is None or expected.shape != found.shape or expected.is_floating_point() != found.is_floating_point():
        return math.inf
    return distance(expected, found) / scale


def distance(one: Tensor, other: Tensor) -> float:
    """Norm of the difference; infinite where a number meets none, or whole numbers differ."""
    if not one.is_floating_point():
        return 0.0 if torch.equal(one, other) else math.inf
    same = (one == other) | (one.isnan() & other.isnan())  # infinities that agree do not differ
    found = float(torch.where(same, 0.0, one - other).double().norm())
    return math.inf if math.isnan(found) else found
