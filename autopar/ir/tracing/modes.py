"""Does a model do the same in evaluation mode as in training mode, but for dropout and batch norm's statistics?

A rank program for evaluation is made from the training graph by leaving dropout out and normalising by running statistics. That is
right for nearly every model, but `if self.training:` may hide anything. So the evaluation graph is traced as well and compared here,
by value numbering: two values have one number where the same operator made them from arguments of the same numbers.
"""

from __future__ import annotations

from autopar.ir.graph import Arg, Graph, Op, Ref

_IDENTITIES = frozenset({"autopar.reshard", "autopar.dropout"})
_ATTENTION = "aten.scaled_dot_product_attention.default"
_RECURRENT = {
    f"aten.{name}.{form}": dropout for form, dropout in (("input", 5), ("data", 6)) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
}
"""Position of `dropout`, which `train` follows, in the arguments of recurrent layers."""


def evaluation_differs(training: Graph, evaluation: Graph) -> str | None:
    """Where `evaluation` computes an output otherwise than `training` without dropout, in words; None where it does not."""
    table: dict[object, int] = {}
    first, second = _numbers(training, table), _numbers(evaluation, table)
    expected = {output.path: first[output.value] for output in training.outputs}
    found = {output.path: second[output.value] for output in evaluation.outputs}
    if expected.keys() != found.keys():
        return f"it returns {', '.join(found) or 'nothing'} instead of {', '.join(expected) or 'nothing'}"
    known = set(first.values())
    for path, number in found.items():
        if number == expected[path]:
            continue
        for op in evaluation.ops:
            if any(second[name] not in known for name in op.outputs):
                return f"output `{path}` differs; the first other operation is {op.target} of `{op.module or 'the model'}` ({op.source})"
        return f"output `{path}` is another value"
    return None


def _numbers(graph: Graph, table: dict[object, int]) -> dict[str, int]:
    """A number for every value; equal numbers from one `table` mean equal values in evaluation mode."""
    numbers: dict[str, int] = {}

    def number(key: object) -> int:
        return table.setdefault(key, len(table))

    for item in graph.inputs:
        numbers[item.value] = number(("input", item.path))
    for parameter in graph.parameters:
        numbers[parameter.value] = number(("state", parameter.fqn))
    for buffer in graph.buffers:
        numbers[buffer.value] = number(("state", buffer.fqn))
    for position, constant in enumerate(graph.constants):
        value = graph.values[constant.value]
        numbers[constant.value] = number(("constant", position, value.shape, value.dtype))

    def argument(arg: Arg) -> object:
        if isinstance(arg, Ref):
            return ("value", numbers[arg.name])
        if isinstance(arg, tuple):
            return tuple(argument(item) for item in arg)
        return (type(arg).__name__, repr(arg))

    for op in graph.ops:
        if op.target in _IDENTITIES:
            numbers[op.outputs[0]] = numbers[op.operands[0]]
            continue
        target, arguments = _evaluated(op)
        key = (target, tuple(argument(item) for item in arguments))
        for position, name in enumerate(op.outputs):
            numbers[name] = number((key, position))
    return numbers


def _evaluated(op: Op) -> tuple[str, tuple[Arg, ...]]:
    """Operator and arguments in evaluation mode."""
    if op.target == "autopar.batch_norm":
        x, weight, bias, mean, variance, momentum, eps = op.args
        return "aten.batch_norm.default", (x, weight, bias, mean, variance, False, momentum, eps, False)
    if op.target == _ATTENTION:
        flags = (op.arg(3, "attn_mask"), op.arg(5, "is_causal", False), op.kwarg("scale"), op.kwarg("enable_gqa", False))
        return op.target, (*op.args[:3], *flags)
    if op.target in _RECURRENT:
        place = _RECURRENT[op.target]
        return op.target, (*op.args[:place], *op.args[place + 2 :])
    return op.target, (*op.args, *((name, item) for name, item in op.kwargs))
