"""Is it still my model? The model on one device beside itself under a plan on local processes: every number that training makes.

    report = verify(model, example_inputs, plan)
    assert report.ok, report

Both sides compute in float64, where a wrong plan is off by far more than rounding, and without dropout, whose masks are random. One
side is the user's own eager model, not the traced graph, so that tracing is checked as well as splitting.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.errors import AutoparError, RanksFailedError, VerifyError
from autopar.ir.assignment import Assignment, expand
from autopar.ir.graph import Graph
from autopar.ir.plan import Plan
from autopar.ir.trace import OutputSlot, TracedModel, leaf_paths, split_example, trace
from autopar.runtime.checkpoint import whole_tensor
from autopar.runtime.dropout import without_dropout
from autopar.runtime.launch import RankPool
from autopar.runtime.materialize import materialize_whole
from autopar.runtime.module import ParallelModule
from autopar.runtime.one_dtype import FLOATS, computing_in, in_dtype
from autopar.runtime.process_mesh import mesh_for
from autopar.runtime.shards import coordinate_of, local_part
from autopar.runtime.verify_report import Facts, Key, VerifyReport, distance, judge

Optimizer = Literal["sgd", "adamw"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
"""Largest relative error that is still the same model. Rounding is near 1e-15 and 1e-7, and grows with the length of sums."""

_RANDOM = ("rand", "randn", "randint", "bernoulli", "multinomial", "normal", "uniform", "randperm", "rand_like", "randn_like")


@dataclass(frozen=True)
class Job:
    """What both sides do: `steps` training steps with each of `optimizers`, the inputs of step `i` being `batches[i]` (in the order of
    `traced.graph.inputs`). `state`: values of all parameters and buffers by name, whole.

    `traced` takes its tensors by position and returns its outputs as a tuple, so that no class of the user's goes to the ranks.
    """

    traced: TracedModel
    plan: Plan
    assignment: Assignment
    state: dict[str, Tensor]
    batches: tuple[tuple[Tensor, ...], ...]
    optimizers: tuple[Optimizer, ...]
    dtype: torch.dtype
    training: bool


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
) -> VerifyReport:
    """Train `model` for `steps` steps on one device and under `plan` on as many local processes as it has ranks, and compare all numbers.

    Compared are the loss, every output and every gradient of each step, every parameter and buffer after the last, with SGD with
    momentum and with AdamW; and each of these between the ranks. `example_inputs` is a global batch as for `autopar.plan`; later
    steps draw their batches from its rows. A model without a loss is given one: its outputs, weighted at random and added up.
    A model on `meta` is initialised first. `model` is not changed. `ranks`: a pool to use instead of starting processes.

    Raises `PlanMismatchError` or `PlanError` where `plan` is not one for this model, and `VerifyError` where a side cannot run.
    """
    if dtype not in TOLERANCE:
        raise VerifyError(f"verify compares in torch.float64 or torch.float32, not in {dtype}; leave `dtype` out for float64")
    started = time.monotonic()
    args, kwargs = split_example(example_inputs)
    traced = trace(model, args, kwargs)
    assignment = expand(plan, traced.graph)
    reference, notes = _one_device_copy(model, dtype)
    args, kwargs = pytree.tree_map(lambda leaf: _cast(leaf, dtype), (args, kwargs))
    traced = _traced_in(dtype, reference, traced, args, kwargs)
    optimizers: tuple[Optimizer, ...] = ("sgd", "adamw") if optimizer == "both" else (optimizer,)
    batches = _batches(traced, args, kwargs, steps)
    named: dict[str, Tensor] = {**dict(reference.named_parameters()), **dict(reference.named_buffers())}
    state = {name: tensor.detach().clone() for name, tensor in named.items()}
    job = Job(_flat(traced), plan, assignment, state, batches, optimizers, dtype, model.training)
    if drawn := sorted({op.target for op in traced.graph.ops if op.target.split(".")[1] in _RANDOM}):
        notes.append(f"the model draws random numbers ({', '.join(drawn)}), which differ between one device and many")
    expected = on_one_device(job, reference, traced)
    try:
        with RankPool(plan.world_size, collective_timeout_s=timeout_s) if ranks is None else nullcontext(ranks) as pool:
            found = pool.run(on_a_rank, job, timeout_s=timeout_s)
    except RanksFailedError as error:
        raise VerifyError(f"the plan's ranks could not run {steps} steps of {traced.graph.name}:\n{error}") from error
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    return judge(
        expected,
        found,
        limit,
        plan_name=plan.name,
        mesh=dict(plan.mesh),
        steps=steps,
        optimizers=optimizers,
        dtype=str(dtype).removeprefix("torch."),
        notes=tuple(notes),
        seconds=time.monotonic() - started,
    )


# ---- preparing ------------------------------------------------------------------------------------------------------------------


def _one_device_copy(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[str]]:
    """A copy of `model` on the CPU, with values, all floating-point tensors in `dtype`; and what there is to tell about it."""
    notes: list[str] = []
    copied = copy.deepcopy(model)
    if any(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers())):
        blank: list[str] = []

        def otherwise(name: str, tensor: Tensor) -> Tensor:
            blank.append(name)
            return tensor.normal_(std=0.02) if tensor.is_floating_point() else tensor

        copied = materialize_whole(copied, torch.device("cpu"), seed=0, otherwise=otherwise)
        notes.append("the model was on `meta` and got random weights")
        if blank:
            notes.append(f"no module initialises {', '.join(f'`{name}`' for name in blank[:5])}: small random numbers or zeros were taken")
    for module in copied.modules():
        config: Any = getattr(module, "config", None)
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
            anew = in_dtype(trace(reference, args, kwargs), dtype)
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


# ---- both sides -----------------------------------------------------------------------------------------------------------------


def on_one_device(job: Job, model: nn.Module, traced: TracedModel) -> Facts:
    """All numbers of `job` from the eager `model`, which has `job.state`. Raises `VerifyError` where the model itself fails."""
    literals = traced.literals

    def call(model: nn.Module, batch: tuple[Tensor, ...]) -> list[Tensor]:
        tensors = dict(zip((item.path for item in traced.graph.inputs), batch, strict=True))
        leaves = [literals[path] if path in literals else tensors[path] for path in traced.input_paths]
        args, kwargs = pytree.tree_unflatten(leaves, traced.in_spec)
        results, spec = pytree.tree_flatten(model(*args, **kwargs))
        by_path = dict(zip(leaf_paths(spec), results, strict=True))
        missing = [item.path for item in traced.graph.outputs if not isinstance(by_path.get(item.path), Tensor)]
        if missing:
            raise VerifyError(f"the traced model returns `{missing[0]}`, which the model itself does not: it returns {', '.join(by_path)}")
        return [by_path[item.path] for item in traced.graph.outputs]

    found: Facts = {}
    model.train(job.training)
    try:
        with computing_in(job.dtype), without_dropout(model):
            for kind in job.optimizers:
                found |= _train(job, kind, copy.deepcopy(model), call)
    except VerifyError:
        raise
    except Exception as error:
        raise VerifyError(f"the model itself fails on one device in {job.dtype}: {type(error).__name__}: {error}") from error
    return found


def on_a_rank(job: Job) -> tuple[Facts | None, dict[Key, float]]:
    """All numbers of `job` under its plan, whole, from rank 0 (None from others); and how far this rank's are from rank 0's (norms).

    Runs on every rank of a job of `job.plan.world_size` processes.
    """
    mesh = mesh_for(job.plan.mesh, "cpu")
    coordinate, sizes = coordinate_of(mesh), tuple(mesh.shape)
    found: Facts = {}
    with _default_dtype(job.dtype):
        for kind in job.optimizers:
            local = {}
            for name, tensor in job.state.items():
                part = tensor
                if name in job.assignment.storage:
                    part = local_part(tensor, job.assignment.storage[name].stored, sizes, coordinate)
                local[name] = part.clone(memory_format=torch.contiguous_format)
            module = ParallelModule(job.traced, job.plan, mesh, local, assignment=job.assignment)
            module.train(job.training)
            with without_dropout(module):
                found |= _train(job, kind, module, lambda module, batch: list(module(*batch)))
    distances = {}
    for key, tensor in found.items():
        theirs = tensor.clone()
        if dist.get_world_size() > 1 and theirs.numel():
            dist.broadcast(theirs.view(-1).view(torch.uint8), src=0)
        distances[key] = distance(tensor, theirs)
    return (found if dist.get_rank() == 0 else None), distances


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _train(job: Job, kind: Optimizer, module: nn.Module, call: Callable[[Any, tuple[Tensor, ...]], list[Tensor]]) -> Facts:
    """Train `module` and note every number, whole, under `(optimizer, kind of tensor, name)`."""
    found: Facts = {}

    def note(what: str, name: str, tensor: Tensor) -> None:
        found[kind, what, name] = whole_tensor(tensor).contiguous().clone()

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = _optimizer(kind, trained)
    for step, batch in enumerate(job.batches):
        results = call(module, batch)
        for item, result in zip(job.traced.graph.outputs, results, strict=True):
            note("output", f"{item.path}, step {step + 1}", result)
        loss = loss_of(results)
        if loss is None or optimizer is None:
            continue
        note("loss", f"step {step + 1}", loss)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                note("gradient", f"{name}, step {step + 1}", parameter.grad)
        optimizer.step()
    for name, parameter in module.named_parameters():
        note("parameter", name, parameter)
    for name, buffer in module.named_buffers():
        note("buffer", name, buffer)
    return found


def _optimizer(kind: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """With steps large enough that a wrong gradient shows in the parameters. AdamW divides by the gradient's own size: `eps` stands well
    above rounding noise, so that a gradient which is zero but for rounding (a key bias) moves nothing."""
    if not parameters:
        return None
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4)


def loss_of(results: list[Tensor]) -> Tensor | None:
    """The first floating scalar that carries a gradient; else all outputs that do, weighted by fixed random numbers and added up; a
    plain tensor. None where nothing carries one."""
    carrying = [result for result in results if result.requires_grad and result.is_floating_point()]
    scalars = [result for result in carrying if not result.dim()]
    if scalars:
        return _plain(scalars[0])
    if not carrying:
        return None
    total: Tensor | None = None
    for index, result in enumerate(carrying):
        result = _plain(result)
        weights = torch.randn(result.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(index)).to(result.dtype)
        term = (result * weights).sum() / result.numel() ** 0.5
        total = term if total is None else total + term
    return total


def _plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
