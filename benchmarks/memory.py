"""Exact tensor memory of one training step on any device, the same way for every program that is measured.

`measure(step, *owned)` runs `step` under a dispatch mode that sees every tensor an operator reads or makes, follows the storages behind
them, and takes the largest sum of live storage sizes. Storages are counted once however many tensors view them, at their present
size (`fully_shard` frees by resizing to zero), and disappear with their last owner. What allocates below the dispatcher (a matrix
library's workspace, a transport's staging) is not seen, for any of the programs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PLAIN = (Tensor, torch.nn.Parameter)


class StorageTracker(TorchDispatchMode):
    """Follows live storages; `peak_bytes` is the largest sum seen since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.peak_bytes = 0

    def track(self, values: Iterable[Any]) -> None:
        """Count the storages behind the tensors in `values`; of a `DTensor`, this rank's part."""
        for value in values:
            while hasattr(value, "_local_tensor"):
                value = value._local_tensor
            if isinstance(value, Tensor) and type(value) in _PLAIN and value.device.type != "meta":
                storage = value.untyped_storage()
                self._storages.setdefault(id(storage), weakref.ref(storage, self._forget(id(storage))))

    def _forget(self, key: int) -> Callable[[object], None]:
        return lambda _: self._storages.pop(key, None)

    def live_bytes(self) -> int:
        storages = [reference() for reference in list(self._storages.values())]
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def reset(self) -> None:
        self.peak_bytes = self.live_bytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if FakeTensor in types:
            return func(*args, **(kwargs or {}))  # DTensor works out shapes: nothing is allocated
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # a subclass unwraps itself; its inner operators come back here
        result = func(*args, **(kwargs or {}))
        self.track(tree_leaves((args, kwargs, result)))
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return result


def measure(step: Callable[[], object], owned: Callable[[], Iterable[Any]]) -> int:
    """Peak bytes of the second of two calls of `step`; the first, which is not watched, makes what is made once (buckets, optimizer
    state) and looks at what is looked at once (ranks compare their first batches).

    `owned()`: tensors that live on between steps (parameters, gradients, optimizer state), counted from the start.
    """
    step()
    tracker = StorageTracker()
    tracker.track(owned())
    tracker.reset()
    with tracker:
        step()
    return tracker.peak_bytes


def lasting(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterable[Any]:
    """What a training step leaves behind: parameters, gradients, buffers, the optimizer's state."""
    for parameter in module.parameters():
        yield parameter
        yield parameter.grad
    yield from module.buffers()
    for state in optimizer.state.values():
        yield from state.values()
