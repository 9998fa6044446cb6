"""Plans and modules with stages on real ranks, for the tests of what users do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import autopar
from autopar.ir.plan import Plan
from tests.runtime.random_plans import float64
from tests.zoo import ZOO

Mesh = dict[str, int]


def example(name: str, dropout: float = 0.0, **sizes: Any) -> tuple[nn.Module, Any]:
    """A small model of the zoo in float64, the same on every rank, and inputs."""
    with float64():
        torch.manual_seed(0)
        model = ZOO[name].build(**sizes).double()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        return model, ZOO[name].inputs(model)


def planned(name: str, mesh: Mesh, microbatches: int = 1, schedule: str | None = None, recompute: int = 0, **sizes: Any) -> Plan:
    """The plan of that model forced to `mesh`; `recompute` repeats of every segment."""
    model, inputs = example(name, **sizes)
    ranks = 1
    for size in mesh.values():
        ranks *= size
    options = {"schedule": schedule} if schedule is not None else {}
    plan = autopar.plan(model, inputs, f"cpu:{ranks}", mesh=mesh, microbatches=microbatches, **options)
    segments = [item.model_copy(update={"recompute": min(recompute, item.count)}) for item in plan.segments]
    return plan.model_copy(update={"segments": tuple(segments)})
