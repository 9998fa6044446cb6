"""Leaf modules in a trace: one operation a call, whatever is inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.errors import TraceError
from autopar.ir.text import parse, to_text
from autopar.ir.tracing.leaf_modules import LEAF
from autopar.ir.tracing.trace import TracedModel, trace
from tests.leafy import Leafy, Router, Rows


def traced(model: nn.Module, leaf_modules: Any, *, device: str = "cpu") -> TracedModel:
    return trace(model, (torch.randn(4, 12, device=device),), leaf_modules=leaf_modules)


@pytest.mark.parametrize("leaf_modules", [["blocks.*.leaf"], [Router], ["blocks.0.leaf", "blocks.1.leaf"], {Router: None}])
def test_every_call_of_a_leaf_is_one_operation(leaf_modules: Any) -> None:
    model = Leafy(Router)
    found = traced(model, leaf_modules)
    leaves = [op for op in found.graph.ops if op.target == LEAF]
    assert [op.module for op in leaves] == ["blocks.0.leaf", "blocks.1.leaf"] == list(found.leaf_modules)
    assert [found.graph.values[name].requires_grad for name in leaves[0].outputs] == [True, False, False]  # out, top, the new count
    assert [item.updated is not None for item in found.graph.buffers] == [True, True]
    assert parse(to_text(found.graph)) == found.graph
    assert found.graph.fingerprint() == traced(model, leaf_modules).graph.fingerprint()


def test_the_model_is_as_it_was() -> None:
    model = Leafy(Router)
    generator = torch.get_rng_state()
    example = torch.randn(4, 12)
    state = torch.get_rng_state()
    trace(model, (example,), leaf_modules=[Router])
    assert all(block.leaf.calls == 0 and float(block.leaf.seen) == 0 for block in model.blocks)  # type: ignore[union-attr, arg-type]
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(generator, state)
    assert "forward" not in model.blocks[0].leaf.__dict__  # type: ignore[union-attr]


def test_a_leaf_that_needs_no_values_is_seen_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 2))
    found = traced(model, ["1"], device="meta")
    assert [op.target for op in found.graph.ops] == ["aten.linear.default", LEAF, "aten.linear.default"]


def test_a_leaf_on_meta_that_looks_at_values_needs_a_stand_in() -> None:
    with torch.device("meta"):
        model = Leafy(Rows)
    with pytest.raises(TraceError, match=r"what leaf module `blocks.0.leaf`.* can only be seen with values[\s\S]*leaf_modules=\{"):
        traced(model, [Rows], device="meta")
    assert len(traced(model, {Rows: torch.empty_like}, device="meta").leaf_modules) == 2


class Wrong(nn.Module):
    held: Tensor

    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)
        self.register_buffer("held", torch.zeros(12))
        self.what = what

    def forward(self, x: Tensor) -> Any:
        match self.what:
            case "input":
                return self.inner(x.relu_())
            case "parameter":
                self.inner.weight.data.mul_(1.0)
                with torch.no_grad():
                    self.inner.weight.mul_(1.0)
                return self.inner(x)
            case "buffer":
                self.held = self.held + 1
                return self.inner(x) + self.held
            case _:
                return self.inner(x), object()


class Around(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.leaf = Wrong(what)

    def forward(self, x: Tensor) -> Any:
        found = self.leaf(x * 1) if self.leaf.what != "direct" else self.leaf.forward(x)
        return (found[0] if isinstance(found, tuple) else found).sum()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("input", "changes its inputs in place"),
        ("parameter", "changes or replaces its parameters"),
        ("buffer", "changes or replaces its parameters, or replaces its buffers"),
        ("object", "returns a object"),
    ],
)
def test_what_a_leaf_must_not_do_is_refused(what: str, words: str) -> None:
    with pytest.raises(TraceError, match=f"leaf module `leaf` {words}"):
        traced(Around(what), ["leaf"])


@pytest.mark.parametrize(
    ("leaf_modules", "words"),
    [
        (["blocks.*.leave"], "`blocks.*.leave` is no module of Leafy"),
        (["head.weight"], "is no module"),
        ([nn.Conv1d], "`Conv1d` is no module"),
        ("head", "is a list of"),
        ([3], "holds a int"),
    ],
)
def test_leaves_that_are_not_there_are_an_error(leaf_modules: Any, words: str) -> None:
    with pytest.raises(TraceError) as caught:
        traced(Leafy(Rows), leaf_modules)
    assert words in str(caught.value)
