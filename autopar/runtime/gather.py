"""Gathering sharded parameters just in time, and freeing them again.

Leaves that are used together are gathered together (a `Bucket`), in the background, one bucket ahead of its use: forward in the order
of use, backward in the opposite order. The memory of a leaf is filled and freed underneath the tensor that autograd has saved, so
that nothing has to be saved or restored: whoever reads the tensor must only be preceded by `need`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autopar.ir.plan import SegmentPlan
from autopar.runtime import collectives
from autopar.runtime.convert import LocalStep
from autopar.runtime.gradients import ALONE_BYTES, MESSAGE_BYTES
from autopar.runtime.lower import Hook, Hooks
from autopar.runtime.parameters import Leaf

DIRECT_BYTES = ALONE_BYTES
"""Leaves at least this large travel alone, straight into their own memory, where their shards lie one behind the other there."""


class _Direct:
    """One leaf whose shards are consecutive pieces of it: gathered in place."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf
        self.group = collectives.resolve(leaf.use.steps[-1].group)

    def issue(self, local: Tensor) -> None:
        self.work = collectives.gather_into(self.leaf.data, local, self.group, async_op=True)

    def arrive(self) -> None:
        assert self.work is not None
        self.work.wait()
        self.work = None


class _Flat:
    """Several leaves in one message: shards are packed one behind the other, and unpacked on arrival."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self.leaves = leaves
        self.group = collectives.resolve(leaves[0].use.steps[-1].group)

    def issue(self, locals_: Sequence[Tensor]) -> None:
        packed = [
            collectives.stretch(
                local, step.source.dim, step.source.blocks, collectives.largest(step.source.size, step.source.blocks, step.parts)
            )
            for local, step in zip(locals_, (_gathering(leaf) for leaf in self.leaves), strict=True)
        ]
        self.shapes = [tensor.shape for tensor in packed]
        self.message = torch.cat([tensor.reshape(-1) for tensor in packed]) if len(packed) > 1 else packed[0].reshape(-1)
        self.received = self.message.new_empty((self.group.size(), self.message.numel()))
        self.work = collectives.gather_into(self.received, self.message, self.group, async_op=True)

    def arrive(self) -> None:
        assert self.work is not None
        self.work.wait()
        start = 0
        for leaf, shape in zip(self.leaves, self.shapes, strict=True):
            step = _gathering(leaf)
            stacked = self.received[:, start : start + shape.numel()].view(-1, *shape)
            collectives.join_into(leaf.data, stacked, step.source.dim, step.source.blocks)
            start += shape.numel()
        del self.message, self.received
        self.work = None


class _Copied:
    """One leaf that is a copy of its stored part in another dtype: nothing travels."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf

    def issue(self) -> None:
        self.leaf.data.copy_(self.leaf.local)

    def arrive(self) -> None:
        pass


def _gathering(leaf: Leaf) -> LocalStep:
    """The last step that gathers; what comes before it is gathered ahead."""
    return [step for step in leaf.use.steps if step.forward == "all_gather"][-1]


def _is_direct(leaf: Leaf) -> bool:
    step = _gathering(leaf)
    consecutive = step.source.blocks == 1 and all(size == 1 for size in leaf.shape[: step.source.dim])
    large = leaf.data.element_size() * leaf.data.shape.numel() >= DIRECT_BYTES
    return consecutive and large and step.source.size % step.parts == 0


