"""What cannot be traced is an error that names the user's line and the way out."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autopar.errors import TraceError
from autopar.ir.tracing.trace import trace
from tests.zoo import ZOO


class Opaque:
    pass


class Model(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.run = run

    def forward(self, x: Tensor, *, mode: Any = None) -> Any:
        return self.run(self, x)


def branches(model: Any, x: Tensor) -> Tensor:
    if model.linear(x).sum() > 0:  # branches
        return x
    return -x


def takes_item(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * (x.sum().item() > 1)  # takes_item


def item_as_number(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * x.sum().item()  # item_as_number


def selects(model: Any, x: Tensor) -> Tensor:
    return model.linear(x)[x > 0].sum()  # selects


def to_list(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * x.sum(0).tolist()[0]  # to_list


def to_numpy(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) + torch.from_numpy(x.detach().numpy())  # to_numpy


def prints(model: Any, x: Tensor) -> Tensor:
    print(f"{x.mean():.2f}")  # prints
    return model.linear(x)


def repeats_until(model: Any, x: Tensor) -> Tensor:
    while x.norm() > 1:  # repeats_until
        x = model.linear(x) / 2
    return x


def counts_places(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * len(x.round().unique())  # counts_places


def slices_to_a_value(model: Any, x: Tensor) -> Tensor:
    return model.linear(x)[:, : int(x.abs().max())]  # slices_to_a_value


def nonzero_rows(model: Any, x: Tensor) -> Tensor:
    return model.linear(x)[x[:, 0].nonzero().squeeze(1)]  # nonzero_rows


LOOKING = [branches, takes_item, item_as_number, selects, to_list, to_numpy, prints]
LOOKING += [repeats_until, counts_places, slices_to_a_value, nonzero_rows]


@pytest.mark.parametrize("run", LOOKING)
def test_what_looks_at_values_is_told_all_ways_out(run: Callable[..., Any]) -> None:
    model = nn.ModuleDict({"decider": Model(run)})
    model.forward = lambda x: model["decider"](x)  # type: ignore[method-assign]
    example = (torch.randn(3, 4),)
    with pytest.raises(TraceError) as caught:
        trace(model, example)
    message = str(caught.value)
    assert "`decider`" in message and 'leaf_modules=["decider"]' in message, message
    assert "torch.library.custom_op" in message and "register_rule" in message and "split the model there" in message
    assert message.count("\n") == 4 and len(message) < 1200
    if run not in (selects, slices_to_a_value, nonzero_rows, repeats_until):  # what follows would have no fixed shape, or no end
        assert trace(model, example, leaf_modules=["decider"]).graph.ops[0].target == "autopar.leaf"


def rolls_dice(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * random.random()


def rolls_numpy_dice(model: Any, x: Tensor) -> Tensor:
    return model.linear(x) * float(np.random.rand())


def rolls_for_nothing(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.linear(x)
    return y if random.random() < 2 else -y


@pytest.mark.parametrize(("run", "which"), [(rolls_dice, "random"), (rolls_numpy_dice, "numpy.random")])
def test_random_numbers_that_are_not_torchs_are_refused_where_they_matter(run: Callable[..., Any], which: str) -> None:
    with pytest.raises(TraceError, match=f"draws random numbers from `{which}`"):
        trace(Model(run), (torch.randn(3, 4),))


def test_random_numbers_that_change_nothing_do_no_harm() -> None:
    state = random.getstate()
    assert trace(Model(rolls_for_nothing), (torch.randn(3, 4),)).graph.ops
    assert random.getstate() == state


def opaque(model: Any, x: Tensor) -> Any:
    return Opaque()  # opaque


def changes_input(model: Any, x: Tensor) -> Tensor:
    x.mul_(2)  # changes_input
    return model.linear(x)


def wrong_shape(model: Any, x: Tensor) -> Tensor:
    return model.linear(x.reshape(2, -1))  # wrong_shape


@pytest.mark.parametrize(
    ("run", "words", "has_line"),
    [
        (branches, ("looks at the values of a tensor", "torch.where"), True),
        (takes_item, (".item()",), True),
        (item_as_number, ("depends on data", ".item()"), True),
        (selects, ("test_trace_errors.py",), True),
        (opaque, ("no tree of tensors", "register"), False),
        (changes_input, (" in place", "return the new value"), False),
        (wrong_shape, ("RuntimeError",), True),
    ],
)
@pytest.mark.parametrize("repeats", [False, True])
def test_names_line_and_remedy(run: Callable[..., Any], words: tuple[str, ...], has_line: bool, repeats: bool) -> None:
    model: nn.Module = Model(run)
    if repeats and run not in (opaque, changes_input):
        model = nn.Sequential(Model(lambda model, x: model.linear(x)), Model(run), Model(run))
    with pytest.raises(TraceError) as caught:
        trace(model, (torch.randn(3, 4),))
    message = str(caught.value)
    assert all(word in message for word in words), message
    if has_line:
        lines = Path(__file__).read_text().splitlines()
        number = next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {run.__name__}"))
        forward = next(number for number, line in enumerate(lines, 1) if "return self.run(" in line)
        # torch keeps the lines of forwards only for what it refuses late, when the traced program is looked through
        assert f"test_trace_errors.py:{number}" in message or f"test_trace_errors.py:{forward}" in message, message
    assert "E1" not in message and len(message) < 1500


@pytest.mark.parametrize("run", [branches, wrong_shape])
def test_nothing_but_the_error_is_said(run: Callable[..., Any]) -> None:
    """Neither torch's log nor the graph that it prints; in another process, since pytest takes the log away."""
    code = f"from tests.ir.test_trace_errors import *\ntrace(Model({run.__name__}), (torch.randn(3, 4),))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stderr.startswith("Traceback") and "def forward(self, arg" not in done.stderr, done.stderr
    assert not re.search(r"^[WE]\d{4} ", done.stderr, re.MULTILINE), done.stderr


def test_cause_is_kept() -> None:
    with pytest.raises(TraceError) as caught:
        trace(Model(branches), (torch.randn(3, 4),))
    assert caught.value.__cause__ is not None


def test_wrong_arguments() -> None:
    with pytest.raises(TraceError, match="example inputs do not fit"):
        trace(Model(branches), (torch.randn(3, 4),), {"nonsense": torch.zeros(1)})


@pytest.mark.parametrize("example", [(), {"mode": 1}])
def test_missing_argument(example: Any) -> None:
    """However torch says that `x` was not given, it is told as example inputs that do not fit."""
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    with pytest.raises(TraceError, match=r"(?s)^Model cannot be traced: the example inputs do not fit a forward: .*'x'.*give a tuple"):
        trace(Model(branches), args, kwargs)


def test_opaque_input() -> None:
    with pytest.raises(TraceError, match=r"`mode` is a Opaque.*\n?.*register"):
        trace(Model(branches), (torch.randn(3, 4),), {"mode": Opaque()})


def test_lazy_module() -> None:
    with pytest.raises(TraceError, match=r"`0\.weight` of a lazy module has no shape yet"):
        trace(nn.Sequential(nn.LazyLinear(3)), (torch.randn(3, 4),))


def test_line_of_a_library_model() -> None:
    model = ZOO["llama"].build(device="meta")
    with pytest.raises(TraceError, match=r"transformers.*\.py:\d+"):
        trace(model, (), {"input_ids": torch.zeros(2, 3, 4, 5, dtype=torch.int64)})


class Tripled(torch.autograd.Function):
    """A backward that is not the forward's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3


def test_a_backward_of_its_own_is_refused() -> None:
    """Traced, it would be that of the forward's operations: a wrong gradient without a word."""
    apply = torch.autograd.Function.__dict__["apply"]
    for model in (Model(lambda model, x: Tripled.apply(model.linear(x))), nn.Sequential(*(Model(lambda _, x: Tripled.apply(x)),) * 2)):
        with pytest.raises(TraceError, match=r"(?s)test_trace_errors.*Tripled.*autograd\.Function.*register_autograd"):
            trace(model, (torch.randn(3, 4),))
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_reentrant_checkpoints_keep_their_gradient() -> None:
    plain = Model(lambda model, x: model.linear(x.relu()))
    saved = Model(lambda model, x: checkpoint(lambda y: model.linear(y.relu()), x, use_reentrant=True))
    x = torch.randn(3, 4, requires_grad=True)
    assert trace(saved, (x,)).graph.fingerprint() == trace(plain, (x,)).graph.fingerprint()


class Squared(torch.autograd.Function):
    """A backward that is the forward's, written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradients[0]


def test_a_backward_that_is_the_forward_s_is_traced() -> None:
    found = trace(Model(lambda model, x: Squared.apply(model.linear(x))), (torch.randn(3, 4),)).graph
    assert [op.target for op in found.ops] == ["aten.linear.default", "aten.mul.Tensor"]


class Counting(nn.Module):
    """Counts its calls; `matters` says whether the count changes what it computes."""

    def __init__(self, matters: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 1
        self.matters = matters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.linear(x) * (self.calls if self.matters else 2)


def test_number_that_changes_what_is_computed_is_refused_and_put_back():
    model = nn.Sequential(Counting(matters=True))
    with pytest.raises(TraceError, match=r"self.calls` of `0`, a Counting,.*from 1 to 2.*register_buffer"):
        trace(model, (torch.randn(2, 3),))
    assert model[0].calls == 1


def test_number_that_only_counts_is_left_alone():
    model = Counting(matters=False)
    trace(model, (torch.randn(2, 3),))
    assert model.calls == 1
