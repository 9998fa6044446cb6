"""`ParallelModule`: a traced model under a plan, on the ranks of a mesh, with the model's own call signature, outputs and names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Unpack, cast

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils import _pytree as pytree

from autopar.errors import RuntimeSetupError
from autopar.ir.assignment import Assignment, expand_stages
from autopar.ir.conversion import State
from autopar.ir.pipelining.microbatch import Microbatched, microbatched
from autopar.ir.placement import R, parse
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import TracedModel
from autopar.runtime import last_words
from autopar.runtime.convert import Place, convert, read_as
from autopar.runtime.distributed import DistributedModule, Options
from autopar.runtime.gather import Gatherer, buckets_of, hooks_of
from autopar.runtime.gradients import Reducer
from autopar.runtime.inputs import given_states
from autopar.runtime.loss import NO_GRADIENTS, NO_LOSS, loss_of
from autopar.runtime.lower import Borders, Hooks, Mode, lower
from autopar.runtime.microbatches import Microbatches, joined
from autopar.runtime.parameters import Leaf, uses
from autopar.runtime.pipelining.pipeline_wire import peer_errors
from autopar.runtime.recompute import regions_of
from autopar.runtime.state.shards import torch_placements

_Part = tuple[tuple[Tensor, ...], Tensor]


class ParallelModule(DistributedModule):
    """Runs `traced` on this rank of `mesh` (axes as in the plan) as `plan` says; every rank makes one, with the same plan.

    `local_state`: this rank's stored part of every parameter, and every buffer whole, by fully-qualified name; taken over, not copied.
    `assignment`, `batched`, `outputs`: what `plan` expands to, where the caller has it already. `options`: see `Options`.

    Parameters are DTensors under the names they have in the model, gradients too; between `forward` and the end of `backward` nothing
    else of autopar is needed: any optimizer that takes DTensors works. Hooks that are registered on the parameters do not run, for
    autograd sees the local tensors behind them.
    """

    def __init__(
        self,
        traced: TracedModel,
        plan: Plan,
        mesh: DeviceMesh,
        local_state: Mapping[str, Tensor],
        *,
        assignment: Assignment | None = None,
        batched: Microbatched | None = None,
        outputs: Sequence[State] | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(traced, plan, local_state, options)
        if assignment is None:
            expanded = expand_stages(plan, traced.graph)
            batched, assignment = expanded.microbatched, expanded.assignments[0]
        batched = batched or microbatched(traced.graph, plan.microbatches)
        graph = batched.body
        self._mesh, self._graph, self._assignment = mesh, graph, assignment
        self._place = place_on(mesh)
        whole: State = (R,) * mesh.ndim
        planned = {item.path: tuple(parse(text) for text in item.placement.values()) for item in plan.outputs}
        self._outputs = tuple(outputs) if outputs is not None else tuple(planned.get(item.path, whole) for item in graph.outputs)
        if batched.count > 1:  # joined from microbatch to microbatch
            self._outputs = (whole,) * len(graph.outputs)
        self._loss = loss_of(graph)
        self._register(local_state)
        self._leaves = [Leaf(use, parameter, self._place) for use, parameter in zip(self._uses, self._stored, strict=True)]
        self._buckets = buckets_of(self._leaves, plan.segments)
        self._regions = regions_of(plan.segments)
        self._gatherer = Gatherer(self._buckets)
        self._reducer = Reducer(self._leaves, self._gatherer.gradient_done, self._gatherer.backward_done)
        self._programs: dict[tuple[Mode, bool, bool], fx.GraphModule] = {}
        paths, reads = [item.path for item in traced.graph.inputs], [item.path for item in graph.inputs]
        given = dict.fromkeys(paths, whole) | given_states(plan, self._inputs)
        self._microbatches = Microbatches(batched, paths, given, self._place, self._device, self._constants, reads, traced.leaf_modules)
        states = self._microbatches.states
        self._borders = Borders(
            {item.value: states[item.path] for item in graph.inputs}, {use.value: use.leaf for use in self._uses}, self._outputs
        )
        self._binder = self._binder_of(given, self._place)
        self.train(graph.training)

    # ---- parameters and buffers under their own names ---------------------------------------------------------------------------

    def _register(self, local_state: Mapping[str, Tensor]) -> None:
        graph = self._graph
        self._uses = uses(graph, self._assignment, self._place, self._dtypes)
        by_fqn = {parameter.fqn: (parameter, use) for parameter, use in zip(graph.parameters, self._uses, strict=True)}
        buffers = {buffer.fqn: buffer for buffer in graph.buffers}
        stored: dict[str, nn.Parameter] = {}
        for fqn, local in local_state.items():
            if fqn in buffers:
                owner, name = owner_of(self, fqn)
                owner.register_buffer(name, local, persistent=buffers[fqn].persistent)
                continue
            parameter, use = by_fqn[fqn]
            value = graph.values[parameter.value]
            wrapped = sharded(local, self._mesh, use.stored, value.shape)
            stored[fqn] = nn.Parameter(wrapped, requires_grad=value.requires_grad)
            for name_ in (fqn, *parameter.aliases):
                owner, name = owner_of(self, name_)
                owner.register_parameter(name, stored[fqn])
        self._stored = [stored[parameter.fqn] for parameter in graph.parameters]
        self._buffer_owners = [owner_of(self, buffer.fqn) for buffer in graph.buffers]
        self._updated = [index for index, buffer in enumerate(graph.buffers) if buffer.updated is not None]

    def adopt(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let the given parameter objects, by name, take the place of this module's own: they become its DTensors, so that an
        optimizer that holds them trains this module."""
        for index, parameter in enumerate(self._graph.parameters):
            theirs, ours = parameters.get(parameter.fqn), self._stored[index]
            if theirs is None or theirs is ours:
                continue
            torch.utils.swap_tensors(theirs, ours)  # type: ignore[no-untyped-call]
            self._stored[index] = self._leaves[index].parameter = theirs
            for fqn in (parameter.fqn, *parameter.aliases):
                owner, name = owner_of(self, fqn)
                owner._parameters[name] = theirs

    # ---- calls ------------------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `forward`; microbatch after microbatch where the plan has several.

        Raises `InputError` where the inputs are not of the traced shapes and types, and `RuntimeSetupError` in training mode under a
        plan with microbatches, where only `step` may compute gradients.
        """
        if self._microbatches.count > 1 and self.training and torch.is_grad_enabled():
            raise RuntimeSetupError(
                f"this plan trains in {self._microbatches.count} microbatches: call `loss = module.step(...)` in place of `module(...)` "
                "and `loss.backward()`, then the optimizer's step as ever; to evaluate, call the module after `.eval()` or under "
                "`torch.no_grad()`"
            )
        with self._as_planned():
            parts = self._bind(args, kwargs)
            results = self._run(parts[0]) if len(parts) == 1 else self._microbatches.join([self._run(part) for part in parts])
        return self._as_model_returns(results)

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward and backward pass of one global batch, in as many microbatches as the plan has; arguments as of `forward`.

        Adds the gradients of the global batch to `p.grad`, as `loss.backward()` does, reduced once, with the last microbatch. Returns
        the model's loss, a detached scalar `()` that is the same on every rank. Forward hooks of the module do not run.
        Raises `InputError` as `forward` does, `RuntimeSetupError` where the model returns no loss or gradients are switched off, and
        `PeerError` where another rank is lost.
        """
        if self._loss is None:
            raise RuntimeSetupError(NO_LOSS)
        if not torch.is_grad_enabled():
            raise RuntimeSetupError(NO_GRADIENTS)
        with self._as_planned():
            return self._step(args, kwargs, self._loss)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> Tensor:
        over_time = self._microbatches.batched.outputs[position]
        parts = self._bind(args, kwargs)
        reducing = self._reducer.enabled
        losses: list[Tensor] = []
        try:
            with peer_errors(lambda: f"training microbatch {len(losses)} of {len(parts)}"):
                for part in parts:
                    last = len(losses) == len(parts) - 1
                    self._reducer.enabled = reducing and last
                    loss = self._run(part, loss_only=True)[0]
                    self._gatherer.holding = not last
                    # A loss that no microbatch has a part of, such as a penalty on weights, counts once.
                    if last or over_time.is_partial:
                        loss.backward()  # type: ignore[no-untyped-call]
                    losses.append(loss.detach())
        except BaseException as error:
            last_words.leave(error)
            self._abandon()
            raise
        finally:
            self._reducer.enabled, self._gatherer.holding = reducing, False
        return joined(losses, over_time)

    def _abandon(self) -> None:
        """After a step that raised: nothing of it may reach the next."""
        self._reducer.reset()
        for leaf in self._leaves:
            leaf.drop()

    def _run(self, part: _Part, loss_only: bool = False) -> Sequence[Tensor]:
        """The program's outputs for one microbatch, or the loss alone; buffers are updated."""
        tensors, counter = part
        loss_only = loss_only and self._microbatches.count > 1
        if torch.compiler.is_compiling():
            leaves, program = [self._functional_leaf(i) for i in range(len(self._leaves))], self._program(True, loss_only)
        else:
            leaves, program = self._begin(), self._program(False, loss_only)
        buffers = [owner._buffers[name] for owner, name in self._buffer_owners]
        results = program(*tensors, *leaves, *buffers, *(self._constants[item.value] for item in self._graph.constants), counter)
        count = 1 if loss_only else len(self._outputs)
        if self.training and self._updated:
            self._write_back([buffers[index] for index in self._updated], results[count:])
        return results[:count]  # type: ignore[no-any-return]

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # checks and slicing in plain Python: nothing to compile
    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Part]:
        """The program's inputs for each microbatch, and dropout's counter."""
        self._check_mode()
        owners = zip(self._graph.buffers, self._buffer_owners, strict=True)
        buffers = {item.fqn: cast(Tensor, owner._buffers[name]) for item, (owner, name) in owners}
        tensors = self._bound(args, kwargs)
        parts = self._microbatches.cut(tensors, buffers, self._mode, self._next_counter())
        return [(tuple(part[item.path] for item in self._graph.inputs), self._next_counter()) for part in parts]

    def _begin(self) -> list[Tensor]:
        """Leaves for a new forward pass."""
        renewed = [leaf.refresh() for leaf in self._leaves]
        if any(renewed):
            self._reducer.watch()
            for bucket in self._buckets:
                bucket.renew()
        self._reducer.start()
        self._gatherer.start()
        return [leaf.tensor for leaf in self._leaves]

    def _functional_leaf(self, index: int) -> Tensor:
        """The leaf as a function of the parameter, for compilers: gathers and reductions stand in the graph."""
        use, parameter = self._uses[index], self._stored[index]
        x: Tensor = parameter.to_local(grad_placements=parameter.placements) if isinstance(parameter, DTensor) else parameter
        if use.wide:
            return read_as(x, use.dtype, use.reduced, use.steps)
        for step in use.steps:
            x = convert(x, *step.arguments())
        return x

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # lowering happens once: the program is what is worth compiling
    def _program(self, functional: bool, loss_only: bool) -> fx.GraphModule:
        key = (mode := self._mode, functional, loss_only)
        if key not in self._programs:
            hooks = Hooks() if functional else hooks_of(self._buckets, self._gatherer, self._reducer.begin)
            graph, borders = self._graph, self._borders
            if loss_only:
                assert self._loss is not None
                graph = replace(graph, outputs=(graph.outputs[self._loss],))
                borders = replace(borders, outputs=(self._outputs[self._loss],))
            self._programs[key] = lower(
                graph,
                self._assignment,
                self._place,
                borders,
                self._device,
                mode,
                hooks,
                self._regions,
                leaf_modules=self._traced.leaf_modules,
            )
        return self._programs[key]

    @torch.no_grad()
    def _write_back(self, buffers: Sequence[Tensor | None], values: Sequence[Tensor]) -> None:
        for buffer, value in zip(buffers, values, strict=True):
            assert buffer is not None
            buffer.copy_(value)

    # Outside what is compiled: a compiler takes a DTensor that nobody differentiates for one with a DTensor gradient, and fails.
    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _as_model_returns(self, results: Sequence[Tensor]) -> Any:
        graph = self._traced.graph
        wrapped = []
        for output, state, result in zip(graph.outputs, self._outputs, results, strict=True):
            shape = graph.values[output.value].shape
            if any(placement.is_shard and size > 1 for placement, size in zip(state, self._place.mesh, strict=True)):
                stride = torch.empty(shape, device="meta").stride()
                result = DTensor.from_local(
                    result.contiguous(), self._mesh, torch_placements(state), run_check=False, shape=torch.Size(shape), stride=stride
                )
            wrapped.append(result)
        leaves = [slot.literal if slot.index is None else wrapped[slot.index] for slot in self._traced.output_slots]
        return pytree.tree_unflatten(leaves, self._traced.out_spec)

    # ---- training ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within, backward passes keep each rank's own terms of the gradients; the first one outside reduces their sum.

        Costs a whole gradient's memory for parameters that are stored in parts. `p.grad` is unchanged until the reducing pass.
        """
        self._reducer.enabled = False
        try:
            yield
        finally:
            self._reducer.enabled = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `nn.Module.zero_grad`; also drops terms kept under `no_sync`."""
        super().zero_grad(set_to_none)
        for leaf in self._leaves:
            leaf.drop()


def owner_of(root: nn.Module, fqn: str) -> tuple[nn.Module, str]:
    """The module below `root` that holds `fqn`, made on the way if need be, and the last part of the name."""
    *path, name = fqn.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = cast(nn.Module, module._modules[part])
    return module, name


def place_on(mesh: DeviceMesh) -> Place:
    """This rank's place on `mesh`. Axes of size 1 have no group: nothing is ever sent on them."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    sizes = tuple(mesh.shape)
    return Place(sizes, tuple(coordinate), tuple(mesh.get_group(axis).group_name if size > 1 else "" for axis, size in enumerate(sizes)))


def sharded(local: Tensor, mesh: DeviceMesh, state: State, shape: tuple[int, ...]) -> DTensor:
    """`local` as this rank's part of a DTensor of global `shape` in `state`, without talking to anyone."""
    meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), local.dtype)
    # The constructor that DTensor's own operators use; `DTensor.from_local` does the same, with checks and an autograd node.
    return DTensor(local, DTensorSpec(mesh, torch_placements(state), tensor_meta=meta), requires_grad=False)  # type: ignore[no-untyped-call]
