"""From what torch's tracer writes to the few forms that rules, search and runtime know.

A pass is a function from a graph to a graph; `EACH_ALONE`, then `ALL_TOGETHER` list them in order. After them:

- every change of shape that keeps the order of elements is `aten.view.default` with the whole new shape (it need not be a view of
  memory: the runtime reshapes);
- operations that change nothing (`alias`, a `_to_copy` to the same dtype, `detach` of what has no gradient, ...) are gone;
- dropout, cross-entropy and training-mode batch norm are the operators `autopar.dropout`, `autopar.cross_entropy`, `autopar.batch_norm`,
  whose parts can be computed on several ranks (each one's docstring says exactly what it computes); other losses are computed row by row
  or element by element, and then summed or averaged (`canonical_losses`);
- embedding bags are look-ups and sums (`canonical_bags`);
- one element of every row, `x[arange(n), index]`, is gathered (`canonical_rows`);
- routed experts, from the sort of their ids to the sum over a token's rows, are `autopar.experts` (`canonical_experts`);
- masks of attention that are causal, or hide nothing, are gone (`canonical_masks`);
- what nobody reads is gone, and each module makes an equal constant tensor (`arange`, `full`, ...) once;
- values and operations have names that depend on the graph alone, so that two traces of one model are equal texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from autopar.ir.graph import Arg, Buffer, Constant, Graph, Input, Op, Parameter, Ref, Symbol, Value
from autopar.ir.tracing import canonical_bags, canonical_experts, canonical_losses, canonical_masks, canonical_rows
from autopar.ir.tracing.rewriter import Rewriter

Pass = Callable[[Graph], Graph]

VIEWS = frozenset({"aten.view.default", "aten._unsafe_view.default", "aten.reshape.default"})
COPIES = frozenset({"aten.alias.default", "aten.lift_fresh_copy.default", "aten.lift_fresh.default", "aten.contiguous.default"})
CREATORS = frozenset(
    {
        "aten.arange.default", "aten.arange.start", "aten.arange.start_step", "aten.full.default", "aten.zeros.default",
        "aten.ones.default", "aten.scalar_tensor.default", "aten.eye.default", "aten.linspace.default",
    }
)  # fmt: skip
"""Operators that make a tensor from numbers alone, always the same one."""

STOPS_GRADIENT = frozenset(
    {
        "aten.detach.default", "aten.full_like.default", "aten.zeros_like.default", "aten.ones_like.default", "aten.empty_like.default",
        "aten.rand_like.default", "aten.randn_like.default", "aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default",
        "aten.new_empty.default", "aten.bernoulli.p", "aten.bernoulli.default",
    }
)  # fmt: skip
"""Floating results of these do not depend on their operands in a way that autograd follows."""

FIRST_OUTPUT_ONLY = frozenset({"autopar.batch_norm", "autopar.cross_entropy"})
"""Of these only the first result has a gradient: new statistics and counts of rows have none."""

_FLOATING = ("float", "bfloat", "complex")


def run_passes(graph: Graph, passes: tuple[Pass, ...]) -> Graph:
    for run in passes:
        graph = run(graph)
    return graph


def _read_names(graph: Graph) -> set[str]:
    names: set[str] = set()
    for op in graph.ops:
        names.update(op.operands)
    return names | {item.value for item in graph.outputs} | {item.updated for item in graph.buffers if item.updated is not None}


def whole_sizes(graph: Graph) -> Graph:
    """`view`, `_unsafe_view`, `reshape` become `view` with the result's shape, and `expand` says its whole shape: no -1 left."""
    ops = []
    for op in graph.ops:
        if op.target in VIEWS:
            op = replace(op, target="aten.view.default", args=(op.args[0], graph.values[op.outputs[0]].shape), kwargs=())
        elif op.target == "aten.expand.default":
            op = replace(op, args=(op.args[0], graph.values[op.outputs[0]].shape), kwargs=())
        ops.append(op)
    return replace(graph, ops=tuple(ops))


