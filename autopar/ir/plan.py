"""`Plan`: the one thing that search and runtime share, and the file that people review.

A plan is data. Reading one imports nothing of the user's and runs nothing. It is folded: repeated layers are written once, so that
a plan for 128 layers is as long as one for 2, and two plans diff well. Order is stable everywhere.

What decides is `mesh`, `precision`, the `split` of every operation and the `stored` and `gather` of every parameter; under a pipeline also
`microbatches`, `pipeline` and which `stage` a row is for; and the repeats that `recompute`. All other fields say what follows from these
(placements, collectives, time, memory), for the reader. `autopar validate` checks that they agree.

Operations are those of the graph of one microbatch (`autopar.ir.pipelining.microbatch`), cut into stages (`autopar.ir.pipelining.stages`);
with one microbatch and one stage that is the traced graph itself. Segments number the operations of their stage's graph from 0.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autopar.errors import PlanFileError
from autopar.ir import plan_json
from autopar.ir.plan_check import check
from autopar.ir.precision import Precision
from autopar.ir.rules.given import GivenRule

FORMAT: Literal["autopar-plan"] = "autopar-plan"
VERSION: Literal[2] = 2

LARGEST = 2**63 - 1
Axes = dict[str, str]  # mesh axis -> split name or placement text, in mesh order
Size = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Bytes = Size
Seconds = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Factor = Annotated[float, Field(ge=1, allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ModelInfo(_Data):
    """Which model the plan is for. `fingerprint` is `Graph.fingerprint()`; a plan fits no other graph."""

    name: str
    fingerprint: str
    training: bool
    parameters: Size
    operations: Size


class ClusterInfo(_Data):
    """What the plan was priced for; enough to read the prices, not needed to run it."""

    name: str
    device: str
    devices_per_node: Count
    nodes: Count
    memory_bytes: Bytes
    """Memory of one device; the budget is `Predicted.memory_limit_bytes`."""
    felt_share: Share = 0.0
    """Of the time of traffic that runs beside computing, so much is felt by what computes (`autopar.ir.cluster.Device`)."""
    expert_imbalance: Factor = 1.0
    """Where routed experts are split over ranks, the fullest was taken to have so many times the mean of their rows."""


class InputPlan(_Data):
    """An input as the user passes it (`path`, global `shape`) and the `placement` that the first operations of `stage` want it in."""

    stage: Size = 0
    path: str
    shape: tuple[Size, ...]
    dtype: str
    placement: Axes


class OutputPlan(_Data):
    """A tensor the model returns, from `stage`. `R` is returned whole on every rank; any other placement as a DTensor."""

    stage: Size = 0
    path: str
    shape: tuple[Size, ...]
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

    `dtype`: in which operations read it; with a `precision`, `stored` there says in which it lives where that is another.
    `name`: fully-qualified name; for a repeated layer the numbers that vary are written as a range, `model.layers.{0-31}.mlp.w`.
    `stored`: placement of the parameter, of its gradient and of its optimizer state, per axis (`S(..)` or `R`).
    `gather`: `"never"` (used as stored), `"step"` (gathered once a step and kept until its gradient is done: ZeRO-1/2) or `"use"`
    (gathered for the forward pass, freed, gathered again for the backward pass: ZeRO-3).
    `used`: placement in which the operations read it (follows from their splits).
    `stage`: whose operations read it; a weight that two stages read (a tied embedding) has a row for each, and they are kept equal.
    """

    stage: Size = 0
    name: str
    shape: tuple[Size, ...]
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


