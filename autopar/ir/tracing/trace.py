"""From an `nn.Module` and example inputs to a `Graph`.

    traced = trace(model, (), {"input_ids": ids, "labels": labels})
    print(to_text(traced.graph))

Nothing is computed and nothing is allocated: parameters and inputs may be real or on `meta`. The model is as before afterwards.
The steps, each in its own file: `trace_repeats` (repeated layers become one operator), `trace_export` (torch.export on fake tensors),
`trace_lower` and `trace_assemble` (to the IR), `trace_expand` (the repeated layers again), `canonical` (to the forms the rest of autopar
knows), `reshard_points`.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import TraceError
from autopar.ir.graph import Graph
from autopar.ir.precision import Precision
from autopar.ir.tracing import trace_repeats as repeats
from autopar.ir.tracing.canonical import ALL_TOGETHER, EACH_ALONE, run_passes, without_call_numbers
from autopar.ir.tracing.leaf_modules import LEAF, Chosen, LeafModule, as_operators, chosen, without_values
from autopar.ir.tracing.reshard_points import add_reshard_points
from autopar.ir.tracing.trace_assemble import Assembled, OutputSlot, State, assemble, leaf_paths, state_of
from autopar.ir.tracing.trace_errors import as_trace_error, chain_of
from autopar.ir.tracing.trace_expand import expand, refuse_unsafe
from autopar.ir.tracing.trace_export import export_program
from autopar.ir.tracing.trace_leaves import observe, plain_numbers
from autopar.ir.tracing.trace_precision import as_read, computing_as

__all__ = ["OutputSlot", "TracedModel", "leaf_paths", "split_example", "trace"]

_MOST_ATTEMPTS = 8
"""Attempts to trace repeats once before tracing whole; each learns one thing about the model."""

_THROWS = 3
"""How often a model that draws from Python's random numbers is traced again, to see whether it matters."""


@dataclass(frozen=True)
class TracedModel:
    """A graph and what is needed to call it like the model.

    `in_spec` is the tree of `(args, kwargs)`; `input_paths` names its leaves in order, and `literals` holds those that are not tensors
    (they are baked into the graph: a call must bring equal ones); the other leaves are `graph.inputs`, in the same order.
    `out_spec` is the tree of the result, `output_slots` its leaves. `constants` holds the data of `graph.constants`. `precision`: as which
    it was traced. `leaf_modules` are the bodies of the operations `autopar.leaf`, by the path of the module that they are.
    """

    graph: Graph
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    output_slots: tuple[OutputSlot, ...]
    constants: dict[str, Tensor]
    input_paths: tuple[str, ...]
    literals: dict[str, Any]
    precision: Precision | None = None
    leaf_modules: dict[str, LeafModule] = field(default_factory=dict)


