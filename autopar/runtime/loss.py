"""The loss among a model's outputs, and what of the model it is computed from."""

from __future__ import annotations

from autopar.ir.graph import Graph

NO_GRADIENTS = "`step` computes gradients, but is called under `torch.no_grad()`; call the module itself to evaluate"

NO_LOSS = (
    "`step` needs a loss to differentiate, and the model returns no floating-point scalar that carries a gradient; return the loss from "
    "`forward` (pass the labels to it), or call the module and differentiate what you compute from its outputs"
)


def loss_of(graph: Graph) -> int | None:
    """Which output is the loss: the first floating scalar that carries a gradient; None where there is none."""
    for index, output in enumerate(graph.outputs):
        value = graph.values[output.value]
        if value.requires_grad and not value.shape and value.dtype.startswith(("float", "bfloat")):
            return index
    return None


def reached(graph: Graph, loss: int) -> frozenset[str]:
    """Names of the values that a gradient of output `loss` flows to. A model may compute others that carry a gradient, for outputs beside
    its loss; autograd gives their parameters none, not even zeros."""
    found = {graph.outputs[loss].value}
    for op in reversed(graph.ops):
        if any(name in found for name in op.outputs):
            found.update(name for name in op.operands if graph.values[name].requires_grad)
    return frozenset(found)
