"""Calls are matched to the traced one by name; what does not match is told in words."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopar.errors import InputError
from autopar.ir.placement import R, S
from autopar.ir.tracing.trace import trace
from autopar.runtime.convert import Place
from autopar.runtime.inputs import InputBinder

ALONE = Place((1, 1), (0, 0), ("", ""))


class Model(nn.Module):
    def forward(self, x: Tensor, *, scale: float = 1.0, extra: dict[str, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        y = x * scale
        if extra is not None:
            y = y + extra["shift"] + extra["more"][0]
        return y if mask is None else y * mask


class Positional(nn.Module):
    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        return ids * mask if labels is None else ids * mask - labels


X = torch.ones(4, 3)
EXTRA = {"shift": torch.ones(3), "more": [torch.ones(1)]}


def binder(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], place: Place = ALONE, **options: Any) -> InputBinder:
    traced = trace(model, args, kwargs)
    whole = (R, R)
    states = {item.path: whole for item in traced.graph.inputs} | options.pop("states", {})
    return InputBinder(traced, states, place, signature=inspect.signature(model.forward), **options)


def test_nested_arguments_and_literals() -> None:
    bound = binder(Model(), (X,), {"scale": 2.0, "extra": EXTRA})
    assert [slot.path for slot in bound.slots] == ["0", "extra.shift", "extra.more.0"]
    found = bound.bind((X,), {"extra": {"more": [EXTRA["more"][0]], "shift": EXTRA["shift"]}, "scale": 2.0})
    assert [tuple(tensor.shape) for tensor in found] == [(4, 3), (3,), (1,)]
    bound.bind((), {"x": X, "scale": 2.0, "extra": EXTRA, "mask": None})  # what is None was not given


def test_by_position_or_by_name() -> None:
    ids, mask, labels = torch.ones(2), torch.zeros(2), torch.full((2,), 2.0)
    by_name = binder(Positional(), (), {"labels": labels, "ids": ids, "mask": mask})
    order = [slot.path for slot in by_name.slots]
    for args, kwargs in (
        ((ids, mask, labels), {}),
        ((ids,), {"labels": labels, "mask": mask}),
        ((), {"mask": mask, "ids": ids, "labels": labels}),
    ):
        found = dict(zip(order, by_name.bind(args, kwargs), strict=True))
        assert found["ids"] is ids and found["mask"] is mask and found["labels"] is labels
    by_position = binder(Positional(), (ids, mask), {})
    one, two = by_position.bind((), {"mask": mask, "ids": ids})
    assert one is ids and two is mask


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((torch.ones(2, 3),), {"scale": 2.0}, r"`0` has shape \[2, 3\], expected \[4, 3\]"),
        ((X.double(),), {"scale": 2.0}, r"`0` has dtype torch.float64, expected torch.float32"),
        ((X,), {"scale": 3.0}, r"`scale` is 3.0; the traced call had 2.0"),
        ((X,), {"scale": 2}, r"`scale` is 2; the traced call had 2.0"),
        ((X,), {}, r"`scale` is missing; the traced call had 2.0"),
        ((), {"scale": 2.0}, r"`0` is missing; the traced call had a tensor \[4, 3\] of torch.float32"),
        ((X,), {"scale": 2.0, "mask": X}, r"`mask` \(a tensor \[4, 3\] of torch.float32\) was not part of the traced call"),
        (([1.0],), {"scale": 2.0}, r"`0.0` \(1.0\) was not part of the traced call"),
        ((3.0,), {"scale": 2.0}, r"`0` is 3.0; the traced call had a tensor"),
        ((X.to("meta"),), {"scale": 2.0}, r"`0` is on meta, the model on cpu; move it there"),
    ],
)
def test_what_does_not_match(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    bound = binder(Model(), (X,), {"scale": 2.0}, device=torch.device("cpu"))
    with pytest.raises(InputError, match=message) as caught:
        bound.bind(args, kwargs)
    assert "plan again with these as example inputs" in str(caught.value)
    bound.bind((X,), {"scale": 2.0})


def test_parts_of_a_batch() -> None:
    place = Place((2, 2), (1, 0), ("a", "b"))
    bound = binder(Model(), (X,), {"scale": 2.0}, place, states={"0": (S(0), R)}, whole=False)
    assert bound.bind((X[:2],), {"scale": 2.0})[0].shape == (2, 3)
    with pytest.raises(InputError, match=r"has shape \[4, 3\], expected \[2, 3\], this rank's part of the traced \[4, 3\]"):
        bound.bind((X,), {"scale": 2.0})