def split_example(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that `example_inputs` stand for.

    A tuple is all positional arguments, a mapping all keywords; a tensor or any other tree is one positional argument.
    """
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    if type(example_inputs) is tuple:
        return example_inputs, {}
    return (example_inputs,), {}


def trace(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    once_per_repeat: bool = True,
    precision: Precision | None = None,
    leaf_modules: Chosen = (),
) -> TracedModel:
    """Trace `model(*args, **kwargs)`, in training or evaluation mode as `model.training` says, with the shapes of these inputs.

    With `once_per_repeat`, repeated child modules are exported once and copied; the result is the same graph. `precision`: as the model is
    to compute; by default in its own dtypes, without a surrounding `torch.autocast`. `leaf_modules` are not traced into: see
    `autopar.ir.tracing.leaf_modules`.
    Raises `TraceError` for what cannot be traced, naming the user's line.
    """

    leaves = chosen(model, leaf_modules) if leaf_modules else {}
    if leaves and precision is not None:
        raise TraceError(
            f"leaf modules compute as they are, and the precision {precision.compute} would have them compute otherwise: plan without a "
            "precision, or without leaf_modules"
        )

    def once() -> TracedModel:
        return _trace(model, args, dict(kwargs or {}), once_per_repeat, precision, leaves)

    with _garbage_collection_paused(), _dice_kept():
        changed: dict[tuple[str, str], tuple[float, float]] = {}
        dice: list[str] = []
        with computing_as(model, precision):
            if leaves:
                _observe(model, args, dict(kwargs or {}), leaves)
            with _watched(model, changed, dice):
                found = once()
            inside = {key: value for key, value in changed.items() if not _in_leaf(key[0], leaves)}
            if inside:
                _refuse_counting(model, inside, lambda: once().graph, found.graph)
            if dice:
                _refuse_dice(model, dice[0], lambda: once().graph, found.graph)
        return found


def _observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: dict[str, LeafModule]) -> None:
    try:
        observe(model, args, kwargs, leaves)
    except TraceError:
        raise
    except Exception as error:
        raise as_trace_error(error, model) from error


def _in_leaf(path: str, leaves: Mapping[str, LeafModule]) -> bool:
    return any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves)


@contextmanager
def _dice_kept() -> Iterator[None]:
    """Python's and numpy's random numbers go on afterwards as if nothing had been traced."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _thrown() -> tuple[Any, ...]:
    """Where the random numbers of `random` and of `numpy.random` are."""
    _, keys, position, *rest = np.random.get_state()
    return random.getstate(), (np.asarray(keys).tobytes(), position, *rest)


def _refuse_dice(model: nn.Module, which: str, traced_again: Callable[[], Graph], first: Graph) -> None:
    """Raise `TraceError` where `forward`, which draws from `which`, computes something else when it draws other numbers."""
    if all(traced_again().fingerprint() == first.fingerprint() for _ in range(_THROWS)):
        return
    raise TraceError(
        f"the forward of {type(model).__name__} draws random numbers from `{which}`, and what it computes depends on them; a program would "
        "compute with the first draw for ever. Draw with PyTorch, as in `torch.rand(())`, and choose with `torch.where`, or leave the "
        "module that draws as it is: leaf_modules=[...]"
    )


@contextmanager
def _watched(model: nn.Module, changed: dict[tuple[str, str], tuple[float, float]], dice: list[str]) -> Iterator[None]:
    """Note the plain numbers of modules that `forward` changes, by path and name: (before, after); tracing itself puts them back. And in
    `dice` the generators other than PyTorch's that it draws from."""
    forward, own = model.forward, "forward" in model.__dict__

    @wraps(forward)
    def watching(*args: Any, **kwargs: Any) -> Any:
        before, thrown = plain_numbers(model), _thrown()
        result = forward(*args, **kwargs)
        dice.extend(name for name, one, other in zip(("random", "numpy.random"), thrown, _thrown(), strict=True) if one != other)
        changed.update({key: (before[key], value) for key, value in plain_numbers(model).items() if before.get(key, value) != value})
        return result

    model.__dict__["forward"] = watching
    try:
        yield
    finally:
        if own:
            model.__dict__["forward"] = forward
        else:
            del model.__dict__["forward"]


def _refuse_counting(
    model: nn.Module, changed: dict[tuple[str, str], tuple[float, float]], traced_again: Callable[[], Graph], first: Graph
) -> None:
    """Raise `TraceError` where the second call, with the numbers as the first left them, computes something else than the first."""
    try:
        for (path, name), (_, after) in changed.items():
            model.get_submodule(path).__dict__[name] = after
        if traced_again().fingerprint() == first.fingerprint():
            return
    finally:
        for (path, name), (before, _) in changed.items():
            model.get_submodule(path).__dict__[name] = before
    (path, name), (before, after) = next(iter(changed.items()))
    where = f"`{path}`, a {type(model.get_submodule(path)).__name__}," if path else f"the model, a {type(model).__name__},"
    raise TraceError(
        f"`self.{name}` of {where} goes from {before} to {after} in one call, and the model computes something else in the next; a program "
        f"would compute the first for ever. Keep it as a tensor: self.register_buffer('{name}', torch.tensor({before}))"
    )


def _trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    once_per_repeat: bool,
    precision: Precision | None,
    leaves: dict[str, LeafModule],
) -> TracedModel:
    with _garbage_collection_paused():
        call = _Call(model, args, kwargs, state_of(model), once_per_repeat and not leaves, leaves)
        try:
            found = call.with_repeats_once() or call.whole()
        except TraceError:
            raise
        except Exception as error:
            raise as_trace_error(error, model) from error
        graph = as_read(run_passes(found.graph, ALL_TOGETHER), precision)
        graph = without_call_numbers(add_reshard_points(graph)).verify()
    constants = {item.value: found.constants[item.value] for item in graph.constants}
    for op in graph.ops:
        if op.target == LEAF and op.module not in leaves:
            raise TraceError(f"leaf module {op.args[0]} is called by its `forward`; call the module itself, as in `self.router(x)`")
    bodies = {path: replace(leaf, module=without_values(leaf.module)) for path, leaf in leaves.items()}
    return TracedModel(graph, call.in_spec, found.out_spec, found.slots, constants, call.input_paths, call.literals, precision, bodies)


