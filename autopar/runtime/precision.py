"""Dtypes of parameters and gradients while a plan runs: what is stored in another dtype than it is read in, and how gradients travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from autopar.errors import RuntimeSetupError
from autopar.ir.graph import Graph
from autopar.ir.precision import Precision


@dataclass(frozen=True, slots=True)
class Dtypes:
    """By fully-qualified name of a parameter: the dtype in which it is `stored` where a copy of it is read, and the dtype in which its
    gradient is `reduced` over ranks where that is not the dtype it arrives in. Both may be the dtype that it has anyway."""

    stored: Mapping[str, torch.dtype] = field(default_factory=dict)
    reduced: Mapping[str, torch.dtype] = field(default_factory=dict)

    def all_in(self, dtype: torch.dtype) -> Dtypes:
        """The same ways through memory with every number in `dtype`."""
        return Dtypes(dict.fromkeys(self.stored, dtype), dict.fromkeys(self.reduced, dtype))


def stored_dtypes(precision: Precision | None, graph: Graph) -> dict[str, torch.dtype]:
    """By name the dtype of every parameter that `precision` decides about."""
    if precision is None:
        return {}
    dtype = getattr(torch, precision.stored)
    return {item.fqn: dtype for item in graph.parameters if graph.values[item.value].dtype == precision.compute}


def dtypes_of(precision: Precision | None, graph: Graph) -> Dtypes:
    """What `precision` says of the parameters of `graph`, which was traced as it says."""
    if precision is None:
        return Dtypes()
    stored = stored_dtypes(precision, graph)
    differs = precision.copies or precision.reduce != precision.compute
    reduced = dict.fromkeys(stored, getattr(torch, precision.reduce)) if differs else {}
    return Dtypes(stored if precision.copies else {}, reduced)


@contextmanager
def without_autocast(device: torch.device, precision: Precision | None) -> Iterator[None]:
    """Within, programs run in the dtypes they were made for. Raises `RuntimeSetupError` under a `torch.autocast` that is not the plan's."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
    if precision is None or (precision.by, precision.compute) != ("autocast", dtype):
        planned = f"{precision.compute} by {precision.by}" if precision is not None else "the model's own dtypes"
        raise RuntimeSetupError(
            f"this module was planned for {planned}, and is called under `torch.autocast` for {dtype}, which its program would not follow: "
            f'plan it with precision={{"compute": "{dtype}", "by": "autocast"}} (or under that autocast), or call it outside'
        )
    with torch.autocast(device.type, enabled=False):
        yield
