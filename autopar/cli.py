"""The command line: `autopar plan | show | explain | diff | simulate | validate | verify | clusters | rules | schema`.

Exit codes: 0 for success, 1 where `diff` finds a difference, `validate` a contradiction, `verify` a deviation, or `plan` nothing that fits;
2 for errors of use, each told in one message on stderr (AUTOPAR_DEBUG=1 adds the traceback). Reports go to stdout, all else to stderr.

Every import of weight is inside a command: reading plans must not wait for torch.
"""

from __future__ import annotations

import os
import re
import sys
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from autopar.errors import AutoparError, InfeasibleError, PlanError
from autopar.ir.pipelining.schedules import SCHEDULES

if TYPE_CHECKING:
    from autopar.ir.plan import Plan

app = typer.Typer(
    name="autopar",
    help="Spread a PyTorch model over a cluster: plan, review, verify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="MODULE:FACTORY (a function that returns a model and its inputs) or hf:CONFIG.")
]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Global batch size of the example inputs.")]
Seq = Annotated[int | None, typer.Option("--seq", min=1, help="Sequence length of the example inputs.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Parameters' dtype: fp32, bf16, fp16 or fp64.")]


class Baseline(StrEnum):
    """Well-known plans by name."""

    ddp = "ddp"
    zero1 = "zero1"
    fsdp = "fsdp"
    tp = "tp"
    tp_sp = "tp-sp"


class Effort(StrEnum):
    """How far the search goes."""

    fast = "fast"
    exact = "exact"


class Recompute(StrEnum):
    """Which repeats compute their forward pass again in the backward pass."""

    auto = "auto"
    none = "none"
    all = "all"


class Optimizer(StrEnum):
    """Whose state is counted."""

    adamw = "adamw"
    sgd_momentum = "sgd-momentum"
    sgd = "sgd"


