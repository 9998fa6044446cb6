"""`with_rules`: a graph with rules for what the table has none for: those that are registered, and those that trial finds (imports torch).

Where every operator has a rule, as in nearly all models, nothing is tried. Environment variable `AUTOPAR_DISCOVERY=0` switches trial off.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from time import thread_time
from typing import Any

import torch
from torch import Tensor

import autopar
from autopar.errors import PlanMismatchError, RuleError
from autopar.ir.graph import Arg, Graph, Input, Op, Ref, Value
from autopar.ir.rules import remembered, unruled_kinds
from autopar.ir.rules.discover import BUDGET_S, checked, discover
from autopar.ir.rules.given import GivenRule, form, operator_name
from autopar.ir.rules.operators import leaf_at_hand, operator
from autopar.ir.rules.register import ALL, Registered, key_of
from autopar.ir.rules.table import RANDOM
from autopar.ir.tracing.leaf_modules import LEAF, LeafModule

SWITCH = "AUTOPAR_DISCOVERY"
MODEL_BUDGET_S = 30.0
"""CPU seconds for all operators of a model."""

_OUT_OF_TIME = "too long"


def with_rules(graph: Graph, leaf_modules: Mapping[str, LeafModule] | None = None) -> Graph:
    """`graph` with its registered rules, each checked with the shapes at hand, and with what trial finds for operators that have none.

    `leaf_modules`: the bodies of its leaves, by path. They are split where a rule is registered for their class, not by trial: who keeps
    a module from being traced has reasons that random values may not show.
    Raises `RuleError` where a registered rule is refuted.
    """
    rules = _registered(graph, leaf_modules or {})
    if rules:
        graph = replace(graph, rules=rules)
    if os.environ.get(SWITCH) == "0":
        return graph
    found: list[GivenRule] = []
    deadline_s = thread_time() + MODEL_BUDGET_S
    for op in unruled_kinds(graph):
        if op.target == LEAF or op.target in ALL or op.target in RANDOM or any(rule.fits(op, graph.values) for rule in found):
            continue
        found.append(_found(op, graph, min(BUDGET_S, deadline_s - thread_time())))
    return replace(graph, rules=(*rules, *found)) if found else graph


def _found(op: Op, graph: Graph, budget_s: float) -> GivenRule:
    key = _key(op, graph)
    if (rule := remembered.known(key)) is not None:
        return rule
    if budget_s <= 0:
        return GivenRule(op.target, form(op, graph.values), why="trying the operators before it took too long")
    filed = remembered.filed(key)
    if filed is not None and filed.target == op.target and filed.fits(op, graph.values):
        passed, refuted, untried = (1, "", "") if filed.whole else checked(filed, op, graph, budget_s)
        if passed and not refuted and not untried:
            remembered.keep(key, filed)
            return filed
    rule = discover(op, graph, budget_s)
    if _OUT_OF_TIME not in rule.why:
        remembered.keep(key, rule)
    return rule


def _key(op: Op, graph: Graph) -> str:
    """What a finding depends on: the call, which operands have a gradient, the operator's code where it is Python, and the versions."""
    smooth = "".join("g" if graph.values[name].requires_grad else "-" for name in op.operands)
    space, name, _ = op.target.split(".")
    # Private: torch's book of operators made by `custom_op`. Without it, findings are checked again all the same before they are used.
    made = getattr(getattr(torch._library, "custom_ops", None), "OPDEFS", {}).get(f"{space}::{name}")
    try:
        code = "" if made is None else inspect.getsource(made._init_fn)
    except (OSError, TypeError, AttributeError):
        code = ""
    return "\n".join((form(op, graph.values), smooth, f"torch {torch.__version__}, autopar {autopar.__version__}", code))


# ---- registered rules -----------------------------------------------------------------------------------------------------------------

_PASSED: dict[tuple[GivenRule, str], GivenRule] = {}


def _registered(graph: Graph, leaf_modules: Mapping[str, LeafModule]) -> tuple[GivenRule, ...]:
    """The registered rules for the operators of `graph`, each once, with the checks it passed for all its calls there."""
    passed: dict[GivenRule, int] = {}
    untried: dict[GivenRule, str] = {}
    seen: set[str] = set()
    for op in graph.ops if ALL else ():
        if key_of(op) in ALL and (text := form(op, graph.values)) not in seen:
            seen.add(text)
            written = ALL[key_of(op)].given(op, graph.values)
            with leaf_at_hand(leaf_modules[op.module].run) if op.target == LEAF else nullcontext():
                rule = _checked(written, op, graph)
            passed[written] = passed.get(written, 0) + rule.checks
            if rule.why:
                untried[written] = rule.why
    return tuple(replace(rule, checks=checks, why=untried.get(rule, "")) for rule, checks in passed.items())


