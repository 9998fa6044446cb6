"""From the arguments of a call to the input tensors of the traced graph.

Arguments are matched to the traced call by name: what was traced as a keyword may come by position and the other way round. Tensors
must have the shape and dtype that were traced, on the device the program runs on; other values must equal the traced ones, since
they are baked into the program. Nothing is moved, cut or gathered here: the program itself takes an input from the state in which
it is given, whole or split along the batch, to the states that its operations want.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.errors import InputError
from autopar.ir.conversion import State
from autopar.ir.placement import R, S
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import TracedModel, leaf_paths
from autopar.runtime import handshake
from autopar.runtime.convert import Place
from autopar.runtime.sampler import batch_axes, batch_inputs, batch_parts

Mode = Literal["global", "per-rank"]


@dataclass(frozen=True, slots=True)
class _Slot:
    """One tensor input: its `path`, global `shape` as traced, and the shape and dtype in which this rank passes it."""

    path: str
    shape: tuple[int, ...]
    given: tuple[int, ...]
    dtype: torch.dtype


class InputBinder:
    """Binds calls to the inputs of a traced graph; `states[path]` is the state in which this rank passes an input (`given_states`).

    `whole`: every rank passes the same whole batch, which the first call checks. `device`: where tensors must be (None: anywhere).
    `signature`: that of the model's `forward`, to know arguments by position from those by keyword.
    """

    def __init__(
        self,
        traced: TracedModel,
        states: Mapping[str, State],
        place: Place,
        *,
        whole: bool = True,
        device: torch.device | None = None,
        signature: inspect.Signature | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        self.traced = traced
        self.whole = whole
        self.device = device
        self.signature = signature
        self.timeout_s = timeout_s
        self._first = True
        values = [(item.path, traced.graph.values[item.value]) for item in traced.graph.inputs]
        self.slots = tuple(
            _Slot(path, value.shape, place.local_shape(value.shape, states[path]), getattr(torch, value.dtype)) for path, value in values
        )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The call's tensors as this rank passes them, in the order of `graph.inputs`.

        The first call is compared across the ranks: a problem on one raises on all. Raises `InputError` saying what was traced and
        what came, and `RankDisagreementError` where whole first batches differ.
        """
        problem, tensors = None, {}
        try:
            tensors = self.match(args, kwargs)
        except InputError as error:
            problem = error
        if self._first:
            handshake.compare_first_batch(tensors, problem, self.whole, self.timeout_s)
            self._first = False
        if problem is not None:
            raise problem
        return tuple(tensors[slot.path] for slot in self.slots)

    def match(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """The call's tensors by input path, checked. Talks to nobody. Raises `InputError`."""
        leaves = self._leaves(args, kwargs)
        literals = self.traced.literals
        known = dict.fromkeys(self.traced.input_paths)
        wrong: list[str] = []
        for path in known:
            if path not in leaves and literals.get(path, "") is not None:
                wrong.append(f"`{path}` is missing; the traced call had {self._traced(path)}")
        for path, leaf in leaves.items():
            if path not in known:
                if leaf is not None:  # None is how most models spell an argument that is not given
                    wrong.append(f"`{path}` ({_describe(leaf)}) was not part of the traced call")
            elif path in literals and not _same(leaf, literals[path]):
                wrong.append(f"`{path}` is {_describe(leaf)}; the traced call had {self._traced(path)}")
        for slot in self.slots:
            if slot.path in leaves and (why := self._mismatch(leaves[slot.path], slot)):
                wrong.append(f"`{slot.path}` {why}")
        if wrong:
            raise InputError(
                "the inputs are not those the plan was made for:\n  "
                + "\n  ".join(wrong)
                + "\nPass inputs of the traced shapes (pad or drop a smaller last batch), or plan again with these as example inputs"
            )
        return {slot.path: leaves[slot.path] for slot in self.slots}

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Leaves of the call under the traced call's paths."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.traced.in_spec and self.signature is not None:
            args, kwargs = self._as_traced(args, kwargs)
            leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec == self.traced.in_spec:
            return dict(zip(self.traced.input_paths, leaves, strict=True))
        positional, named = spec.children()
        paths = [*(leaf_paths(positional) if positional.num_leaves else ()), *(leaf_paths(named) if named.num_leaves else ())]
        return dict(zip(paths, leaves, strict=True))

    def _as_traced(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call with arguments by position and by keyword as in the traced call, as far as the signature tells."""
        assert self.signature is not None
        traced_args, traced_kwargs = self.traced.in_spec.children()
        names = [
            name
            for name, parameter in self.signature.parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        if len(args) > len(names):
            return args, kwargs
        by_name = dict(zip(names, args, strict=False))
        if by_name.keys() & kwargs.keys():
            return args, kwargs
        by_name |= kwargs
        count = len(traced_args.children())
        if count > len(names) or any(name not in by_name for name in names[:count]):
            return args, kwargs
        keywords = {name: value for name, value in by_name.items() if name not in names[:count]}
        order = [name for name in traced_kwargs.context if name in keywords] if traced_kwargs.context else []
        keywords = {name: keywords[name] for name in (*order, *(name for name in keywords if name not in order))}
        return tuple(by_name[name] for name in names[:count]), keywords

    def _mismatch(self, leaf: Any, slot: _Slot) -> str | None:
        if not isinstance(leaf, Tensor):
            return f"is {_describe(leaf)}; the traced call had {self._traced(slot.path)}"
        if tuple(leaf.shape) != slot.given:
            whole = "" if slot.given == slot.shape else f", this rank's part of the traced {list(slot.shape)}"
            return f"has shape {list(leaf.shape)}, expected {list(slot.given)}{whole}"
        if leaf.dtype != slot.dtype:
            return f"has dtype {leaf.dtype}, expected {slot.dtype}"
        if self.device is not None and (leaf.device.type != self.device.type or self.device.index not in (None, leaf.device.index)):
            return f"is on {leaf.device}, the model on {self.device}; move it there"
        return None

    def _traced(self, path: str) -> str:
        if path in self.traced.literals:
            return repr(self.traced.literals[path])
        return next(f"a tensor {list(slot.shape)} of {slot.dtype}" for slot in self.slots if slot.path == path)


def given_states(plan: Plan, mode: Mode, group: int = 0) -> dict[str, State]:
    """The state in which a rank of `group` passes each input, by path: whole, or split along the batch by the axes that split it.

    With microbatches, a rank's rows are its part of the first, then its part of the second, and so on: blocks of the global batch.
    Raises `InputError` for an unknown `mode`, and where per-rank batches are asked of a plan that splits the batch unevenly.
    """
    if mode not in ("global", "per-rank"):
        raise InputError(f'inputs="{mode}" is not known; write "global" (each rank passes the whole batch) or "per-rank" (its part)')
    mesh = plan.groups[group].mesh
    states: dict[str, State] = {item.path: (R,) * len(mesh) for item in plan.inputs}
    if mode == "per-rank":
        axes = batch_axes(plan, group)
        parts = batch_parts(plan)
        for item in batch_inputs(plan):
            if item.shape[0] % (parts * plan.microbatches):
                of_each = f" of each of {plan.microbatches} microbatches" if plan.microbatches > 1 else ""
                raise InputError(
                    f"`{item.path}` has a batch of {item.shape[0]}, which the plan cuts in {parts} unequal parts{of_each}; "
                    'per-rank inputs need equal ones: plan for a batch that divides, or pass inputs="global"'
                )
            states[item.path] = tuple(S(0, plan.microbatches) if axis in axes else R for axis in mesh)
    return states


def _describe(leaf: Any) -> str:
    return f"a tensor {list(leaf.shape)} of {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)


def _same(leaf: Any, literal: Any) -> bool:
    return type(leaf) is type(literal) and bool(leaf == literal)
