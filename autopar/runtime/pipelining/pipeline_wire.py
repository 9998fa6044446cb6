"""Values on their way between two groups of ranks: sends that nobody waits for at once, receives that are posted early.

Each rank sends and receives what `autopar.runtime.pipelining.pipeline_transfer` lists, as bytes, one message a pair of ranks. All ranks
post the transfers between any two of them in the same order (the schedule's, then that of the values), so that messages need no names and a
backend that serves a pair of ranks one transfer at a time (nccl) cannot deadlock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.errors import PeerError
from autopar.runtime import last_words
from autopar.runtime.pipelining.pipeline_transfer import Box, Layout, Message, messages

IN_FLIGHT = 1
"""Sends of one lane that may be under way when the next has begun: each holds a tensor's memory."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A send or receive under way: to or from global rank `peer`, of `bytes_`, `what` in words."""

    work: Any
    peer: int
    bytes_: Tensor
    what: str

    def land(self, doing: str) -> None:
        with peer_errors(f"{doing} {self.what}", self.peer):
            self.work.wait()


@contextmanager
def peer_errors(doing: str | Callable[[], str], peer: int | None = None) -> Iterator[None]:
    """What the backend raises where another rank is gone or does not come, as a `PeerError` that says what this rank was `doing`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, PeerError) or not is_communication_error(error):
            raise
        whom = "another rank" if peer is None else f"rank {peer}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        was = doing if isinstance(doing, str) else doing()
        words = last_words.read()
        why = f"Before that, {words}" if words else "That rank ended or did not answer in time; look at what it printed for why"
        raise PeerError(f"rank {dist.get_rank()} lost {whom} while {was}: {reason}. {why}. Start all ranks again") from error


def is_communication_error(error: BaseException) -> bool:
    """Whether the communication backend raised this. gloo raises plain `RuntimeError`s, which name gloo's source files."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/" in text or "NCCL" in text or "Connection closed by peer" in text)


class Channel:
    """One value on its way from `source` to `target`, as this rank sees it. `what` names it in messages."""

    def __init__(
        self,
        what: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        source: Layout,
        target: Layout,
        group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        rank = dist.get_rank()
        found = messages(shape, source, target)
        self.what, self.dtype, self.group, self.device = what, dtype, group, device
        self.outgoing = tuple(message for message in found if message.source == rank)
        self.incoming = tuple(message for message in found if message.target == rank)
        inside = target.first_rank <= rank < target.first_rank + target.size
        self.shape = target.local_shape(shape, rank) if inside else ()

    def send(self, x: Tensor, what: str) -> list[Flight]:
        """Start sending this rank's part `x`, which must not change until the flights have landed."""
        flights = []
        for message in self.outgoing:
            wire = _bytes(_packed(x, message.boxes))
            work = dist.isend(wire, message.target, self.group)
            flights.append(Flight(work, message.target, wire, f"{self.what} {what}"))
        return flights

    def receive(self, what: str) -> Arriving:
        """Start receiving this rank's part."""
        part = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        flights = []
        for message in self.incoming:
            buffer = part if _is_all(message, part) else torch.empty(message.numel, dtype=self.dtype, device=self.device)
            work = dist.irecv(_bytes(buffer), message.source, self.group)
            flights.append((message, buffer, Flight(work, message.source, buffer, f"{self.what} {what}")))
        return Arriving(part, flights)


class Arriving:
    """A rank's part of a value while it is being received. What a message came in is let go as soon as it is unpacked."""

    def __init__(self, part: Tensor, flights: Sequence[tuple[Message, Tensor, Flight]]) -> None:
        self._part, self._flights = part, deque(flights)

    def wait(self) -> Tensor:
        while self._flights:
            message, buffer, flight = self._flights.popleft()
            flight.land("receiving")
            if buffer is not self._part:
                start = 0
                for box in message.boxes:
                    _view(self._part, box.target, box.lengths).copy_(buffer[start : start + box.numel].view(box.lengths))
                    start += box.numel
        return self._part


class Outbox:
    """Sends under way. What is sent stays in memory until it has landed.

    A send is awaited when `IN_FLIGHT` others of its lane have begun after it. That cannot block for ever: send and receive of one transfer
    stand at the same place of one order of all actions of all groups, so what is awaited was to be received before.
    """

    def __init__(self) -> None:
        self._lanes: dict[Hashable, deque[list[Flight]]] = {}

    def post(self, flights: list[Flight], lane: Hashable) -> None:
        """Keep `flights`. `lane`: the same for what follows on each other, such as one stage's outputs, microbatch after microbatch."""
        under_way = self._lanes.setdefault(lane, deque())
        under_way.append(flights)
        while len(under_way) > IN_FLIGHT:
            _land(under_way.popleft())

    def settle(self) -> None:
        """Wait until all has landed."""
        for under_way in self._lanes.values():
            while under_way:
                _land(under_way.popleft())

    def drop(self) -> None:
        """Forget what is under way, after a failure."""
        self._lanes.clear()


def _land(flights: Sequence[Flight]) -> None:
    for flight in flights:
        flight.land("sending")


def warm_up(pairs: Sequence[tuple[int, int]], group: dist.ProcessGroup, device: torch.device) -> None:
    """Have each of the `pairs` (lower global rank first) open its connection: nccl does so at a pair's first transfer, and blocks until
    both have come. The same list, in the same order, on every rank. One by one, as all transfers are: what is batched takes another
    communicator."""
    rank = dist.get_rank()
    for low, high in pairs:
        if rank in (low, high):
            peer = high if rank == low else low
            there, back = torch.zeros(1, device=device), torch.zeros(1, device=device)
            with peer_errors("opening connections", peer):
                first = dist.isend(there, peer, group) if rank == low else dist.irecv(back, peer, group)
                second = dist.irecv(back, peer, group) if rank == low else dist.isend(there, peer, group)
                for work in (first, second):
                    assert work is not None
                    work.wait()


def _is_all(message: Message, part: Tensor) -> bool:
    """Whether the message is the whole part, from its first element to its last."""
    return len(message.boxes) == 1 and message.boxes[0].lengths == tuple(part.shape)


def _packed(x: Tensor, boxes: Sequence[Box]) -> Tensor:
    views = [_view(x, box.source, box.lengths) for box in boxes]
    return views[0].contiguous() if len(views) == 1 else torch.cat([view.reshape(-1) for view in views])


def _view(x: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    for dim, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        x = x.narrow(dim, start, length)
    return x


def _bytes(x: Tensor) -> Tensor:
    """Contiguous `x` as the backends move it: not every backend knows every dtype."""
    return x.view(-1).view(torch.uint8)