class SegmentCost(_Data):
    """What one repeat of a segment takes on one rank for one microbatch: the simulator's input.

    `forward_s`, `backward_s`: computing; `weight_s` of the backward pass makes gradients of parameters, for which no other stage waits.
    `forward_comm_s`, `backward_comm_s`: by axis, collectives that computing waits for.
    `gather_s`: by axis, gathering its parameters for the forward pass, ahead of use, and `regather_s` again for the backward pass, of
    what is freed after use; `step_gather_s`: once a step, ahead of the first microbatch, of what stays gathered. `reduce_s`: by axis,
    reducing its parameters' gradients behind the backward pass of the last microbatch. `activation_bytes`: kept from its forward to its
    backward pass, and `checkpoint_bytes` of these when the repeat is recomputed. `parameter_bytes`, `gradient_bytes`, `optimizer_bytes`:
    of the parameters that it is the first to read, and of what stays gathered or adds up for a whole step. `gathered_bytes`: what
    gathering for use adds while it runs. `workspace_bytes`: the most for a moment in its forward pass, beyond its activations;
    `backward_workspace_bytes`: in its backward pass, beyond what was there when that began (with one microbatch, gradients of parameters
    that have come by then are among it), or `input_workspace_bytes` where only gradients of inputs are made. `postponed_bytes`: held
    beside its activations from gradients of its inputs to those of its parameters where a schedule makes them apart. `unreduced_bytes`:
    of gradients beyond `gradient_bytes`, until they are reduced. `message_bytes`: of gradients as they travel, and `scattered_bytes` of
    those that are scattered, where the plan's precision says the dtype. `unkept_bytes`: in place of `workspace_bytes` where the repeat is
    recomputed. `sent_bytes`: of what it sends to the next stage, as much as is not kept.
    """

    forward_s: Seconds = 0.0
    backward_s: Seconds = 0.0
    weight_s: Seconds = 0.0
    forward_comm_s: dict[str, Seconds] = {}
    backward_comm_s: dict[str, Seconds] = {}
    gather_s: dict[str, Seconds] = {}
    regather_s: dict[str, Seconds] = {}
    step_gather_s: dict[str, Seconds] = {}
    reduce_s: dict[str, Seconds] = {}
    optimizer_s: Seconds = 0.0
    activation_bytes: Bytes = 0
    checkpoint_bytes: Bytes = 0
    parameter_bytes: Bytes = 0
    gradient_bytes: Bytes = 0
    optimizer_bytes: Bytes = 0
    gathered_bytes: Bytes = 0
    workspace_bytes: Bytes = 0
    backward_workspace_bytes: Bytes = 0
    postponed_bytes: Bytes = 0
    unreduced_bytes: Bytes = 0
    message_bytes: Bytes = 0
    scattered_bytes: Bytes = 0
    input_workspace_bytes: Bytes = 0
    unkept_bytes: Bytes = 0
    sent_bytes: Bytes = 0


class SegmentPlan(_Data):
    """`count` repeats of `length` operations, from position `start` in the graph of `stage`; `ops` lists the first repeat's.

    `recompute`: of how many of the repeats, the first ones, the backward pass computes the forward pass again instead of keeping its
    activations. `cost`: of one repeat.
    """

    stage: Size = 0
    name: str
    start: Size
    length: Count
    count: Count
    recompute: Size = 0
    cost: SegmentCost = SegmentCost()
    ops: tuple[OpPlan, ...]


class GroupPlan(_Data):
    """The ranks `first_rank, first_rank + 1, ...` of one place in a pipeline, as a mesh (outer axis first)."""

    first_rank: Size
    mesh: dict[str, Count]


class StagePlan(_Data):
    """One stage: operations `start` to `stop` of the graph of one microbatch, on the ranks of `groups[group]`.

    `sends_bytes`: what one microbatch sends to the next stage forward, in all; `receives_s`: time on the link for one rank to receive
    its part from the stage before (`receives_bytes`), `returns_s` for the gradients on their way back to that stage.
    """

    name: str
    start: Size
    stop: Size
    group: Size
    sends_bytes: Bytes = 0
    receives_bytes: Bytes = 0
    receives_s: Seconds = 0.0
    returns_s: Seconds = 0.0


class PipelinePlan(_Data):
    """`schedule` is a name in `autopar.ir.pipelining.schedules.SCHEDULES`; `groups` in rank order, together all ranks; `stages` in
    order."""

    schedule: str
    groups: tuple[GroupPlan, ...]
    stages: tuple[StagePlan, ...]


class CollectivePlan(_Data):
    """A collective that the rank program runs: `kind` on `axis`, `bytes` on one rank and `time_s` for one, run `count` times a step."""

    stage: Size = 0
    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift"]
    """`shift`: each rank to one other, around a ring or to the one it trades with."""
    axis: str
    phase: Literal["forward", "backward", "gradient"]
    value: str
    """The value or parameter it moves, repeats folded."""
    op: str
    """The operation or parameter it serves."""
    bytes: Bytes
    count: Count
    time_s: Seconds
    exposed_s: Seconds
    """The part of `time_s` that computing does not hide."""


class Candidate(_Data):
    """The best plan of one pipeline degree (number of groups), or why there is none: what the winner won against."""

    groups: Count
    what: str
    """Stages, mesh, schedule and microbatches in a few words."""
    cost_s: Seconds | None = None
    bubble: Seconds | None = None
    communication_s: Seconds | None = None
    memory_bytes: Bytes | None = None
    why: str = ""


