"""From gradients of leaves to gradients of parameters: reduced in the background while the backward pass goes on.

A gradient that the ranks hold as terms of a sum is all-reduced where the parameter is stored whole and reduce-scattered where it is
stored in parts. Large gradients travel alone, from the memory in which autograd left them; small ones are packed together. Messages
leave in one fixed order on all ranks, the reverse of the order in which the forward pass uses the parameters. When the backward pass
ends, what is still missing is sent, all messages are awaited, and every `p.grad` is set or added to.

After Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", sections 3.2.3 and 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from autopar.ir.conversion import COLLECTIVES
from autopar.ir.placement import chunk
from autopar.runtime import collectives
from autopar.runtime.convert import LocalStep
from autopar.runtime.parameters import Leaf

MESSAGE_BYTES = 25 * 1024 * 1024
"""Small gradients are packed until they, with the large ones that pass meanwhile, make this many bytes (DDP's bucket size)."""

ALONE_BYTES = 4 * 1024 * 1024
"""Gradients at least this large travel alone. Below, a message's own cost exceeds that of packing (gloo: 1 ms of CPU time a rank, as
much as copying 4 MB; measured with PyTorch 2.13 on four local ranks)."""

_IN_FLIGHT = 2
"""Messages in flight before an earlier one is awaited, where awaiting frees memory or starts a second collective."""


def reductions(leaf: Leaf) -> tuple[LocalStep, ...]:
    """What turns a leaf's gradient into the parameter's, in order: first what makes it smaller, then sums over other axes."""
    return _reductions(leaf.use.steps)


@lru_cache(maxsize=65536)
def _reductions(steps: tuple[LocalStep, ...]) -> tuple[LocalStep, ...]:
    found = [step for step in reversed(steps) if step.backward != "nothing"]
    return tuple(sorted(found, key=lambda step: step.backward == "all_reduce"))


def _talking(leaf: Leaf) -> int | None:
    """Position of the first collective among the leaf's reductions; None where there is none."""
    return next((i for i, step in enumerate(reductions(leaf)) if step.backward in COLLECTIVES), None)


class Message:
    """Gradients that are reduced together: their leaves' reductions are the same actions on the same groups.

    `ready(leaf, gradient)` collects; `send()` starts the first collective with what has come; `halfway()` waits for it and starts the
    second, where there is one; `finish()` waits, runs what is left and returns the reduced local gradients.
    """

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self.leaves = tuple(leaves)
        position = _talking(leaves[0])
        assert position is not None
        self.first = position
        steps = reductions(leaves[0])
        self.scatters = steps[position].backward == "reduce_scatter"
        self.group = collectives.resolve(steps[position].group)
        second = steps[position + 1] if len(steps) > position + 1 else None
        self.second_group = collectives.resolve(second.group) if second is not None and second.backward == "all_reduce" else None
        self.clear()

    def clear(self) -> None:
        self.gradients: dict[int, Tensor] = {}
        self.sent: list[Leaf] = []
        self.shapes: list[torch.Size] = []
        self.buffer: Tensor | None = None
        self._work: object = None
        self._halfway = False

    @property
    def complete(self) -> bool:
        return len(self.gradients) == len(self.leaves)

    def ready(self, leaf: Leaf, gradient: Tensor) -> None:
        assert id(leaf) not in self.gradients and not self.sent
        for step in reductions(leaf)[: self.first]:
            gradient = step.run_backward(gradient)
        self.gradients[id(leaf)] = gradient  # in the dtype it came in: the message casts while it packs

    def send(self) -> None:
        # In the leaves' own order, which all ranks share, not in that of arrival.
        self.sent = [leaf for leaf in self.leaves if id(leaf) in self.gradients]
        if not self.sent:
            return
        gradients = [self.gradients[id(leaf)] for leaf in self.sent]
        self.gradients = {}
        dtype = self.sent[0].reduced
        if not self.scatters:
            self.shapes = [gradient.shape for gradient in gradients]
            if len(gradients) == 1 and gradients[0].dtype == dtype:
                self.buffer = gradients[0].contiguous().view(-1)
            else:
                self.buffer = _packed([gradient.unsqueeze(0) for gradient in gradients], dtype).view(-1)
            self._work = dist.all_reduce(self.buffer, group=self.group, async_op=True)
            return
        steps = [reductions(leaf)[self.first] for leaf in self.sent]
        cut = [
            collectives.cut(gradient, step.source.dim, step.source.blocks, step.parts)
            for gradient, step in zip(gradients, steps, strict=True)
        ]
        self.shapes = [stacked.shape[1:] for stacked in cut]
        parts = self.group.size()
        rows = cut[0].contiguous() if len(cut) == 1 and cut[0].dtype == dtype else _packed(cut, dtype)
        self.buffer = rows.new_empty((rows.numel() // parts,))
        self._work = collectives.reduce_scatter_into(self.buffer, rows, self.group, async_op=True)

    def halfway(self) -> None:
        if self.buffer is None or self._halfway:
            return
        self._halfway = True
        _wait(self._work)
        self._work = None
        if self.second_group is not None:
            self._work = dist.all_reduce(self.buffer, group=self.second_group, async_op=True)

    def finish(self) -> list[tuple[Leaf, Tensor]]:
        self.halfway()
        _wait(self._work)
        found: list[tuple[Leaf, Tensor]] = []
        start = 0
        for leaf, shape in zip(self.sent, self.shapes, strict=True):
            assert self.buffer is not None
            steps = reductions(leaf)
            local = self.buffer[start : start + shape.numel()].view(shape)
            start += shape.numel()
            if self.scatters:
                step = steps[self.first]
                length = chunk(step.source.size // step.source.blocks, step.parts, step.index)[1]
                local = collectives.shrink(local, step.source.dim, step.source.blocks, length)
            for step in steps[self.first + (1 if self.second_group is None else 2) :]:
                local = step.run_backward(local)
            found.append((leaf, local.contiguous()))
        self.clear()
        return found


def _packed(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`(rows, ...)` each, side by side in one message `(rows, all)` of `dtype`, without a copy on the way."""
    rows = tensors[0].shape[0]
    sizes = [tensor.numel() // rows for tensor in tensors]
    message = tensors[0].new_empty((rows, sum(sizes)), dtype=dtype)
    start = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        place = message.narrow(1, start, size)
        place.view(tensor.shape).copy_(tensor)
        start += size
    return message


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()


def messages(leaves: Sequence[Leaf]) -> list[Message]:
    """Leaves, in the order in which their gradients are expected, as messages in the order in which they are sent."""
    done: list[list[Leaf]] = []
    open_: dict[tuple[object, ...], list[Leaf]] = {}
    passed: dict[tuple[object, ...], int] = {}
    for leaf in leaves:
        size_bytes = leaf.data.shape.numel() * leaf.reduced.itemsize
        key = (leaf.reduced, *((step.backward, step.group) for step in reductions(leaf)))
        for other in list(open_):
            passed[other] += size_bytes
            if passed[other] > MESSAGE_BYTES:
                done.append(open_.pop(other))
        if size_bytes >= ALONE_BYTES:
            done.append([leaf])
        else:
            open_.setdefault(key, []).append(leaf)
            passed.setdefault(key, 0)
            if len(open_[key]) == 1:
                passed[key] = size_bytes
    return [Message(group) for group in (*done, *open_.values())]


class Reducer:
    """Watches the leaves of a module; see the module's docstring.

    `on_gradient(leaf)` is called when a leaf's gradient is complete and has been taken; `on_end()` at the end of a backward pass.
    """

    def __init__(self, leaves: Sequence[Leaf], on_gradient: Callable[[Leaf], None], on_end: Callable[[], None]) -> None:
        self.enabled = True
        self.on_gradient, self.on_end = on_gradient, on_end
        self.leaves = tuple(leaves)
        self._handles: list[RemovableHandle] = []
        self.watch()

    def watch(self) -> None:
        """(Re)attach to the leaves; needed again when one was made anew."""
        for handle in self._handles:
            handle.remove()
        trainable = [leaf for leaf in self.leaves if leaf.tensor.requires_grad]
        self._handles = [leaf.tensor.register_post_accumulate_grad_hook(lambda _, leaf=leaf: self._arrived(leaf)) for leaf in trainable]  # type: ignore[no-untyped-call]
        # The last used first: that is how the backward pass meets them. Leaves that nobody reads come last, and have no gradient.
        ordered = sorted(trainable, key=lambda leaf: -(leaf.use.readers[0] if leaf.use.readers else -1))
        self._plain = {id(leaf) for leaf in ordered if _talking(leaf) is None}
        self.messages = messages([leaf for leaf in ordered if id(leaf) not in self._plain])
        self._message_of = {id(leaf): message for message in self.messages for leaf in message.leaves}
        self.reset()

    def reset(self) -> None:
        """Forget a backward pass that did not reach its end."""
        self._next = 0
        self._running = False
        for message in self.messages:
            message.clear()

    def start(self) -> None:
        """A new forward pass: a backward pass that raised half-way is over. (Not so where a checkpoint recomputes within one.)"""
        if self._running and torch._C._current_graph_task_id() == -1:
            self.reset()

    def begin(self) -> None:
        """Have the end of the running backward pass reported. Called from inside of it; once is enough."""
        if not self._running:
            self._running = True
            # Private in PyTorch, and what DDP and FSDP build on.
            torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _arrived(self, leaf: Leaf) -> None:
        self.begin()
        if not self.enabled:
            leaf.hold()
            self.on_gradient(leaf)
            return
        gradient = leaf.take()
        assert gradient is not None
        self._take(leaf, gradient)
        self.on_gradient(leaf)

    @torch.no_grad()
    def _take(self, leaf: Leaf, gradient: Tensor) -> None:
        if id(leaf) in self._plain:
            for step in reductions(leaf):
                gradient = step.run_backward(gradient)
            self._deliver(leaf, gradient)
            return
        message = self._message_of[id(leaf)]
        message.ready(leaf, gradient)
        while self._next < len(self.messages) and self.messages[self._next].complete:
            self._send_next()

    def _send_next(self) -> None:
        self.messages[self._next].send()
        self._next += 1
        if self._next > _IN_FLIGHT:
            self._attend(self.messages[self._next - 1 - _IN_FLIGHT])

    def _attend(self, earlier: Message) -> None:
        """To a message that has been under way for a while."""
        if earlier.second_group is not None:
            earlier.halfway()
        elif earlier.scatters:
            self._finish(earlier)

    def _finish(self, message: Message) -> None:
        for leaf, gradient in message.finish():
            self._deliver(leaf, gradient)

    @torch.no_grad()
    def _end(self) -> None:
        self._running = False
        if self.enabled:
            self._send_rest()
            self._land()
        self.on_end()

    def _send_rest(self) -> None:
        """Send what the leaves still hold, from backward passes under `no_sync` that reached others than the last did, and what is left."""
        for leaf in self.leaves:
            if (gradient := leaf.take()) is not None:
                self._take(leaf, gradient)
        while self._next < len(self.messages):
            self._send_next()

    def _land(self) -> None:
        """Wait for what was sent, and set or add to the parameters' gradients."""
        for message in self.messages:
            message.halfway()
        for message in self.messages:
            self._finish(message)
        self._next = 0

    @staticmethod
    def _deliver(leaf: Leaf, gradient: Tensor) -> None:
        add_gradient(leaf.parameter, gradient.to(leaf.local.dtype))


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Set the gradient of `parameter`, or add to it: `gradient` is this rank's part, which may become the gradient itself."""
    if parameter.grad is not None:
        present = parameter.grad
        (present._local_tensor if isinstance(present, DTensor) else present).add_(gradient)
    elif isinstance(parameter, DTensor):
        # The constructor that DTensor's own operators use; `DTensor.from_local` does the same with checks and an autograd node.
        parameter.grad = DTensor(gradient, parameter._spec, requires_grad=False)  # type: ignore[no-untyped-call]
    else:
        parameter.grad = gradient
