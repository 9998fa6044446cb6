"""Masks of attention: those that are causal are written as `is_causal`, and no other is taken for one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

from autopar.ir.graph import Op
from autopar.ir.tracing.trace import trace
from tests.ir.interpreter import run

Mask = Callable[[int, int], Tensor]
INF = float("inf")


def positions(rows: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows)[:, None], torch.arange(keys)


CAUSAL: dict[str, Mask] = {
    "lower triangle": lambda n, s: torch.ones(n, s, dtype=torch.bool).tril(),
    "upper triangle of -inf": lambda n, s: torch.triu(torch.full((n, s), -INF), diagonal=1),
    "filled where not below": lambda n, s: torch.zeros(n, s).masked_fill(torch.ones(n, s).tril().bool().logical_not(), -INF),
    "filled above": lambda n, s: torch.zeros(n, s).masked_fill(torch.ones(n, s).triu(1).bool(), torch.finfo(torch.float32).min),
    "positions": lambda n, s: positions(n, s)[0] >= positions(n, s)[1],
    "keys first": lambda n, s: positions(n, s)[1] <= positions(n, s)[0],
    "not above": lambda n, s: ~(positions(n, s)[1] > positions(n, s)[0]),
    "shifted twice": lambda n, s: positions(n, s)[0] + 3 > positions(n, s)[1] + 2,
    "where": lambda n, s: torch.where(positions(n, s)[0] >= positions(n, s)[1], 0.0, -INF),
    "one minus, times the least": lambda n, s: (1.0 - torch.ones(n, s).tril()) * torch.finfo(torch.float32).min,
    "and a window that is wider than all": lambda n, s: (
        (positions(n, s)[0] >= positions(n, s)[1]) & (positions(n, s)[1] > positions(n, s)[0] - 100)
    ),
    "and all": lambda n, s: torch.ones(n, s, dtype=torch.bool) & (positions(n, s)[0] >= positions(n, s)[1]),
    "or none": lambda n, s: torch.zeros(n, s, dtype=torch.bool) | (positions(n, s)[0] >= positions(n, s)[1]),
    "upside down": lambda n, s: (positions(s, n)[0] <= positions(s, n)[1]).t(),
    "neither above nor above": lambda n, s: ~((positions(n, s)[1] > positions(n, s)[0]) | torch.ones(n, s).triu(2).bool()),
}
OTHER: dict[str, Mask] = {
    "without the diagonal": lambda n, s: positions(n, s)[0] > positions(n, s)[1],
    "one key more": lambda n, s: torch.ones(n, s, dtype=torch.bool).tril(1),
    "the other triangle": lambda n, s: torch.ones(n, s, dtype=torch.bool).triu(),
    "transposed": lambda n, s: (positions(s, n)[0] >= positions(s, n)[1]).t(),
    "a window": lambda n, s: (positions(n, s)[0] >= positions(n, s)[1]) & (positions(n, s)[1] > positions(n, s)[0] - 3),
    "every other key": lambda n, s: positions(n, s)[0] >= 2 * positions(n, s)[1],
    "hides little": lambda n, s: torch.triu(torch.full((n, s), -1.0), diagonal=1),
    "hides much": lambda n, s: torch.triu(torch.full((n, s), -1e9), diagonal=1),
    "hides what it should show": lambda n, s: torch.tril(torch.full((n, s), -INF), diagonal=-1),
    "from the other end": lambda n, s: torch.ones(n, s, dtype=torch.bool).tril(s - n - 1),
    "from a row of its own": lambda n, s: torch.ones(n, s, dtype=torch.bool).tril() | (positions(n, s)[1] < 2),
    "only some rows": lambda n, s: (positions(n, s)[0] >= positions(n, s)[1]) | (positions(n, s)[0] > n - 2),
    "shown twice as dear": lambda n, s: torch.where(positions(n, s)[0] >= positions(n, s)[1], 1.0, -INF),
    "backwards": lambda n, s: (positions(n, s)[0] >= positions(n, s)[1]).flip(0) | (positions(n, s)[1] == 0),
    "nothing": lambda n, s: torch.zeros(n, s, dtype=torch.bool) | (positions(n, s)[1] == 0),
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, mask: Mask, keys: int) -> None:
        super().__init__()
        self.query, self.mask, self.keys = nn.Linear(4, 4), mask, keys

    def forward(self, x: Tensor) -> Tensor:
        k = x[:, : self.keys].unsqueeze(1)
        return F.scaled_dot_product_attention(self.query(x).unsqueeze(1), k, k, attn_mask=self.mask(x.shape[1], self.keys))


def attention_of(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[Op]:
    graph = trace(model, args, kwargs).graph
    return [op for op in graph.ops if op.target == "aten.scaled_dot_product_attention.default"]


@pytest.mark.parametrize("keys", [8, 5])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_masks_are_recognised(name: str, keys: int) -> None:
    model, x = Attention(CAUSAL[name], keys), torch.randn(2, 8, 4)
    traced = trace(model, (x,), {})
    (op,) = [op for op in traced.graph.ops if op.target == "aten.scaled_dot_product_attention.default"]
    assert op.args[3] is None and op.args[5] is True
    assert not any("tri" in op.target or "arange" in op.target for op in traced.graph.ops)
    torch.testing.assert_close(run(traced, model, [x])[0][0], model(x))


@pytest.mark.parametrize("keys", [8, 5])
@pytest.mark.parametrize("name", OTHER)
def test_other_masks_are_left_alone(name: str, keys: int) -> None:
    (op,) = attention_of(Attention(OTHER[name], keys), torch.randn(2, 8, 4))
    assert op.args[3] is not None and op.arg(5, "is_causal", False) is False


def test_masks_of_data_are_left_alone() -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            mask = torch.ones(8, 8, dtype=torch.bool).tril() & valid[:, None]
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None])

    (op,) = attention_of(Padded(), torch.randn(2, 1, 8, 4), torch.ones(2, 8, dtype=torch.bool))
    assert op.args[3] is not None


def test_a_mask_that_hides_nothing_goes() -> None:
    for mask in (lambda n, s: torch.ones(n, s, dtype=torch.bool), lambda n, s: torch.zeros(n, s), lambda n, s: positions(n, s)[0] >= -1):
        (op,) = attention_of(Attention(mask, 8), torch.randn(2, 8, 4))
        assert op.args[3] is None and op.args[5] is False


def test_windows_of_mistral_stay_unless_they_are_wider_than_the_sequence() -> None:
    for window, causal in ((8, False), (16, True), (64, True)):
        config = MistralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            sliding_window=window,
        )  # fmt: skip
        with torch.device("meta"):
            model, ids = MistralForCausalLM(config), torch.zeros(2, 16, dtype=torch.int64)
        found = attention_of(model, input_ids=ids, labels=ids)
        assert found and all((op.args[3] is None) is causal for op in found)


def test_heads_repeated_for_a_mask_are_read_once() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).split((8, 4, 4), -1)
            q, k, v = (part.unflatten(-1, (-1, 2)).transpose(1, 2) for part in (q, k, v))
            k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, 6, 2) for part in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(6, 6, dtype=torch.bool).tril())

    model, x = Grouped(), torch.randn(2, 6, 8)
    traced = trace(model, (x,), {})
    (op,) = [op for op in traced.graph.ops if op.target == "aten.scaled_dot_product_attention.default"]
    assert op.kwarg("enable_gqa") is True and traced.graph.values[op.operands[1]].shape == (2, 2, 6, 2)
    torch.testing.assert_close(run(traced, model, [x])[0][0], model(x))
