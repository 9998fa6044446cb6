"""What collectives really send: every call of `torch.distributed` by the ranks of this process, with its bytes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

_CALLS = {
    "all_reduce": 0, "all_gather_single": 0, "reduce_scatter_single": 1, "all_to_all_single": 0, "broadcast": 0, "send": 0, "isend": 0,
}  # fmt: skip
"""By name the position of the larger tensor: what an all-gather makes, what a reduce-scatter is given."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One call on one rank: its name, the ranks of its group (of the job), and the tensor's bytes and dtype."""

    kind: str
    group: tuple[int, ...]
    bytes: int
    dtype: str


@contextmanager
def counted() -> Iterator[dict[int, list[Sent]]]:
    """Within, the calls of all simulated ranks, by rank."""
    found: dict[int, list[Sent]] = {}
    lock = threading.Lock()

    def counting(kind: str) -> Any:
        original, position = getattr(dist, kind), _CALLS[kind]

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor: Tensor = args[position]
            group = kwargs.get("group")
            ranks = tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
            size = tensor.numel() * tensor.element_size()
            with lock:
                found.setdefault(dist.get_rank(), []).append(Sent(kind, ranks, size, str(tensor.dtype).removeprefix("torch.")))
            return original(*args, **kwargs)

        return patch.object(dist, kind, call)

    patches = [counting(kind) for kind in _CALLS]
    for item in patches:
        item.start()
    try:
        yield found
    finally:
        for item in patches:
            item.stop()
