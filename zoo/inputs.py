"""Example inputs by the kind of task: random, the same at every call, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SEQUENCE = 16


def _generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(low: int, high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(low, high, shape, generator=_generator(seed))


def floats(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.vocab_size)


def tokens(model: nn.Module, batch: int) -> dict[str, Any]:
    """`input_ids`, `labels`: `(batch, SEQUENCE)`; some labels are ignored (-100), unevenly over the rows."""
    vocabulary = _vocabulary(model)
    labels = numbers(1, vocabulary, batch, SEQUENCE, seed=2)
    labels[0, : SEQUENCE // 2] = -100
    return {"input_ids": numbers(1, vocabulary, batch, SEQUENCE), "labels": labels}


def tokens_to_tokens(model: nn.Module, batch: int) -> dict[str, Any]:
    """As `tokens`, and `decoder_input_ids`: `(batch, SEQUENCE // 2)` as the labels."""
    found = tokens(model, batch)
    vocabulary = _vocabulary(model)
    return {
        "input_ids": found["input_ids"],
        "decoder_input_ids": numbers(1, vocabulary, batch, SEQUENCE // 2, seed=3),
        "labels": found["labels"][:, SEQUENCE // 4 :][:, : SEQUENCE // 2].contiguous(),
    }


def images(model: nn.Module, batch: int, size: int = 32) -> dict[str, Any]:
    """`pixel_values`: `(batch, 3, size, size)`; `labels`: `(batch,)` of 10 classes."""
    return {"pixel_values": floats(batch, 3, size, size), "labels": numbers(0, 10, batch)}
