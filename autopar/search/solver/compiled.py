"""Functions compiled to machine code by numba, and random numbers inside them.

Only the search over time steps uses these; importing them takes a moment, so that others import that search where they call it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["compiled", "fill", "generator", "least_of", "uniform", "whole"]

Function = TypeVar("Function", bound=Callable[..., object])
State = NDArray[np.uint64]


def compiled(function: Function) -> Function:
    """`function` as machine code, made on its first call and kept on disk; it runs without the interpreter's lock.

    What is kept is made again when the function's own file has changed, not when one has that it calls: after changing a function that
    others call, remove `__pycache__/*.nb?` here.
    """
    try:
        return cast(Function, njit(cache=True, nogil=True, error_model="numpy")(function))
    except RuntimeError:  # neither the source's folder nor the user's cache can be written to: nothing is kept
        return cast(Function, njit(nogil=True, error_model="numpy")(function))


def generator(seed: int) -> State:
    """The state of a generator, `(1,)`, never zero; seeds near each other are spread by splitmix64 (Steele and others, 2014)."""
    mixed = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return np.array([(mixed ^ mixed >> 31) or 1], np.uint64)


@compiled
def whole(state: State, below: int) -> int:
    """A number from `range(below)`; xorshift64 (Marsaglia 2003)."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return int(x % np.uint64(below))


@compiled
def uniform(state: State) -> float:
    """A number from [0, 1)."""
    return whole(state, 1 << 53) * (1.0 / (1 << 53))


@compiled
def least_of(numbers: NDArray[np.float64], begin: int, end: int) -> float:
    """The least of `numbers[begin:end]`, `inf` of none. A loop: numpy's functions take seconds to compile in here."""
    least = np.inf
    for k in range(begin, end):
        least = numbers[k] if numbers[k] < least else least
    return least


@compiled
def fill(numbers: NDArray[np.float64], count: int, number: float) -> None:
    """Set `numbers[:count]` to `number`."""
    for k in range(count):
        numbers[k] = number
