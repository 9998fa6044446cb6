"""What one operation does on whole (global) operands: flops, kernels, and which tensors autograd keeps for the backward pass.

`FAMILIES` is the table: one line an operator family. An operator that is not in it counts as pointwise and keeps its float operands,
which overstates memory rather than understating it.
Sources: `derivatives.yaml` of PyTorch for what each backward reads; for attention, Dao 2023 (FlashAttention-2): the backward pass does
2.5 times the forward's flops because it computes the scores again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from autopar.ir import experts as routed
from autopar.ir.graph import DTYPE_BYTES, Graph, Op, Value
from autopar.ir.rules.families import contractions
from autopar.ir.rules.nest import Call

if TYPE_CHECKING:
    from autopar.search.prices.experts import Experts

FLOATS = frozenset(("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"))


@dataclass(frozen=True, slots=True)
class Extra:
    """`bytes` that an operation keeps for its backward pass beside operands and results; local size goes as that of a value it reads
    (`output=False`) or writes (`output=True`) at position `slot`."""

    bytes: float
    slot: int
    output: bool


@dataclass(frozen=True, slots=True)
class Work:
    """Of one operation on global shapes.

    `forward_flops`, `backward_flops`; `view`: moves no bytes forward and its result shares its first operand's storage;
    `keeps` and `keeps_outputs`: positions of the operands and results that the backward pass reads; `extra`: what else is kept;
    `trains`: whether it has a backward pass; `kernels`: launches forward (backward counts twice as many); `wire`: whether it receives a
    value from another stage, or sends one there; `experts`: what routed experts do (`autopar.search.prices.experts`).
    """

    forward_flops: float
    backward_flops: float
    view: bool
    keeps: frozenset[int]
    keeps_outputs: frozenset[int]
    extra: Extra | None
    trains: bool
    kernels: int
    wire: bool = False
    experts: Experts | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """`keeps`: `"none"`, `"operands"` (all of float dtype), `"factors"` (each that multiplies one with a gradient), `"output"`, or
    positions. `kernels`: launches of one forward call."""

    keeps: str | tuple[int, ...] = "operands"
    view: bool = False
    kernels: int = 1


_VIEW = Family("none", view=True, kernels=0)
_NONE, _OUTPUT, _FACTORS = Family("none"), Family("output"), Family("factors")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys((
        "view", "_unsafe_view", "reshape", "transpose", "t", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "split",
        "split_with_sizes", "chunk", "unbind", "alias", "detach", "narrow", "diagonal", "unfold", "reshard", "view_as", "movedim",
        "lift_fresh_copy", "contiguous", "flatten", "unflatten", "numpy_T", "expand_as", "real", "imag", "view_as_complex", "view_as_real",
        "send",
    ), _VIEW),
    **dict.fromkeys((
        "add", "sub", "rsub", "neg", "clone", "_to_copy", "to", "copy", "cat", "stack", "mean", "sum", "cumsum", "repeat", "pad",
        "constant_pad_nd", "roll", "flip", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "empty_like", "tril", "triu",
        "dropout", "repeat_interleave", "pixel_shuffle", "floor", "ceil", "round", "sign", "lt", "le", "gt", "ge", "eq", "ne",
    ), _NONE),
    **dict.fromkeys((
        "exp", "exp2", "tanh", "sigmoid", "sqrt", "rsqrt", "reciprocal", "relu", "softmax", "_softmax", "log_softmax", "_log_softmax",
        "expm1", "tan", "cumprod",
    ), _OUTPUT),
    **dict.fromkeys(("mul", "mm", "bmm", "matmul", "linear", "dot", "mv", "einsum", "convolution", "conv1d", "conv2d", "conv3d"), _FACTORS),
    **dict.fromkeys(("addmm", "baddbmm", "expert_linear"), _FACTORS), "expert_rows": _NONE,
    "layer_norm": Family((0, 1)), "native_layer_norm": Family((0, 1)), "rms_norm": Family((0, 1)), "group_norm": Family((0, 1)),
    "batch_norm": Family((0, 1), kernels=2), "embedding": Family((1,)), "where": Family((0,)), "masked_fill": Family((1,)),
    "gather": Family((1,)), "index_select": Family((1,)), "index": Family((1, 2, 3, 4)),
    "scatter": Family((1,)), "scatter_add": Family((1,)), "nll_loss": Family((1, 2)), "nll_loss_nd": Family((1, 2)),
    "nll_loss2d": Family((1, 2)), "argmax": _NONE,
    "receive": Family("none", kernels=0),
    "scaled_dot_product_attention": Family((0, 1, 2, 3)), "cross_entropy": Family((1,), kernels=2),
    "cross_entropy_loss": Family((1,), kernels=2),
}  # fmt: skip
_DEFAULT = Family()
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
RECEIVE, SEND = "autopar.receive", "autopar.send"


def base_name(target: str) -> str:
    """`"aten.add.Tensor"` and `"aten.add_.Tensor"` are `"add"`."""
    parts = target.split(".")
    return parts[1].rstrip("_") if len(parts) > 1 else target


def is_view(op: Op) -> bool:
    return FAMILIES.get(base_name(op.target), _DEFAULT).view


def work(graph: Graph, op: Op, fused_attention: bool = True) -> Work:
    """The work of `op`. `fused_attention`: whether the device has an attention kernel that does not keep the scores."""
    name = base_name(op.target)
    family = FAMILIES.get(name, _DEFAULT)
    operands = [graph.values[item] for item in op.operands]
    outputs = [graph.values[item] for item in op.outputs]
    if op.target == routed.EXPERTS:
        return _experts(graph, op, operands, outputs)
    trains = graph.training and any(value.requires_grad for value in outputs)
    forward, backward = _flops(name, op, operands, outputs)
    keeps, keeps_outputs = _keeps(family, name, operands) if trains else (frozenset[int](), frozenset[int]())
    extra = None
    if trains and outputs:
        extra = _extra(name, operands, outputs)
        if name == "scaled_dot_product_attention":
            keeps, keeps_outputs, extra = _attention_keeps(op, operands, outputs, fused_attention)
    wire = op.target in (RECEIVE, SEND)
    return Work(forward, backward if trains else 0.0, family.view, keeps, keeps_outputs, extra, trains, family.kernels, wire)


def _experts(graph: Graph, op: Op, operands: list[Value], outputs: list[Value]) -> Work:
    """Routed experts: the tensors and the ids are kept as they are, of rows what `experts.kept` says."""
    from autopar.search.prices.experts import describe  # which asks here for the work of what is in a body

    found = describe(op, operands, outputs)
    rows = found.tokens * found.slots
    trains = graph.training and outputs[0].requires_grad
    alone = found.count == found.slots == 1
    keeps = frozenset(range(0 if alone else found.first_tensor, len(operands))) if trains else frozenset[int]()
    backward = rows * found.trained if trains else 0.0
    return Work(rows * found.flops, backward, False, keeps, frozenset(), None, trains, found.kernels, experts=found)


def _keeps(family: Family, name: str, operands: list[Value]) -> tuple[frozenset[int], frozenset[int]]:
    if isinstance(family.keeps, tuple):
        return frozenset(slot for slot in family.keeps if slot < len(operands)), frozenset()
    if family.keeps == "output":
        return frozenset(), frozenset((0,))
    if family.keeps == "none" or (family.keeps == "operands" and name in ("div", "true_divide") and len(operands) == 1):
        return frozenset(), frozenset()
    if family.keeps == "operands":
        return frozenset(slot for slot, value in enumerate(operands) if value.dtype in FLOATS), frozenset()
    # A product keeps each factor that another factor's gradient is multiplied with; added terms (a bias) are no factors.
    terms = {"addmm": (1, 2), "baddbmm": (1, 2)}.get(name, (0, 1))
    pairs = [slot for slot in terms if slot < len(operands)]
    return frozenset(slot for slot in pairs if any(operands[other].requires_grad for other in pairs if other != slot)), frozenset()


def _extra(name: str, operands: list[Value], outputs: list[Value]) -> Extra | None:
    if name == "dropout":
        return Extra(float(outputs[0].numel), 0, True)  # a bool mask
    if name in ("cross_entropy", "cross_entropy_loss"):
        return Extra(float(operands[0].size_bytes), 0, False)  # the log-softmax
    if name in ("layer_norm", "native_layer_norm", "rms_norm"):
        rows = outputs[0].numel // max(outputs[0].shape[-1] if outputs[0].shape else 1, 1)
        return Extra(8.0 * rows, 0, True)  # mean and reciprocal deviation of every row, float32
    if name.startswith("max_pool"):
        return Extra(8.0 * outputs[0].numel, 0, True)  # int64 positions
    return None


def _attention_keeps(
    op: Op, operands: list[Value], outputs: list[Value], fused: bool
) -> tuple[frozenset[int], frozenset[int], Extra | None]:
    """Fused: operands, result and the log-sum-exp of every row. Unfused (dropout, or no kernel): scaled copies of q and k, v, the
    probabilities, and with dropout its mask (of the same dtype there) and what it left."""
    query, key = operands[0], operands[1]
    rows = prod(query.shape[:-1])
    dropout = float(op.arg(4, "dropout_p", 0.0) or 0.0)  # type: ignore[arg-type]
    if fused and dropout == 0.0:
        return frozenset(range(len(operands))), frozenset((0,)), Extra(4.0 * rows, 0, True)
    scores = rows * key.shape[-2] * DTYPE_BYTES[query.dtype]
    kept = scores * (3.0 if dropout else 1.0) + 2 * query.size_bytes
    return frozenset((2,)), frozenset(), Extra(float(kept), 0, True)


def _flops(name: str, op: Op, operands: list[Value], outputs: list[Value]) -> tuple[float, float]:
    """Forward and backward flops of products; everything else is bound by memory and counts its bytes."""
    if not outputs:
        return 0.0, 0.0
    trained = sum(value.requires_grad for value in operands[:2])
    out = outputs[0].numel
    if name == "linear" or (name in ("mm", "bmm", "matmul") and operands[0].shape):
        flops = 2.0 * out * operands[0].shape[-1]
    elif name in ("addmm", "baddbmm"):
        flops = 2.0 * out * operands[1].shape[-1]
        trained = sum(value.requires_grad for value in operands[1:3])
    elif name in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback"):
        flops = 2.0 * out * operands[0].shape[-1]
    elif name == "einsum" and len(operands) > 1:
        nest = contractions.einsum(Call(op, tuple(operands), tuple(outputs)))
        flops = 0.0 if nest is None else 2.0 * (len(operands) - 1) * prod(nest.loops.values())
    elif name.startswith("conv") and len(operands) > 1:
        transposed = bool(op.arg(6, "transposed", False)) if name == "convolution" else False
        positions = operands[0].numel / max(operands[0].shape[1], 1) if transposed else out / max(outputs[0].shape[1], 1)
        flops = 2.0 * positions * operands[1].numel
    elif name == "scaled_dot_product_attention":
        # Two products of (queries, keys, head size); a causal mask halves both.
        causal = bool(op.arg(5, "is_causal", False))
        flops = 2.0 * prod(operands[0].shape[:-1]) * operands[1].shape[-2] * (operands[0].shape[-1] + operands[2].shape[-1])
        flops *= 0.5 if causal else 1.0
        return flops, 2.5 * flops
    elif name in _RECURRENT and len(outputs[0].shape) == 3:  # every step and row is multiplied with all weights
        flops = 2.0 * prod(operands[0].shape[:2]) * sum(value.numel for value in operands if len(value.shape) == 2)
        trained = 2
    else:
        return 0.0, 0.0
    return flops, flops * trained