class RulePlan(_Data):
    """A rule that autopar's own table does not have, by which operations of the plan are split: see `autopar.ir.rules.given.GivenRule`.

    `linear`: sets of terms by number, such as `"0 2, 1"`. `origin`: `"found"` by trial or `"registered"` by the user, and numerically
    checked `checks` times. One without `notation` and `splits` is for operators that run replicated; `why` says why.
    """

    target: str
    form: str = ""
    notation: str = ""
    uneven: str = ""
    linear: Annotated[str, Field(pattern=r"^(\d{1,3}( \d{1,3})*(, \d{1,3}( \d{1,3})*)*)?$")] = ""
    splits: tuple[str, ...] = ()
    origin: Literal["found", "registered"] = "found"
    checks: Size = 0
    why: str = ""

    @classmethod
    def of(cls, rule: GivenRule) -> RulePlan:
        linear = ", ".join(" ".join(map(str, terms)) for terms in rule.linear)
        return cls(
            target=rule.target,
            form=rule.form,
            notation=rule.notation,
            uneven=rule.uneven,
            linear=linear,
            splits=rule.splits,
            origin=cast(Literal["found", "registered"], rule.origin),
            checks=rule.checks,
            why=rule.why,
        )

    def given(self) -> GivenRule:
        """The rule as a graph carries it."""
        linear = tuple(tuple(map(int, terms.split())) for terms in self.linear.split(",")) if self.linear else ()
        return GivenRule(self.target, self.form, self.notation, self.uneven, linear, self.splits, self.origin, self.checks, self.why)


class Predicted(_Data):
    """Predictions for one training step on the worst rank. `cost_s` is the objective of the search: with one microbatch and one stage the
    sum over operations that `lower_bound_s` bounds, else the simulated time. `step_s` is what the simulator says; `bubble`: the time that
    the groups of a pipeline idle for want of work over the time they compute, (p-1)/m for 1F1B with equal stages. `stage_memory_bytes`:
    peak by group. `resident_bytes`: by group, what is held all the time beside parameters: inputs, buffers, constants."""

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
    step_s: Seconds = 0.0
    bubble: Seconds = 0.0
    stage_memory_bytes: tuple[Bytes, ...] = ()
    resident_bytes: tuple[Bytes, ...] = ()