def known_operators(graph: Graph) -> Graph:
    """Put autopar's own operators in place of the aten forms that cannot be computed in parts (see the functions it calls)."""
    read = _read_names(graph)
    rewriter = Rewriter(graph)
    for op in graph.ops:
        op = rewriter.read(op)
        form = _FORMS.get(op.target)
        if form is None or not form(rewriter, op, read):
            rewriter.ops.append(op)
    return rewriter.done()


def _dropout(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`autopar.dropout(x, p)`: elements are zeroed with probability `p`, the others divided by `1 - p`. Gone in eval mode."""
    x, p, train = op.args[0], op.arg(1, "p", 0.5), op.arg(2, "train", True)
    assert isinstance(x, Ref)
    if any(name in read for name in op.outputs[1:]):
        return False
    for name in op.outputs[1:]:
        del rewriter.values[name]
    op = replace(op, target="autopar.dropout", args=(x, p), kwargs=(), outputs=op.outputs[:1])
    if train is False or p == 0:
        rewriter.drop(op, x.name)
    else:
        rewriter.ops.append(op)
    return True


def _batch_norm(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`autopar.batch_norm(x, weight, bias, running_mean, running_var, momentum, eps) -> (y, new_mean, new_var)`, training mode.

    `x`: `(n, c, ...)`; the statistics are over all dims but `c`; the new running variance takes the unbiased one, as torch does.
    """
    x, weight, bias, mean, variance, training, momentum, eps = op.args
    if training is not True or len(op.outputs) != 5 or any(name in read for name in op.outputs[1:3]):
        return False
    for name in op.outputs[1:3]:
        del rewriter.values[name]
    args = (x, weight, bias, mean, variance, momentum, eps)
    outputs = (op.outputs[0], *op.outputs[3:])
    rewriter.ops.append(replace(op, target="autopar.batch_norm", args=args, kwargs=(), outputs=outputs))
    return True


def _batch_norm_evaluated(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`aten.batch_norm(x, weight, bias, mean, var, False, momentum, eps, False) -> y`: one result instead of one and two empty ones."""
    if any(name in read for name in op.outputs[1:]):
        return False
    for name in op.outputs[1:]:
        del rewriter.values[name]
    args = (*op.args[:5], False, *op.args[5:7], False)
    rewriter.ops.append(replace(op, target="aten.batch_norm.default", args=args, kwargs=(), outputs=op.outputs[:1]))
    return True


def _type_as(rewriter: Rewriter, op: Op, read: set[str]) -> bool:
    """`type_as(x, y)` is a copy in a dtype that is known; nothing of `y` is read, so `x` need not lie as `y` does."""
    dtype = Symbol(f"torch.{rewriter.values[op.outputs[0]].dtype}")
    rewriter.ops.append(replace(op, target="aten._to_copy.default", args=op.args[:1], kwargs=(("dtype", dtype),)))
    return True


_FORMS: dict[str, Callable[[Rewriter, Op, set[str]], bool]] = {
    "aten.type_as.default": _type_as,
    "aten.native_dropout.default": _dropout,
    "aten.dropout.default": _dropout,
    "aten._native_batch_norm_legit_functional.default": _batch_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm_evaluated,
    **canonical_bags.FORMS,
    **canonical_losses.FORMS,
    **canonical_rows.FORMS,
}


def no_identities(graph: Graph) -> Graph:
    """Leave out operations that give back their first operand as it was, and copies whose only effect is on the layout for a `view`."""
    readers: dict[str, list[str]] = {}
    for op in graph.ops:
        for name in op.operands:
            readers.setdefault(name, []).append(op.target)
    rewriter = Rewriter(graph)
    for op in graph.ops:
        op = rewriter.read(op)
        if op.target == "aten.copy.default":
            op = _copy_as_expand(rewriter.values, op)
        if op.args and isinstance(op.args[0], Ref) and _is_identity(rewriter.values, op, readers):
            rewriter.drop(op, op.args[0].name)
        else:
            rewriter.ops.append(op)
    return rewriter.done()


def _copy_as_expand(values: dict[str, Value], op: Op) -> Op:
    """`copy(destination, source)` is the source in the destination's shape and dtype; the destination's elements are not read."""
    source = op.args[1]
    assert isinstance(source, Ref)
    result = values[op.outputs[0]]
    if values[source.name].dtype == result.dtype:
        return replace(op, target="aten.expand.default", args=(source, result.shape), kwargs=())
    if values[source.name].shape == result.shape:
        return replace(op, target="aten._to_copy.default", args=(source,), kwargs=(("dtype", Symbol(f"torch.{result.dtype}")),))
    return op


def _is_identity(values: dict[str, Value], op: Op, readers: dict[str, list[str]]) -> bool:
    if len(op.outputs) != 1:
        return False
    (operand, result) = values[op.operands[0]], values[op.outputs[0]]
    if operand.shape != result.shape or operand.dtype != result.dtype:
        return False
    if op.target in COPIES or op.target in ("aten.view.default", "aten.expand.default", "aten.slice.Tensor"):
        return not (op.target == "aten.slice.Tensor" and not result.numel)
    if op.target == "aten.clone.default":
        layout = op.kwarg("memory_format")
        only_views = all(reader == "aten.view.default" for reader in readers.get(result.name, ["output"]))
        return layout in (None, Symbol("torch.preserve_format")) or only_views
    if op.target == "aten._to_copy.default":
        return op.kwarg("memory_format") in (None, Symbol("torch.preserve_format"))
    return False


def _following(op: Op) -> frozenset[int]:
    """The results of a leaf module that carry a gradient where its operands do; new values of buffers are none of them."""
    assert isinstance(op.args[2], tuple)
    return frozenset(index for index, follows in enumerate(op.args[2]) if follows)


def mark_gradients(graph: Graph) -> Graph:
    """Set `requires_grad` of every result: floating, and an operand's gradient flows through the operation."""
    values = dict(graph.values)
    for op in graph.ops:
        flows = op.target not in STOPS_GRADIENT and any(values[name].requires_grad for name in op.operands)
        for index, name in enumerate(op.outputs):
            value = values[name]
            wanted = flows and value.dtype.startswith(_FLOATING) and (index == 0 or op.target not in FIRST_OUTPUT_ONLY)
            if op.target == "autopar.leaf":
                wanted = wanted and index in _following(op)
            if wanted != value.requires_grad:
                values[name] = Value(name, value.shape, value.dtype, wanted)
    return replace(graph, values=values)


def no_idle_detach(graph: Graph) -> Graph:
    """`detach` of a value without gradient is that value (after `mark_gradients`)."""
    if not any(op.target == "aten.detach.default" and not graph.values[op.operands[0]].requires_grad for op in graph.ops):
        return graph
    rewriter = Rewriter(graph)
    for op in graph.ops:
        op = rewriter.read(op)
        if op.target == "aten.detach.default" and not rewriter.values[op.operands[0]].requires_grad:
            rewriter.drop(op, op.operands[0])
        else:
            rewriter.ops.append(op)
    return rewriter.done()


def creators_once(graph: Graph) -> Graph:
    """Within one module, equal constant tensors are made once. Not across modules: repeated layers must stay equal to each other."""
    made: dict[tuple[object, ...], str] = {}
    rewriter = Rewriter(graph)
    for op in graph.ops:
        op = rewriter.read(op)
        if op.target in CREATORS:
            key = (op.module, op.target, repr(op.args), repr(op.kwargs))
            if key in made:
                rewriter.drop(op, made[key])
                continue
            made[key] = op.outputs[0]
        rewriter.ops.append(op)
    return rewriter.done()


def no_dead_code(graph: Graph) -> Graph:
    """Leave out operations and constants that no output and no buffer depends on."""
    live = {item.value for item in graph.outputs} | {item.updated for item in graph.buffers if item.updated is not None}
    kept: list[Op] = []
    for op in reversed(graph.ops):
        if any(name in live for name in op.outputs):
            kept.append(op)
            live.update(op.operands)
    kept.reverse()
    constants = tuple(item for item in graph.constants if item.value in live)
    kept_sources: list[Input | Parameter | Buffer | Constant] = [*graph.inputs, *graph.parameters, *graph.buffers, *constants]
    names = {item.value for item in kept_sources} | {name for op in kept for name in op.outputs}
    values = {name: value for name, value in graph.values.items() if name in names}
    return replace(graph, ops=tuple(kept), constants=constants, values=values)


def plain_names(graph: Graph) -> Graph:
    """Name inputs by path, parameters and buffers by their own names, and operations by operator and number: `linear_3`, `split_0.1`."""
    names: dict[str, str] = {}
    taken: set[str] = set()

    def give(old: str, wanted: str) -> None:
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        names[old] = wanted

    for constant in graph.constants:  # first, so that they keep the names under which their data is stored
        give(constant.value, constant.value)
    for parameter in graph.parameters:
        give(parameter.value, parameter.fqn)
    for buffer in graph.buffers:
        give(buffer.value, buffer.fqn)
    for item in graph.inputs:
        give(item.value, item.path if not item.path[:1].isdigit() else f"input.{item.path}")
    counts: Counter[str] = Counter()
    op_names: dict[str, str] = {}
    for op in graph.ops:
        base = op.target.split(".")[1] if "." in op.target else op.target
        wanted = f"{base}_{counts[base]}"
        counts[base] += 1
        while wanted in taken:
            wanted += "_"
        op_names[op.name] = wanted
        if len(op.outputs) == 1:
            give(op.outputs[0], wanted)
        else:
            taken.add(wanted)
            for index, name in enumerate(op.outputs):
                give(name, f"{wanted}.{index}")
    return renamed(graph, names, op_names)


def renamed(graph: Graph, names: dict[str, str], op_names: dict[str, str]) -> Graph:
    """`graph` with values called `names[old]` and operations called `op_names[old]`; both must cover everything."""
    interned = {old: Ref(new) for old, new in names.items()}

    def new(arg: Arg) -> Arg:
        if type(arg) is Ref:
            return interned[arg.name]
        return tuple([new(item) for item in arg]) if type(arg) is tuple else arg

    def op_of(op: Op) -> Op:
        kwargs = tuple([(key, new(arg)) for key, arg in op.kwargs]) if op.kwargs else ()
        outputs = tuple([names[name] for name in op.outputs])
        return Op(op_names[op.name], op.target, tuple([new(arg) for arg in op.args]), kwargs, outputs, op.module, op.source)

    values = {names[old]: Value(names[old], value.shape, value.dtype, value.requires_grad) for old, value in graph.values.items()}
    sources: list[Input | Parameter | Buffer | Constant] = [*graph.parameters, *graph.buffers, *graph.inputs, *graph.constants]
    ops = tuple(op_of(op) for op in graph.ops)
    order = [*(names[item.value] for item in sources), *(name for op in ops for name in op.outputs)]
    return replace(
        graph,
        values={name: values[name] for name in order},
        inputs=tuple(replace(item, value=names[item.value]) for item in graph.inputs),
        parameters=tuple(replace(item, value=names[item.value]) for item in graph.parameters),
        buffers=tuple(_buffer(item, names) for item in graph.buffers),
        constants=tuple(replace(item, value=names[item.value]) for item in graph.constants),
        ops=ops,
        outputs=tuple(replace(item, value=names[item.value]) for item in graph.outputs),
    )


def _buffer(buffer: Buffer, names: dict[str, str]) -> Buffer:
    updated = None if buffer.updated is None else names[buffer.updated]
    return replace(buffer, value=names[buffer.value], updated=updated)


def without_call_numbers(graph: Graph) -> Graph:
    """Modules by their own names: the tracer calls the second call of a module `layer@1`."""
    if not any("@" in op.module for op in graph.ops):
        return graph
    return replace(graph, ops=tuple(replace(op, module=re.sub(r"@\d+", "", op.module)) for op in graph.ops))


EACH_ALONE: tuple[Pass, ...] = (whole_sizes, known_operators, no_identities, creators_once, canonical_experts.recognise)
"""Passes that look at one module at a time, so that they may run before repeated modules are copied."""

ALL_TOGETHER: tuple[Pass, ...] = (canonical_masks.causal_masks, mark_gradients, no_idle_detach, no_dead_code, plain_names)
"""Passes that need the whole graph."""
