"""Evaluation under a training plan: allowed where the model does the same in both modes, refused with a reason where it does not."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils import _pytree as pytree

from autopar.errors import AutoparError
from autopar.ir.tracing.modes import evaluation_differs
from autopar.ir.tracing.trace import TracedModel, trace


class EvaluationCheck:
    """Compares evaluation with training mode when first asked, on a copy of `model` without values."""

    def __init__(self, model: nn.Module, traced: TracedModel) -> None:
        self._traced = traced
        self._skeleton: nn.Module | None = None
        self._problem: str | None = None
        if not traced.graph.training:
            return
        try:
            self._skeleton = _without_values(model)
        except Exception:  # a module may refuse to be copied in any way it likes; then ask while it is at hand
            self._problem = self._compare(model)

    def problem(self) -> str | None:
        """Why this plan must not be run in evaluation mode, or None."""
        if self._skeleton is not None:
            self._problem = self._compare(self._skeleton)
            self._skeleton = None
        return self._problem

    def _compare(self, model: nn.Module) -> str | None:
        graph = self._traced.graph
        example = iter(graph.inputs)
        leaves = []
        for path in self._traced.input_paths:
            if path in self._traced.literals:
                leaves.append(self._traced.literals[path])
            else:
                value = graph.values[next(example).value]
                leaves.append(torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="meta"))
        args, kwargs = pytree.tree_unflatten(leaves, self._traced.in_spec)
        modes = {module: module.training for module in model.modules()}
        try:
            leaves = list(self._traced.leaf_modules.values())
            again = trace(model.eval(), args, kwargs, precision=self._traced.precision, leaf_modules=leaves)
            return evaluation_differs(graph, again.graph)
        except AutoparError as error:
            return f"it cannot be traced: {error}"
        finally:
            for module, mode in modes.items():
                module.training = mode


def _without_values(model: nn.Module) -> nn.Module:
    """A deep copy of `model` whose parameters and buffers are on `meta`."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)
