"""`Precision`: in which dtype operations read parameters, in which they are stored, and in which gradients are added up over ranks.

    autopar.plan(model, batch, cluster, precision="bfloat16")                     # float32 masters, gradients reduced in float32
    autopar.plan(model, batch, cluster, precision={"compute": "bfloat16", "reduce": "bfloat16"})
    autopar.plan(model, batch, cluster, precision={"compute": "bfloat16", "by": "autocast"})

The graph of a plan with a precision is that of the model as it computes: a parameter's dtype there is that in which it is read. Those that
are read in `compute` are stored, updated and saved in `stored`; others in their own dtype.
After the mixed precision of `torch.distributed.fsdp.fully_shard` (`MixedPrecisionPolicy`) and of `torch.autocast`.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from autopar.errors import PlanError
from autopar.ir.graph import DTYPE_BYTES, Value

FLOATS = ("bfloat16", "float16", "float32", "float64")
BY = ("parameters", "autocast")


class Precision(BaseModel):
    """`compute`: the dtype in which operations read parameters; `stored`: that of these parameters, of their gradients and of their
    optimizer's state; `reduce`: that in which their gradients are added up over ranks.

    `by`: how the model comes to compute so. `"parameters"`: every parameter but those of batch norms, and every floating-point input, is
    cast to `compute` before it is used. `"autocast"`: the model runs under `torch.autocast(dtype=compute)`, which decides operation by
    operation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    compute: str
    stored: str = "float32"
    reduce: str = "float32"
    by: Literal["parameters", "autocast"] = "parameters"

    @property
    def copies(self) -> bool:
        """Whether what is read is another tensor than what is stored."""
        return self.compute != self.stored


def problems(precision: Precision) -> list[tuple[str, str]]:
    """What is wrong with its fields, each with the remedy."""
    found = []
    for field in ("compute", "stored", "reduce"):
        dtype = getattr(precision, field)
        if dtype not in FLOATS:
            near = get_close_matches(str(dtype), FLOATS, 1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            found.append((field, f"`{str(dtype)[:40]}` is no dtype to compute in; {hint}there are {', '.join(FLOATS)}"))
    if not found and precision.by == "autocast" and precision.compute not in ("bfloat16", "float16"):
        found.append(("compute", f"is {precision.compute}, and `torch.autocast` computes in bfloat16 or float16"))
    if not found and DTYPE_BYTES[precision.stored] < DTYPE_BYTES[precision.compute]:
        found.append(("stored", f"is {precision.stored}, narrower than {precision.compute}, in which they are read; store them as wide"))
    return found


def stored_bytes(value: Value, precision: Precision | None) -> int:
    """Bytes of a parameter as it is stored, whole."""
    cast = precision is not None and value.dtype == precision.compute
    return value.numel * DTYPE_BYTES[precision.stored] if precision is not None and cast else value.size_bytes


def read_precision(option: Precision | Mapping[str, str] | str | None) -> Precision | None:
    """What the option `precision` stands for: a dtype is that of computing. Raises `PlanError` for what is none."""
    if option is None or isinstance(option, Precision):
        found = option
    elif isinstance(option, str):
        found = Precision(compute=option)
    elif isinstance(option, Mapping):
        fields: dict[str, Any] = dict(option)
        if unknown := fields.keys() - Precision.model_fields.keys():
            raise PlanError(f"precision has no field `{min(unknown)}`; there are {', '.join(Precision.model_fields)}")
        if "compute" not in fields:
            raise PlanError('precision: say in which dtype to compute, such as precision={"compute": "bfloat16"}')
        if fields.get("by", BY[0]) not in BY:
            raise PlanError(f"precision: `by` is {fields['by']!r}; write {' or '.join(map(repr, BY))}")
        if not all(isinstance(item, str) for item in fields.values()):
            raise PlanError("precision: dtypes are given by name, such as 'bfloat16'")
        found = Precision(**fields)
    else:
        raise PlanError(f"precision is a {type(option).__name__}; give a dtype by name, such as 'bfloat16', or a dict")
    for field, why in problems(found) if found is not None else ():
        raise PlanError(f"precision: `{field}` {why}" if why[0] != "`" else f"precision: {why}")
    return found
