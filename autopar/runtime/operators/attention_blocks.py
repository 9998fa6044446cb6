"""Attention in blocks of keys: each gives a result and the logarithm of its sum of exponentials, by which blocks merge exactly.

With `o_i` the result over block `i` of the keys and `lse_i` its log-sum-exp, the result over all is `sum_i exp(lse_i - lse) o_i` with
`lse = log sum_i exp(lse_i)` (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). Backward, a block needs only the
whole's `lse` and result to give its own exact gradients (Dao 2023, "FlashAttention-2", section 3.1.2).

All tensors here are `(batch, heads, rows, size)`; `heads` of q may be a multiple of those of k and v (grouped queries). `lse`:
`(batch, heads, rows)`, at least float32; -inf for a row that sees no key.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE_SCORES = 2**24
"""So many scores at once where there is no fused kernel: 64 MB in float32."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results and gradients of blocks are summed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class Merged:
    """The result of attention as blocks come: `out (batch, heads, rows, size)` and `lse`, in the wide dtype."""

    def __init__(self, q: Tensor, v: Tensor) -> None:
        dtype = wide_dtype(q.dtype)
        self.out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
        self.lse = q.new_full(q.shape[:-1], -torch.inf, dtype=dtype)

    def add(self, out: Tensor, lse: Tensor, start: int = 0) -> None:
        """Add a block's result for the rows from `start` on."""
        rows = out.shape[-2]
        whole, old = self.out.narrow(-2, start, rows), self.lse.narrow(-1, start, rows)
        share = torch.sigmoid(lse - old).nan_to_num_(0.0)  # -inf less -inf: nothing has been seen yet, and nothing now
        whole.lerp_(out.to(whole.dtype), share.unsqueeze(-1))
        torch.logaddexp(old, lse, out=old)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Result and log-sum-exp of one block. `causal`: rows and keys are equally many, and row `i` sees keys up to `i`.

    `mask (batch or 1, heads or 1, rows, keys)`: true where a row sees a key.
    """
    kernel = _kernel(q, v, mask)
    if kernel == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    if kernel == "cuda":
        found = torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, causal, scale=scale)
        return found[0], found[1]
    return _plain(q, k, v, causal, scale, mask)


def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k` and `v` of one block. `gradient`, `out`, `lse` are those of the whole result, of which this is one block."""
    kernel = _kernel(q, v, mask)
    if kernel == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            gradient, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return found[0], found[1], found[2]
    if kernel == "cuda":
        none = torch.zeros(2, dtype=torch.uint64, device=q.device)  # the state of a generator that draws nothing
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward.default(
            gradient, q, k, v, out, lse, None, None, q.shape[-2], k.shape[-2], 0.0, causal, none, none[0], scale=scale
        )
        return found[0], found[1], found[2]
    return _plain_backward(gradient, q, k, v, out, lse, causal, scale, mask)


def _kernel(q: Tensor, v: Tensor, mask: Tensor | None) -> str:
    """Which of PyTorch's fused kernels that give the log-sum-exp takes such a block. Private names; `"plain"` does without."""
    if mask is not None or q.shape[-1] != v.shape[-1]:
        return "plain"
    if q.device.type == "cpu":
        return "cpu"
    half = q.dtype in (torch.float16, torch.bfloat16)
    return "cuda" if q.device.type == "cuda" and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 else "plain"


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    outs, sums = [], []
    for start, stop in _tiles(q, k):
        scores = _scores(q, k, start, stop, causal, scale, mask)
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse).exp_().nan_to_num_(0.0)
        outs.append((weights @ v.unsqueeze(2).to(weights.dtype)).flatten(1, 2).to(q.dtype))
        sums.append(lse.squeeze(-1).flatten(1, 2))
    return torch.cat(outs, -2), torch.cat(sums, -1)


def _plain_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, heads = wide_dtype(q.dtype), k.shape[1]
    wide_k, wide_v = k.unsqueeze(2).to(dtype), v.unsqueeze(2).to(dtype)
    q_parts = []
    k_gradient, v_gradient = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
    for start, stop in _tiles(q, k):
        rows = slice(start, stop)
        scores = _scores(q, k, start, stop, causal, scale, mask)
        weights = (scores - _grouped(lse[:, :, rows].unsqueeze(-1), heads)).exp_().nan_to_num_(0.0)
        own = _grouped(gradient[:, :, rows], heads).to(dtype)
        inner = (own * _grouped(out[:, :, rows], heads).to(dtype)).sum(-1, keepdim=True)
        v_gradient += (weights.transpose(-1, -2) @ own).sum(2)
        of_scores = weights * (own @ wide_v.transpose(-1, -2) - inner) * scale
        q_parts.append((of_scores @ wide_k).flatten(1, 2).to(q.dtype))
        k_gradient += (of_scores.transpose(-1, -2) @ _grouped(q[:, :, rows], heads).to(dtype)).sum(2)
    return torch.cat(q_parts, -2), k_gradient.to(k.dtype), v_gradient.to(v.dtype)


def _tiles(q: Tensor, k: Tensor) -> list[tuple[int, int]]:
    """Rows of q in turns, so that the scores of one turn are not too many."""
    rows = q.shape[-2]
    step = max(1, _TILE_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[-2]))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _grouped(x: Tensor, heads: int) -> Tensor:
    """`x (batch, heads of q, ...)` as `(batch, heads, queries a head, ...)`."""
    grouped: Tensor = x.unflatten(1, (heads, -1))  # type: ignore[no-untyped-call]
    return grouped


def _scores(q: Tensor, k: Tensor, start: int, stop: int, causal: bool, scale: float, mask: Tensor | None) -> Tensor:
    """`(batch, heads of k, queries a head, rows, keys)`, -inf where a row does not see a key."""
    dtype, heads = wide_dtype(q.dtype), k.shape[1]
    scores = (_grouped(q[:, :, start:stop], heads).to(dtype) @ k.unsqueeze(2).to(dtype).transpose(-1, -2)) * scale
    if causal:
        rows = torch.arange(start, stop, device=q.device)
        scores.masked_fill_(rows.unsqueeze(-1) < torch.arange(k.shape[-2], device=q.device), -torch.inf)
    if mask is not None:
        own = mask[:, :, start:stop] if mask.shape[2] > 1 else mask
        scores.masked_fill_(~(_grouped(own, heads) if own.shape[1] > 1 else own.unsqueeze(2)), -torch.inf)
    return scores
