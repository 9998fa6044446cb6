"""The rules: one line an operator family. To add an operator, add its name to a line, or a line, and samples in `tests/ir/rule_samples.py`.

`rule(targets, notation)` takes index notation (see `notation.py`); `family(function, targets)` takes the families whose nest depends on
ranks or arguments. Targets are operator names with their overload; `aten.` is left out.
"""

from __future__ import annotations

from autopar.ir.rules import notation
from autopar.ir.rules.families import contractions, cuts, experts, indexing, losses, pointwise, recurrent, reductions, views
from autopar.ir.rules.families.common import Family
from autopar.ir.rules.nest import Call, Nest

RULES: dict[str, Family] = {}
"""Family of every operator that has a rule."""

LINES: dict[str, str] = {}
"""The notation of those whose rule is a line."""

_RANDOM = """
    bernoulli.default bernoulli.p rand.default randn.default randint.default randint.low randperm.default rand_like.default
    randn_like.default randint_like.default randint_like.low_dtype normal.Tensor_Tensor normal.float_float multinomial.default
    native_dropout.default dropout.default rrelu_with_noise.default exponential.default uniform.default normal_functional.default
"""
RANDOM: frozenset[str] = frozenset(f"aten.{name}" for name in _RANDOM.split())
"""Random operators: every rank must draw the same numbers, so they run whole on every rank. (`autopar.dropout` is the exception.)"""


def family(function: Family, targets: str) -> None:
    """All of `targets` (separated by blanks) follow `function`."""
    for name in targets.split():
        target = name if name.startswith("autopar.") or name.count(".") == 2 else f"aten.{name}"
        assert target not in RULES, f"{target} has two rules"
        RULES[target] = function


def rule(targets: str, text: str, uneven: str = "", linear: tuple[tuple[int, ...], ...] = ()) -> None:
    """All of `targets` follow the index notation `text`. `uneven`: loops that may be split into unequal parts. `linear`: sets of terms
    in which the operator is jointly linear."""
    pattern = notation.read(text)
    loops = frozenset(uneven.split())

    def bound(call: Call) -> Nest | None:
        return notation.bind(pattern, call, loops, linear)

    family(bound, targets)
    LINES.update((name if name.startswith("autopar.") or name.count(".") == 2 else f"aten.{name}", text) for name in targets.split())


def replicated(call: Call) -> Nest | None:
    """Replicated on purpose: too small to split, made from nothing, or random."""
    return Nest({}, tuple(((),) * len(value.shape) for value in call.operands), tuple(((),) * len(value.shape) for value in call.outputs))


# Matrix products.
rule("mm.default", "m k, k n -> m n", uneven="m k n", linear=((0,),))
rule("bmm.default", "b m k, b k n -> b m n", uneven="k n", linear=((0,),))
rule("mv.default", "m k, k -> m", uneven="k", linear=((0,),))
rule("dot.default vdot.default", "k, k ->", uneven="k", linear=((0,),))
rule("linear.default", "... k, n k, +n -> ... n", uneven="k n", linear=((0, 2),))
rule("addmm.default", "+n, m k, k n -> m n", uneven="k n", linear=((0, 1),))
rule("baddbmm.default", "+b m n, b m k, b k n -> b m n", uneven="k n", linear=((0, 1),))
rule("addbmm.default", "+m n, b m k, b k n -> m n", linear=((0, 1),))
rule("addmv.default", "+m, m k, k -> m", linear=((0, 1),))
rule("bilinear.default", "... i, ... j, n i j, +n -> ... n", linear=((0, 3),))
rule("_grouped_mm.default transformers.grouped_mm_fallback.default", "[m] k, [e] k n, [e] -> [m] n", linear=((0,),))
family(contractions.matmul, "matmul.default")
family(contractions.outer, "outer.default ger.default")
family(contractions.einsum, "einsum.default")

# Convolutions, pooling, attention.
family(contractions.convolution, "conv1d.default conv2d.default conv3d.default conv1d.padding conv2d.padding conv3d.padding")
family(contractions.general_convolution, "convolution.default _convolution.default")
family(contractions.transposed_convolution, "conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input")
family(
    cuts.spatial(linear=True),
    "avg_pool1d.default avg_pool2d.default avg_pool3d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default "
    "adaptive_avg_pool3d.default _adaptive_avg_pool2d.default _adaptive_avg_pool3d.default",
)
family(contractions.attention, "scaled_dot_product_attention.default")
family(recurrent.layers, "lstm.input gru.input rnn_tanh.input rnn_relu.input")
family(recurrent.cell, "lstm_cell.default gru_cell.default rnn_tanh_cell.default rnn_relu_cell.default")

