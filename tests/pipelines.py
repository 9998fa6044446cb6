"""Forced plans with stages, microbatches and recomputation for the models of the zoo: what `verify` is asked about them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import autopar
from autopar.ir.pipelining.microbatch import microbatched
from autopar.ir.pipelining.stages import candidates
from autopar.ir.tracing.trace import trace
from autopar.runtime.verification.launch import RankPool
from autopar.runtime.verification.verify_report import VerifyReport
from tests.zoo import ZOO, talkative

Mesh = tuple[int, int, int] | tuple[dict[str, int], ...]


@dataclass(frozen=True)
class Case:
    """One plan of one model. `mesh`: as `autopar.plan` takes it, `(pp, dp, tp)`, or a sequence of one mesh a group.

    `uneven`: the first stage ends after this share of the places where a cut may be; None leaves the cuts to the planner.
    """

    model: str
    mesh: Mesh
    schedule: str | None = "1f1b"
    microbatches: int = 4
    uneven: float | None = None
    recompute: str | None = None
    batch: int = 8

    @property
    def groups(self) -> tuple[dict[str, int], ...]:
        """The mesh of every group of ranks."""
        return tuple(group if isinstance(group, dict) else dict(zip(("dp", "tp"), self.mesh[1:], strict=True)) for group in self._places())

    def _places(self) -> tuple[Any, ...]:
        return self.mesh if isinstance(self.mesh[0], dict) else (None,) * self.mesh[0]

    @property
    def ranks(self) -> int:
        return sum(prod(group.values()) for group in self.groups)

    def __str__(self) -> str:
        meshes = ["x".join(map(str, group.values())) for group in self.groups]
        where = f"{len(meshes)}x{meshes[0]}" if len(set(meshes)) == 1 else "+".join(meshes)
        words = [self.model, where, self.schedule if len(meshes) > 1 else "no pipeline", f"m{self.microbatches}"]
        words += [f"uneven {self.uneven}"] * (self.uneven is not None) + [f"recompute {self.recompute}"] * (self.recompute is not None)
        return " ".join(map(str, words))

    def options(self, model: Any, example: Any) -> dict[str, Any]:
        """Keywords of `autopar.plan`."""
        groups = self.groups
        options: dict[str, Any] = {"microbatches": self.microbatches}
        if len(groups) == 1:
            options["mesh"] = groups[0]
        else:
            options["schedule"] = self.schedule
            options["mesh"] = {"pp": len(groups), **groups[0]} if all(group == groups[0] for group in groups) else list(groups)
        if self.uneven is not None:
            options["cuts"] = self._cuts(model, example)
        if self.recompute is not None:
            options["recompute"] = self.recompute
        return options

    def _cuts(self, model: Any, example: Any) -> tuple[int, ...]:
        traced = trace(model, (), example) if isinstance(example, dict) else trace(model, example)
        places = [place for place in candidates(microbatched(traced.graph, self.microbatches).body) if place]
        later = len(self.groups) - 1
        assert self.uneven is not None and len(places) >= later, f"{self.model} can be cut at {len(places)} places"
        first = min(round(len(places) * self.uneven), len(places) - later)
        return tuple(places[first : first + later])

    def plan(self, model: Any, example: Any) -> autopar.Plan:
        return autopar.plan(model, example, talkative(self.ranks), **self.options(model, example))

    def verify(self, pool: RankPool, optimizer: Literal["both", "sgd", "adamw"] = "both") -> VerifyReport:
        """Plan and verify, in float64; `pool` has as many `ranks`."""
        model = ZOO[self.model].build(**LARGER.get(self.model, {})).double()
        example = ZOO[self.model].inputs(model, batch=self.batch)
        plan = self.plan(model, example)
        assert plan.world_size == self.ranks and plan.microbatches == self.microbatches
        return autopar.verify(model, example, plan, optimizer=optimizer, ranks=pool)


LARGER: dict[str, dict[str, Any]] = {"gpt2": {"layers": 4}, "llama": {"layers": 4}, "vit": {"layers": 4}}
"""Options of `build` for models that four stages cut between layers."""
