"""Tracing repeats once gives what tracing whole gives, or is not done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.ir.fold import fold
from autopar.ir.text import parse, to_text
from autopar.ir.tracing import trace as tracing
from autopar.ir.tracing.trace import split_example, trace
from tests.zoo import ZOO


@pytest.fixture
def done_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each trace whether its repeats were traced once."""
    record: list[bool] = []
    original = tracing._Call.with_repeats_once

    def watched(call: Any) -> Any:
        found = original(call)
        record.append(found is not None)
        return found

    monkeypatch.setattr(tracing._Call, "with_repeats_once", watched)
    return record


def assert_equal_to_whole(model: nn.Module, example: Any) -> str:
    args, kwargs = split_example(example)
    text = to_text(trace(model, args, kwargs).graph)
    assert text == to_text(trace(model, args, kwargs, once_per_repeat=False).graph)
    return text


@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("unet")])  # no level of a U-Net is like another
def test_zoo(name: str, done_once: list[bool]) -> None:
    model = ZOO[name].build(layers=4, device="meta")
    example = ZOO[name].inputs(model, device="meta")
    text = assert_equal_to_whole(model, example)
    assert done_once[0]
    segments = [segment.count for segment in fold(parse(text)) if segment.count > 1]
    assert segments in ([4], [3, 3], [4, 3], [4, 2])  # T5's first blocks differ, ResNet's first of a stage; BART has 2 decoder layers