@app.command(short_help="Search the best plan for a model on a cluster.")
def plan(
    source: Source,
    cluster: Annotated[
        str, typer.Option("--cluster", "-c", help="A preset such as h100x8 or cpu:4 (see `autopar clusters`), or a .toml file.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the plan.")] = None,
    mesh: Annotated[
        str | None,
        typer.Option(
            "--mesh",
            metavar="SIZES",
            help="Force a mesh: 2x4 or dp=2,tp=4; with a pipeline pp=2,dp=2,tp=2, or one mesh a group, as in dp=4+dp=2,tp=2.",
        ),
    ] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", metavar="NAME", help=f"Of the pipeline: {', '.join(SCHEDULES)}.")] = None,
    microbatches: Annotated[
        int | None, typer.Option("--microbatches", min=1, metavar="N", help="Equal parts of the batch, one after the other in a step.")
    ] = None,
    stages: Annotated[int | None, typer.Option("--stages", min=1, metavar="N", help="Stages of the pipeline in all.")] = None,
    cuts: Annotated[
        str | None,
        typer.Option("--cuts", metavar="N,N,...", help="Operations at which its later stages begin; else the best are searched."),
    ] = None,
    recompute: Annotated[
        Recompute | None,
        typer.Option("--recompute", help="Repeats that compute their forward pass again, to save memory; auto: as many as pay."),
    ] = None,
    batch: Batch = None,
    seq: Seq = None,
    dtype: Dtype = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="DTYPE",
            help="Compute in bf16 with float32 parameters; or in full: compute=bf16,stored=fp32,reduce=bf16,by=autocast.",
        ),
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            "--pin",
            metavar="GLOB=PLACEMENT",
            help="Force a storage, '*.up_proj.weight=S(0)@tp', or a split, 'scaled_dot_product_attention_*=ring@tp'. Repeatable.",
        ),
    ] = None,
    baseline: Annotated[Baseline | None, typer.Option("--baseline", help="A well-known plan instead of the best.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the well-known plans beside the searched one.")] = False,
    effort: Annotated[Effort, typer.Option("--effort", help="exact: proven by HiGHS where the fast search leaves a gap.")] = Effort.fast,
    memory_limit: Annotated[
        str | None, typer.Option("--memory-limit", metavar="SIZE", help="Memory of a rank that may be used: 70GB, 64GiB.")
    ] = None,
    optimizer: Annotated[Optimizer, typer.Option("--optimizer", help="Whose state is counted.")] = Optimizer.adamw,
    expert_imbalance: Annotated[
        float | None,
        typer.Option(
            "--expert-imbalance", min=1, metavar="FACTOR", help="Rows of the fullest rank over their mean, where experts are split."
        ),
    ] = None,
    expert_capacity: Annotated[
        float | None,
        typer.Option("--expert-capacity", min=0, metavar="FACTOR", help="Let experts drop rows beyond so many times the mean: 1.25."),
    ] = None,
    alternatives: Annotated[bool, typer.Option("--alternatives", help="Price every other storage too, for `autopar explain`.")] = False,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", min=0, metavar="SECONDS", help="Stop searching after this long.")
    ] = None,
    leaf: Annotated[
        list[str] | None,
        typer.Option("--leaf", metavar="GLOB", help="Modules that are not traced into, such as '*.router'. May be repeated."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Show every operation and collective.")] = False,
) -> None:
    """Search the best plan for MODEL on a cluster, show it, and write it with -o. Needs no GPU."""
    if compare and baseline:
        raise PlanError("--compare shows all baselines; leave --baseline away")
    options: dict[str, Any] = {
        "mesh": None if mesh is None else _mesh(mesh),
        "pins": dict(map(_pin, pin or [])) or None,
        "effort": effort.value,
        "optimizer": optimizer.value,
        "memory_limit_bytes": None if memory_limit is None else _size(memory_limit),
        "time_limit_s": time_limit,
        "alternatives": alternatives,
        "leaf_modules": tuple(leaf or ()),
    }
    staged = {
        "schedule": None if schedule is None else _schedule(schedule),
        "microbatches": microbatches,
        "stages": stages,
        "cuts": None if cuts is None else _cuts(cuts),
        "recompute": None if recompute is None else recompute.value,
        "expert_imbalance": expert_imbalance,
        "expert_capacity": expert_capacity,
    }
    options |= {name: value for name, value in staged.items() if value is not None}
    if precision is not None:
        options["precision"] = _precision(precision)
    _check_writable(output)

    from autopar.report.progress import live_line

    with live_line("loading the model") as (enter, step):
        model, inputs = _load(source, batch, seq, dtype)
        enter("tracing")

        import autopar

        options["progress"] = step
        if compare:
            plans = autopar.compare(model, inputs, cluster, **options)
        else:
            plans = {"": autopar.plan(model, inputs, cluster, baseline=None if baseline is None else baseline.value, **options)}

    from autopar.ir.plan import Plan
    from autopar.report.compare import compare as show_compared
    from autopar.report.show import show as show_plan
    from autopar.report.terminal import console

    screen = console()
    chosen = plans["searched" if compare else ""]
    if isinstance(chosen, Plan):
        if output is not None:
            chosen.save(output)  # first: who reads the report may stop reading
        show_plan(chosen, screen, full)
    if compare:
        screen.print()
        show_compared(plans, screen)
    if not isinstance(chosen, Plan):
        raise chosen
    if output is not None:
        print(f"plan written to {output}", file=sys.stderr)
    if not chosen.predicted.fits:
        raise typer.Exit(1)


@app.command(short_help="Show a plan for review.")
def show(plan: PlanFile, full: Annotated[bool, typer.Option("--full", help="Show every operation and collective.")] = False) -> None:
    """Show a plan so that it can be reviewed in a minute."""
    from autopar.report.show import show as show_plan
    from autopar.report.terminal import console

    show_plan(_read(plan), console(), full)


@app.command(short_help="Say why a parameter or operation lies as it does.")
def explain(
    plan: PlanFile,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A parameter, operation or module, or a glob over these.")],
    instead: Annotated[str | None, typer.Option("--instead", metavar="PLACEMENT", help="Ask about one storage: 'S(0)@tp'.")] = None,
) -> None:
    """Say why NAME lies as it does: what serves it, and what each alternative would cost."""
    from autopar.report.explain import explain as explain_name
    from autopar.report.terminal import console

    explain_name(_read(plan), name, console(), instead)


@app.command(short_help="Say what differs between two plans.")
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A plan file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another plan file.")],
    full: Annotated[bool, typer.Option("--full", help="Also show operations that only follow, such as additions and views.")] = False,
) -> None:
    """Say what differs between two plans: decisions first, then what follows. Exits 1 where they differ, 0 where they are equal."""
    from autopar.report.diff import diff as diff_plans
    from autopar.report.terminal import console

    first, second = _read(a), _read(b)
    names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
    if diff_plans(first, second, console(), names, full):
        raise typer.Exit(1)


