"""Runs a graph on whole tensors: the meaning of a graph, to compare traces with the models they were made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.ir.graph import Arg, Ref, Symbol
from autopar.ir.tracing.trace import TracedModel


def run(traced: TracedModel, model: nn.Module, inputs: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of the graph, and new values of the buffers it updates, with the parameters and buffers of `model`."""
    graph = traced.graph
    state: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    env: dict[str, Tensor] = dict(traced.constants)
    env |= {item.value: state[item.fqn] for item in (*graph.parameters, *graph.buffers)}
    env |= {item.value: tensor for item, tensor in zip(graph.inputs, inputs, strict=True)}

    def value(arg: Arg) -> Any:
        if isinstance(arg, Ref):
            return env[arg.name]
        if isinstance(arg, Symbol):
            return getattr(torch, arg.name.removeprefix("torch."))
        return [value(item) for item in arg] if isinstance(arg, tuple) else arg

    for op in graph.ops:
        given = [value(arg) for arg in op.args]
        result = _call(op.target, given, {key: value(arg) for key, arg in op.kwargs})
        results = [result] if isinstance(result, Tensor) else [item for item in result if item is not None]
        for name, tensor in zip(op.outputs, results, strict=True):
            wanted = graph.values[name]
            assert tuple(tensor.shape) == wanted.shape and str(tensor.dtype) == f"torch.{wanted.dtype}", (op, tensor.shape, tensor.dtype)
            assert tensor.requires_grad == wanted.requires_grad or not torch.is_grad_enabled(), op
            env[name] = tensor
    updated = {item.fqn: env[item.updated] for item in graph.buffers if item.updated is not None}
    return [env[item.value] for item in graph.outputs], updated


def _call(target: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if target == "autopar.reshard":
        return args[0].view_as(args[0])
    if target == "autopar.dropout":
        return F.dropout(args[0], args[1])
    if target == "autopar.cross_entropy":
        logits, classes, ignored, smoothing = args
        total = F.cross_entropy(logits, classes, reduction="sum", ignore_index=ignored, label_smoothing=smoothing)
        return total, (classes != ignored).sum().to(logits.dtype)
    if target == "autopar.target_weight":
        classes, ignored, dtype = args
        return (classes != ignored).sum().to(dtype)
    if target == "autopar.batch_norm":
        x, weight, bias, mean, variance, momentum, eps = args
        mean, variance = mean.clone(), variance.clone()
        return F.batch_norm(x, mean, variance, weight, bias, True, momentum, eps), mean, variance
    if target == "aten.view.default":
        return args[0].reshape(args[1])
    space, name, overload = target.split(".")
    return getattr(getattr(getattr(torch.ops, space), name), overload)(*args, **kwargs)
