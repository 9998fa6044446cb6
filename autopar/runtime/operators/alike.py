"""Random numbers that one device and many draw alike, so that models with random masks and samples can be compared.

A draw is known by the module that makes it, by its shape, and by how many of that shape the module has made before in the same forward
pass. Within `drawing_alike`, what a rank's program draws is seeded by that; within `eagerly_alike`, what an eager module draws is too.
Both draw whole tensors, of which ranks take their parts afterwards. Outside, draws differ from step to step, as they should.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.ir.graph import Graph
from autopar.ir.rules.table import RANDOM
from autopar.runtime.operators.dropout import seeded

_active = False


def draws_alike() -> bool:
    """Whether ranks' programs are to draw as `draw_seed` says."""
    return _active


@contextmanager
def drawing_alike() -> Iterator[None]:
    """Within, programs of ranks draw what `eagerly_alike` draws."""
    global _active
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before


@dataclass(frozen=True, slots=True)
class Draw:
    """How an operation draws: by `number`, with the run's seed and the step, or alike, from `seed`."""

    number: int
    seed: int


def draws(graph: Graph) -> dict[str, Draw]:
    """The draws of operations by name; those that draw nothing have one all the same."""
    seen: Counter[tuple[str, tuple[int, ...]]] = Counter()
    found = {}
    for number, op in enumerate(graph.ops):
        key = (op.module, graph.values[op.outputs[0]].shape if op.outputs else ())
        found[op.name] = Draw(number, draw_seed(*key, seen[key]))
        seen[key] += op.target in RANDOM
    return found


def draw_seed(module: str, shape: Sequence[int], occurrence: int) -> int:
    """The seed of a draw of `shape` in `module`, the `occurrence`-th there of that shape."""
    return zlib.crc32(repr((module, tuple(shape), occurrence)).encode())


class _Seeding(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Seeds every operator that draws; `modules`: the paths of the modules that are running, innermost last."""

    def __init__(self, modules: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules = modules
        self.seen: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        device = torch.device("cpu")
        if func._schema.is_mutable:  # writes its first argument
            shape = args[0].shape
        else:
            with seeded(device, 0):
                result = func(*args, **kwargs)
            if not isinstance(result, Tensor):  # recurrent layers and attention, which draw for dropout alone
                return result
            shape = result.shape
        key = (self.modules[-1] if self.modules else "", tuple(shape))
        self.seen[key] += 1
        with seeded(device, draw_seed(*key, self.seen[key] - 1)):
            return func(*args, **kwargs)


@contextmanager
def eagerly_alike(model: nn.Module, path: str = "") -> Iterator[None]:
    """Within, one forward pass of `model`, on the CPU, draws as the ranks of its plan do within `drawing_alike`. `path`: of `model` in the
    model that is planned."""
    running: list[str] = []
    hooks = []
    for name, module in model.named_modules(prefix=path):
        hooks.append(module.register_forward_pre_hook(lambda module, args, name=name: running.append(name)))
        hooks.append(module.register_forward_hook(lambda module, args, output: (running.pop(), None)[1], always_call=True))
    try:
        with _Seeding(running):
            yield
    finally:
        for hook in hooks:
            hook.remove()