class Plan(_Data):
    """A plan; see the module's docstring. `autopar.plan` makes one, `save` and `load` keep it."""

    format: Literal["autopar-plan"] = FORMAT
    version: Literal[2] = VERSION
    name: str
    """`"searched"` or the name of the baseline."""
    model: ModelInfo
    cluster: ClusterInfo
    mesh: dict[str, Count]
    """The axes of all ranks, outer first. Under a pipeline the first is `pp`, and where its groups have different meshes the only one."""
    microbatches: Count = 1
    precision: Precision | None = None
    """In which dtypes the model computes and its parameters are stored; by default each in its own."""
    pipeline: PipelinePlan | None = None
    inputs: tuple[InputPlan, ...]
    outputs: tuple[OutputPlan, ...]
    pins: dict[str, str]
    predicted: Predicted
    replicated: tuple[str, ...]
    """Operators without a sharding rule, which every rank runs whole."""
    leaf_modules: tuple[str, ...] = ()
    """Paths of the modules that are not traced into: each is an operation whose body is the module itself."""
    expert_capacity: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The capacity that the user allows experts: operations split `n+e/...` drop rows beyond it."""
    rules: tuple[RulePlan, ...] = ()
    """Rules that were found by trial or registered: the plan can be read and run where neither is at hand."""
    notes: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    parameters: tuple[ParameterPlan, ...]
    segments: tuple[SegmentPlan, ...]
    collectives: tuple[CollectivePlan, ...]

    @property
    def given_rules(self) -> tuple[GivenRule, ...]:
        """Its `rules`, as a graph carries them."""
        return tuple(rule.given() for rule in self.rules)

    @property
    def groups(self) -> tuple[GroupPlan, ...]:
        """The groups of ranks that run its stages; one with all ranks where there is no pipeline."""
        return self.pipeline.groups if self.pipeline else (GroupPlan(first_rank=0, mesh=self.mesh),)

    @property
    def stage_count(self) -> int:
        return len(self.pipeline.stages) if self.pipeline else 1

    def stage_mesh(self, stage: int) -> dict[str, int]:
        """The mesh of the ranks that run `stage`, outer axis first: that of its group, or without a pipeline the plan's."""
        return self.pipeline.groups[self.pipeline.stages[stage].group].mesh if self.pipeline else self.mesh

    @property
    def world_size(self) -> int:
        return sum(math.prod(group.mesh.values()) for group in self.groups)

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

    def text(self) -> str:
        """The plan as it stands in a file: JSON in stable order, one line for each decision, ending with a newline."""
        data = {"format": self.format, "version": self.version, **self.model_dump(mode="json", exclude_defaults=True)}
        return plan_json.write(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to `path`. A reader sees the old file or the whole new one, never a part.

        Raises `PlanFileError` where the file cannot be written.
        """
        target = Path(os.path.realpath(path))  # a link stays a link
        try:
            if target.exists() and not target.is_file():  # replacing a device or a pipe would remove it
                raise PlanFileError(f"{target}: not a file; name a file for the plan")
            handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                    file.write(self.text())
                    file.flush()
                    os.fsync(file.fileno())
                    os.chmod(temporary, _mode(target))
                os.replace(temporary, target)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise PlanFileError(f"{target}: cannot be written: {error.strerror or error}") from None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """The plan in the file at `path`. Runs and imports nothing.

        Raises `PlanFileError`, with line or field and the remedy, where the file cannot be read or is not a sound plan.
        """
        name = os.fspath(path)
        try:
            if not stat.S_ISREG(os.stat(name).st_mode):  # before opening: a pipe would wait for a writer
                raise PlanFileError(f"{name}: not a file; give the plan's JSON file")
            with open(name, "rb") as file:
                data = file.read(plan_json.MAX_BYTES + 1)
        except OSError as error:
            raise PlanFileError(f"{name}: cannot be read: {error.strerror or error}") from None
        except ValueError as error:  # a zero byte in the name
            raise PlanFileError(f"{name!r}: cannot be read: {error}") from None
        if len(data) > plan_json.MAX_BYTES:
            raise PlanFileError(f"{name}: larger than {plan_json.MAX_BYTES // 2**20} MiB; no plan is, give the plan's JSON file")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise PlanFileError(f"{name}:{line}: not UTF-8 text (byte {error.start}); restore the file or make the plan anew") from None
        return cls.parse(text, name)

    @classmethod
    def parse(cls, text: str, source: str = "plan") -> Plan:
        """The plan that `text` holds; `source` names it in messages. Raises as `load` does."""
        data = plan_json.read(text, source)
        found = data.get("format"), data.get("version")
        if found[0] != FORMAT:
            raise PlanFileError(f'{source}: not an autopar plan: "format" is {_quote(found[0])} and should be "{FORMAT}"')
        if type(found[1]) is not int or found[1] != VERSION:
            remedy = (
                "update autopar to read it" if type(found[1]) is int and found[1] > VERSION else "make the plan anew with `autopar plan`"
            )
            raise PlanFileError(f"{source}: plan version {_quote(found[1])}; this autopar reads version {VERSION}; {remedy}")
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanFileError(_explain(error, text, source)) from None
        problems = check(plan)
        if problems:
            raise PlanFileError(_lines([(problem.path, problem.message) for problem in problems], text, source))
        return plan

    def sampler(self, dataset: Any, **options: Any) -> Any:
        """A `DistributedSampler` that gives this rank its part of every batch of `dataset`, for `parallelize(..., inputs="per-rank")`.

        `options`: `shuffle`, `seed`, `drop_last`, `rank`; see `autopar.runtime.sampler`.
        """
        # By name, because `runtime` stands above `ir`, and a plan must be read without torch.
        return import_module("autopar.runtime.sampler").sampler(self, dataset, **options)

    def __str__(self) -> str:
        """What a person reads in a minute; see `autopar.ir.plan_text`."""
        from autopar.ir.plan_text import summary  # which reads plans, and so imports this file

        return summary(self)


def _mode(target: Path) -> int:
    """Permission bits for the file: those it has, or those a new file gets."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _quote(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float) or value is None else f"a {type(value).__name__}"
    text = "missing" if value is None else text
    return text if len(text) <= 40 else text[:37] + "..."


SHOWN = 8  # a file damaged everywhere is told in the first few places


def _lines(problems: list[tuple[plan_json.Path, str]], text: str, source: str) -> str:
    lines = []
    for path, message in problems[:SHOWN]:
        line = plan_json.locate(text, path)
        place = source if line is None else f"{source}:{line}"
        lines.append(f"{place}: {plan_json.show_path(path) or 'plan'}: {message}")
    if len(problems) > SHOWN:
        lines.append(f"{source}: and {len(problems) - SHOWN} more such places")
    return "\n".join(lines)


def _explain(error: ValidationError, text: str, source: str) -> str:
    """pydantic's findings in this project's words: where, what, and what to write instead."""
    problems = [(tuple(item["loc"]), _sentence(dict(item))) for item in error.errors(include_url=False, include_context=True)]
    return _lines(problems, text, source)


def _sentence(item: dict[str, Any]) -> str:
    context = item.get("ctx", {})
    match item["type"]:
        case "extra_forbidden":
            return f"unknown field; this autopar's version {VERSION} has none of that name: remove it or correct the spelling"
        case "missing":
            return "missing; add the field or make the plan anew"
        case "literal_error":
            return f"is {_quote(item['input'])}; write {context['expected']}"
        case "greater_than_equal":
            return f"is {_quote(item['input'])}; must be at least {context['ge']}"
        case "less_than_equal":
            return f"is {_quote(item['input'])}; must be at most {context['le']}"
        case "json_invalid":
            return f"not JSON: {context['error']}"
        case _:
            message = item["msg"].removeprefix("Input should be ").rstrip(".")
            return f"is {_quote(item['input'])}; write {message}"
