"""What optimizers keep: known by name to the cost model and, without what that needs to be imported, to the simulator."""

from __future__ import annotations

OPTIMIZER_STATES = {"sgd": 0, "sgd-momentum": 1, "adamw": 2}
"""State tensors per parameter, in the parameter's dtype and placement."""
