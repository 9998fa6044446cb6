"""`Plan`: the one thing that search and runtime share, and the file that people review.

A plan is data. Reading one imports nothing of the user's and runs nothing. It is folded: repeated layers are written once, so that
a plan for 128 layers is as long as one for 2, and two plans diff well. Order is stable everywhere.

What decides is `mesh`, the `split` of every operation and the `stored` and `gather` of every parameter; all other fields say what
follows from these (placements, collectives, time, memory), for the reader. `autopar validate` checks that they agree.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autopar.errors import PlanFileError
from autopar.ir import plan_json
from autopar.ir.plan_check import check

FORMAT: Literal["autopar-plan"] = "autopar-plan"
VERSION: Literal[1] = 1

LARGEST = 2**63 - 1
Axes = dict[str, str]  # mesh axis -> split name or placement text, in mesh order
Size = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Bytes = Size
Seconds = Annotated[float, Field(ge=0)]


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


class InputPlan(_Data):
    """An input as the user passes it (`path`, global `shape`) and the `placement` that the first operations want it in."""

    path: str
    shape: tuple[Size, ...]
    dtype: str
    placement: Axes


class OutputPlan(_Data):
    """A tensor the model returns. `R` is returned whole on every rank; any other placement as a DTensor."""

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

    `name`: fully-qualified name; for a repeated layer the numbers that vary are written as a range, `model.layers.{0-31}.mlp.w`.
    `stored`: placement of the parameter, of its gradient and of its optimizer state, per axis (`S(..)` or `R`).
    `gather`: `"never"` (used as stored), `"step"` (gathered once a step and kept until its gradient is done: ZeRO-1/2) or `"use"`
    (gathered for the forward pass, freed, gathered again for the backward pass: ZeRO-3).
    `used`: placement in which the operations read it (follows from their splits).
    """

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


class SegmentPlan(_Data):
    """`count` repeats of `length` operations, from position `start` in the graph; `ops` lists the first repeat's."""

    name: str
    start: Size
    length: Count
    count: Count
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
    count: Count
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
    mesh: dict[str, Count]
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
