"""Plans and modules with stages on real ranks, for the tests of what users do with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autopar
from autopar.ir.plan import Plan
from tests.runtime.random_plans import float64
from tests.zoo import ZOO, talkative

Mesh = dict[str, int]


class TinyLM(nn.Module):
    """A language model that computes its loss in the dtype of its weights, with one table for the tokens it reads and predicts."""

    def __init__(self, layers: int = 2, width: int = 16, vocabulary: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, target: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), target.flatten()), "logits": logits}


def _tokens(model: nn.Module) -> dict[str, Tensor]:
    tokens = torch.randint(0, 32, (8, 6), generator=torch.Generator().manual_seed(1))
    return {"tokens": tokens, "target": tokens.roll(-1, 1)}


MODELS = {name: (entry.build, entry.inputs) for name, entry in ZOO.items()} | {"tiny": (TinyLM, _tokens)}


def example(name: str, dropout: float = 0.0, **sizes: Any) -> tuple[nn.Module, Any]:
    """A small model in float64, the same on every rank, and inputs."""
    build, inputs = MODELS[name]
    with float64():
        torch.manual_seed(0)
        model = build(**sizes).double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        return model, inputs(model)


def planned(name: str, mesh: Mesh, microbatches: int = 1, schedule: str | None = None, recompute: int = 0, **sizes: Any) -> Plan:
    """The plan of that model forced to `mesh`, where talking costs nothing; `recompute` repeats of every segment."""
    model, inputs = example(name, **sizes)
    ranks = 1
    for size in mesh.values():
        ranks *= size
    options = {"schedule": schedule} if schedule is not None else {}
    plan = autopar.plan(model, inputs, talkative(ranks), mesh=mesh, microbatches=microbatches, **options)
    segments = [item.model_copy(update={"recompute": min(recompute, item.count)}) for item in plan.segments]
    return plan.model_copy(update={"segments": tuple(segments)})
