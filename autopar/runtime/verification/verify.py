"""Is it still my model? The model on one device beside itself under a plan on local processes: every number that training makes.

    report = verify(model, example_inputs, plan)
    assert report.ok, report

Both sides compute in float64, where a wrong plan is off by far more than rounding, and without dropout, whose masks are random. Under a
plan with a precision every number is in float64 too, and goes the same ways: parameters are copied before they are read. One
side is the user's own eager model, not the traced graph, so that tracing is checked as well as splitting.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import AutoparError, RanksFailedError, VerifyError
from autopar.ir.assignment import Expanded, expand_stages
from autopar.ir.experts import with_capacity
from autopar.ir.graph import Graph
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.pipelining.stages import cut
from autopar.ir.plan import Plan
from autopar.ir.precision import Precision
from autopar.ir.rules.table import RANDOM
from autopar.ir.tracing.leaf_modules import Chosen
from autopar.ir.tracing.trace import OutputSlot, TracedModel, split_example, trace
from autopar.runtime.precision import dtypes_of
from autopar.runtime.state.materialize import materialize_whole
from autopar.runtime.verification.launch import RankPool
from autopar.runtime.verification.one_dtype import FLOATS, computing_in, in_dtype, rule_in_dtype
from autopar.runtime.verification.verify_report import Facts, VerifyReport, judge
from autopar.runtime.verification.verify_runs import Job, Optimizer, copy_of, on_a_rank, on_one_device

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest relative error that is still the same model. Rounding is near 1e-15 and 1e-7, and grows with the length of sums."""


def verify(
    model: nn.Module,
    example_inputs: Any,
    plan: Plan,
    *,
    steps: int = 3,
    optimizer: Literal["both", "sgd", "adamw"] = "both",
    dtype: torch.dtype = torch.float64,
    tolerance: float | None = None,
    ranks: RankPool | None = None,
    timeout_s: float = 600.0,
    leaf_modules: Chosen | None = None,
) -> VerifyReport:
    """Train `model` for `steps` steps on one device and under `plan` on as many local processes as it has ranks, and compare all numbers.

    Compared are the loss, every output and every gradient of each step, every parameter and buffer after the last, with SGD with
    momentum and with AdamW; and each of these between the ranks that hold it. A plan with microbatches or a pipeline trains through
    `step`. `example_inputs` is a global batch as for `autopar.plan`; later
    steps draw their batches from its rows. A model without a loss is given one where `step` is not needed: its outputs, weighted at random
    and added up.
    A model on `meta` is initialised first. `model` is not changed. `ranks`: a pool to use instead of starting processes. `leaf_modules`: by
    default those of the plan.

    Raises `PlanMismatchError` or `PlanError` where `plan` is not one for this model, and `VerifyError` where a side cannot run.
    """
    subject = prepare(model, example_inputs, dtype, plan.precision, plan.leaf_modules if leaf_modules is None else leaf_modules)
    return compare(subject, plan, steps=steps, optimizer=optimizer, tolerance=tolerance, ranks=ranks, timeout_s=timeout_s)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model made ready to be compared with any number of its plans: `planned` is its trace as it is, for planning; `reference` a copy on
    the CPU with all numbers in `dtype`, and `traced` that copy's trace. `args`, `kwargs`: the example, in `dtype`."""

    planned: TracedModel
    reference: nn.Module
    traced: TracedModel
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    training: bool
    notes: tuple[str, ...]


def prepare(
    model: nn.Module,
    example_inputs: Any,
    dtype: torch.dtype = torch.float64,
    precision: Precision | None = None,
    leaf_modules: Chosen = (),
) -> Subject:
    """What `compare` needs of `model`, which is not changed, for plans with this `precision`; `leaf_modules` as for `trace`.

    Raises `TraceError`, and `VerifyError` where the model cannot be copied.
    """
    if dtype not in TOLERANCE:
        raise VerifyError(f"verify compares in torch.float64 or torch.float32, not in {dtype}; leave `dtype` out for float64")
    args, kwargs = split_example(example_inputs)
    planned = trace(model, args, kwargs, precision=precision, leaf_modules=leaf_modules)
    reference, notes = _one_device_copy(model, dtype)
    args, kwargs = pytree.tree_map(lambda leaf: _cast(leaf, dtype), (args, kwargs))
    traced = _traced_in(dtype, reference, planned, args, kwargs)
    if drawn := sorted({op.target for op in traced.graph.ops if op.target in RANDOM}):
        notes.append(f"both sides draw the same random numbers ({', '.join(drawn)}), the same in every step")
    return Subject(planned, reference, traced, args, kwargs, dtype, model.training, tuple(notes))


