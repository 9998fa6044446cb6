"""Attention over a sequence that is split over ranks: keys and values travel in a ring, or have been gathered.

In the ring (Liu, Zaharia and Abbeel 2023, "Ring attention with blockwise transformers") every rank keeps its block of queries and computes
on one block of keys and values while the next one arrives; results merge by their log-sum-exp. Backward, keys and values travel again,
and behind them their gradients, which every rank adds to. No rank ever holds more than two blocks. With several axes the ring goes around
the innermost one between two steps of the one outside it.

Causal attention runs on half-blocks that are equally much work for every rank (`autopar.runtime.operators.zigzag`): each then has in every
step either all of its rows and the lower half of the keys, or the upper half of its rows and all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autopar.ir.rules.local_context import AxisContext, LocalContext
from autopar.runtime.collectives import resolve
from autopar.runtime.operators.attention_blocks import Merged, attend, attend_backward, wide_dtype
from autopar.runtime.operators.zigzag import Blocks, from_zigzag, to_zigzag, unpacked

Kwargs = Mapping[str, Any]
Piece = tuple[slice, slice, bool]
"""Rows, keys, and whether the block they make is causal."""
_ALL = slice(None)


# ---- the ring -------------------------------------------------------------------------------------------------------------------


class _Ring:
    """The steps of a ring: in step `t` this rank works on the block of the rank that is `offsets[t]` places behind it, by axis."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.moves: list[int] = []  # the axis along which keys and values move after each step but the last
        for axis in range(len(blocks.axes) - 1, -1, -1):
            inner, self.moves = self.moves, []
            for turn in range(blocks.axes[axis].size):
                self.moves += [axis] * (turn > 0) + inner
        self.offsets = [[0] * len(blocks.axes)]
        for axis in self.moves:
            self.offsets.append([offset + (axis == number) for number, offset in enumerate(self.offsets[-1])])

    def __len__(self) -> int:
        return len(self.offsets)

    def block(self, step: int) -> int:
        return self.blocks.number(self.offsets[step])

    def pass_on(self, x: Tensor, step: int) -> tuple[Tensor, dist.Work]:
        """Begin to move `x` as keys and values move after `step`; the result is there when the work is waited for."""
        return _shift(x, self.blocks.axes[self.moves[step]], 1)

    def bring_home(self, x: Tensor) -> Tensor:
        """What has travelled through all steps, back on the rank whose block it is of."""
        for axis, offset in zip(self.blocks.axes, self.offsets[-1], strict=True):
            if offset % axis.size:
                x, work = _shift(x, axis, -offset % axis.size)
                work.wait()
        return x


def _shift(x: Tensor, axis: AxisContext, by: int) -> tuple[Tensor, dist.Work]:
    """Begin to send `x` to the rank `by` places further in the ring of `axis`. An all-to-all of one part: no rank waits for the others."""
    sends, receives = [0] * axis.size, [0] * axis.size
    sends[(axis.index + by) % axis.size] = receives[(axis.index - by) % axis.size] = x.numel()
    out = torch.empty_like(x)
    work = dist.all_to_all_single(out.view(-1), x.view(-1), receives, sends, group=resolve(axis.group), async_op=True)
    assert work is not None
    return out, work


