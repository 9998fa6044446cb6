"""What other libraries do only because they notice that they are being traced, undone while we trace.

Each row names a module, an attribute, what stands there while tracing, and why. A row is applied only if its module is already
imported, and skipped silently where the attribute has moved: the trace is then larger, never wrong.

A replacement must give what the library computes in eager mode for the same inputs; that is the condition for a row to be here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Patch:
    """While tracing, `module.attribute` is `replacement`; `unless_input` skips it when the user passes an input of that name."""

    module: str
    attribute: str
    replacement: Callable[..., Any]
    reason: str
    unless_input: str = ""


PATCHES = (
    Patch(
        "transformers.masking_utils",
        "find_packed_sequence_indices",
        lambda position_ids: None,
        "positions that the model makes itself are consecutive, so no row packs several sequences; eager mode looks at the values "
        "and returns None, tracing cannot look and would build a mask that is always true",
        unless_input="position_ids",
    ),
    Patch(
        "transformers.masking_utils",
        "is_torchdynamo_exporting",
        lambda: False,
        "exporting with open shapes needs an explicit causal mask; our shapes are fixed, so `is_causal=True` is right as in eager mode",
    ),
)


@contextmanager
def library_patches(input_names: frozenset[str]) -> Iterator[None]:
    """Apply the table for the time of the `with` block. `input_names` are the keyword inputs that the user passes."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for patch in PATCHES:
            module = sys.modules.get(patch.module)
            if module is None or not hasattr(module, patch.attribute) or patch.unless_input in input_names:
                continue
            undo.append((module, patch.attribute, getattr(module, patch.attribute)))
            setattr(module, patch.attribute, patch.replacement)
        yield
    finally:
        for module, attribute, original in reversed(undo):
            setattr(module, attribute, original)