def compare(
    subject: Subject,
    plan: Plan,
    *,
    steps: int = 3,
    optimizer: Literal["both", "sgd", "adamw"] = "both",
    tolerance: float | None = None,
    ranks: RankPool | None = None,
    timeout_s: float = 600.0,
) -> VerifyReport:
    """`verify` of a model that is already prepared."""
    if optimizer not in ("both", "sgd", "adamw"):
        raise VerifyError(f'verify trains with "sgd", "adamw" or "both", not with {optimizer!r}')
    if steps < 1:
        raise VerifyError(f"verify needs at least one step to compare anything, not {steps}")
    started = time.monotonic()
    dtype, reference = subject.dtype, subject.reference
    expanded = expand_stages(plan, subject.planned.graph)
    rules = tuple(rule_in_dtype(rule, dtype) for rule in plan.given_rules)
    traced = replace(subject.traced, graph=with_capacity(replace(subject.traced.graph, rules=rules), plan.expert_capacity))
    dtypes = dtypes_of(plan.precision, subject.planned.graph).all_in(dtype)
    optimizers: tuple[Optimizer, ...] = ("sgd", "adamw") if optimizer == "both" else (optimizer,)
    batches = _batches(traced, subject.args, subject.kwargs, steps)
    named: dict[str, Tensor] = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    state = {name: tensor.detach().clone() for name, tensor in named.items()}
    draws = bool(traced.leaf_modules) or any(op.target in RANDOM for op in traced.graph.ops)
    job = Job(_flat(traced), plan, _again(expanded, traced.graph), state, batches, optimizers, dtype, subject.training, dtypes, draws)
    expected = on_one_device(job, reference, traced)
    try:
        with RankPool(plan.world_size, collective_timeout_s=timeout_s) if ranks is None else nullcontext(ranks) as pool:
            found = pool.run(on_a_rank, job, timeout_s=timeout_s, importing=_registering(reference, traced.graph))
    except RanksFailedError as error:
        raise VerifyError(f"the plan's ranks could not run {steps} steps of {traced.graph.name}:\n{error}") from error

    def judged(moved: Facts | None = None) -> VerifyReport:
        return judge(
            expected,
            found,
            TOLERANCE[dtype] if tolerance is None else tolerance,
            plan=plan,
            holders=_holders(expanded),
            steps=steps,
            optimizers=optimizers,
            dtype=str(dtype).removeprefix("torch."),
            notes=subject.notes,
            seconds=time.monotonic() - started,
            moved=moved,
        )

    report = judged()
    if report.ok:
        return report
    generator = torch.Generator().manual_seed(0)
    other = copy_of(reference)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.copy_(_with_other_last_digits(tensor, generator))
    changed = tuple(tuple(_with_other_last_digits(tensor, generator) for tensor in batch) for batch in batches)
    return judged(on_one_device(replace(job, batches=changed), other, traced))


def _with_other_last_digits(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """`tensor` with every number one unit in the last place larger or smaller, at random; whole numbers as they are."""
    if not tensor.is_floating_point():
        return tensor
    up = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int64)
    return tensor * (1 + (2 * up - 1).to(tensor.dtype) * torch.finfo(tensor.dtype).eps)


def _registering(model: nn.Module, graph: Graph) -> tuple[str, ...]:
    """The modules that make the operators of `graph` which are not PyTorch's or autopar's: those of the operators' own functions, where
    torch tells, and those of the model's classes."""
    foreign = {op.target.partition(".")[::2] for op in graph.ops if not op.target.startswith(("aten.", "autopar."))}
    if not foreign:
        return ()
    # Private: torch's book of operators made by `custom_op`. Without it the modules of the model's classes are all there is to go by.
    book = getattr(getattr(torch._library, "custom_ops", None), "OPDEFS", {})
    made = [book.get(f"{space}::{name.rpartition('.')[0]}") for space, name in sorted(foreign)]
    names = [getattr(getattr(item, "_init_fn", None), "__module__", None) for item in made]
    names += [type(item).__module__ for item in model.modules()]
    return tuple(dict.fromkeys(name for name in names if name and not name.startswith(("torch.", "autopar."))))


def _again(expanded: Expanded, graph: Graph) -> Expanded:
    """The same decisions for `graph`, which differs in nothing but dtypes."""
    batched = microbatched(graph, expanded.microbatched.count)
    stages = cut(batched.body, tuple(stage.start for stage in expanded.stages))
    for one, other in zip(expanded.stages, stages, strict=True):
        assert [op.name for op in one.graph.ops] == [op.name for op in other.graph.ops]
    return Expanded(batched, stages, expanded.assignments)


