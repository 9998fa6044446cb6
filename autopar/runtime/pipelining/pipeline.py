"""`PipelineModule`: a model whose stages run on different groups of ranks, microbatch after microbatch, as a schedule says.

Each rank holds the parameters of its group's stages and is given every batch, whole or its part of it. `step` runs the schedule,
forward and backward; calling the module runs the forward passes alone. What the model returns is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import PlanError, RuntimeSetupError
from autopar.ir.assignment import Expanded, expand_stages
from autopar.ir.conversion import State
from autopar.ir.graph import Graph, Parameter
from autopar.ir.pipelining.microbatch import PROLOGUE
from autopar.ir.pipelining.schedule_check import check
from autopar.ir.pipelining.schedules import Action, Orders, named
from autopar.ir.pipelining.stages import RECEIVE, SEND
from autopar.ir.placement import R
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import TracedModel
from autopar.runtime import last_words
from autopar.runtime.distributed import DistributedModule, Options
from autopar.runtime.inputs import given_states
from autopar.runtime.loss import NO_GRADIENTS, NO_LOSS, loss_of, reached
from autopar.runtime.microbatches import Microbatches, joined
from autopar.runtime.module import owner_of, place_on, sharded
from autopar.runtime.operators.alike import draws
from autopar.runtime.pipelining.pipeline_schedule import Batch, Interpreter, PipelineStage, Progress, Wire, wire
from autopar.runtime.pipelining.pipeline_stage import LiveStage, Sources
from autopar.runtime.pipelining.pipeline_tied import TiedWeight, exchange
from autopar.runtime.pipelining.pipeline_transfer import Layout, messages
from autopar.runtime.pipelining.pipeline_wire import Outbox, peer_errors, warm_up
from autopar.runtime.process_mesh import GroupMesh
from autopar.runtime.state.clip import PartOfModel, register


class PipelineModule(DistributedModule):
    """Runs `traced` as `plan` (one with a pipeline) says, on this rank of `group`; every rank makes one, with the same plan.

    `local_state`: this rank's stored part of every parameter of its group's stages (`storage_of`), and their buffers whole, by
    fully-qualified name; taken over, not copied. `expanded`: what `plan` expands to, where the caller has it already. `options`: see
    `Options`.

    Parameters are DTensors on the group's mesh under the names they have in the model, gradients too. A weight that several groups hold
    stays equal on all of them under optimizers that work element by element.
    """

    def __init__(
        self,
        traced: TracedModel,
        plan: Plan,
        group: GroupMesh,
        local_state: Mapping[str, Tensor],
        *,
        expanded: Expanded | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(traced, plan, local_state, options)
        assert plan.pipeline is not None
        self._group = group
        self._expanded = expanded or expand_stages(plan, traced.graph)
        self._stage_groups = tuple(stage.group for stage in plan.pipeline.stages)
        self._mine = tuple(index for index, owner in enumerate(self._stage_groups) if owner == group.index)
        self._place = place_on(group.mesh)
        body = self._expanded.microbatched.body
        loss = loss_of(body)
        if loss is None:
            raise PlanError("a plan with a pipeline needs a loss to differentiate: " + NO_LOSS)
        self._loss, self._reached = loss, reached(body, loss)
        self._storage = storage_of(self._expanded, self._mine)
        self._register(local_state)
        self._outbox, self._progress = Outbox(), Progress()
        states = self._make_binder()
        self._make_stages(plan, body.outputs[loss].path, states)
        self._tied = self._find_tied()
        elsewhere = tuple(weight.parameter for weight in self._tied if weight.groups[0] != group.index)
        first = dist.get_rank() == plan.pipeline.groups[group.index].first_rank
        register(self, PartOfModel(group.everyone, first, elsewhere, self._device))
        self._sync = True
        self._failure = ""
        if dist.get_backend(group.everyone) == "nccl":
            warm_up(self._pairs(), group.everyone, self._device)
        self.register_load_state_dict_pre_hook(_leave_out_others)  # type: ignore[no-untyped-call]
        self.train(body.training)

    # ---- making ----------------------------------------------------------------------------------------------------------------------

    def _register(self, local_state: Mapping[str, Tensor]) -> None:
        """This rank's parameters and buffers under their own names."""
        self._parameters_of: dict[str, nn.Parameter] = {}
        graph = self._traced.graph
        values = {item.fqn: (item, graph.values[item.value]) for item in graph.parameters}
        buffers = {item.fqn: item for item in graph.buffers}
        self._buffer_owners: dict[str, tuple[nn.Module, str]] = {}
        # In the graph's order, which all ranks of a group share, whatever that of `local_state`.
        for fqn in (fqn for fqn in (*values, *buffers) if fqn in local_state):
            local = local_state[fqn]
            if fqn in buffers:
                owner, name = self._buffer_owners[fqn] = owner_of(self, fqn)
                owner.register_buffer(name, local, persistent=buffers[fqn].persistent)
                continue
            item, value = values[fqn]
            wrapped = sharded(local, self._group.mesh, self._storage[fqn], value.shape)
            parameter = self._parameters_of[fqn] = nn.Parameter(wrapped, requires_grad=value.requires_grad)
            for alias in (fqn, *item.aliases):
                owner, name = owner_of(self, alias)
                owner.register_parameter(name, parameter)
        self._all_names = {name for item in graph.parameters for name in (item.fqn, *item.aliases)} | buffers.keys()

    def _buffer(self, fqn: str) -> Tensor:
        owner, name = self._buffer_owners[fqn]
        buffer = owner._buffers[name]
        assert buffer is not None
        return buffer

    def _make_stages(self, plan: Plan, loss: str, states: Mapping[str, State]) -> None:
        assert plan.pipeline is not None
        count, groups = self._expanded.microbatched.count, len(plan.pipeline.groups)
        schedule = named(plan.pipeline.schedule)
        orders = schedule.orders(groups, len(self._stage_groups) // groups, count)
        check(orders, self._stage_groups, count)
        drawn = draws(self._traced.graph)
        sources = Sources(self._parameters_of, self._constants, self._buffer, self._traced.leaf_modules)
        self._stages: list[PipelineStage] = []
        for index in self._mine:
            assignment = self._expanded.assignments[index]
            stage = self._expanded.stages[index]
            live = LiveStage(
                stage,
                replace(assignment, storage={fqn: replace(item, stored=self._storage[fqn]) for fqn, item in assignment.storage.items()}),
                self._place,
                sources,
                plan.segments,
                drawn,
                self._device,
                inputs=states,
                loss=loss,
                reached=self._reached,
                loss_terms=self._expanded.microbatched.outputs[self._loss].is_partial,
                microbatches=count,
                splits_backward=schedule.splits_backward,
                dtypes=self._dtypes,
            )
            before = self._wires(index - 1, self._group.everyone) if index else []
            after = self._wires(index, self._group.everyone) if index + 1 < len(self._stage_groups) else []
            self._stages.append(PipelineStage(live, before, after, self._outbox, self._progress, self._group.index, groups))
        forwards = [[index for index, owner in enumerate(self._stage_groups) if owner == group] for group in range(groups)]
        evaluation: Orders = tuple(tuple(Action("F", stage, m) for stage in mine for m in range(count)) for mine in forwards)
        self._training_run = Interpreter(self._stages, orders, self._stage_groups, count)
        self._evaluation_run = Interpreter(self._stages, evaluation, self._stage_groups, count)

    def _layout(self, group: int, state: State) -> Layout:
        assert self._plan.pipeline is not None
        item = self._plan.pipeline.groups[group]
        return Layout(state, tuple(item.mesh.values()), item.first_rank)

    def _wire_layouts(self, index: int) -> Iterator[tuple[str, Layout, Layout]]:
        """What stage `index` sends to the next, in wire order: name, and how it lies on both groups."""
        sender, receiver = self._expanded.stages[index], self._expanded.stages[index + 1]
        sending, receiving = self._expanded.assignments[index], self._expanded.assignments[index + 1]
        sent = {op.operands[0]: sending.operand_states(op)[0] for op in sender.graph.ops if op.target == SEND}
        received = {op.outputs[0]: receiving.output_states(op)[0] for op in receiver.graph.ops if op.target == RECEIVE}
        for name in sender.sends:
            yield name, self._layout(self._stage_groups[index], sent[name]), self._layout(self._stage_groups[index + 1], received[name])

    def _wires(self, index: int, everyone: dist.ProcessGroup) -> list[Wire]:
        values = self._expanded.stages[index + 1].graph.values
        return [
            wire(
                name,
                values[name].shape,
                getattr(torch, values[name].dtype),
                name in self._reached,
                source,
                target,
                everyone,
                self._device,
            )
            for name, source, target in self._wire_layouts(index)
        ]

    def _tied_layouts(self) -> Iterator[tuple[Parameter, dict[int, Layout]]]:
        """The weights that several groups hold, and how each of these (by index) does."""
        stored = [
            storage_of(self._expanded, [index for index, owner in enumerate(self._stage_groups) if owner == group])
            for group in range(len(self._plan.groups))
        ]
        for item in self._traced.graph.parameters:
            holders = {group: self._layout(group, states[item.fqn]) for group, states in enumerate(stored) if item.fqn in states}
            if len(holders) > 1:
                yield item, holders

    def _find_tied(self) -> list[TiedWeight]:
        """The weights that this rank and other groups hold."""
        found = []
        for item, holders in self._tied_layouts():
            if self._group.index in holders:
                value, parameter, group = self._traced.graph.values[item.value], self._parameters_of[item.fqn], self._group
                dtype, trained = parameter.dtype, item.value in self._reached
                found.append(
                    TiedWeight(item.fqn, value.shape, dtype, trained, holders, group.index, parameter, group.everyone, self._device)
                )
        return found

    def _make_binder(self) -> dict[str, State]:
        """What cuts the arguments of a call for the microbatches; returns the state in which each input of the stages then comes."""
        whole: State = (R,) * len(self._place.mesh)
        paths = [item.path for item in self._traced.graph.inputs]
        given = dict.fromkeys(paths, whole) | given_states(self._plan, self._inputs, self._group.index)
        batched, graphs = self._expanded.microbatched, [self._expanded.stages[index].graph for index in self._mine]
        if not _reads_prologue(graphs):
            batched = replace(batched, prologue=None)  # not for this rank
        reads = {item.path for graph in graphs for item in graph.inputs}
        self._microbatches = Microbatches(
            batched, paths, given, self._place, self._device, self._constants, reads, self._traced.leaf_modules
        )
        self._binder = self._binder_of(given, self._place)
        return self._microbatches.states

    def _pairs(self) -> list[tuple[int, int]]:
        """All pairs of ranks that ever send to each other, the lower first."""
        ways: list[tuple[tuple[int, ...], Layout, Layout]] = []
        for index in range(len(self._stage_groups) - 1):
            values = self._expanded.stages[index + 1].graph.values
            ways += [(values[name].shape, source, target) for name, source, target in self._wire_layouts(index)]
        for item, holders in self._tied_layouts():
            ways += [(self._traced.graph.values[item.value].shape, *pair) for pair in combinations(holders.values(), 2)]
        found: set[tuple[int, int]] = set()
        for shape, one, other in ways:
            if one.first_rank != other.first_rank:
                for message in (*messages(shape, one, other), *messages(shape, other, one)):
                    found.add((min(message.source, message.target), max(message.source, message.target)))
        return sorted(found)

    # ---- calls -----------------------------------------------------------------------------------------------------------------------

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The forward and backward pass of one global batch, in as many microbatches as the plan has; arguments as of the model.

        Adds the gradients of the global batch to `p.grad` of this rank's parameters. Returns the model's loss, a detached scalar `()`
        that is the same on every rank. A collective call.
        Raises `InputError` where the inputs are not of the traced shapes and types, and `PeerError` where another rank is lost.
        """
        if not torch.is_grad_enabled():
            raise RuntimeSetupError(NO_GRADIENTS)
        with self._as_planned():
            return self._step(args, kwargs)

    def _step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        batch = self._batch(args, kwargs, train=True)
        tied = [weight for weight in self._tied if weight.differentiable and weight.parameter.requires_grad]
        with self._running("a training step"):
            for weight in tied:
                weight.set_aside()
            self._begin()
            self._training_run.run(batch)
            self._progress.doing = "reducing gradients"
            for stage in self._stages:
                stage.live.finish(reduced=self._sync)
            if self._sync:
                self._progress.doing = "adding up the gradients of weights that several stages read"
                exchange(tied)
            else:
                for weight in tied:
                    weight.restore()
            self._outbox.settle()
            return self._whole_output(self._loss, train=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `forward`, without gradients; every rank gets all outputs, whole.

        A collective call. Raises `RuntimeSetupError` in training mode while gradients are on: then `step` is what to call.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeSetupError(
                "this plan trains in the stages of a pipeline: call `loss = module.step(...)` in place of `module(...)` and "
                "`loss.backward()`, then the optimizer's step as ever; to evaluate, call the module after `.eval()` or under "
                "`torch.no_grad()`"
            )
        with self._as_planned(), torch.no_grad():
            return self._evaluated(args, kwargs)

    def _evaluated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        batch = self._batch(args, kwargs, train=False)
        with self._running("an evaluation"):
            self._begin()
            self._evaluation_run.run(batch)
            for stage in self._stages:
                stage.live.finish(reduced=False)
            self._outbox.settle()
            results = [self._whole_output(index, train=False) for index in range(len(self._traced.graph.outputs))]
            for stage in self._stages:
                stage.outputs = {}
        leaves = [slot.literal if slot.index is None else results[slot.index] for slot in self._traced.output_slots]
        return pytree.tree_unflatten(leaves, self._traced.out_spec)

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, train: bool) -> Batch:
        if self._failure:
            raise RuntimeSetupError(f"this module cannot go on: {self._failure}. Start all ranks again, from the last checkpoint")
        self._check_mode()
        buffers = {fqn: self._buffer(fqn) for fqn in self._buffer_owners}
        tensors = self._bound(args, kwargs)
        inputs = self._microbatches.cut(tensors, buffers, self._mode, self._next_counter())
        return Batch(inputs, [self._next_counter() for _ in inputs], self._mode, train, self._sync)

    def _begin(self) -> None:
        for stage in self._stages:
            stage.live.begin()

    @contextmanager
    def _running(self, what: str) -> Iterator[None]:
        """A run that raises leaves this rank and the others at different places: nothing of it may reach a next one."""
        self._progress.doing = f"starting {what}"
        try:
            with peer_errors(lambda: self._progress.doing):
                yield
        except BaseException as error:
            self._failure = f"{what} failed ({type(error).__name__}: {error})"
            last_words.leave(error)
            for stage in self._stages:
                stage.live.abandon()
            for weight in self._tied:
                weight.restore()
            self._outbox.drop()
            raise

    def _whole_output(self, index: int, *, train: bool) -> Tensor:
        """Output `index` of the model, whole, on every rank: joined by the group that makes it, and sent to all."""
        output = self._expanded.microbatched.body.outputs[index]
        maker = next(i for i, stage in enumerate(self._expanded.stages) if output.path in {item.path for item in stage.graph.outputs})
        value = self._traced.graph.values[self._traced.graph.outputs[index].value]
        self._progress.doing = f"sending `{output.path}` to all ranks"
        owner = self._plan.groups[self._stage_groups[maker]]
        if self._stage_groups[maker] == self._group.index:
            [stage] = [stage for stage in self._stages if stage.stage_index == maker]
            position = 0 if train else [item.path for item in stage.live.graph.outputs].index(output.path)
            terms = [stage.outputs[microbatch][position] for microbatch in sorted(stage.outputs)]
            result = joined(terms, self._expanded.microbatched.outputs[index]).contiguous()
        else:
            result = torch.empty(value.shape, dtype=getattr(torch, value.dtype), device=self._device)
        if result.numel():
            dist.broadcast(result.view(-1).view(torch.uint8), src=owner.first_rank, group=self._group.everyone)
        return result

    # ---- training ----------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within, `step` keeps each rank's own terms of the gradients; the first step outside reduces their sum.

        Costs a whole gradient's memory for parameters that are stored in parts. `p.grad` is unchanged until the reducing step.
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `nn.Module.zero_grad`; also drops terms kept under `no_sync`."""
        super().zero_grad(set_to_none)
        for stage in self._stages:
            stage.live.drop_terms()


def storage_of(expanded: Expanded, stages: Sequence[int]) -> dict[str, State]:
    """How one group that runs `stages` stores its parameters, by name. One that several of them read is stored as the first says."""
    found: dict[str, State] = {}
    for index in stages:
        for fqn, storage in expanded.assignments[index].storage.items():
            found.setdefault(fqn, storage.stored)
    return found


def held_by(expanded: Expanded, stages: Sequence[int]) -> set[str]:
    """Names of all parameters and buffers that a rank which runs `stages` holds; among them what its part of the prologue reads."""
    graphs = [expanded.stages[index].graph for index in stages]
    if expanded.microbatched.prologue is not None and _reads_prologue(graphs):
        graphs.append(expanded.microbatched.prologue)
    return {item.fqn for graph in graphs for item in graph.parameters} | {item.fqn for graph in graphs for item in graph.buffers}


def _reads_prologue(graphs: Sequence[Graph]) -> bool:
    return any(item.path.startswith(PROLOGUE) for graph in graphs for item in graph.inputs)


def _leave_out_others(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """A `load_state_dict` pre-hook: a state dict of the whole model may be loaded on every rank."""
    assert isinstance(module, PipelineModule)
    mine = {name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))}
    for name in module._all_names - mine:
        state_dict.pop(prefix + name, None)