@app.command(short_help="Say what a step takes, and draw it.")
def simulate(
    plan: PlanFile,
    trace: Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Write a Chrome trace, for ui.perfetto.dev.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the schedule: one row a group of ranks.")] = None,
    full: Annotated[bool, typer.Option("--full", help="List every group of ranks, however many there are.")] = False,
) -> None:
    """Run a plan through the simulator: step time, bubble, and what each group of ranks does and holds over time."""
    from autopar.report.simulate import simulate as simulate_plan
    from autopar.report.terminal import console

    _check_writable(trace, "--trace")
    _check_writable(svg, "--svg")
    timeline = simulate_plan(_read(plan), console(), full)
    if trace is not None:
        from autopar.report.chrome_trace import chrome_trace

        _write(trace, chrome_trace(timeline), "trace")
    if svg is not None:
        from autopar.report.schedule_svg import schedule_svg

        _write(svg, schedule_svg(timeline), "picture")


def _write(path: Path, text: str, what: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise PlanError(f"{path}: cannot be written: {error.strerror or error}") from None
    print(f"{what} written to {path}", file=sys.stderr)


@app.command(short_help="Check a plan, alone or with its model.")
def validate(
    plan: PlanFile,
    source: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The model to validate against: MODULE:FACTORY or hf:CONFIG.")
    ] = None,
    batch: Batch = None,
    seq: Seq = None,
    dtype: Dtype = None,
) -> None:
    """Check that a plan holds together, and with MODEL that it is a plan for that model. Exits 1 with the contradictions."""
    from autopar.report.validate import contradictions, contradictions_with

    found = _read(plan)
    if source is None:
        problems = contradictions(found)
    else:
        from autopar.report.progress import live_line

        with live_line("loading the model") as (enter, _):
            model, inputs = _load(source, *_sizes(found, source, batch, seq, dtype))
            enter("tracing")

            from autopar.ir.tracing.trace import split_example, trace

            args, kwargs = split_example(inputs)
            again = trace(model, args, kwargs, precision=found.precision, leaf_modules=found.leaf_modules)
            problems = contradictions_with(found, again.graph)
    for problem in problems:
        print(f"{plan}: {problem}")
    if problems:
        raise typer.Exit(1)
    print(f"{plan}: sound" + ("" if source is None else f", and a plan for {source}"))


@app.command(short_help="Compare a plan's training with one device.")
def verify(source: Source, plan: PlanFile, batch: Batch = None, seq: Seq = None, dtype: Dtype = None) -> None:
    """Compare losses, gradients and updated parameters of MODEL under PLAN with those on one device. Exits 1 where they deviate."""
    from autopar.report.progress import live_line

    found = _read(plan)
    with live_line("loading the model") as (enter, _):
        model, inputs = _load(source, *_sizes(found, source, batch, seq, dtype))
        enter(f"training on 1 and on {found.world_size} local processes")

        import autopar

        report = autopar.verify(model, inputs, found)
    if words := _what_ran(found):
        print(words)
    print(report)
    if not report.ok:
        raise typer.Exit(1)


@app.command(short_help="List the clusters known by name.")
def clusters() -> None:
    """List the clusters that --cluster knows by name, with the numbers that plans are priced by."""
    from autopar.report.clusters import clusters as show_clusters
    from autopar.report.terminal import console

    show_clusters(console())


@app.command(short_help="List the sharding rules.")
def rules(pattern: Annotated[str, typer.Argument(metavar="[GLOB]", help="Operators, such as 'aten::*mm*'.")] = "*") -> None:
    """List the sharding rules that autopar has, and those that it has found by trial on this machine."""
    from autopar.report.rules import rules as show_rules
    from autopar.report.terminal import console

    show_rules(console(), pattern)


@app.command(short_help="Print the JSON schema of plan files.")
def schema() -> None:
    """Print the JSON schema of plan files."""
    import json

    from autopar.ir.plan import Plan

    print(json.dumps(Plan.model_json_schema(), indent=2))


def _read(path: Path) -> Plan:
    from autopar.ir.plan import Plan

    return Plan.load(path)


_DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _load(source: str, batch: int | None, seq: int | None, dtype: str | None) -> tuple[Any, Any]:
    """The model and its example inputs."""
    from autopar.ir.tracing.sources import load_model

    # Unless the user asks for more: advice on a configuration made for planning is not what the command was called for.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return load_model(source, batch, seq, None if dtype is None else _DTYPES.get(dtype, dtype))


def _sizes(plan: Plan, source: str, batch: int | None, seq: int | None, dtype: str | None) -> tuple[int | None, int | None, str | None]:
    """For a transformers model, whose inputs are made here, what was not given is as the plan has it."""
    if not source.startswith("hf:") or not plan.inputs or not plan.parameters:
        return batch, seq, dtype
    shape = plan.inputs[0].shape
    stored = plan.precision.stored if plan.precision is not None else plan.parameters[0].dtype
    return batch or (shape[0] if shape else None), seq or (shape[1] if len(shape) == 2 else None), dtype or stored


