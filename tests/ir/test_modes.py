"""Evaluation graphs against training graphs: equal for ordinary models, and a hidden `if self.training` is found."""

import pytest
import torch
from torch import Tensor, nn

from autopar.ir.tracing.modes import evaluation_differs
from autopar.ir.tracing.trace import split_example, trace
from tests.zoo import ZOO


def graphs(model, example):
    args, kwargs = split_example(example)
    training = trace(model.train(), args, kwargs).graph
    return training, trace(model.eval(), args, kwargs).graph


@pytest.mark.parametrize("name", ZOO)
def test_ordinary_models_differ_in_dropout_and_statistics_alone(name):
    model = ZOO[name].build()
    assert evaluation_differs(*graphs(model, ZOO[name].inputs(model))) is None


class Sly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y.relu() if self.training else y.tanh()


class Talkative(Sly):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.inner(x)
        return (y, y + 1) if self.training else (y,)


@pytest.mark.parametrize(("model", "hint"), [(Sly(), "tanh"), (Talkative(), "returns")])
def test_what_only_evaluation_does_is_named(model, hint):
    why = evaluation_differs(*graphs(model, torch.randn(2, 4)))
    assert why is not None
    assert hint in why


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(4, 4, 2, dropout=0.5), nn.GRU(4, 4, 2, dropout=0.5), nn.RNN(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return x


def test_recurrent_layers_differ_in_dropout_alone():
    assert evaluation_differs(*graphs(Recurrent(), torch.randn(3, 2, 4))) is None
