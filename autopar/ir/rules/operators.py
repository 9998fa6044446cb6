"""Operators as callables: `aten.*` from torch, and `autopar.*` as they are defined on one device (imports torch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autopar.ir.rules.expert_operators import experts_of


def reshard(x: Tensor) -> Tensor:
    """The identity."""
    return x


def dropout(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p)


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = -100, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """`logits`: `(m, v)`, `target`: `(m,)`. The summed loss of the valid rows and their number, both scalars of the dtype of `logits`."""
    loss = F.cross_entropy(logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum")
    return loss, (target != ignore_index).sum().to(loss.dtype)


def target_weight(target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """`target`: `(m,)`. The number of valid rows, a scalar of `dtype`: what `cross_entropy` gives beside the loss."""
    return (target != ignore_index).sum().to(dtype)


def receive() -> Tensor:
    """What the stage before sends; only the runtime knows."""
    raise RuntimeError("`autopar.receive` takes a value from another stage: it runs in a pipeline only")


def send(x: Tensor) -> None:
    """Hands `x` to the next stage; only the runtime knows how."""
    raise RuntimeError("`autopar.send` gives a value to another stage: it runs in a pipeline only")


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Training mode. `x`: `(n, c, ...)`, all others `(c,)`. The result and the new running mean and variance."""
    new_mean, new_var = mean.detach().clone(), var.detach().clone()
    y = F.batch_norm(x, new_mean, new_var, weight, bias, True, momentum, eps)
    return y, new_mean, new_var


@torch.compiler.disable  # type: ignore[untyped-decorator]  # sizes that depend on data
def experts(x: Tensor, ids: Tensor, weights: Tensor | None, tensors: Sequence[Tensor], body: str, capacity: float | None = None) -> Tensor:
    """`x` `(n, h)`, `ids` and `weights` `(n, k)`; see `autopar.ir.experts`. Returns `(n, o)`."""
    return experts_of(x, ids, weights, tensors, body, operator, alone=tensors[0].shape[0] == 1)


def expert_linear(rows: Tensor, matrix: Tensor, expert: Tensor, transposed: bool) -> Tensor:
    """`rows` `(r, i)`, `matrix` `(e, i, o)` or `(e, o, i)`, `expert` `(r,)`; see `autopar.ir.experts`. For checking rules: it copies
    matrices."""
    return torch.einsum("ri,roi->ro" if transposed else "ri,rio->ro", rows, matrix[expert])


def expert_rows(rows: Tensor, expert: Tensor) -> Tensor:
    """`rows` `(e, c)`, `expert` `(r,)`; see `autopar.ir.experts`."""
    return rows[expert]


_at_hand: list[Callable[..., list[Tensor]]] = []


@contextmanager
def leaf_at_hand(body: Callable[..., list[Tensor]]) -> Iterator[None]:
    """Within, `autopar.leaf` runs `body`: which module it is, its arguments do not say."""
    _at_hand.append(body)
    try:
        yield
    finally:
        _at_hand.pop()


def leaf(kind: str, nth: int, follows: list[bool], state: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """A module of the user's as a function of its parameters and buffers (`state`) and its inputs."""
    return _at_hand[-1](kind, nth, follows, state, inputs)


_OWN: dict[str, Callable[..., Any]] = {
    "autopar.reshard": reshard,
    "autopar.dropout": dropout,
    "autopar.cross_entropy": cross_entropy,
    "autopar.batch_norm": batch_norm,
    "autopar.target_weight": target_weight,
    "autopar.experts": experts,
    "autopar.expert_linear": expert_linear,
    "autopar.expert_rows": expert_rows,
    "autopar.receive": receive,
    "autopar.send": send,
    "autopar.leaf": leaf,
}


@cache
def operator(target: str) -> Callable[..., Any]:
    """The callable that `target` names. A view that need not be one of memory becomes a reshape."""
    if target in _OWN:
        return _OWN[target]
    target = {"aten.view.default": "aten.reshape.default", "aten._unsafe_view.default": "aten.reshape.default"}.get(target, target)
    namespace, name, overload = target.split(".")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return found
