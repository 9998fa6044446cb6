"""One or more calls of every operator that has a rule. A new rule needs a line here, unless its operands are all of one shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from autopar.ir.graph import Arg, Graph, Input, Op, Ref, Symbol, Value
from autopar.ir.rules.operators import operator
from autopar.ir.rules.samples import random_operands


@dataclass(frozen=True, slots=True)
class T:
    """A tensor argument."""

    shape: tuple[int, ...]
    dtype: str = "float64"


def f(*shape: int) -> T:
    return T(shape)


def i(*shape: int) -> T:
    return T(shape, "int64")


def b(*shape: int) -> T:
    return T(shape, "bool")


def call(target: str, *args: Any, **kwargs: Any) -> tuple[Graph, Op]:
    """A graph of one operation; shapes and dtypes of its results are those of a trial run."""
    values: dict[str, Value] = {}

    def named(arg: Any) -> Arg:
        if isinstance(arg, T):
            name = f"x{len(values)}"
            values[name] = Value(name, arg.shape, arg.dtype, arg.dtype.startswith("float"))
            return Ref(name)
        return tuple(map(named, arg)) if isinstance(arg, (tuple, list)) else arg

    positional = tuple(map(named, args))
    keywords = tuple((key, named(arg)) for key, arg in kwargs.items())
    op = Op("op", target, positional, keywords)
    operands = [values[name] for name in op.operands]
    tensors = random_operands(op, [value.shape for value in operands], [value.dtype for value in operands], 0)
    results = _run(op, tensors)
    outputs = []
    for number, result in enumerate(results):
        name = f"y{number}"
        values[name] = Value(name, tuple(result.shape), str(result.dtype).removeprefix("torch."), result.is_floating_point())
        outputs.append(name)
    op = Op("op", target, positional, keywords, tuple(outputs))
    inputs = tuple(Input(name, name) for name in dict.fromkeys(op.operands))
    return Graph("sample", values, inputs, (), (), (), (op,), ()), op


def _run(op: Op, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    given = iter(tensors)

    def concrete(arg: Arg) -> Any:
        if isinstance(arg, Ref):
            return next(given)
        if isinstance(arg, Symbol):
            return getattr(torch, arg.name.removeprefix("torch."))
        return [concrete(item) for item in arg] if isinstance(arg, tuple) else arg

    args = [concrete(arg) for arg in op.args]
    kwargs = {key: concrete(arg) for key, arg in op.kwargs}
    result = operator(op.target)(*args, **kwargs)
    return list(result) if isinstance(result, (tuple, list)) else [result]


DOUBLE = Symbol("torch.float64")

GATED = """graph experts training
input %x: float64[1, 8] grad = "x"
input %weight: float64[1] grad = "weight"
input %expert: int64[1] = "expert"
input %tensor_0: float64[4, 12, 8] grad = "tensor_0"
input %tensor_1: float64[4, 12] grad = "tensor_1"
input %tensor_2: float64[4, 6, 10] grad = "tensor_2"
input %tensor_3: float64[4, 10] grad = "tensor_3"
%up: float64[1, 12] grad = autopar.expert_linear(%x, %tensor_0, %expert, True)
%bias: float64[1, 12] grad = autopar.expert_rows(%tensor_1, %expert)
%sum: float64[1, 12] grad = aten.add.Tensor(%up, %bias)
%gate: float64[1, 6] grad, %value: float64[1, 6] grad = aten.chunk.default(%sum, 2, -1) as halves
%open: float64[1, 6] grad = aten.silu.default(%gate)
%inner: float64[1, 6] grad = aten.mul.Tensor(%open, %value)
%down: float64[1, 10] grad = autopar.expert_linear(%inner, %tensor_2, %expert, False)
%more: float64[1, 10] grad = autopar.expert_rows(%tensor_3, %expert)
%out: float64[1, 10] grad = aten.add.Tensor(%down, %more)
%column: float64[1, 1] grad = aten.unsqueeze.default(%weight, -1)
%scaled: float64[1, 10] grad = aten.mul.Tensor(%out, %column)
output %scaled = "0"
"""
"""The body of gated experts with biases, gate and value one after the other."""

PLAIN = """graph experts training
input %x: float64[1, 4] grad = "x"
input %expert: int64[1] = "expert"
input %tensor_0: float64[5, 4, 6] grad = "tensor_0"
%up: float64[1, 6] grad = autopar.expert_linear(%x, %tensor_0, %expert, False)
%even: float64[1, 3] grad = aten.slice.Tensor(%up, 1, 0, 9223372036854775807, 2)
%odd: float64[1, 3] grad = aten.slice.Tensor(%up, 1, 1, 9223372036854775807, 2)
%out: float64[1, 3] grad = aten.mul.Tensor(%even, %odd)
output %out = "0"
"""
"""The body of one layer without weights, factors interleaved."""

# Operator (without `aten.`) -> calls: tuples of arguments, a dict at the end holds keywords.
SAMPLES: dict[str, list[tuple[Any, ...]]] = {
    "mm.default": [(f(6, 4), f(4, 12)), (f(5, 7), f(7, 3))],
    "bmm.default": [(f(6, 4, 3), f(6, 3, 12))],
    "mv.default": [(f(6, 4), f(4))],
    "dot.default": [(f(6), f(6))],
    "vdot.default": [(f(6), f(6))],
    "linear.default": [(f(4, 6, 8), f(12, 8), f(12)), (f(4, 6, 8), f(7, 8)), (f(6), f(12, 6), f(12)), (f(2, 5), f(5, 5), f(5))],
    "addmm.default": [
        (f(12), f(6, 4), f(4, 12)),
        (f(6, 1), f(6, 4), f(4, 12)),
        (f(1), f(6, 4), f(4, 12)),
        (f(6, 12), f(6, 4), f(4, 12), {"beta": 2, "alpha": 3}),
    ],
    "baddbmm.default": [(f(2, 4, 6), f(2, 4, 3), f(2, 3, 6)), (f(1, 6), f(2, 4, 3), f(2, 3, 6))],
    "addbmm.default": [(f(4, 6), f(2, 4, 3), f(2, 3, 6))],
    "addmv.default": [(f(6), f(6, 4), f(4))],
    "bilinear.default": [(f(4, 6), f(4, 3), f(8, 6, 3), f(8))],
    "matmul.default": [
        (f(6, 4), f(4, 6)),
        (f(2, 6, 4), f(4, 6)),
        (f(6, 4), f(2, 4, 6)),
        (f(3, 1, 6, 4), f(2, 4, 8)),
        (f(4), f(4, 6)),
        (f(6, 4), f(4)),
        (f(4), f(4)),
    ],
    "outer.default": [(f(6), f(4))],
    "ger.default": [(f(6), f(4))],
    "einsum.default": [
        ("bhid,bhjd->bhij", (f(2, 4, 6, 8), f(2, 4, 6, 8))),
        ("...ij,jk->...ik", (f(3, 4, 6), f(6, 8))),
        ("bi,bi->b", (f(4, 6), f(4, 6))),
    ],
    "conv1d.default": [(f(4, 6, 9), f(8, 6, 3), f(8), (1,), (1,)), (f(4, 6, 9), f(6, 1, 3), None, (1,), (0,), (1,), 6)],
    "conv2d.default": [
        (f(4, 6, 5, 5), f(8, 6, 3, 3), f(8), (2, 2), (1, 1)),
        (f(4, 12, 5, 5), f(18, 2, 3, 3), f(18), (1, 1), (1, 1), (1, 1), 6),
        (f(2, 4, 4, 4), f(6, 4, 2, 2)),
    ],
    "conv3d.default": [(f(2, 4, 3, 3, 3), f(6, 4, 2, 2, 2), f(6))],
    "conv1d.padding": [(f(4, 6, 9), f(8, 6, 3), f(8), (1,), "same")],
    "conv2d.padding": [(f(4, 6, 5, 5), f(8, 6, 3, 3), f(8), (1, 1), "valid")],
    "conv3d.padding": [(f(2, 4, 3, 3, 3), f(6, 4, 2, 2, 2), f(6), (1, 1, 1), "valid")],
    "convolution.default": [
        (f(4, 6, 5, 5), f(8, 6, 3, 3), f(8), (2, 2), (1, 1), (1, 1), False, (0, 0), 1),
        (f(4, 12, 5, 5), f(18, 2, 3, 3), f(18), (1, 1), (1, 1), (1, 1), False, (0, 0), 6),
        (f(4, 6, 5, 5), f(6, 4, 3, 3), f(4), (2, 2), (1, 1), (1, 1), True, (0, 0), 1),
        (f(4, 12, 5, 5), f(12, 3, 3, 3), f(18), (2, 2), (1, 1), (1, 1), True, (0, 0), 6),
    ],
    "_convolution.default": [(f(4, 6, 5), f(8, 6, 3), None, (2,), (1,), (1,), False, (0,), 1, False, False, False, False)],
    "conv_transpose1d.default": [(f(4, 6, 5), f(6, 4, 3), f(4))],
    "conv_transpose2d.input": [(f(4, 6, 5, 5), f(6, 2, 3, 3), f(4), (2, 2), (1, 1), (0, 0), 2)],
    "conv_transpose3d.input": [(f(2, 4, 3, 3, 3), f(4, 6, 2, 2, 2), f(6))],
    "avg_pool1d.default": [(f(4, 6, 8), (2,))],
    "avg_pool2d.default": [(f(4, 6, 8, 8), (2, 2)), (f(4, 6, 8, 8), (3, 3), (1, 1), (1, 1)), (f(4, 6, 6), (3, 3), (1, 1), (1, 1))],
    "avg_pool3d.default": [(f(2, 4, 4, 4, 4), (2, 2, 2))],
    "adaptive_avg_pool1d.default": [(f(4, 6, 8), (1,)), (f(4, 6, 8), (8,))],
    "adaptive_avg_pool2d.default": [(f(4, 6, 8, 8), (1, 1)), (f(4, 6, 7, 7), (3, 3))],
    "adaptive_avg_pool3d.default": [(f(2, 4, 4, 4, 4), (1, 1, 1))],
    "_adaptive_avg_pool2d.default": [(f(4, 6, 8, 8), (2, 2))],
    "_adaptive_avg_pool3d.default": [(f(2, 4, 4, 4, 4), (2, 2, 2))],
    "scaled_dot_product_attention.default": [
        (f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8)),
        (f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8), None, 0.0, True, {"scale": 0.3}),
        (f(2, 4, 6, 8), f(2, 4, 3, 8), f(2, 4, 3, 8), f(2, 1, 6, 3)),
        (f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8), f(1, 4, 6, 6), 0.1),
        (f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8), b(6, 6)),
        (f(2, 4, 6, 8), f(2, 4, 6, 8), f(2, 4, 6, 8), b(2, 1, 1, 6)),
        (f(2, 12, 4, 8), f(2, 2, 4, 8), f(2, 2, 4, 8), None, 0.0, True, {"enable_gqa": True}),
        (f(2, 6, 4, 8), f(2, 1, 4, 8), f(2, 1, 4, 8), f(2, 6, 4, 4), {"enable_gqa": True}),
        (f(2, 4, 6, 8), f(2, 1, 6, 8), f(2, 1, 6, 8), None, 0.0, True),
        (f(6, 4, 8), f(6, 4, 8), f(6, 4, 8)),
        (f(6, 12, 8), f(6, 12, 8), f(6, 12, 6), None, 0.0, True),
        (f(2, 4, 12, 8), f(2, 2, 12, 8), f(2, 2, 12, 8), None, 0.0, True, {"enable_gqa": True}),
        (f(2, 2, 3, 6, 4), f(2, 2, 3, 4, 4), f(2, 2, 3, 4, 5), b(2, 1, 3, 6, 4)),
    ],
    "_grouped_mm.default": [],
    "transformers.grouped_mm_fallback.default": [],
    "fft_fftn.default": [],
    "view_as_real.default": [],
    "view_as_complex.default": [],
    "im2col.default": [(f(4, 6, 5, 5), (3, 3), (1, 1), (1, 1), (1, 1))],
    "fft_ifftn.default": [],
    "divide.Tensor": [(f(6, 4), f(4))],
    "histc.default": [(f(6, 4), 4, 0.0, 1.0)],
    "__and__.Tensor": [(b(6, 4), b(4))],
    "__and__.Scalar": [(i(6, 4), 1)],
    "__or__.Tensor": [(b(6, 4), b(4))],
    "__or__.Scalar": [(i(6, 4), 1)],
    "__xor__.Tensor": [(b(6, 4), b(4))],
    "__xor__.Scalar": [(i(6, 4), 1)],
    "where.self": [(b(6, 4), f(6, 4), f(1, 4)), (b(6, 1), f(4), f(6, 4))],
    "where.ScalarOther": [(b(6, 4), f(6, 4), 0.5)],
    "where.ScalarSelf": [(b(6, 4), 0.5, f(6, 4))],
    "where.Scalar": [(b(6, 4), 0.5, 0.25)],
    "masked_fill.Scalar": [(f(6, 4), b(6, 4), 0.0), (f(6, 4), b(1, 4), -1.0), (f(6, 4), b(4), float("-inf"))],
    "masked_fill.Tensor": [(f(6, 4), b(6, 4), f())],
    "add.Tensor": [
        (f(6, 4), f(6, 4)),
        (f(6, 4), f(4)),
        (f(6, 1), f(1, 4), {"alpha": 2}),
        (f(6, 4), 1.0),
        (f(5, 7), f(7)),
        (i(6, 4), i(6, 4)),
    ],
    "sub.Tensor": [(f(6, 4), f(6, 4)), (f(4), f(6, 4)), (f(6, 4), 2)],
    "mul.Tensor": [(f(6, 4), f(6, 4)), (f(4), f(2, 6, 4)), (f(6, 4), 3.0), (f(5, 7), f(5, 1)), (f(6, 4), b(6, 4))],
    "div.Tensor": [(f(6, 4), f(6, 4)), (f(6, 4), f(4)), (f(6, 4), 3.0), (f(), f())],
    "type_as.default": [(f(6, 4), f(6, 4)), (f(6, 4), f())],
    "_to_copy.default": [
        (f(6, 4), {"dtype": Symbol("torch.float64")}),
        (i(6, 4), {"dtype": Symbol("torch.float64")}),
        (b(6, 4), {"dtype": Symbol("torch.float64")}),
        (f(6, 4), {"dtype": Symbol("torch.int64")}),
    ],
    "to.dtype": [(f(6, 4), DOUBLE)],
    "to.dtype_layout": [(f(6, 4), {"dtype": DOUBLE})],
    "to.device": [(f(6, 4), "cpu", DOUBLE)],
    "view.dtype": [(f(6, 4), DOUBLE)],
    "copy.default": [(f(6, 4), f(6, 4)), (f(6, 4), f(4))],
    "polar.default": [],
    "bucketize.Scalar": [],
    "threshold.default": [(f(6, 4), 0.1, 20.0)],
    "clamp.default": [(f(6, 4), -0.5, 0.5)],
    "clip.default": [(f(6, 4), -0.5, 0.5)],
    "clamp.Tensor": [(f(6, 4), f(6, 4)), (f(6, 4), f(4))],
    "lerp.Tensor": [(f(6, 4), f(6, 4), f(4))],
    "bitwise_left_shift.Tensor_Scalar": [(i(6, 4), 1)],
    "bitwise_right_shift.Tensor_Scalar": [(i(6, 4), 1)],
    "fill.Tensor": [(f(6, 4), f())],
    "eq.default": [],
    "zeros_like.default": [(f(6, 4),)],
    "full_like.default": [(f(6, 4), 2.0)],
    "empty_like.default": [],
    "autopar.dropout": [(f(6, 4), 0.1)],
    "view.default": [
        (f(4, 6, 8), (24, 8)),
        (f(24, 8), (4, 6, 8)),
        (f(4, 6, 8), (4, 6, 2, 4)),
        (f(4, 6, 8), (4, -1)),
        (f(6, 4), (2, 12)),
        (f(2, 3), (3, 2)),
        (f(4, 1, 6), (4, 6)),
        (f(4, 6, 12), (4, 6, 3, 4)),
        (f(2, 5, 7), (10, 7)),
        (f(4, 6), (4, 6)),
        (f(1, 1), (1,)),
        (f(4, 4, 1, 6), (16, 6)),
        (f(2, 2, 6, 6), (2, 12, 1, 6)),
        (f(12), (2, 2, 3)),
        (f(4, 9, 5), (4, 3, 3, 5)),
    ],
    "_unsafe_view.default": [(f(4, 6, 8), (24, 8))],
    "reshape.default": [(f(4, 6, 8), (24, 8))],
    "view_copy.default": [(f(4, 6, 8), (24, 8))],
    "_reshape_alias.default": [],
    "flatten.using_ints": [(f(4, 6, 8), 1), (f(4, 6, 8), 0, 1)],
    "unflatten.int": [(f(4, 6, 8), 1, (2, 3)), (f(4, 6, 8), -1, (2, -1))],
    "squeeze.default": [(f(4, 1, 6),)],
    "squeeze.dim": [(f(4, 1, 6), 1), (f(4, 1, 6), 0)],
    "squeeze.dims": [(f(4, 1, 6, 1), (1, 3))],
    "unsqueeze.default": [(f(4, 6), 1), (f(4, 6), -1)],
    "expand.default": [(f(4, 1, 6), (4, 3, 6)), (f(6), (4, -1)), (f(4, 2, 1, 6), (4, 2, 3, 6))],
    "expand_copy.default": [(f(4, 1, 6), (4, 3, 6))],
    "broadcast_to.default": [(f(4, 1, 6), (4, 3, 6))],
    "expand_as.default": [],
    "permute.default": [(f(2, 4, 6), (2, 0, 1)), (f(2, 5, 7), (0, -1, 1))],
    "permute_copy.default": [(f(2, 4, 6), (2, 0, 1))],
    "transpose.int": [(f(2, 4, 6), 1, 2), (f(2, 4, 6), 0, -1)],
    "transpose_copy.int": [(f(2, 4, 6), 1, 2)],
    "swapaxes.default": [(f(2, 4, 6), 1, 2)],
    "swapdims.default": [(f(2, 4, 6), 1, 2)],
    "t.default": [(f(5, 7),), (f(6),)],
    "t_copy.default": [(f(4, 6),)],
    "mT.default": [(f(2, 4, 6),)],
    "adjoint.default": [(f(2, 4, 6),)],
    "numpy_T.default": [(f(4, 6),)],
    "movedim.int": [(f(2, 4, 6), 0, 2)],
    "movedim.intlist": [(f(2, 4, 6), (0, 1), (-1, 0))],
    "repeat.default": [(f(4, 6), (2, 3)), (f(4, 6), (2, 1, 1)), (f(1, 6), (4, 1))],
    "tile.default": [(f(4, 6), (2, 1))],
    "repeat_interleave.self_int": [(f(4, 6), 2, 1), (f(4, 1), 6, 1)],
    "slice.Tensor": [
        (f(6, 12), 1, 1, 2**63 - 1, 3),
        (f(6, 12), -1, 0, 12, 2),
        (f(4, 6), 1, 0, 3),
        (f(4, 6), 1, 3, 9223372036854775807),
        (f(4, 6), 0, 0, 9223372036854775807),
        (f(4, 6), -1, 1, -1),
        (f(4, 6), 1, 0, 6, 2),
    ],
    "slice_copy.Tensor": [(f(4, 6), 1, 0, 3)],
    "narrow.default": [(f(4, 6), 1, 2, 3), (f(4, 6), 1, 0, 6)],
    "narrow_copy.default": [(f(4, 6), 1, 2, 3)],
    "split.Tensor": [(f(4, 12), 4, 1), (f(4, 12), 5, -1), (f(6, 4), 3)],
    "split.sizes": [(f(4, 12), (4, 4, 4), 1)],
    "split_copy.Tensor": [(f(4, 12), 4, 1)],
    "split_with_sizes.default": [(f(4, 12), (6, 6), 1), (f(4, 12), (2, 10), 1), (f(6, 4), (4, 2))],
    "split_with_sizes_copy.default": [(f(4, 12), (6, 6), 1)],
    "chunk.default": [(f(4, 12), 2, 1), (f(4, 5), 2, 1)],
    "select.int": [(f(4, 3, 6), 1, -1)],
    "select_copy.int": [(f(4, 3, 6), 0, 1)],
    "unbind.int": [(f(4, 3, 6), 1), (f(3, 4))],
    "unbind_copy.int": [(f(4, 3, 6), 1)],
    "cat.default": [((f(4, 6), f(4, 3)), 1), ((f(4, 6), f(4, 6)), -1), ((f(4, 6, 2), f(4, 6, 2)), 1), ((f(1, 6), f(5, 6)),)],
    "concat.default": [((f(4, 6), f(4, 6)), 0)],
    "stack.default": [((f(4, 6), f(4, 6)), 1), ((f(4, 6), f(4, 6)), -1)],
    "pad.default": [(f(4, 6), (1, 0)), (f(4, 6), (0, 1), "constant", -100.0), (f(2, 4, 6), (0, 0, 1, 1))],
    "constant_pad_nd.default": [(f(4, 6), (1, 2), 0.0), (f(4, 6), (1, 2), 3.0)],
    "reflection_pad1d.default": [(f(2, 4, 6), (1, 1))],
    "reflection_pad2d.default": [(f(2, 4, 6, 6), (1, 1, 1, 1))],
    "replication_pad1d.default": [(f(2, 4, 6), (1, 1))],
    "replication_pad2d.default": [(f(2, 4, 6, 6), (1, 1, 1, 1))],
    "upsample_nearest1d.default": [(f(2, 4, 3), (6,))],
    "upsample_nearest1d.vec": [(f(2, 4, 3), (6,), None)],
    "upsample_nearest2d.default": [(f(2, 4, 3, 3), (6, 6))],
    "upsample_nearest2d.vec": [(f(2, 4, 3, 3), None, (2.0, 2.0))],
    "upsample_bilinear2d.default": [(f(2, 4, 3, 3), (6, 6), False)],
    "upsample_bilinear2d.vec": [(f(2, 4, 3, 3), (6, 6), False, None), (f(2, 4, 6, 6), (6, 6), False, None)],
    "upsample_bicubic2d.default": [(f(2, 4, 3, 3), (6, 6), False)],
    "upsample_bicubic2d.vec": [(f(2, 4, 3, 3), (6, 6), False, None)],
    "max_pool1d.default": [(f(4, 6, 8), (2,))],
    "max_pool2d.default": [(f(4, 6, 8, 8), (3, 3), (2, 2), (1, 1)), (f(4, 6, 8, 8), (3, 3), (1, 1), (1, 1))],
    "max_pool3d.default": [(f(2, 4, 4, 4, 4), (2, 2, 2))],
    "max_pool2d_with_indices.default": [(f(4, 6, 8, 8), (2, 2))],
    "max_pool3d_with_indices.default": [(f(2, 4, 4, 4, 4), (2, 2, 2))],
    "adaptive_max_pool2d.default": [(f(4, 6, 8, 8), (2, 2))],
    "roll.default": [(f(4, 6), (1,), (1,)), (f(4, 6), (1,))],
    "flip.default": [(f(4, 6, 2), (0, 2))],
    "diff.default": [(f(4, 6),), (f(4, 6), 1, 0), (f(4, 6), 1, -1, f(4, 1))],
    "cumsum.default": [(f(4, 6), 1), (i(4, 6), -1)],
    "cumprod.default": [(f(4, 6), 1)],
    "logcumsumexp.default": [(f(4, 6), 1)],
    "cummax.default": [(f(4, 6), 1)],
    "cummin.default": [(f(4, 6), 0)],
    "sort.default": [(f(4, 6),), (f(4, 6), 0, True)],
    "sort.stable": [(f(4, 6), {"stable": True, "dim": 0})],
    "argsort.default": [(f(4, 6), 0)],
    "topk.default": [(f(4, 6), 2), (f(4, 6), 2, 0)],
    "kthvalue.default": [(f(4, 6), 2)],
    "glu.default": [(f(4, 6),), (f(4, 6), 0)],
    "tril.default": [(f(2, 4, 6),), (f(4, 6), 1)],
    "triu.default": [(f(2, 4, 6), 1)],
    "slice_scatter.default": [(f(4, 6), f(4, 5), 1, 1, 9223372036854775807), (f(4, 6), f(2, 6), 0, 0, 2)],
    "select_scatter.default": [(f(4, 6), f(4), 1, 0), (f(4, 6), f(6), 0, -1)],
    "full.default": [((4, 6), 2.0)],
    "zeros.default": [((4, 6),)],
    "ones.default": [((4, 6),)],
    "empty.memory_format": [],
    "new_full.default": [(f(3), (4, 6), 2.0)],
    "new_zeros.default": [(f(3), (4, 6))],
    "new_ones.default": [(f(3), (4, 6))],
    "new_empty.default": [],
    "sum.default": [(f(4, 6),), (i(4, 6),), (b(4, 6),)],
    "sum.dim_IntList": [(f(4, 6, 5), (1,)), (f(4, 6), (-1,), True), (f(4, 6), (0, 1)), (f(4, 6), None)],
    "mean.default": [(f(4, 6),)],
    "mean.dim": [(f(4, 6, 5), (1,)), (f(4, 6), (-1,), True), (f(4, 6), (0, 1)), (f(4, 6), 0), (f(5, 7), None)],
    "linalg_vector_norm.default": [(f(4, 6), 2, (1,)), (f(4, 6),)],
    "norm.ScalarOpt_dim": [(f(4, 6), 2, (1,))],
    "softmax.int": [(f(4, 6), -1), (f(4, 6), 0)],
    "log_softmax.int": [(f(4, 6), -1), (f(3, 7, 2), 1)],
    "_softmax.default": [(f(4, 6), -1, False)],
    "_log_softmax.default": [(f(4, 6), -1, False)],
    "_safe_softmax.default": [(f(4, 6), -1)],
    "layer_norm.default": [(f(4, 6, 8), (8,), f(8), f(8), 1e-5), (f(4, 6, 8), (6, 8)), (f(4, 8), (8,), None, f(8))],
    "native_layer_norm.default": [(f(4, 6, 8), (8,), f(8), f(8), 1e-5)],
    "rms_norm.default": [(f(4, 6, 8), (8,), f(8), 1e-5), (f(4, 6, 8), (8,))],
    "_fused_rms_norm.default": [(f(4, 6, 8), (8,), f(8), 1e-5)],
    "group_norm.default": [(f(4, 6, 5), 3, f(6), f(6)), (f(4, 6, 5), 2)],
    "instance_norm.default": [(f(4, 6, 5), f(6), f(6), None, None, True, 0.1, 1e-5, False)],
    "native_group_norm.default": [
        (f(4, 6, 5), f(6), f(6), 4, 6, 5, 3, 1e-5),
        (f(4, 6, 5), None, None, 4, 6, 5, 6, 1e-5),
        (f(4, 6, 5), f(6), f(6), 4, 6, 5, 1, 1e-5),
    ],
    "_native_batch_norm_legit_no_training.default": [(f(4, 6, 5), f(6), f(6), f(6), f(6), 0.1, 1e-5)],
    "_native_batch_norm_legit.no_stats": [(f(4, 6, 5), f(6), f(6), True, 0.1, 1e-5)],
    "batch_norm.default": [
        (f(4, 6, 5, 5), f(6), f(6), f(6), f(6), False, 0.1, 1e-5, False),
        (f(4, 6), None, None, f(6), f(6), False, 0.1, 1e-5, False),
    ],
    "native_batch_norm.default": [(f(4, 6, 5), f(6), f(6), f(6), f(6), False, 0.1, 1e-5)],
    "cudnn_batch_norm.default": [],
    "autopar.batch_norm": [
        (f(6, 4, 6), f(4), f(4), f(4), f(4), 0.1, 1e-5),
        (f(6, 4, 2, 6), f(4), f(4), f(4), f(4), 0.1, 1e-5),
        (f(6, 4), None, None, f(4), f(4), 0.1, 1e-5),
    ],
    "embedding.default": [(f(12, 6), i(4, 6)), (f(7, 6), i(4)), (f(9, 4), i(4, 6), 0), (f(9, 4), i(4, 6), 8)],
    "gather.default": [(f(4, 6), 1, i(4, 3)), (f(4, 6), 1, i(2, 3)), (f(4, 6), -1, i(4, 12))],
    "scatter.src": [(f(4, 6), 1, i(4, 3), f(4, 3)), (f(4, 6), 1, i(2, 3), f(2, 3))],
    "scatter.value": [(f(4, 6), 1, i(4, 3), 1.0)],
    "scatter_add.default": [(f(4, 6), 1, i(4, 3), f(4, 3)), (f(5, 4), 0, i(5, 4), f(5, 4))],
    "scatter_reduce.two": [
        (f(4, 6), 1, i(4, 3), f(4, 3), "amax"),
        (f(4, 6), 1, i(4, 3), f(4, 3), "sum"),
        (f(4, 6), 1, i(4, 4), f(4, 4), "sum", {"include_self": False}),
    ],
    "index_select.default": [(f(4, 6), 1, i(4)), (f(4, 6), 0, i(8))],
    "index_add.default": [
        (f(4, 6), 0, i(9), f(9, 6)),
        (f(2, 4, 6), -1, i(5), f(2, 4, 5), {"alpha": 2}),
        (f(6), 0, i(4), f(4)),
    ],
    "unfold.default": [(f(4, 6), 1, 3, 2), (f(4, 6, 3), -2, 2, 2), (f(6), 0, 2, 1)],
    "unfold_copy.default": [(f(4, 6), 1, 3, 2)],
    "_weight_norm.default": [(f(6, 4, 3), f(6, 1, 1)), (f(6, 4, 3), f(1, 1, 3), 2), (f(6, 4), f(1, 1), -1)],
    "bucketize.Tensor": [(f(4, 6), f(5)), (f(6), f(3), {"right": True})],
    "searchsorted.Tensor": [(f(4, 5), f(4, 6)), (f(3), f(6))],
    "lstm.input": [
        (f(5, 6, 4), (f(1, 6, 3), f(1, 6, 3)), (f(12, 4), f(12, 3), f(12), f(12)), True, 1, 0.0, True, False, False),
        (f(6, 5, 4), (f(2, 6, 3), f(2, 6, 3)), (f(12, 4), f(12, 3), f(12, 4), f(12, 3)), False, 1, 0.0, False, True, True),
    ],
    "gru.input": [(f(6, 5, 4), f(1, 6, 3), (f(9, 4), f(9, 3), f(9), f(9)), True, 1, 0.0, True, False, True)],
    "rnn_tanh.input": [(f(5, 6, 4), f(1, 6, 3), (f(3, 4), f(3, 3)), False, 1, 0.0, True, False, False)],
    "rnn_relu.input": [(f(5, 6, 4), f(1, 6, 3), (f(3, 4), f(3, 3)), False, 1, 0.0, True, False, False)],
    "lstm_cell.default": [(f(6, 4), (f(6, 3), f(6, 3)), f(12, 4), f(12, 3), f(12), f(12))],
    "gru_cell.default": [(f(6, 4), f(6, 3), f(9, 4), f(9, 3), f(9), f(9)), (f(6, 4), f(6, 3), f(9, 4), f(9, 3))],
    "rnn_tanh_cell.default": [(f(6, 4), f(6, 3), f(3, 4), f(3, 3), f(3), f(3))],
    "rnn_relu_cell.default": [(f(6, 4), f(6, 3), f(3, 4), f(3, 3), f(3), f(3))],
    "index.Tensor": [
        (f(4, 6, 8), (None, i(4))),
        (f(4, 6, 8), (i(4, 2),)),
        (f(4, 6, 8), (i(4), None, i(4))),
        (f(4, 6, 8), (i(4, 1), i(6))),
        (f(4, 6, 8), (None, i(6, 1), i(4))),
    ],
    "_unsafe_index.Tensor": [(f(4, 6, 8), (None, i(4)))],
    "index_put.default": [
        (f(4, 6), (i(2),), f(2, 6)),
        (f(4, 6), (None, i(2)), f(4, 2)),
        (f(4, 6), (i(2),), f()),
        (f(4, 6), (i(2), i(2)), f(2), True),
    ],
    "_unsafe_index_put.default": [(f(4, 6), (i(2),), f(2, 6))],
    "autopar.experts": [
        (f(6, 8), i(6, 2), f(6, 2), (f(4, 12, 8), f(4, 12), f(4, 6, 10), f(4, 10)), GATED),
        (f(7, 4), i(7, 3), None, (f(5, 4, 6),), PLAIN),
        (f(8, 8), i(8, 2), f(8, 2), (f(4, 12, 8), f(4, 12), f(4, 6, 10), f(4, 10)), GATED, 4.0),
        (f(6, 4), i(6, 1), None, (f(1, 4, 6),), PLAIN.replace("[5, 4, 6]", "[1, 4, 6]")),
    ],
    "autopar.expert_linear": [(f(6, 8), f(4, 8, 6), i(6), False), (f(6, 8), f(4, 6, 8), i(6), True)],
    "autopar.expert_rows": [(f(4, 8), i(6))],
    "one_hot.default": [(i(4, 6), 5)],
    "autopar.target_weight": [(i(6), -100, DOUBLE), (i(7), 2, DOUBLE)],
    "autopar.receive": [],
    "autopar.send": [],
    "autopar.cross_entropy": [(f(6, 12), i(6), -100, 0.0), (f(6, 7), i(6), -100, 0.1), (f(4, 5), i(4), 2, 0.0)],
    "cross_entropy_loss.default": [
        (f(6, 5), i(6), None, 0),
        (f(6, 5), i(6), f(5), 0, 2, 0.1),
        (f(6, 5, 4), i(6, 4), None, 0),
        (f(6, 5, 4, 3), i(6, 4, 3), f(5), 0),
        (f(6, 5), f(6, 5), None, 0),
        (f(6, 5, 4), f(6, 5, 4), f(5), 0, -100, 0.1),
    ],
    "nll_loss.default": [(f(6, 5), i(6), None, 0), (f(6, 5), i(6), f(5), 0), (f(6, 8), i(6), f(8), 0, 2)],
    "nll_loss_nd.default": [(f(6, 5), i(6), None, 0), (f(6, 5, 4, 3), i(6, 4, 3), f(5), 0)],
    "nll_loss2d.default": [(f(6, 5, 4, 3), i(6, 4, 3), None, 0)],
    "mse_loss.default": [(f(4, 6), f(4, 6), 0)],
    "l1_loss.default": [(f(4, 6), f(4, 6), 0)],
    "smooth_l1_loss.default": [(f(4, 6), f(4, 6), 0), (f(4, 6), f(4, 6), 0, 0.5)],
    "huber_loss.default": [(f(4, 6), f(4, 6), 0, 0.5)],
    "soft_margin_loss.default": [(f(4, 6), f(4, 6), 0)],
    "kl_div.default": [(f(4, 6), f(4, 6), 0), (f(4, 6), f(4, 6), 0, {"log_target": True}), (f(4, 6), f(6), 0)],
    "binary_cross_entropy.default": [(f(4, 6), f(4, 6), None, 0), (f(4, 6), f(4, 6), f(4, 6), 0), (f(4, 6), f(4, 6), f(6), 0)],
    "binary_cross_entropy_with_logits.default": [
        (f(4, 6), f(4, 6), None, None, 0),
        (f(4, 6), f(4, 6), f(4, 1), f(6), 0),
        (f(4, 6), f(4, 6), None, f(6), 0),
    ],
    "poisson_nll_loss.default": [(f(4, 6), f(4, 6), True, True, 1e-8, 0), (f(4, 6), f(4, 6), False, False, 1e-8, 0)],
    "hinge_embedding_loss.default": [(f(4, 6), f(4, 1), 1.0, 0)],
    "margin_ranking_loss.default": [(f(4, 6), f(4, 6), f(6), 0.2, 0)],
    "cosine_embedding_loss.default": [(f(4, 6), f(4, 6), f(4), 0.1, 0)],
    "triplet_margin_loss.default": [
        (f(4, 3, 6), f(4, 3, 6), f(4, 1, 6), 1.0, 2.0, 1e-6, False, 0),
        (f(4, 6), f(4, 6), f(4, 6), {"reduction": 0}),
    ],
    "multilabel_margin_loss.default": [(f(4, 6), i(4, 6), 0)],
    "cosine_similarity.default": [(f(4, 6, 5), f(4, 6, 5)), (f(4, 6), f(6), -1), (f(4, 1, 5), f(6, 5), 2)],
    "pairwise_distance.default": [(f(4, 6), f(4, 6)), (f(4, 6), f(6), 2.0, 1e-6, True)],
    "count_nonzero.dim_IntList": [(f(4, 6), (1,))],
    "var.dim": [(f(4, 6), (1,))],
    "std.dim": [(f(4, 6), (1,), False, True)],
    "var.correction": [(f(4, 6), (1,)), (f(4, 6), (-1,), {"correction": 0, "keepdim": True}), (f(4, 6),)],
    "div.Tensor_mode": [(f(4, 6), f(6), {"rounding_mode": "floor"})],
    "div.Scalar_mode": [(f(4, 6), 2.0, {"rounding_mode": "trunc"})],
    "round.decimals": [(f(4, 6), {"decimals": 1})],
    "max.dim": [(f(4, 6), 1)],
    "linspace.default": [(0.0, 1.0, 5)],
    "arange.default": [(6,)],
    "arange.start": [(1, 6)],
    "arange.start_step": [(1, 6, 2)],
    "scalar_tensor.default": [(2.0,)],
    "eye.default": [(4,)],
    "eye.m": [(4, 6)],
    "tril_indices.default": [(4, 4)],
}

UNTRIED = {
    "autopar.receive": "takes a value from another stage: tests of pipelines run it",
    "autopar.send": "gives a value to another stage: tests of pipelines run it",
    "view_as_real.default": "its operand is complex",
    "view_as_complex.default": "its result is complex",
    "fft_fftn.default": "its result is complex",
    "fft_ifftn.default": "its result is complex",
    "polar.default": "its result is complex",
    "bucketize.Scalar": "takes no tensor to split",
    "eq.default": "takes numbers in eager mode",
    "empty_like.default": "its values are arbitrary",
    "empty.memory_format": "its values are arbitrary",
    "new_empty.default": "its values are arbitrary",
    "cudnn_batch_norm.default": "needs a GPU",
    "_reshape_alias.default": "needs strides",
    "_grouped_mm.default": "takes bfloat16 only",
    "transformers.grouped_mm_fallback.default": "is checked on its own, with offsets that fit",
    "expand_as.default": "its second operand only gives a shape",
}
"""Operators whose rule no sample on a CPU can check, and why."""


def samples(target: str) -> Iterator[tuple[Graph, Op]]:
    """Calls of `target`: those of the table, or else made from its schema, all operands of one shape and one broadcast."""
    name = target.removeprefix("aten.")
    if name in SAMPLES:
        for given in SAMPLES[name]:
            given = given if isinstance(given, tuple) else (given,)
            keywords = given[-1] if given and isinstance(given[-1], dict) else {}
            yield call(target, *(given[:-1] if keywords else given), **keywords)
        return
    schema = operator(target)._schema
    for shapes in (((6, 4), (6, 4), (6, 4)), ((6, 4), (4,), (6, 1)), ((5, 7), (5, 7), (5, 7))):
        tensor = i if "bitwise" in name or "gcd" in name else f
        args: list[Any] = []
        for argument in schema.arguments:
            if argument.kwarg_only or argument.has_default_value():
                continue
            kind = str(argument.type)
            if kind == "Tensor":
                args.append(tensor(*shapes[sum(isinstance(arg, T) for arg in args)]))
            elif kind == "List[int]":
                args.append((1,))
            else:
                args.append({"number": 1.5 if tensor is f else 1, "float": 0.5, "int": 1, "bool": True}[kind])
        yield call(target, *args)