# Element by element.
family(
    pointwise.nonlinear,
    "abs.default acos.default acosh.default asin.default asinh.default atan.default atanh.default atan2.default bitwise_and.Tensor "
    "bitwise_and.Scalar bitwise_not.default bitwise_or.Tensor bitwise_or.Scalar bitwise_xor.Tensor bitwise_xor.Scalar "
    "bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar "
    "bucketize.Scalar ceil.default celu.default clamp.default clamp.Tensor clamp_max.default clamp_max.Tensor clamp_min.default "
    "clamp_min.Tensor clip.default copysign.Tensor copysign.Scalar cos.default cosh.default deg2rad.default digamma.default elu.default "
    "eq.Tensor eq.Scalar erf.default erfc.default erfinv.default exp.default exp2.default expm1.default floor.default "
    "floor_divide.default floor_divide.Scalar fmax.default fmin.default fmod.Tensor fmod.Scalar frac.default ge.Tensor ge.Scalar "
    "gelu.default gt.Tensor gt.Scalar hardshrink.default hardsigmoid.default hardswish.default hardtanh.default heaviside.default "
    "hypot.default isfinite.default isinf.default isnan.default isneginf.default isposinf.default le.Tensor le.Scalar leaky_relu.default "
    "lgamma.default log.default log10.default log1p.default log2.default log_sigmoid.default logaddexp.default logaddexp2.default "
    "logical_and.default logical_not.default logical_or.default logical_xor.default logit.default lt.Tensor lt.Scalar maximum.default "
    "minimum.default mish.default nan_to_num.default ne.Tensor ne.Scalar max.other min.other polar.default pow.Tensor_Scalar "
    "pow.Tensor_Tensor pow.Scalar reciprocal.default relu.default relu6.default remainder.Tensor remainder.Scalar round.default "
    "round.decimals rsqrt.default selu.default sigmoid.default sign.default silu.default sin.default sinc.default sinh.default "
    "softplus.default softshrink.default special_erf.default special_expm1.default sqrt.default square.default tan.default tanh.default "
    "threshold.default trunc.default xlogy.Tensor xlogy.Scalar_Other div.Tensor_mode div.Scalar_mode lerp.Tensor lerp.Scalar "
    "addcmul.default addcdiv.default where.ScalarOther where.ScalarSelf where.Scalar sub.Scalar add.Scalar "
    "rsub.Scalar bitwise_and.Scalar_Tensor eq.default isclose.default float_power.Tensor_Scalar float_power.Tensor_Tensor gcd.default "
    "__and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar __xor__.Tensor __xor__.Scalar masked_fill.Tensor fill.Scalar "
    "fill.Tensor signbit.default",
)
family(pointwise.additive, "add.Tensor sub.Tensor rsub.Tensor")
family(pointwise.multiplicative, "mul.Tensor mul.Scalar multiply.Tensor multiply.Scalar")
family(
    pointwise.first_linear,
    "div.Tensor div.Scalar divide.Tensor divide.Scalar true_divide.Tensor neg.default positive.default clone.default alias.default "
    "contiguous.default lift_fresh_copy.default detach.default detach_copy.default real.default conj.default conj_physical.default",
)
family(pointwise.cast, "_to_copy.default to.dtype to.dtype_layout to.device type_as.default view.dtype")
family(pointwise.where, "where.self")
family(pointwise.masked_fill, "masked_fill.Scalar")
family(pointwise.copied, "copy.default")
family(
    pointwise.nonlinear,
    "zeros_like.default ones_like.default full_like.default empty_like.default",
)
family(pointwise.dropout, "autopar.dropout")

# Views.
family(
    views.view,
    "view.default _unsafe_view.default reshape.default view_copy.default flatten.using_ints unflatten.int "
    "unsqueeze.default _reshape_alias.default",
)
family(views.squeeze, "squeeze.default squeeze.dim squeeze.dims")
rule("view_as_real.default", "... -> ... [z]")
rule("view_as_complex.default", "... [z] -> ...")
family(views.expand, "expand.default expand_copy.default broadcast_to.default expand_as.default")
family(views.permute, "permute.default permute_copy.default")
family(views.transpose, "transpose.int swapaxes.default swapdims.default transpose_copy.int")
family(views.t, "t.default t_copy.default mT.default adjoint.default numpy_T.default")
family(views.movedim, "movedim.int movedim.intlist")
family(views.repeat, "repeat.default tile.default")
family(views.repeat_interleave, "repeat_interleave.self_int")
family(views.unfold, "unfold.default unfold_copy.default")

