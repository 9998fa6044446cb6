"""Our stages under PyTorch's pipeline runtime: it interprets the schedule, action by action, and we do what each action says.

`_PipelineScheduleRuntime` puts the sends and receives between our actions (`autopar.ir.pipelining.schedules`), in an order that is the same
on both sides of every pair of groups, and runs the list. Its ranks are our groups: who sends what to whom inside of an action is ours.

Private in PyTorch (2.13). Should it move: what is used of it is `_add_send_recv`, which places an action's receive on the other side
when it places the send, and a loop over the resulting list that calls the methods below; both are short.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining.schedules import (
    _Action,
    _add_reduce_grad,
    _add_send_recv,
    _PipelineScheduleRuntime,
)
from torch.distributed.pipelining.stage import _PipelineStageBase

from autopar.ir.pipelining.schedules import Orders
from autopar.runtime.convert import Place, local_steps
from autopar.runtime.lower import Mode
from autopar.runtime.pipelining.pipeline_stage import LiveStage
from autopar.runtime.pipelining.pipeline_transfer import Layout
from autopar.runtime.pipelining.pipeline_wire import Arriving, Channel, Outbox


@dataclass(frozen=True, slots=True)
class Wire:
    """How one value passes from a stage to the next, as this rank sees it. Within one group it is converted in place; between groups
    it goes through channels: `there` the value, `back` its gradient (None where it has none)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool
    source: Layout
    target: Layout
    there: Channel | None
    back: Channel | None

    def here(self, x: Tensor, place: Place) -> Tensor:
        """Within one group: this rank's part in the target's state, from that in the source's."""
        return _converted(x, self.source, self.target, self.shape, place)

    def here_back(self, gradient: Tensor, place: Place) -> Tensor:
        return _converted(gradient, self.target, self.source, self.shape, place)


def _converted(x: Tensor, source: Layout, target: Layout, shape: tuple[int, ...], place: Place) -> Tensor:
    for step in local_steps(source.state, target.state, shape, place):
        x = step.run(x)
    return x