def subject(op: Op) -> str:
    """What a message calls the operator of `op`."""
    return f"leaf module {op.args[0]}" if op.target == LEAF else operator_name(op.target)


def _checked(rule: GivenRule, op: Op, graph: Graph) -> GivenRule:
    """`rule`, registered, with the number of checks that its splits pass for `op`, or why there are none. Raises `RuleError`."""
    key = (rule, form(op, graph.values))
    if key not in _PASSED:
        passed, refuted, untried = checked(rule, op, graph)
        if refuted:
            raise RuleError(
                f"the rule registered for {subject(op)}, `{rule.notation or '; '.join(rule.splits)}`, is wrong for "
                f"{form(op, graph.values)}: {refuted}. Put loops that cannot be split in brackets, as in `[k]`"
            )
        why = rule.why if rule.whole or passed else f"not checked: {untried}"
        _PASSED[key] = replace(rule, checks=passed, why=why)
    return _PASSED[key]


def check_samples(entry: Registered, samples: Sequence[Sequence[Any]]) -> None:
    """Check a rule with arguments as they are. Raises `RuleError` where it is refuted, or does not fit them."""
    for arguments in samples:
        graph, op = _call(entry.target, tuple(arguments))
        rule = entry.given(op, graph.values)
        if not rule.whole and not _fits(rule, op, graph):
            raise RuleError(f"the rule `{rule.notation}` for {subject(op)} does not fit {form(op, graph.values)}")
        passed = _checked(rule, op, graph)
        if not passed.whole and not passed.checks:
            raise RuleError(f"the rule for {subject(op)} could not be checked with {form(op, graph.values)}: {passed.why}")


def _fits(rule: GivenRule, op: Op, graph: Graph) -> bool:
    return op not in unruled_kinds(replace(graph, rules=(rule,)))


def _call(target: str, arguments: tuple[Any, ...]) -> tuple[Graph, Op]:
    """A graph of one operation, with `arguments` as it is called with."""
    values: dict[str, Value] = {}

    def entered(name: str, tensor: Tensor) -> str:
        dtype = str(tensor.dtype).removeprefix("torch.")
        values[name] = Value(name, tuple(tensor.shape), dtype, tensor.is_floating_point())
        return name

    def argument(item: Any) -> Arg:
        if isinstance(item, Tensor):
            return Ref(entered(f"x{len(values)}", item))
        if isinstance(item, (list, tuple)):
            return tuple(map(argument, item))
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        raise RuleError(f"a sample for {operator_name(target)} has a {type(item).__name__}; give tensors, numbers, texts and None")

    args = tuple(map(argument, arguments))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            results = operator(target)(*arguments)
    except Exception as error:  # an operator may raise anything
        raise RuleError(f"{operator_name(target)} does not take its sample: {type(error).__name__}: {error}") from error
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    inputs = tuple(Input(name, name) for name in list(values))
    outputs = tuple(entered(f"y{number}", item) for number, item in enumerate(results))
    op = Op("op", target, args, (), outputs)
    return Graph(operator_name(target), values, inputs, (), (), (), (op,), ()), op


# ---- rules of a plan ------------------------------------------------------------------------------------------------------------------


def confirm(rules: Sequence[GivenRule], graph: Graph) -> None:
    """Check the rules that a plan brings, as far as its operators run here. Raises `PlanMismatchError` where one is refuted."""
    for rule in rules:
        if rule.target == LEAF:
            continue  # its body is in no operator; what it gives is checked by shape in every call
        op = None if rule.whole else next((item for item in graph.ops if rule.fits(item, graph.values)), None)
        if op is None:
            continue
        _, refuted, _ = checked(rule, op, graph)
        if refuted:
            raise PlanMismatchError(
                f"the plan's rule for {subject(op)}, `{rule.notation or '; '.join(rule.splits)}`, is wrong here: {refuted}; "
                "the operator is another one than the plan was made with, or the rule was edited. Plan again"
            )
