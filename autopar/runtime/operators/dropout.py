"""Dropout on a split value: masks that differ from part to part, agree on every copy of a part, and repeat from the same seed.

A mask is drawn from a generator of its own, seeded by (run's seed, step, operation, part). Ranks that hold the same part draw the
same mask without talking, ranks with different parts draw different ones, and the ranks' default generators are left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_MASK = (1 << 63) - 1


def mix(*numbers: int) -> int:
    """One 63-bit number from several, well mixed: splitmix64's finaliser over each (Steele, Lea and Flood 2014, "Fast splittable
    pseudorandom number generators")."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK


def _keep_mask(like: Tensor, p: float, part: int, counter: Tensor) -> Tensor:
    generator = torch.Generator(like.device)
    generator.manual_seed(mix(*counter.tolist(), part))
    return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - p, generator=generator)


# An operator of its own so that `torch.compile` neither traces the generator nor guards on the seed and step, which are a tensor for
# the same reason.
_library = torch.library.Library("autopar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("keep_mask(Tensor like, float p, int part, Tensor counter) -> Tensor")  # type: ignore[no-untyped-call]
for _key in ("CPU", "CUDA"):
    _library.impl("keep_mask", _keep_mask, _key)  # type: ignore[no-untyped-call]


@torch.library.register_fake("autopar::keep_mask", lib=_library)  # type: ignore[untyped-decorator]
def _keep_mask_fake(like: Tensor, p: float, part: int, counter: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.bool, device=like.device)


def dropout(x: Tensor, p: float, part: int, counter: Tensor) -> Tensor:
    """`x` with elements zeroed with probability `p` and the others divided by `1 - p`. `part` numbers the operation and the part of
    the value that this rank holds; `counter`: `(2,)` int64 on CPU, the run's seed and the step."""
    if p >= 1:
        return x * 0
    mask: Tensor = torch.ops.autopar.keep_mask(x.detach(), p, part, counter)
    return x * mask * (1 / (1 - p))


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Run what draws from the device's default generator from `seed`, and leave the generator as it was."""
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    else:
        generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


# A compiler must not move the draw out of the seeded region, nor bake the seed in.
@torch._dynamo.disable  # type: ignore[untyped-decorator]
def drawing(function: Callable[..., Any], device: torch.device, part: int, seed: int, counter: Tensor, /, *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, which draws from the default generator: the same numbers on every rank, others in every step, or from
    `seed` where draws are to be `alike`."""
    from autopar.runtime.operators.alike import draws_alike

    with seeded(device, seed if draws_alike() else mix(*counter.tolist(), part)):
        return function(*args, **kwargs)


def attention(part: int, counter: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`scaled_dot_product_attention` with dropout, its masks drawn as this module's docstring says."""
    if torch.compiler.is_compiling():
        return _composed_attention(part, counter, query, key, value, *args, **kwargs)
    with seeded(query.device, mix(*counter.tolist(), part)):
        result: Tensor = torch.ops.aten.scaled_dot_product_attention.default(query, key, value, *args, **kwargs)
    return result


def _composed_attention(
    part: int, counter: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention from operations that a compiler can trace, random masks included."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, float("-inf"))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return dropout(torch.softmax(scores, -1), dropout_p, part, counter) @ value


class _NoDropout(TorchFunctionMode):
    """Within, dropout returns its input, and attention keeps all of its weights. Dropout of whole channels or in place, which a
    program of a rank draws whole (see `alike`), stays."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "dropout" and not (kwargs.get("inplace") or (len(args) > 3 and args[3])):
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            args = (*args[:4], *((0.0,) if len(args) > 4 else ()), *args[5:])
            kwargs.pop("dropout_p", None)
        if name in (
            "lstm",
            "gru",
            "rnn_tanh",
            "rnn_relu",
        ):  # (input, hx, params, has_biases, num_layers, dropout, ...), or batch_sizes second
            place = 5 if isinstance(args[3], bool) else 6
            args = (*args[:place], 0.0, *args[place + 1 :])
        if name == "multi_head_attention_forward":  # in one piece: what it calls inside does not come through here
            bound = inspect.signature(func).bind(*args, **kwargs)
            bound.arguments["dropout_p"] = 0.0
            return func(*bound.args, **bound.kwargs)
        return func(*args, **kwargs)


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Run `module`, distributed or not, without dropout, attention's included; all else stays in training mode. For comparisons."""
    from autopar.runtime.distributed import DistributedModule

    parallel = [inner for inner in module.modules() if isinstance(inner, DistributedModule)]
    before = [inner._dropout for inner in parallel]
    for inner in parallel:
        inner._dropout = False
    try:
        with _NoDropout():
            yield
    finally:
        for inner, value in zip(parallel, before, strict=True):
            inner._dropout = value