# Cutting, joining, moving along a dim.
family(cuts.slice_, "slice.Tensor slice_copy.Tensor narrow.default narrow_copy.default")
family(cuts.equal_parts, "split.Tensor split.sizes split_with_sizes.default split_with_sizes_copy.default split_copy.Tensor chunk.default")
family(cuts.select, "select.int select_copy.int")
family(cuts.unbind, "unbind.int unbind_copy.int")
family(cuts.cat, "cat.default concat.default")
family(cuts.stack, "stack.default")
family(cuts.pad, "pad.default constant_pad_nd.default")
family(cuts.differing(linear=True), "reflection_pad1d.default reflection_pad2d.default replication_pad1d.default replication_pad2d.default")
family(
    cuts.spatial(linear=True),
    "upsample_nearest1d.default upsample_nearest2d.default upsample_nearest2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec "
    "upsample_bicubic2d.default upsample_bicubic2d.vec upsample_nearest1d.vec",
)
family(
    cuts.spatial(linear=False),
    "max_pool1d.default max_pool2d.default max_pool3d.default max_pool2d_with_indices.default max_pool3d_with_indices.default "
    "adaptive_max_pool2d.default",
)
family(cuts.along(2, "dims", default=None, linear=True), "roll.default")
family(cuts.along(1, "dims", default=None, linear=True), "flip.default")
family(cuts.along(2, "dim", default=-1), "diff.default")
family(cuts.along(1, "dim", linear=True), "cumsum.default")
family(cuts.along(2, "dim", default=None, linear=True), "fft_fftn.default fft_ifftn.default")
family(cuts.along(1, "dim"), "cumprod.default logcumsumexp.default cummax.default cummin.default")
family(cuts.along(1, "dim", default=-1), "sort.default argsort.default glu.default")
family(cuts.along(2, "dim", default=-1), "topk.default sort.stable")
family(cuts.last(2, linear=True), "tril.default triu.default")
rule("im2col.default", "b c [h w] -> b (c [k]) [l]", linear=((0,),))
family(cuts.slice_scatter, "slice_scatter.default")
family(cuts.select_scatter, "select_scatter.default")
family(
    cuts.creation,
    "full.default zeros.default ones.default empty.memory_format new_full.default new_zeros.default new_ones.default new_empty.default",
)

# Reductions and norms.
family(reductions.total, "sum.default sum.dim_IntList")
family(reductions.mean, "mean.default mean.dim")
family(
    reductions.coupled(),
    "amin.default min.dim prod.dim_int any.dim any.dims all.dim all.dims argmin.default var.dim var.correction "
    "std.dim std.correction var_mean.correction median.dim std_mean.correction count_nonzero.dim_IntList",
)
family(reductions.reduced_over_ranks("split_logsumexp"), "logsumexp.default")
family(reductions.reduced_over_ranks("split_amax"), "amax.default")
family(reductions.reduced_over_ranks("split_max"), "max.dim")
family(reductions.reduced_over_ranks("split_argmax"), "argmax.default")
family(reductions.coupled(2), "linalg_vector_norm.default norm.ScalarOpt_dim")
family(reductions.coupled(2, default=-1), "kthvalue.default")
family(reductions.everything, "max.default min.default any.default all.default prod.default var.default std.default")
family(reductions.softmax, "softmax.int log_softmax.int _softmax.default _log_softmax.default _safe_softmax.default")
family(
    reductions.layer_norm,
    "layer_norm.default native_layer_norm.default rms_norm.default _fused_rms_norm.default",
)
family(reductions.weight_norm, "_weight_norm.default")
family(reductions.group_norm, "group_norm.default instance_norm.default")
family(reductions.native_group_norm, "native_group_norm.default")
family(reductions.batch_norm_inference, "_native_batch_norm_legit_no_training.default _native_batch_norm_legit.no_stats")
family(reductions.batch_norm_eval, "batch_norm.default native_batch_norm.default cudnn_batch_norm.default")
family(indexing.batch_norm, "autopar.batch_norm")

# Between the stages of a pipeline.
family(cuts.wire, "autopar.receive autopar.send")

# Looking up.
family(indexing.embedding, "embedding.default")
family(indexing.gather, "gather.default")
family(indexing.scatter, "scatter.src scatter.value scatter_add.default scatter_reduce.two")
family(indexing.index_select, "index_select.default")
family(indexing.index_add, "index_add.default")
rule("bucketize.Tensor", "..., [m] -> ...")
rule("searchsorted.Tensor", "... [m], ... n -> ... n")
family(indexing.index, "index.Tensor _unsafe_index.Tensor")
family(indexing.index_put, "index_put.default _unsafe_index_put.default")
family(indexing.one_hot, "one_hot.default")

# Routed experts, and what stands in their bodies.
family(experts.experts, "autopar.experts")
family(experts.linear, "autopar.expert_linear")
rule("autopar.expert_rows", "[e] c, r -> r c", linear=((0,),))

# Losses.
family(losses.cross_entropy, "autopar.cross_entropy")
rule("autopar.target_weight", "m ->", uneven="m")
family(losses.nll_loss, "cross_entropy_loss.default nll_loss.default nll_loss_nd.default nll_loss2d.default")
family(losses.elementwise, " ".join(name.removeprefix("aten.") for name in losses.LOSSES))
family(losses.distance, "cosine_similarity.default pairwise_distance.default")

# Replicated on purpose: made from nothing, and too small or not a sum over ranks.
family(replicated, _RANDOM)
family(
    replicated,
    "arange.default arange.start arange.start_step linspace.default scalar_tensor.default eye.default eye.m tril_indices.default "
    "histc.default",
)
