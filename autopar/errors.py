"""Every error that autopar raises for its user, drawn as a tree.

    AutoparError
    ├── TraceError               the model cannot be read; names the user's own line
    ├── GraphError               a graph text or graph that breaks the IR's own laws (also a ValueError)
    ├── ClusterError             an unknown preset, a damaged cluster file, numbers that make no cluster (also a ValueError)
    ├── RuleError                a sharding rule that cannot be read, or that its numerical check refutes
    ├── PlanError                (also a ValueError)
    │   ├── PlanFileError        a plan file that is damaged, hostile, or of another version
    │   ├── PlanMismatchError    a sound plan for another model, other inputs or another world size
    │   ├── PinError             a pin that matches nothing, or pins that cannot hold together
    │   └── InfeasibleError      no way to run it; where memory is missing, how much, and what would fit
    ├── ProblemError             a file with an optimisation problem that cannot be read or breaks its format (also a ValueError)
    ├── RuntimeSetupError        the process group, devices or ranks do not fit the plan
    │   ├── RankDisagreementError   a rank came with another plan or another first batch
    │   ├── InputError           inputs of other shapes, dtypes or structure than were traced (also a ValueError)
    │   ├── PeerError            another rank ended, or did not answer, in the middle of a step
    │   └── RanksFailedError     local ranks raised, died or did not answer; carries what each of them said
    └── VerifyError              the comparing processes themselves failed (not: the comparison was bad)

Each message says what, where in the user's model, and the remedy. Broken invariants of autopar itself are `assert`s.
"""

from __future__ import annotations


class AutoparError(Exception):
    """Root of all errors meant for the user."""


class TraceError(AutoparError):
    """The model cannot be traced; the message names the user's line and the ways out."""


class GraphError(AutoparError, ValueError):
    """A graph, or the text of one, breaks the laws of the IR."""


class ClusterError(AutoparError, ValueError):
    """A cluster description cannot be used."""


class RuleError(AutoparError):
    """A sharding rule cannot be read or is refuted by its numerical check."""


class PlanError(AutoparError, ValueError):
    """A plan cannot be made, read or used."""


class PlanFileError(PlanError):
    """A plan file is damaged, hostile or of another version."""


class PlanMismatchError(PlanError):
    """A sound plan does not fit this model, these inputs or this world size."""


class PinError(PlanError):
    """A pin matches nothing, or pins contradict each other or the rules."""


class InfeasibleError(PlanError):
    """No plan fits the limits; `missing_bytes` per rank, and `remedies` in words with numbers."""

    def __init__(self, message: str, missing_bytes: int = 0, remedies: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.missing_bytes = missing_bytes
        self.remedies = remedies


class ProblemError(AutoparError, ValueError):
    """A file with a problem to solve is damaged; the message names the place in it."""


class RuntimeSetupError(AutoparError):
    """Process group, devices or ranks do not fit the plan."""


class RankDisagreementError(RuntimeSetupError):
    """Ranks came with different plans or different first batches."""


class InputError(RuntimeSetupError, ValueError):
    """Inputs differ in structure, shape or dtype from those the plan was made for."""


class PeerError(RuntimeSetupError):
    """Another rank ended, or did not answer in time, in the middle of a step; the message says which, and what this rank was doing."""


class RanksFailedError(RuntimeSetupError):
    """Local ranks failed; `failures` maps the rank to its error in a line and its traceback (empty where it died)."""

    def __init__(self, message: str, failures: dict[int, tuple[str, str]]) -> None:
        super().__init__(message)
        self.failures = failures


class VerifyError(AutoparError):
    """The processes that compare a plan with one device failed before they could compare."""