def _what_ran(plan: Plan) -> str:
    """How the batch went through, where it did not go through whole and at once."""
    from autopar.ir.plan_text import mesh_words, pipeline_rows

    rows = pipeline_rows(plan)
    return "\n".join(f"{name.ljust(10)}  {words}" for name, words in [("mesh", mesh_words(plan)), *rows]) if rows else ""


_AXIS = re.compile(r"\s*([A-Za-z]\w{0,30})\s*[=:]\s*(\d{1,7})\s*")


def _mesh(text: str) -> tuple[int, int] | dict[str, int] | list[dict[str, int]]:
    """`2x4`, `pp=2,dp=2,tp=2`, or a mesh for each group of a pipeline: `dp=4+dp=2,tp=2`."""
    match = re.fullmatch(r"\s*(\d{1,7})\s*[xX*,]\s*(\d{1,7})\s*", text)
    if match and int(match[1]) and int(match[2]):
        return int(match[1]), int(match[2])
    groups = []
    for part in text.split("+"):
        axes = [_AXIS.fullmatch(item) for item in part.split(",")]
        sizes = {axis[1]: int(axis[2]) for axis in axes if axis and int(axis[2])}
        if len(sizes) != len(axes) or ("pp" in sizes and "+" in text):
            raise PlanError(
                f"--mesh {text}: write two sizes, such as 2x4: 2 on the outer axis dp, 4 on the inner axis tp; or name the axes: "
                "dp=2,tp=4, with a pipeline pp=2,dp=2,tp=2, or dp=4+dp=2,tp=2 for two groups of ranks with a mesh each"
            )
        groups.append(sizes)
    return groups if len(groups) > 1 else groups[0]


def _schedule(name: str) -> str:
    if name not in SCHEDULES:
        near = get_close_matches(name.lower(), SCHEDULES, 2, 0.5)
        hint = f"did you mean {' or '.join(f'`{word}`' for word in near)}? " if near else ""
        raise PlanError(f"--schedule {name}: no schedule has that name; {hint}There are {', '.join(SCHEDULES)}")
    return name


def _precision(text: str) -> str | dict[str, str]:
    """`bf16`, or fields such as `compute=bf16,reduce=bf16,by=autocast`."""
    if "=" not in text:
        return _DTYPES.get(text, text)
    fields = dict(item.partition("=")[::2] for item in text.split(","))
    return {name.strip(): _DTYPES.get(dtype.strip(), dtype.strip()) for name, dtype in fields.items()}


def _cuts(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\s*\d{1,9}(\s*,\s*\d{1,9})*\s*", text):
        raise PlanError(f"--cuts {text}: write the positions of the first operations of all stages but the first, such as 120,240")
    return tuple(map(int, text.split(",")))


def _pin(text: str) -> tuple[str, str]:
    glob, equals, placement = text.partition("=")
    if not equals or not glob.strip() or not placement.strip():
        raise PlanError(f"--pin {text}: write GLOB=PLACEMENT, such as '*.up_proj.weight=S(0)@tp'")
    return glob.strip(), placement.strip()


_UNITS = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024), (letter, 1024))
}


def _size(text: str) -> int:
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([a-zA-Z]*)\s*", text)
    if not match or match[2].lower() not in _UNITS:
        raise PlanError(f"--memory-limit {text}: write a size such as 70GB, 64GiB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _check_writable(output: Path | None, option: str = "-o") -> None:
    """Before minutes of work, not after them."""
    if output is None:
        return
    if output.is_dir():
        raise PlanError(f"{option} {output}: is a directory; name a file")
    if not output.parent.is_dir():
        raise PlanError(f"{option} {output}: the directory `{output.parent}` does not exist; make it first")


def _fail(error: AutoparError) -> NoReturn:
    if os.environ.get("AUTOPAR_DEBUG"):
        raise error
    text = f"error: {error}"
    if isinstance(error, InfeasibleError) and error.remedies and error.remedies[0] not in text:
        text += "".join(f"\n  {number}. {remedy}" for number, remedy in enumerate(error.remedies, 1))
    print(text, file=sys.stderr)
    sys.exit(1 if isinstance(error, InfeasibleError) else 2)


def main(arguments: list[str] | None = None) -> None:
    """The console script. Ends the process with the exit codes above."""
    try:
        app(args=arguments, prog_name="autopar")
    except AutoparError as error:
        _fail(error)


if __name__ == "__main__":
    main()