def wire(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    differentiable: bool,
    source: Layout,
    target: Layout,
    group: dist.ProcessGroup,
    device: torch.device,
) -> Wire:
    """How the value `name` of global `shape` passes from `source` to `target`."""
    there = back = None
    if source.first_rank != target.first_rank:
        there = Channel(f"`{name}`", shape, dtype, source, target, group, device)
        if differentiable:
            back = Channel(f"the gradient of `{name}`", shape, dtype, target, source, group, device)
    return Wire(shape, dtype, differentiable, source, target, there, back)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one run of the schedule works on: per microbatch the inputs by path and dropout's counter. `train`: with backward passes;
    `reduce`: and with a reduction of the gradients behind them."""

    inputs: Sequence[Mapping[str, Tensor]]
    counters: Sequence[Tensor]
    mode: Mode
    train: bool
    reduce: bool


@dataclass(slots=True)
class Progress:
    """What this rank is doing, in words, for the message where that fails."""

    doing: str = ""


@dataclass(slots=True)
class _Microbatch:
    """Where the values of one microbatch are between the actions of this stage."""

    arriving: list[Arriving] = field(default_factory=list)
    handed: list[Tensor] | None = None
    sent: list[Tensor] = field(default_factory=list)
    gradients_arriving: list[Arriving | None] = field(default_factory=list)
    gradients_handed: list[Tensor | None] | None = None
    gradients: list[Tensor | None] = field(default_factory=list)


class PipelineStage(_PipelineStageBase):
    """`live` as PyTorch's runtime sees it. `before`, `after`: the wires from the stage before and to the one after.

    Of the base class only the interface is used: its constructor knows one process group with one rank a stage.
    """

    def __init__(
        self,
        live: LiveStage,
        before: Sequence[Wire],
        after: Sequence[Wire],
        outbox: Outbox,
        progress: Progress,
        group: int,
        groups: int,
    ) -> None:
        self.live, self.before, self.after = live, tuple(before), tuple(after)
        self.outbox, self.progress = outbox, progress
        self.submod = nn.Module()
        self.stage_index, self.num_stages = live.stage.index, live.stage.count
        self.device = live.device
        self.group = None
        self.group_rank, self.group_size = group, groups
        self.chunks: int | None = None
        self.has_backward = False
        self.stage_index_to_group_rank: dict[int, int] = {}
        self.output_chunks: list[Any] = []
        self.outputs: dict[int, list[Tensor]] = {}
        self._batch: Batch | None = None
        self._at: dict[int, _Microbatch] = {}

    def start(self, batch: Batch) -> None:
        self._batch = batch
        self.chunks = len(batch.inputs)
        self.has_backward = batch.train
        self.outputs = {}
        self._at = {microbatch: _Microbatch() for microbatch in range(self.chunks)}

    def end(self) -> None:
        """Let go of what a run left behind."""
        self._batch = None
        self._at = {}

    def _words(self, microbatch: int, other: int) -> str:
        return f"of microbatch {microbatch} (stage {self.stage_index} and {other} of {self.num_stages})"

    # ---- forward -------------------------------------------------------------------------------------------------------------------

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Post the receives. What is returned would be posted and awaited by PyTorch, without a word on who did not come."""
        words = self._words(fwd_chunk_id, self.stage_index - 1)
        channels = [item.there for item in self.before]
        self._at[fwd_chunk_id].arriving = [channel.receive(words) for channel in channels if channel is not None]
        return []

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        self._at[mb_index].handed = [item.here(x, self.live.place) for item, x in zip(self.before, prev_stage_outputs, strict=True)]

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, save_forward_output: bool = True
    ) -> list[Tensor]:
        at, batch = self._at[fwd_chunk_id], self._batch
        assert batch is not None
        self.progress.doing = f"the forward pass of microbatch {fwd_chunk_id} in stage {self.stage_index} of {self.num_stages}"
        received = at.handed if at.handed is not None else [item.wait() for item in at.arriving]
        at.arriving, at.handed = [], None
        with torch.set_grad_enabled(batch.train):
            outputs, sent = self.live.forward(
                fwd_chunk_id, batch.inputs[fwd_chunk_id], received, batch.counters[fwd_chunk_id], batch.mode, train=batch.train
            )
        self.outputs[fwd_chunk_id] = outputs
        if any(item.there is not None for item in self.after):
            at.sent = sent
        return sent

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        at = self._at[fwd_chunk_id]
        words = self._words(fwd_chunk_id, self.stage_index + 1)
        flights = [flight for item, x in zip(self.after, at.sent, strict=True) if item.there for flight in item.there.send(x, words)]
        at.sent = []
        self.outbox.post(flights, (self.stage_index, "there"))
        return []

    # ---- backward ------------------------------------------------------------------------------------------------------------------

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        words = self._words(bwd_chunk_id, self.stage_index + 1)
        self._at[bwd_chunk_id].gradients_arriving = [item.back.receive(words) if item.back else None for item in self.after]
        return []

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        self._at[mb_index].gradients_handed = [
            item.here_back(gradient, self.live.place) if gradient is not None and item.differentiable else None
            for item, gradient in zip(self.after, next_stage_bwd_outputs, strict=True)
        ]

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False) -> None:
        at = self._at[bwd_chunk_id]
        self.progress.doing = f"the backward pass of microbatch {bwd_chunk_id} in stage {self.stage_index} of {self.num_stages}"
        if at.gradients_handed is not None:
            given = at.gradients_handed
        else:
            given = [item.wait() if item is not None else None for item in at.gradients_arriving]
        at.gradients_arriving, at.gradients_handed = [], None
        assert self._batch is not None
        if full_backward:
            # Where another stage waits for this one, gradients are reduced behind the pass (`perform_reduce_grad`): not in its way.
            during = last_backward and self._batch.reduce and self.stage_index == 0
            found = self.live.backward(bwd_chunk_id, given, reduce=during)
        else:
            found = self.live.backward_input(bwd_chunk_id, given)
        at.gradients = [
            self._gradient(item, gradient) if item.differentiable else None for item, gradient in zip(self.before, found, strict=True)
        ]

    def _gradient(self, item: Wire, gradient: Tensor | None) -> Tensor:
        if gradient is not None:
            return gradient.detach()
        shape = self.live.place.local_shape(item.shape, item.target.state)
        return torch.zeros(shape, dtype=item.dtype, device=self.device)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        self.progress.doing = f"the weights' backward pass of microbatch {bwd_chunk_id} in stage {self.stage_index} of {self.num_stages}"
        self.live.backward_weight(bwd_chunk_id)

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        found, self._at[mb_index].gradients = tuple(self._at[mb_index].gradients), []
        return found

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        words = self._words(bwd_chunk_id, self.stage_index - 1)
        gradients = self.get_local_bwd_output(bwd_chunk_id)
        flights = [
            flight
            for item, gradient in zip(self.before, gradients, strict=True)
            if item.back is not None and gradient is not None
            for flight in item.back.send(gradient, words)
        ]
        del gradients
        self.outbox.post(flights, (self.stage_index, "back"))
        return []

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        self.progress.doing = f"reducing the gradients of stage {self.stage_index} of {self.num_stages}"
        assert self._batch is not None
        if self._batch.reduce:
            self.live.reduce()

    # ---- what PyTorch asks of its own stages: shapes are known from the plan ------------------------------------------------------------

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError

    def _create_grad_recv_info(self, act_send_info: Any) -> tuple[Any, ...]:
        raise AssertionError


class Interpreter(_PipelineScheduleRuntime):
    """Runs `orders` (one order of actions a group) for the group of `stages`, which are all of this rank's."""

    def __init__(self, stages: Sequence[PipelineStage], orders: Orders, stage_groups: Sequence[int], microbatches: int) -> None:
        super().__init__(list(stages), n_microbatches=microbatches, scale_grads=False)  # type: ignore[no-untyped-call]
        self._mine = tuple(stages)
        self.stage_index_to_group_rank = dict(enumerate(stage_groups))
        actions = {
            group: _add_reduce_grad([_Action.from_str(str(action)) for action in order], microbatches) for group, order in enumerate(orders)
        }
        self.pipeline_order_with_comms = _add_send_recv(
            actions,  # type: ignore[arg-type]  # none of ours is None
            stage_to_rank=lambda stage: stage_groups[stage],
            num_stages=len(stage_groups),
        )

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to find out by running the stages: the plan says what travels."""

    def run(self, batch: Batch) -> None:
        """All actions of this group, on `batch`."""
        for stage in self._mine:
            stage.start(batch)
        try:
            with _own_words():
                self._step_microbatches()
        finally:
            # A run that raised leaves receives behind that the next must not take for its own.
            self.fwd_recv_ops.clear()
            self.bwd_recv_ops.clear()
            for stage in self._mine:
                stage.end()


@contextmanager
def _own_words() -> Iterator[None]:
    """PyTorch logs the whole schedule when an action raises; what is raised says what is wrong."""
    logger = logging.getLogger(_PipelineScheduleRuntime.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
