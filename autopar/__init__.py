"""autopar: an automatic parallelization compiler for PyTorch.

    plan = autopar.plan(model, example_inputs, "h100x8")
    m = autopar.parallelize(model, example_inputs, plan=plan)

Names are imported when first used, so that reading and comparing plan files never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import compare, parallelize, plan, verify
    from autopar.errors import AutoparError
    from autopar.ir.cluster import Cluster, Device, Link
    from autopar.ir.plan import Plan
    from autopar.ir.rules.register import register_rule
    from autopar.runtime.module import ParallelModule
    from autopar.runtime.state.checkpoint import full_state_dict, load_optimizer_state_dict, optimizer_state_dict
    from autopar.runtime.state.clip import clip_grad_norm_
    from autopar.runtime.verification.verify_report import VerifyReport

__version__ = "0.1.0"

_HOME = {
    "plan": "autopar.api",
    "parallelize": "autopar.api",
    "verify": "autopar.api",
    "compare": "autopar.api",
    "AutoparError": "autopar.errors",
    "Cluster": "autopar.ir.cluster",
    "Device": "autopar.ir.cluster",
    "Link": "autopar.ir.cluster",
    "Plan": "autopar.ir.plan",
    "register_rule": "autopar.ir.rules.register",
    "ParallelModule": "autopar.runtime.module",
    "VerifyReport": "autopar.runtime.verification.verify_report",
    "clip_grad_norm_": "autopar.runtime.state.clip",
    "full_state_dict": "autopar.runtime.state.checkpoint",
    "optimizer_state_dict": "autopar.runtime.state.checkpoint",
    "load_optimizer_state_dict": "autopar.runtime.state.checkpoint",
}

__all__ = [
    "AutoparError",
    "Cluster",
    "Device",
    "Link",
    "ParallelModule",
    "Plan",
    "VerifyReport",
    "clip_grad_norm_",
    "compare",
    "full_state_dict",
    "load_optimizer_state_dict",
    "optimizer_state_dict",
    "parallelize",
    "plan",
    "register_rule",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'autopar' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
