"""What is tried on a row: it is traced and folded, and in every way of `WAYS` planned, run on local ranks and compared with one device.

Tiny models are best left on one rank. Plans are therefore made for a cluster on which it pays to split them as far as they go, or for a
baseline that says what is split.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import autopar
from autopar.ir.assignment import Choice, expand_stages
from autopar.ir.cluster import DEVICES, Cluster, Link
from autopar.ir.fold import fold
from autopar.ir.graph import Graph, Op
from autopar.ir.plan_roles import Roles, operator
from autopar.ir.rules.complete import with_rules
from autopar.runtime.verification.launch import RankPool
from autopar.runtime.verification.verify import Subject, compare, prepare
from autopar.search.planner import plan_graph
from autopar.search.prices.work import work
from zoo.row import Row

STEPS = 3
LARGE = 0.01
"""The least share of a model's work with which an operator is named that every rank does whole."""


@dataclass(frozen=True, slots=True)
class Way:
    """One plan of a row; `options` are the planner's. `title`: the heading of its column."""

    title: str
    ranks: int
    training: bool
    options: dict[str, Any]


WAYS = (
    Way("batch on 2", 2, True, {"baseline": "ddp"}),
    Way("features on 2", 2, True, {"baseline": "tp"}),
    Way("searched on 4", 4, True, {"mesh": {"dp": 2, "tp": 2}}),
    Way("2 stages", 2, True, {"mesh": {"pp": 2, "dp": 1, "tp": 1}, "schedule": "1f1b", "microbatches": 2}),
    Way("evaluation on 2", 2, False, {"mesh": {"dp": 1, "tp": 2}}),
    Way("evaluation on 4", 4, False, {"mesh": {"dp": 2, "tp": 2}}),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one way. `worst`: the largest relative error, at `where`. `axes`: what each mesh axis splits, in words. `share`: of the
    model's work, what one rank does. `whole`: operators that every rank ran whole, by their share of the work, if that is `LARGE`;
    `unruled`: those without a rule. `error`: why it could not be planned or run."""

    way: Way
    ok: bool = False
    worst: float = math.nan
    where: str = ""
    error: str = ""
    axes: dict[str, str] = field(default_factory=dict)
    share: float = math.nan
    whole: tuple[tuple[str, float], ...] = ()
    unruled: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Found:
    """All that came of a row. `folds`: `2 x 36 ops` for every repeat in the graph of a training step."""

    row: Row
    operations: int = 0
    folds: tuple[str, ...] = ()
    trials: tuple[Trial, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return bool(self.trials) and all(trial.ok for trial in self.trials)


def workshop(ranks: int) -> Cluster:
    """Machines of two slow devices that talk for next to nothing, a little dearer between machines: on real links a tiny model is fastest
    whole."""
    pair = min(ranks, 2)
    slow = replace(DEVICES["cpu"], flops_per_s=(("float32", 1e9), ("float64", 1e9)), memory_bytes_per_s=1e8, launch_s=0.0)
    inside, between = Link("nearly free", 0.0, 1e15), Link("cheap", 0.0, 1e13)
    return Cluster(f"workshop:{ranks}", slow, pair, ranks // pair, inside, between)


def run(
    row: Row, pools: Callable[[int], RankPool], ways: tuple[Way, ...] = WAYS, tell: Callable[[Trial], None] = lambda trial: None
) -> Found:
    """Everything about `row`. `pools(ranks)` is a pool of so many ranks that stays up; `tell` hears of each way when it is done."""
    started = time.perf_counter()
    found = Found(row)
    subjects: dict[bool, Subject] = {}
    for way in ways:
        begun = time.perf_counter()
        trial = Trial(way)
        try:
            if way.training not in subjects:
                subjects[way.training] = subject_of(row, way.training)
            subject = subjects[way.training]
            graph = with_rules(subject.planned.graph)
            if way.training or not found.operations:
                folds = tuple(f"{item.count} x {item.length} ops" for item in fold(graph) if item.count > 1)
                found = replace(found, operations=len(graph.ops), folds=folds)
            options = way.options | ({"microbatches": row.microbatches} if "microbatches" in way.options else {})
            plan = plan_graph(graph, workshop(way.ranks), **options)
            trial = _described(trial, plan, graph)
            report = compare(subject, plan, steps=STEPS if way.training else 1, optimizer="adamw", ranks=pools(way.ranks))
            worst = report.worst
            trial = replace(trial, ok=report.ok, worst=report.max_relative_error, where=f"{worst.kind} {worst.where}")
        except autopar.AutoparError as error:
            trial = replace(trial, error=f"{type(error).__name__}: {error}")
        trial = replace(trial, seconds=time.perf_counter() - begun)
        found = replace(found, trials=(*found.trials, trial), seconds=time.perf_counter() - started)
        tell(trial)
    return found


def subject_of(row: Row, training: bool) -> Subject:
    """The row's model and example, made ready for verifying: with a loss in training mode, without one in evaluation mode."""
    model = row.build().train(training)
    example = row.inputs(model, row.batch) if training else row.questions(model, row.batch)
    return prepare(model, example, leaf_modules=row.leaf_modules)


def _described(trial: Trial, plan: autopar.Plan, graph: Graph) -> Trial:
    """`trial` with what `plan` splits."""
    roles = Roles.of(plan)
    axes = {axis: roles.axis(axis).split(";")[0] for axis, size in plan.mesh.items() if size > 1 and axis != "pp"}
    expanded = expand_stages(plan, graph)
    done = total = 0.0
    whole: dict[str, float] = defaultdict(float)
    for stage, assignment in zip(expanded.stages, expanded.assignments, strict=True):
        for op in stage.graph.ops:
            amount, part = _work(stage.graph, op), _share(assignment.choices[op.name], assignment.mesh)
            total += amount
            done += amount * part
            if part == 1.0 and axes:
                whole[operator(op.target)] += amount
    largest = sorted(whole.items(), key=lambda item: -item[1])
    named = tuple((name, amount / total) for name, amount in largest if amount >= LARGE * total)
    return replace(trial, axes=axes, share=done / total / len(plan.groups), whole=named, unruled=plan.replicated)


def _share(choice: Choice, mesh: tuple[int, ...]) -> float:
    """Of an operation's work, what one rank does."""
    return math.prod(1 / size if split.work == "split" else 1.0 for split, size in zip(choice, mesh, strict=True))


def _work(graph: Graph, op: Op) -> float:
    """Flops, and elements read and written, of the forward pass: enough to tell what is large."""
    known = work(graph, op)
    elements = sum(graph.values[name].numel for name in (*op.operands, *op.outputs))
    return 0.0 if known.view else known.forward_flops + elements