class _Call:
    """One call of a model that is to be traced."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: State,
        once_per_repeat: bool,
        leaf_modules: dict[str, LeafModule],
    ) -> None:
        self.model, self.state, self.once_per_repeat, self.leaf_modules = model, state, once_per_repeat, leaf_modules
        leaves, self.in_spec = pytree.tree_flatten((args, kwargs))
        self.args, self.kwargs = pytree.tree_unflatten(_each_its_own(leaves), self.in_spec)
        positional, named = self.in_spec.children()
        self.input_paths = tuple(path for part in (positional, named) if part.num_leaves for path in leaf_paths(part))
        self.literals = {path: leaf for path, leaf in zip(self.input_paths, leaves, strict=True) if not isinstance(leaf, Tensor)}
        for path, leaf in self.literals.items():
            if leaf is not None and not isinstance(leaf, bool | int | float | str):
                raise TraceError(
                    f"input `{path}` is a {type(leaf).__name__}; autopar takes tensors, numbers, strings and None in lists, tuples and "
                    "dicts. Register its type with `torch.utils._pytree.register_pytree_node` if it holds tensors"
                )

    def whole(self) -> Assembled:
        with as_operators(self.leaf_modules):
            return self._assembled(export_program(self.model, self.args, self.kwargs))

    def _assembled(self, program: Any) -> Assembled:
        paths = [path for path in self.input_paths if path not in self.literals]
        found = assemble(type(self.model).__name__, program, self.state, paths, self.model.training)
        return replace(found, graph=run_passes(found.graph, EACH_ALONE))

    def with_repeats_once(self) -> Assembled | None:
        """Trace with repeated modules exported once; None where that is not certain to give what the whole trace gives."""
        significant: frozenset[str] = frozenset()
        traced: frozenset[str] = frozenset()
        chained = True
        for _ in range(_MOST_ATTEMPTS if self.once_per_repeat else 0):
            groups = repeats.find_repeats(self.model, significant)
            if not groups:
                return None
            try:
                with repeats.once_per_repeat(self.model, groups, traced, chained=chained) as recording:
                    program = export_program(self.model, self.args, self.kwargs, refuse_unsafe)
                found = self._assembled(program)
                return replace(found, graph=expand(found.graph, recording))
            except Exception as error:
                reason = next((item for item in chain_of(error) if isinstance(item, repeats.Uncertain)), None)
                if isinstance(reason, repeats.Looked) and reason.name not in significant:
                    significant |= {reason.name}
                elif isinstance(reason, repeats.UnseenSignature) and reason.path not in traced:
                    traced |= {reason.path}
                elif chained:
                    chained = False
                else:
                    return None
        return None


def _each_its_own(leaves: list[Any]) -> list[Any]:
    """`leaves`, a tensor that is given twice replaced by another one like it: export would have both places read the one, and a later call,
    which may bring two, would be computed with the one as well."""
    seen: set[int] = set()
    found = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            again = id(leaf) in seen
            seen.add(id(leaf))
            leaf = torch.empty_like(leaf).requires_grad_(leaf.requires_grad) if again else leaf
        found.append(leaf)
    return found


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Tracing makes many objects that live on; looking for cycles among all of torch's and the model's would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
