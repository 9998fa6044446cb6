"""A training plan in evaluation mode: runs where the model does the same, is refused where it does not."""

import pytest
import torch
from torch import nn

import autopar
from autopar.errors import RuntimeSetupError
from autopar.ir.tracing.trace import trace
from autopar.runtime.build import build
from tests.ir.test_modes import Sly
from tests.zoo import ZOO


def alone(model, example):
    plan = autopar.plan(model, example, "cpu:1")
    args, kwargs = ((), example) if isinstance(example, dict) else ((example,), {})
    return build(model, trace(model, args, kwargs), plan)


def test_ordinary_model_evaluates_as_itself():
    model = ZOO["resnet"].build().train()
    example = ZOO["resnet"].inputs(model)
    module = alone(model, example).eval()
    with torch.no_grad():
        torch.testing.assert_close(module(**example).logits, model.eval()(**example).logits)


def test_model_with_a_life_of_its_own_in_evaluation_is_refused():
    module = alone(Sly().train(), torch.randn(4, 4))
    module(torch.randn(4, 4)).sum().backward()
    with pytest.raises(RuntimeSetupError, match="tanh"):
        module.eval()(torch.randn(4, 4))
    module.train()(torch.randn(4, 4))


def test_model_that_will_not_be_copied_is_checked_at_once():
    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo: object) -> "Uncopied":
            raise TypeError("no copies")

    module = alone(nn.Sequential(Uncopied(4, 4), nn.Dropout()).train(), torch.randn(4, 4))
    module.eval()(torch.randn(4, 4))