class Bucket:
    """Leaves that are gathered and freed together. `keep`: not freed after the forward pass ("step")."""

    def __init__(self, leaves: Sequence[Leaf], keep: bool) -> None:
        self.leaves = tuple(leaves)
        self.keep = keep
        self.here = self.flying = False
        self._prepare()

    def _prepare(self) -> None:
        self.trainable = sum(leaf.tensor.requires_grad for leaf in self.leaves)
        self.waiting = self.trainable
        flat: dict[tuple[str, torch.dtype], list[Leaf]] = {}
        self._lanes: list[_Direct | _Flat | _Copied] = []
        for leaf in self.leaves:
            if not leaf.use.gathered:
                self._lanes.append(_Copied(leaf))
            elif _is_direct(leaf):
                self._lanes.append(_Direct(leaf))
            else:
                flat.setdefault((_gathering(leaf).group, leaf.data.dtype), []).append(leaf)
        self._lanes += [_Flat(leaves) for leaves in flat.values()]

    def renew(self) -> None:
        """After a leaf was made anew."""
        self.free()
        self._prepare()

    @torch.no_grad()
    def prefetch(self) -> None:
        """Start gathering, if that has not been done."""
        if self.here or self.flying:
            return
        self.flying = True
        for lane in self._lanes:
            for leaf in lane.leaves if isinstance(lane, _Flat) else (lane.leaf,):
                leaf.data.untyped_storage().resize_(leaf.data.numel() * leaf.data.element_size())
            if isinstance(lane, _Copied):
                lane.issue()
            elif isinstance(lane, _Direct):
                lane.issue(_all_but_last(lane.leaf))
            else:
                lane.issue([_all_but_last(leaf) for leaf in lane.leaves])

    @torch.no_grad()
    def need(self) -> None:
        """Have the leaves' memory filled when this returns."""
        if self.here:
            return
        self.prefetch()
        for lane in self._lanes:
            lane.arrive()
        self.here, self.flying = True, False

    def free(self) -> None:
        """Give the leaves' memory back."""
        if self.flying:
            self.need()
        if self.here:
            for leaf in self.leaves:
                leaf.data.untyped_storage().resize_(0)
        self.here = False
        self.waiting = self.trainable


def _all_but_last(leaf: Leaf) -> Tensor:
    """The leaf's stored part, gathered along all axes that come before the last gathering."""
    x = leaf.source()
    steps = [step for step in leaf.use.steps if step.forward == "all_gather"]
    for step in steps[:-1]:
        x = step.run(x)
    return x.contiguous()