def _holders(expanded: Expanded) -> dict[str, tuple[int, ...]]:
    """By name of a parameter or buffer the stages that hold it."""
    found: dict[str, tuple[int, ...]] = {}
    for stage in expanded.stages:
        for fqn in (*(item.fqn for item in stage.graph.parameters), *(item.fqn for item in stage.graph.buffers)):
            found[fqn] = (*found.get(fqn, ()), stage.index)
    return found


def _one_device_copy(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """A copy of `model` on the CPU, with values, all floating-point tensors in `dtype`; and what there is to tell about it."""
    notes: list[str] = []
    try:
        copied = copy_of(model)
    except Exception as error:  # a module may refuse to be copied in any way it likes
        raise VerifyError(
            f"{type(model).__name__} cannot be copied, and verify trains a copy: `copy.deepcopy(model)` raises "
            f"{type(error).__name__}: {error}. Keep what cannot be copied out of the module"
        ) from error
    if any(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers())):
        blank: list[str] = []

        def otherwise(name: str, tensor: Tensor) -> Tensor:
            blank.append(name)
            return tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor

        copied = materialize_whole(copied, torch.device("cpu"), seed=0, otherwise=otherwise)
        notes.append("the model was on `meta` and got random weights")
        if blank:
            notes.append(f"no module initialises {', '.join(f'`{name}`' for name in blank[:5])}: small random numbers or zeros were taken")
    inner: Any
    for inner in copied.modules():
        if getattr(inner, "gradient_checkpointing", False) is True:
            inner.gradient_checkpointing = False  # changes no number, and recomputes outside of what sets the dtype
        config: Any = getattr(inner, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False  # as while tracing
    return copied.to(device="cpu", dtype=dtype), notes


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_meta:
        # Small whole numbers are valid as tokens, labels and masks of nearly every model.
        generator = torch.Generator().manual_seed(0)
        if leaf.dtype in FLOATS:
            return torch.randn(leaf.shape, dtype=dtype, generator=generator)
        return torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.dtype)
    leaf = leaf.detach().cpu()
    return leaf.to(dtype) if leaf.dtype in FLOATS else leaf


def _traced_in(
    dtype: torch.dtype, reference: nn.Module, planned: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TracedModel:
    """The traced model in `dtype`: traced anew if that gives the same operations (its constants then have all digits), else converted."""
    try:
        with computing_in(dtype):
            anew = in_dtype(trace(reference, args, kwargs, leaf_modules=list(planned.leaf_modules.values())), dtype)
    except AutoparError:
        return in_dtype(planned, dtype)
    same = [_shape_of(anew.graph), anew.input_paths, anew.in_spec] == [_shape_of(planned.graph), planned.input_paths, planned.in_spec]
    return anew if same else in_dtype(planned, dtype)


def _shape_of(graph: Graph) -> tuple[Any, ...]:
    return (
        [(op.name, op.target, op.operands, op.outputs) for op in graph.ops],
        {name: value.shape for name, value in graph.values.items()},
        graph.outputs,
        graph.buffers,
    )


def _batches(traced: TracedModel, args: tuple[Any, ...], kwargs: dict[str, Any], steps: int) -> tuple[tuple[Tensor, ...], ...]:
    """Inputs for each step: the example, then rows drawn from it; all inputs with as many rows as the first draw alike."""
    leaves = dict(zip(traced.input_paths, pytree.tree_leaves((args, kwargs)), strict=True))
    tensors = tuple(leaves[item.path] for item in traced.graph.inputs)
    rows = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 0)
    batches = [tensors]
    for step in range(1, steps):
        order = torch.randint(0, max(rows, 1), (rows,), generator=torch.Generator().manual_seed(step))
        batches.append(tuple(tensor[order] if tensor.dim() and tensor.shape[0] == rows else tensor for tensor in tensors))
    return tuple(batches)


def _flat(traced: TracedModel) -> TracedModel:
    """`traced` as a function of a flat tuple of tensors to a flat tuple of tensors."""
    inputs, outputs = traced.graph.inputs, traced.graph.outputs
    return replace(
        traced,
        in_spec=pytree.tree_structure((tuple(range(len(inputs))), {})),
        out_spec=pytree.tree_structure(tuple(range(len(outputs)))),
        output_slots=tuple(OutputSlot(index) for index in range(len(outputs))),
        input_paths=tuple(item.path for item in inputs),
        literals={},
    )