def _pieces(blocks: Blocks, block: int, rows: int, causal: bool) -> list[Piece]:
    """What this rank's rows see of the keys of `block`."""
    if not causal:
        return [(_ALL, _ALL, False)]
    if block == blocks.own:
        return [(_ALL, _ALL, True)]  # both halves in their order, the lower first
    if blocks.lower(block) < blocks.lower(blocks.own):
        return [(_ALL, slice(0, rows // 2), False)]
    return [(slice(rows // 2, None), _ALL, False)]


def _columns(mask: Tensor | None, block: int, keys: int) -> Tensor | None:
    """`mask (batch, heads, rows, all keys)` for the keys of `block`."""
    return mask if mask is None or mask.shape[-1] == 1 else mask.narrow(-1, block * keys, keys)


def _flat(k: Tensor, v: Tensor) -> Tensor:
    return torch.cat((k.reshape(-1), v.reshape(-1)))


def _unflat(kv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return kv[: k.numel()].view(k.shape), kv[k.numel() :].view(v.shape)


def _ring_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float,
    groups: Sequence[str], sizes: Sequence[int], indices: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    blocks = unpacked(groups, sizes, indices)
    ring, merged, kv = _Ring(blocks), Merged(q, v), _flat(k, v)
    for step in range(len(ring)):
        arriving, work = ring.pass_on(kv, step) if step + 1 < len(ring) else (kv, None)
        block = ring.block(step)
        own_k, own_v = _unflat(kv, k, v)
        for rows, keys, diagonal in _pieces(blocks, block, q.shape[-2], causal):
            columns = _columns(mask, block, k.shape[-2])
            out, lse = attend(q[:, :, rows], own_k[:, :, keys], own_v[:, :, keys], diagonal, scale, columns)
            merged.add(out, lse, rows.start or 0)
        if work is not None:
            work.wait()
        kv = arriving
    return merged.out.to(q.dtype), merged.lse


def _ring_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float,
    groups: Sequence[str], sizes: Sequence[int], indices: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    blocks = unpacked(groups, sizes, indices)
    ring, kv = _Ring(blocks), _flat(k, v)
    dtype = wide_dtype(q.dtype)
    q_gradient = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    travelling: Tensor | None = None  # gradients of the block's keys and values, from the ranks where it has been
    behind: dist.Work | None = None
    for step in range(len(ring)):
        arriving, work = ring.pass_on(kv, step) if step + 1 < len(ring) else (kv, None)
        block = ring.block(step)
        own_k, own_v = _unflat(kv, k, v)
        added = torch.zeros_like(kv, dtype=dtype)
        k_gradient, v_gradient = _unflat(added, k, v)
        for rows, keys, diagonal in _pieces(blocks, block, q.shape[-2], causal):
            found = attend_backward(
                gradient[:, :, rows], q[:, :, rows], own_k[:, :, keys], own_v[:, :, keys], out[:, :, rows],
                lse[:, :, rows].contiguous(), diagonal, scale, _columns(mask, block, k.shape[-2]),
            )  # fmt: skip
            q_gradient[:, :, rows] += found[0]
            k_gradient[:, :, keys] += found[1]
            v_gradient[:, :, keys] += found[2]
        if behind is not None:
            assert travelling is not None
            behind.wait()
            added += travelling
        if work is not None:
            work.wait()
            travelling, behind = ring.pass_on(added, step)
        kv = arriving
    k_gradient, v_gradient = _unflat(ring.bring_home(added), k, v)
    return q_gradient.to(q.dtype), k_gradient.to(k.dtype), v_gradient.to(v.dtype)


_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_WHERE = "str[] groups, int[] sizes, int[] indices"
_library.define(  # type: ignore[no-untyped-call]
    f"ring_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, {_WHERE}) -> (Tensor, Tensor)"
)
_library.define(  # type: ignore[no-untyped-call]
    "ring_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse, bool causal, "
    f"float scale, {_WHERE}) -> (Tensor, Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):
    _library.impl("ring_attention", _ring_forward, _key)  # type: ignore[no-untyped-call]
    _library.impl("ring_attention_backward", _ring_backward, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("autopar::ring_attention", lib=_library)  # type: ignore[untyped-decorator]
def _ring_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype))


@torch.library.register_fake("autopar::ring_attention_backward", lib=_library)  # type: ignore[untyped-decorator]
def _ring_backward_fake(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


class _RingAttention(torch.autograd.Function):
    """Kept for the backward pass: queries, keys and values as they were worked on, the result in contiguous blocks (where its reader keeps
    it too), and the log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, blocks: Blocks) -> Tensor:
        if causal:
            q, k, v = to_zigzag(blocks, q, k, v)
        out, lse = torch.ops.autopar.ring_attention.default(q, k, v, mask, causal, scale, *blocks.packed())
        if causal:
            (out,) = from_zigzag(blocks, out)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.how = causal, scale, blocks
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, out, lse = ctx.saved_tensors
        causal, scale, blocks = ctx.how
        gradient = gradients[0]
        if causal:
            gradient, out = to_zigzag(blocks, gradient, out)
        found = torch.ops.autopar.ring_attention_backward.default(gradient, q, k, v, mask, out, lse, causal, scale, *blocks.packed())
        if causal:
            found = from_zigzag(blocks, *found)
        return (*found, None, None, None, None)


# ---- gathered keys and values -----------------------------------------------------------------------------------------------------


def _seen(blocks: Blocks, rows: int) -> list[Piece]:
    """What the two half-blocks of this rank see of all keys: those before each half, and, causally, its own."""
    half, found = rows // 2, []
    lower = blocks.lower(blocks.own)
    for number, at in enumerate((lower, 2 * blocks.count - 1 - lower)):
        mine = slice(number * half, (number + 1) * half)
        found += [(mine, slice(0, at * half), False)] if at else []
        found.append((mine, slice(at * half, (at + 1) * half), True))
    return found


class _CausalQueries(torch.autograd.Function):
    """Queries are this rank's block, keys and values whole; gradients of these are terms of a sum."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, blocks: Blocks) -> Tensor:
        (q,) = to_zigzag(blocks, q)
        merged = Merged(q, v)
        for rows, keys, diagonal in _seen(blocks, q.shape[-2]):
            out, lse = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], diagonal, scale)
            merged.add(out, lse, rows.start)
        (result,) = from_zigzag(blocks, merged.out.to(q.dtype))
        ctx.save_for_backward(q, k, v, result, merged.lse)
        ctx.how = scale, blocks
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        scale, blocks = ctx.how
        gradient, out = to_zigzag(blocks, gradients[0], out)
        dtype = wide_dtype(q.dtype)
        q_gradient, k_gradient, v_gradient = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        for rows, keys, diagonal in _seen(blocks, q.shape[-2]):
            found = attend_backward(
                gradient[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows].contiguous(),
                diagonal, scale,
            )  # fmt: skip
            q_gradient[:, :, rows] += found[0]
            k_gradient[:, :, keys] += found[1]
            v_gradient[:, :, keys] += found[2]
        (own,) = from_zigzag(blocks, q_gradient.to(q.dtype))
        return own, k_gradient.to(k.dtype), v_gradient.to(v.dtype), None, None


# ---- local implementations ------------------------------------------------------------------------------------------------------


def _arguments(args: Sequence[Any], kwargs: Kwargs) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float]:
    """q, k, v and mask in four dims, whether causal, and the scale."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    known = dict(zip(names, args, strict=False)) | dict(kwargs)
    assert not known.get("dropout_p")
    q, k, v = known["query"], known["key"], known["value"]
    mask = known.get("attn_mask")
    scale = known.get("scale")
    if mask is not None:
        mask = mask[(None,) * (q.dim() - mask.dim())]
        if q.dim() > 4:
            mask = mask.expand(*q.shape[:-3], *mask.shape[-3:])
    return (
        _four(q), _four(k), _four(v), None if mask is None else _four(mask), bool(known.get("is_causal", False)),
        q.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip


def _four(x: Tensor) -> Tensor:
    """`x (..., rows, size)` in four dims."""
    return x.unsqueeze(0) if x.dim() == 3 else x.flatten(0, -4) if x.dim() > 4 else x


def ring_attention(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`scaled_dot_product_attention(q (.. l_local e), k (.. s_local e), v (.. s_local f), mask (.. l_local s), 0.0, is_causal)`."""
    q, k, v, mask, causal, scale = _arguments(args, kwargs)
    out: Tensor = _RingAttention.apply(q, k, v, mask, causal, scale, Blocks(context.axes))  # type: ignore[no-untyped-call]
    return out.view(*args[0].shape[:-1], v.shape[-1])


def causal_queries(args: Sequence[Any], kwargs: Kwargs, context: LocalContext) -> Tensor:
    """`scaled_dot_product_attention(q (.. l_local e), k (.. l e), v (.. l f), None, 0.0, True)`."""
    q, k, v, _, _, scale = _arguments(args, kwargs)
    out: Tensor = _CausalQueries.apply(q, k, v, scale, Blocks(context.axes))  # type: ignore[no-untyped-call]
    return out.view(*args[0].shape[:-1], v.shape[-1])
