"""Parameters as a program reads them: which state each is read in, and the leaves that autograd sees.

A parameter is stored as its plan says, as a DTensor. The program reads a *leaf*: a local tensor in the state that most readers want
and that gathering alone can reach (`leaf_state`). Where nothing needs gathering the leaf is the DTensor's own local tensor under
another name; else, and where it is read in another dtype than it is stored in, it is a tensor of its own whose memory
`autopar.runtime.gather` fills and frees. Gradients arrive at leaves and
go from there to the parameter (`autopar.runtime.gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.ir.assignment import Assignment
from autopar.ir.conversion import State
from autopar.ir.graph import Graph
from autopar.ir.placement import RP, Placement, R
from autopar.runtime.convert import LocalStep, Place, local_steps
from autopar.runtime.precision import Dtypes

MAY_SHARE_MEMORY = frozenset(
    {
        "autopar.reshard", "autopar.dropout", "aten.view.default", "aten._unsafe_view.default", "aten.reshape.default",
        "aten.expand.default",
        "aten.t.default", "aten.transpose.int", "aten.permute.default", "aten.slice.Tensor", "aten.select.int",
        "aten.unsqueeze.default", "aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.split.Tensor",
        "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int", "aten.narrow.default", "aten.alias.default",
        "aten.detach.default", "aten.diagonal.default", "aten.unfold.default", "aten.movedim.int", "aten.contiguous.default",
        "aten.flatten.using_ints", "aten.unflatten.int", "aten.numpy_T.default", "aten.mT.default", "aten.as_strided.default",
        "aten.real.default", "aten.view_as_real.default", "aten.view_as_complex.default", "aten._to_copy.default",
    }
)  # fmt: skip
"""Operators whose result may lie in their operand's memory, such as dropout while it is switched off; a reader of the result then reads
the operand."""


@dataclass(frozen=True, slots=True)
class Use:
    """How a program reads one parameter.

    `stored`: where it lives; `leaf`: the state the program reads, `steps` away; `gather`: `"never"`, `"step"` or `"use"`.
    `readers`: positions in the graph of all operations that read its memory, in order; empty if none does.
    `dtype`: in which the program reads it; `copied`: whether that is a copy of what is stored, in general of another dtype; `reduced`: the
    dtype in which its gradient travels, where that is not the one in which it arrives.
    """

    fqn: str
    value: str
    shape: tuple[int, ...]
    stored: State
    leaf: State
    steps: tuple[LocalStep, ...]
    gather: str
    readers: tuple[int, ...]
    dtype: torch.dtype
    copied: bool = False
    reduced: torch.dtype | None = None

    @property
    def own(self) -> bool:
        """Whether the leaf has memory of its own, which is filled when it is needed."""
        return self.copied or self.gathered

    @property
    def wide(self) -> bool:
        """Whether its gradients add up in another dtype than they arrive in."""
        return self.copied or self.reduced is not None

    @property
    def gathered(self) -> bool:
        """Whether the leaf is larger than what is stored."""
        return any(step.forward == "all_gather" for step in self.steps)


def uses(graph: Graph, assignment: Assignment, place: Place, dtypes: Dtypes) -> tuple[Use, ...]:
    """How the rank at `place` reads each of `graph.parameters`, in their order."""
    wants: dict[str, set[State]] = {}
    for op in graph.ops:
        for name, state in zip(op.operands, assignment.operand_states(op), strict=True):
            wants.setdefault(name, set()).add(state)
    for output in graph.outputs:
        wants.setdefault(output.value, set())
    readers = _readers(graph)
    found = []
    for parameter in graph.parameters:
        value = graph.values[parameter.value]
        storage = assignment.storage[parameter.fqn]
        leaf = leaf_state(storage.stored, wants.get(value.name, set()), value.shape, place, value.requires_grad)
        steps = local_steps(storage.stored, leaf, value.shape, place)
        gathered = any(step.forward == "all_gather" for step in steps)
        copied, reduced = parameter.fqn in dtypes.stored, dtypes.reduced.get(parameter.fqn)
        gather = ("step" if storage.gather == "never" else storage.gather) if gathered or copied else "never"
        dtype = getattr(torch, value.dtype)
        read = readers.get(value.name, ())
        found.append(Use(parameter.fqn, value.name, value.shape, storage.stored, leaf, steps, gather, read, dtype, copied, reduced))
    return tuple(found)


def leaf_state(stored: State, wants: set[State], shape: tuple[int, ...], place: Place, differentiable: bool) -> State:
    """The state that the leaf of a parameter is in, given all the states in which it is read.

    On each axis: as stored, if every reader splits it or takes it as a term of a sum; `R` if every reader wants that, else `R/P`,
    from which every other state can be had without talking (the gradients of all readers are then terms of one sum).
    """
    if not differentiable:
        wants = {tuple(R if placement.is_replicated else placement for placement in state) for state in wants}

    def on(axis: int) -> Placement:
        wanted = {state[axis] for state in wants}
        if not any(placement.is_replicated for placement in wanted):
            return stored[axis]
        return R if wanted == {R} else RP

    leaf = tuple(on(axis) for axis in range(len(stored)))
    while any(step.forward not in ("all_gather", "nothing") for step in local_steps(stored, leaf, shape, place)):
        # An inner axis that splits the same dim is in the way of gathering the outer one: gather it too, readers slice.
        axis = max(axis for axis, placement in enumerate(leaf) if placement.is_shard)
        leaf = (*leaf[:axis], RP if differentiable else R, *leaf[axis + 1 :])
    return leaf


def _readers(graph: Graph) -> dict[str, tuple[int, ...]]:
    """For every parameter the operations that read it or what may be a view of it."""
    owners: dict[str, set[str]] = {parameter.value: {parameter.value} for parameter in graph.parameters}
    found: dict[str, list[int]] = {}
    for index, op in enumerate(graph.ops):
        read = set().union(*(owners[name] for name in op.operands if name in owners))
        for name in read:
            found.setdefault(name, []).append(index)
        if read and op.target in MAY_SHARE_MEMORY:
            for name in op.outputs:
                owners[name] = read
    for output in graph.outputs:
        for name in owners.get(output.value, ()):
            found.setdefault(name, []).append(len(graph.ops) - 1)
    return {name: tuple(dict.fromkeys(indices)) for name, indices in found.items()}


class Leaf:
    """A parameter and the tensor that the program reads for it."""

    def __init__(self, use: Use, parameter: nn.Parameter, place: Place) -> None:
        self.use = use
        self.parameter = parameter
        self.shape = place.local_shape(use.shape, use.leaf)
        self.tensor = self._make()
        self.data = self.tensor.data
        self.terms: Tensor | None = None
        """Gradients that have been taken and wait to be reduced with later ones, added up as `Use.wide` says."""

    @property
    def local(self) -> Tensor:
        """This rank's stored part."""
        parameter: Tensor = self.parameter
        return parameter._local_tensor if isinstance(parameter, DTensor) else parameter.data

    @property
    def reduced(self) -> torch.dtype:
        """The dtype in which its gradient travels."""
        return self.use.reduced or self.tensor.dtype

    def source(self) -> Tensor:
        """This rank's stored part in the dtype in which it is read; a copy where that is another."""
        return self.local.detach().to(self.tensor.dtype)

    def hold(self) -> None:
        """Take the gradient that has arrived and add it to the terms, where these are wider than it is."""
        gradient = self.tensor.grad
        if gradient is None or not self.use.wide:
            return
        self.tensor.grad = None
        wide = self.local.dtype if self.use.copied else self.reduced
        self.terms = gradient.to(wide) if self.terms is None else self.terms.add_(gradient)

    def take(self) -> Tensor | None:
        """All that has arrived and not been reduced; the leaf has none of it any more."""
        if self.terms is not None:
            self.hold()
        gradient, self.tensor.grad = self.tensor.grad, None
        terms, self.terms = self.terms, None
        return gradient if terms is None else terms

    def drop(self) -> None:
        """Forget what has arrived."""
        self.tensor.grad = self.terms = None

    def _make(self) -> Tensor:
        if self.use.own:
            dtype = self.use.dtype if self.use.copied else self.local.dtype
            tensor = torch.empty(self.shape, dtype=dtype, device=self.local.device)
            tensor.untyped_storage().resize_(0)
        else:
            tensor = self.local.detach()
        return tensor.requires_grad_(self.parameter.requires_grad)

    def refresh(self) -> bool:
        """Make the leaf anew if the parameter was given other memory or was (un)frozen; True if so."""
        local = self.local
        moved = not self.use.own and (local.data_ptr() != self.tensor.data_ptr() or local.dtype != self.tensor.dtype)
        if not moved and self.parameter.requires_grad == self.tensor.requires_grad:
            return False
        self.tensor = self._make()
        self.data = self.tensor.data
        return True