class Gatherer:
    """All buckets of a module, in the order in which the forward pass uses them.

    `forward(i)` and `backward(i)` go before a reader of bucket `i`; `forward_done(i)` behind its last reader in the forward pass;
    `gradient_done(leaf)` when a leaf's gradient has arrived; `backward_done()` at the end of a backward pass. Within `recomputing()`
    a forward pass is part of the backward pass: buckets are needed in that order, and stay until their gradients are done.
    While `holding`, buckets that are gathered once a step stay from one backward pass to the next.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = tuple(buckets)
        self.holding = False
        self.recomputations = 0
        """How many are running, one inside of the other."""
        self._of = {id(leaf): bucket for bucket in buckets for leaf in bucket.leaves}

    def start(self) -> None:
        """A new forward pass: what is still here may be out of date."""
        for bucket in self.buckets:
            self._free(bucket)

    def recomputing(self) -> _Recomputing:
        """A context around a forward pass that a backward pass runs again; it may be entered several times."""
        return _Recomputing(self)

    def _free(self, bucket: Bucket) -> None:
        if bucket.keep and self.holding:
            bucket.waiting = bucket.trainable
        else:
            bucket.free()

    def forward(self, index: int) -> None:
        if self.recomputations:
            self.backward(index)
            return
        self.buckets[index].need()
        if index + 1 < len(self.buckets):
            self.buckets[index + 1].prefetch()

    def again(self, index: int) -> None:
        """Before any reader of bucket `index` with which a recomputation may begin."""
        if self.recomputations:
            self.backward(index)

    def forward_done(self, index: int) -> None:
        if self.recomputations:
            return
        # The backward pass begins with the last bucket: freeing it now would gather it twice in a row.
        keep = self.buckets[index].keep or index == len(self.buckets) - 1
        if not keep or not torch.is_grad_enabled():
            self.buckets[index].free()

    def backward(self, index: int) -> None:
        bucket = self.buckets[index]
        if bucket.here:
            return
        bucket.need()
        for other in self.buckets[index + 2 :]:
            if not other.trainable:
                other.free()
        if index:
            self.buckets[index - 1].prefetch()

    def gradient_done(self, leaf: Leaf) -> None:
        bucket = self._of.get(id(leaf))
        if bucket is not None:
            bucket.waiting -= 1
            if bucket.waiting == 0:
                self._free(bucket)

    def backward_done(self) -> None:
        for bucket in self.buckets:
            self._free(bucket)


class _Recomputing:
    def __init__(self, gatherer: Gatherer) -> None:
        self.gatherer = gatherer

    def __enter__(self) -> None:
        self.gatherer.recomputations += 1

    def __exit__(self, *_: object) -> None:
        self.gatherer.recomputations -= 1


def buckets_of(leaves: Sequence[Leaf], segments: Sequence[SegmentPlan]) -> list[Bucket]:
    """Leaves that need gathering, by what uses them first: a repeat of a repeated segment, or up to `MESSAGE_BYTES` in a row elsewhere.

    A leaf that is used in several places (a tied embedding) stays longer than its neighbours and so has a bucket to itself.
    """
    gathered = sorted((leaf for leaf in leaves if leaf.use.own and leaf.use.readers), key=lambda leaf: leaf.use.readers[0])
    groups: list[list[Leaf]] = []
    last: object = None
    filled_bytes = 0
    for leaf in gathered:
        places = {_repeat(reader, segments) for reader in leaf.use.readers}
        first, keep = _repeat(leaf.use.readers[0], segments), leaf.use.gather == "step"
        size_bytes = leaf.data.shape.numel() * leaf.data.element_size()
        key = (first, keep) if len(places) == 1 else (leaf.use.fqn,)
        full = first[1] is None and filled_bytes + size_bytes > MESSAGE_BYTES
        if key != last or full:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(leaf)
        filled_bytes += size_bytes
        last = key
    return [Bucket(group, group[0].use.gather == "step") for group in groups]


def _repeat(position: int, segments: Sequence[SegmentPlan]) -> tuple[int, int | None]:
    """Start of the segment that the operation at `position` is in, and in which repeat; None for a segment that is not repeated."""
    for segment in segments:
        if segment.start <= position < segment.start + segment.length * segment.count:
            return segment.start, None if segment.count == 1 else (position - segment.start) // segment.length
    return 0, None


def hooks_of(buckets: Sequence[Bucket], gatherer: Gatherer, begin: Callable[[], None]) -> Hooks:
    """Where a program must call the gatherer. `begin` is called when a backward pass reaches a reader of a gathered leaf."""
    before: dict[int, tuple[Hook, ...]] = {}
    after: dict[int, tuple[Hook, ...]] = {}
    again: dict[int, tuple[Hook, ...]] = {}
    watch: dict[int, tuple[Callable[[Tensor], None], ...]] = {}
    for index, bucket in enumerate(buckets):
        readers = sorted({reader for leaf in bucket.leaves for reader in leaf.use.readers})
        gather, regather, release, watcher = _hooks_of(index, gatherer, begin)
        before[readers[0]] = (*before.get(readers[0], ()), gather)
        after[readers[-1]] = (*after.get(readers[-1], ()), release)
        for reader in readers:
            again[reader] = (*again.get(reader, ()), regather)
            watch[reader] = (*watch.get(reader, ()), watcher)
    return Hooks(before, after, watch, again, gatherer.recomputing)


def _hooks_of(index: int, gatherer: Gatherer, begin: Callable[[], None]) -> tuple[Hook, Hook, Hook, Callable[[Tensor], None]]:
    def gather() -> None:
        gatherer.forward(index)

    def regather() -> None:
        gatherer.again(index)

    def release() -> None:
        gatherer.forward_done(index)

    def before_backward(_: Any) -> None:
        begin()
        gatherer.backward(index)

    def watch(result: Tensor) -> None:
        if result.grad_fn is not None:
            result.grad_fn.register_prehook(before_backward)

    return gather, regather, release, watch
