"""`Plan`: the one thing that search and runtime share, and the file that people review.

A plan is data. Reading one imports nothing of the user's and runs nothing. It is folded: repeated layers are written once, so that
a plan for 128 layers is as long as one for 2, and two plans diff well. Order is stable everywhere.

What decides is `mesh`, the `split` of every operation and the `stored` and `gather` of every parameter; all other fields say what
follows from these (placements, collectives, time, memory), for the reader. `autopar validate` checks that they agree.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT: Literal["autopar-plan"] = "autopar-plan"
VERSION: Literal[1] = 1

Axes = dict[str, str]  # mesh axis -> split name or placement text, in mesh order
Bytes = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ModelInfo(_Data):
    """Which model the plan is for. `fingerprint` is `Graph.fingerprint()`; a plan fits no other graph."""

    name: str
    fingerprint: str
    training: bool
    parameters: int
    operations: int


class ClusterInfo(_Data):
    """What the plan was priced for; enough to read the prices, not needed to run it."""

    name: str
    device: str
    devices_per_node: int
    nodes: int
    memory_bytes: Bytes
    """Memory of one device; the budget is `Predicted.memory_limit_bytes`."""


class InputPlan(_Data):
    """An input as the user passes it (`path`, global `shape`) and the `placement` that the first operations want it in."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    placement: Axes


class OutputPlan(_Data):
    """A tensor the model returns. `R` is returned whole on every rank; any other placement as a DTensor."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    placement: Axes


class Alternative(_Data):
    """What another storage would have cost: the best plan with it, or why there is none."""

    stored: Axes
    cost_s: Seconds | None = None
    memory_bytes: Bytes | None = None
    why: str = ""


class ParameterPlan(_Data):
    """Where a parameter, its gradient and its optimizer state live, and when it is gathered for use.

    `name`: fully-qualified name; for a repeated layer the numbers that vary are written as a range, `model.layers.{0-31}.mlp.w`.
    `stored`: placement of the parameter, of its gradient and of its optimizer state, per axis (`S(..)` or `R`).
    `gather`: `"never"` (used as stored), `"step"` (gathered once a step and kept until its gradient is done: ZeRO-1/2) or `"use"`
    (gathered for the forward pass, freed, gathered again for the backward pass: ZeRO-3).
    `used`: placement in which the operations read it (follows from their splits).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    stored: Axes
    gather: Literal["never", "step", "use"]
    used: Axes
    alternatives: tuple[Alternative, ...] = ()


class OpPlan(_Data):
    """One operation: how it is `split` on each mesh axis (names of `Split`s), and the placement of its first `output`."""

    name: str
    target: str
    module: str
    split: Axes
    output: Axes


class SegmentPlan(_Data):
    """`count` repeats of `length` operations, from position `start` in the graph; `ops` lists the first repeat's."""

    name: str
    start: Annotated[int, Field(ge=0)]
    length: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)]
    ops: tuple[OpPlan, ...]


class CollectivePlan(_Data):
    """A collective that the rank program runs: `kind` on `axis`, `bytes` on one rank and `time_s` for one, run `count` times a step."""

    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
    axis: str
    phase: Literal["forward", "backward", "gradient"]
    value: str
    """The value or parameter it moves, repeats folded."""
    op: str
    """The operation or parameter it serves."""
    bytes: Bytes
    count: Annotated[int, Field(ge=1)]
    time_s: Seconds
    exposed_s: Seconds
    """The part of `time_s` that computing does not hide."""


class Predicted(_Data):
    """Predictions for one training step on the worst rank."""

    cost_s: Seconds
    lower_bound_s: Seconds
    compute_s: Seconds
    communication_s: Seconds
    memory_bytes: dict[str, Bytes]
    """By kind: parameters, gradients, optimizer, activations, buffers (communication and workspace)."""
    memory_limit_bytes: Bytes
    fits: bool
    optimizer: str
    effort: str


class Plan(_Data):
    """A plan; see the module's docstring. `autopar.plan` makes one, `save` and `load` keep it."""

    format: Literal["autopar-plan"] = FORMAT
    version: Literal[1] = VERSION
    name: str
    """`"searched"` or the name of the baseline."""
    model: ModelInfo
    cluster: ClusterInfo
    mesh: dict[str, Annotated[int, Field(ge=1)]]
    inputs: tuple[InputPlan, ...]
    outputs: tuple[OutputPlan, ...]
    pins: dict[str, str]
    predicted: Predicted
    replicated: tuple[str, ...]
    """Operators without a sharding rule, which every rank runs whole."""
    notes: tuple[str, ...] = ()
    parameters: tuple[ParameterPlan, ...]
    segments: tuple[SegmentPlan, ...]
    collectives: tuple[CollectivePlan, ...]

    @property
    def world_size(self) -> int:
        size = 1
        for axis in self.mesh.values():
            size *= axis
        return size

    @property
    def cost_s(self) -> float:
        """Predicted time of one training step in seconds."""
        return self.predicted.cost_s

    @property
    def lower_bound_s(self) -> float:
        """No plan on these meshes, under this cost model and budget, is faster than this."""
        return self.predicted.lower_bound_s

    @property
    def gap(self) -> float:
        """`cost_s / lower_bound_s - 1`; 0.0 is optimal."""
        if self.predicted.lower_bound_s <= 0:
            return 0.0
        return max(0.0, self.predicted.cost_s / self.predicted.lower_bound_s - 1.0)

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Predicted peak memory by kind, in bytes, on the worst rank."""
        return dict(self.predicted.memory_bytes)