@pytest.mark.parametrize(
    "changes", [{"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, {"output_hidden_states": True}]
)
def test_layers_that_differ(changes: dict[str, Any]) -> None:
    model = ZOO["qwen3"].build(layers=4, device="meta", **changes)
    assert_equal_to_whole(model, ZOO["qwen3"].inputs(model, device="meta"))


def test_scale_by_layer_number(done_once: list[bool]) -> None:
    """GPT-2 can be told to look at `layer_idx` in forward."""
    model = ZOO["gpt2"].build(layers=3, device="meta", scale_attn_by_inverse_layer_idx=True)
    text = assert_equal_to_whole(model, ZOO["gpt2"].inputs(model, device="meta"))
    assert "scale=0.25" in text and "scale=0.125" in text
    assert not done_once[0]


class Layer(nn.Module):
    def __init__(self, number: int, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Stack(nn.Module):
    """Layers whose forward is `layer`, called by `run`."""

    def __init__(self, layer: Callable[..., Any], run: Callable[..., Any], count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(number, layer) for number in range(count))
        self.shared = nn.Linear(4, 4)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def plain(layer: Any, x: Tensor) -> Tensor:
    return F.dropout(layer.norm(layer.linear(x)), 0.5)


def in_a_row(stack: Any, x: Tensor) -> Tensor:
    for layer in stack.layers:
        x = layer(x)
    return x


def forwards_and_back(stack: Any, x: Tensor) -> Tensor:
    kept = []
    for layer in stack.layers:
        x = layer(x)
        kept.append(x)
    for layer, other in zip(reversed(stack.layers), reversed(kept), strict=True):
        x = F.relu(layer.linear(x)) + other
    return x


def looks_at_number(layer: Any, x: Tensor) -> Tensor:
    return layer.linear(x) if layer.number % 2 else F.relu(layer.linear(x))


def uses_number(layer: Any, x: Tensor) -> Tensor:
    return layer.linear(x) * layer.number


def asks_for_type(layer: Any, x: Tensor) -> Tensor:
    return layer.linear(x) if isinstance(layer.number, int) else x


def skips_middle(stack: Any, x: Tensor) -> Tensor:
    middle = stack.layers[1](stack.layers[0](x))
    return stack.layers[3](stack.layers[2](middle)) + middle


def skips_last(stack: Any, x: Tensor) -> Tensor:
    return stack.layers[2](stack.layers[1](stack.layers[0](x)))


def twice(stack: Any, x: Tensor) -> Tensor:
    return in_a_row(stack, in_a_row(stack, x))


def own_weights_outside(stack: Any, x: Tensor) -> Tensor:
    return in_a_row(stack, x) @ stack.layers[2].linear.weight


def all_weights_outside(stack: Any, x: Tensor) -> Tensor:
    return in_a_row(stack, x) + torch.stack([weight.pow(2).sum() for weight in stack.parameters()]).sum()


def all_children_outside(stack: Any, x: Tensor) -> Tensor:
    return in_a_row(stack, x) * sum(len(list(layer.children())) for layer in stack.layers)


def changes_argument(layer: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    return layer.linear(x)


def changed_argument_is_seen(stack: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for layer in stack.layers:
        y = x + 1
        x = layer(y)
        total = total + y
    return x + total


def side_effect(layer: Any, x: Tensor) -> Tensor:
    y = layer.linear(x)
    layer.seen = y
    return F.relu(y)


def side_effect_is_read(stack: Any, x: Tensor) -> Tensor:
    x = in_a_row(stack, x)
    return x + stack.layers[0].seen


def structured(layer: Any, given: dict[str, Any], *, extra: Any = None) -> dict[str, Any]:
    y = layer.linear(given["x"])
    return {"x": y, "same": given["same"], "none": None, "number": 3, "pair": (y, y + (0 if extra is None else extra))}


def structured_row(stack: Any, x: Tensor) -> Any:
    given: dict[str, Any] = {"x": x, "same": x}
    for number, layer in enumerate(stack.layers):
        given = layer({"x": given["x"], "same": given["same"]}, extra=x if number == 2 else None)
    return given["x"] + given["same"] + given["pair"][1]


def other_shapes(stack: Any, x: Tensor) -> Tensor:
    a = stack.layers[1](stack.layers[0](x))
    b = stack.layers[3](stack.layers[2](torch.cat([a, a])))
    return b + torch.cat([a, a])


def side_by_side(stack: Any, x: Tensor) -> Tensor:
    return torch.stack([layer(x) for layer in stack.layers]).sum(0)


def with_outer_module(stack: Any, x: Tensor) -> Tensor:
    for layer in stack.layers:
        x = layer(stack.shared(x))
    return x


def simple(layer: Any, x: Tensor) -> Tensor:
    return F.gelu(layer.linear(x))


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], bool | None]] = {
    "in a row": (plain, in_a_row, True),
    "skip": (simple, skips_middle, True),
    "last not called": (simple, skips_last, None),
    "called twice": (simple, twice, True),
    "called twice, updating": (plain, twice, False),
    "inner modules called directly": (simple, forwards_and_back, False),
    "number decides": (looks_at_number, in_a_row, False),
    "number counts": (uses_number, in_a_row, False),
    "type of number": (asks_for_type, in_a_row, False),
    "weights used outside": (simple, own_weights_outside, False),
    "all weights used outside": (simple, all_weights_outside, False),
    "children counted outside": (simple, all_children_outside, False),
    "argument changed in place": (changes_argument, changed_argument_is_seen, False),
    "side effect": (side_effect, side_effect_is_read, None),
    "structured": (structured, structured_row, True),
    "other shapes": (simple, other_shapes, True),
    "side by side": (simple, side_by_side, True),
    "between others": (simple, with_outer_module, True),
}


@pytest.mark.parametrize("case", CASES)
def test_hard_cases(case: str, done_once: list[bool]) -> None:
    layer, run, expected = CASES[case]
    stack = Stack(layer, run)
    before = [dict(vars(module)) for module in stack.modules()]
    text = assert_equal_to_whole(stack, torch.randn(8, 4))
    assert "layers.2.linear.weight" in text
    assert expected is None or done_once[0] == expected
    ignored = {"seen", "number"}
    for module, attributes in zip(stack.modules(), before, strict=True):
        assert {key: value for key, value in vars(module).items() if key not in ignored} == {
            key: value for key, value in attributes.items() if key not in ignored
        }
    assert [module.number for module in stack.layers] == [0, 1, 2, 3]


def test_hooks_run() -> None:
    stack = Stack(simple, in_a_row)
    stack.layers[2].register_forward_hook(lambda module, args, output: output * 2)
    assert "aten.mul.Tensor" in assert_equal_to_whole(stack, torch.randn(8, 4))
    stack.layers[1].linear.register_forward_hook(lambda module, args, output: output - 2)
    assert "aten.sub.Tensor" in assert_equal_to_whole(stack, torch.randn(8, 4))


def test_frozen_layers_are_not_like_trainable_ones() -> None:
    stack = Stack(simple, in_a_row)
    stack.layers[0].requires_grad_(False)
    stack.layers[1].requires_grad_(False)
    assert_equal_to_whole(stack, torch.randn(8, 4))


def test_weights_tied_across_layers() -> None:
    stack = Stack(simple, in_a_row)
    stack.layers[3].linear.weight = stack.layers[0].linear.weight
    assert_equal_to_whole(stack, torch.randn(8, 4))


def test_depth_hardly_costs() -> None:
    """The program that torch exports must not grow with depth (counted in calls of `torch.export`'s operators, not in seconds)."""
    sizes = []
    original = tracing.export_program

    def watched(*args: Any) -> Any:
        program = original(*args)
        sizes.append(len(program.graph.nodes))
        return program

    for layers in (3, 30):
        model = ZOO["llama"].build(layers=layers, device="meta")
        args, kwargs = split_example(ZOO["llama"].inputs(model, device="meta"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tracing, "export_program", watched)
            trace(model, args, kwargs)
    assert sizes[0] == sizes[1]
