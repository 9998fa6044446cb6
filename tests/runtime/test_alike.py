"""Random numbers drawn alike: a model with random masks of its own is the same on one device and on many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autopar
from autopar.runtime.operators.alike import drawing_alike, draws_alike, eagerly_alike
from autopar.runtime.verification.launch import RankPool
from tests.zoo import talkative


class Noisy(nn.Module):
    """Rows left out at random, noise, dropout of whole channels, a sample, and numbers that nobody reads."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        self.channels = nn.Dropout1d(0.4)
        self.elements = nn.Dropout(0.3, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(7, device=x.device)
        keep = torch.rand(x.shape[0], 1, 1, dtype=x.dtype, device=x.device) < 0.5
        x = x + keep * self.up(x)
        x = self.channels(self.channels(x))
        x = self.elements(x * 1)
        x = x + torch.empty_like(x).uniform_(-1, 1) + torch.randn_like(x)
        return (x + torch.bernoulli(self.down(x).sigmoid())).square().mean()


@pytest.mark.processes
@pytest.mark.parametrize("options", [{"mesh": (2, 2)}, {"mesh": {"dp": 4}}, {"mesh": {"pp": 2, "dp": 2}, "microbatches": 1}], ids=str)
def test_draws_do_not_depend_on_the_plan(ranks4: RankPool, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Noisy(), nn.Identity()).double()
    example = torch.randn(8, 4, 8, dtype=torch.float64)
    plan = autopar.plan(model, example, talkative(4), **options)
    report = autopar.verify(model, example, plan, ranks=ranks4)
    assert report.ok, report
    assert any("same random numbers" in note for note in report.notes)


def test_draws_repeat_and_leave_the_generator_alone() -> None:
    model, example = Noisy(), torch.randn(8, 4, 8)
    state = torch.get_rng_state()
    with eagerly_alike(model):
        first = model(example)
    with eagerly_alike(model):
        second = model(example)
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, model(example))
    assert not model._forward_hooks and not model._forward_pre_hooks
    with drawing_alike():
        assert draws_alike()
    assert not draws_alike()
