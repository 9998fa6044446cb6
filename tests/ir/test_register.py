"""`autopar.register_rule`: the user's rules, checked before they are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import randn

import autopar
from autopar.errors import RuleError
from autopar.ir.placement import RP, S
from autopar.ir.rules import register, splits
from autopar.ir.rules.complete import with_rules
from autopar.ir.rules.split import Split
from tests.custom_ops import Custom, gated
from tests.ir.rule_samples import call, f


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    known = dict(register.ALL)
    register.ALL.clear()
    yield
    register.ALL.clear()
    register.ALL.update(known)


SAMPLE = (randn(6, 12, 18), randn(18), 1.5)


@pytest.mark.parametrize("op", ["autopar_tests::gated", "autopar_tests::gated.default", gated, torch.ops.autopar_tests.gated])
def test_an_operator_is_named_in_any_way(op: Any) -> None:
    autopar.register_rule(op, "... h, h -> ... h", uneven="h", linear=[(1,)], samples=[SAMPLE])
    assert list(register.ALL) == ["autopar_tests.gated.default"]


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        ("... h, h -> ... h", ["d0", "d1", "h"]),
        (["S(0) R/P -> S(0)"], ["split0"]),
        ([Split("rows", (S(0), RP), (S(0),))], ["split0"]),
        ([], []),
        (lambda call: "b [s] h, h -> b [s] h" if len(call.operands[0].shape) == 3 else None, ["b", "h"]),
    ],
)
def test_a_registered_rule_stands_above_what_is_found(rule: Any, names: list[str]) -> None:
    graph, op = call("autopar_tests.gated.default", f(6, 4, 16), f(16), 1.5)
    autopar.register_rule("autopar_tests::gated", rule)
    complete = with_rules(graph)
    (given,) = complete.rules
    assert given.origin == "registered" and (given.checks > 0) == bool(names)
    assert [split.name for split in splits(complete, op)[1:]] == names


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ("... h, h -> ... h, h", {}, "does not fit"),
        ("b s h, h -> s b h", {}, "does not fit"),
        ("b s k, h -> b s k", {}, r"wrong for autopar_tests.gated.*split S\(2\) R/P -> S\(2\): .*must match"),
        ("... h, h -> ... h", {"linear": [(0,)]}, r"P\(sum\).*differs by"),
        ("... h, h - ... h", {}, "has no `->`"),
        ("... h, h -> ... h", {"uneven": "k"}, "`uneven` names `k`"),
        ("... h, h -> ... h", {"linear": [(2,)]}, "`linear` names a term"),
        (["S(0) R/P"], {}, "has no `->`"),
        (["S(0) S(0) -> S(0)"], {}, "wrong for"),
        (["S(0) -> S(0)"], {}, "has 1 operands"),
        (["S(0) X -> S(0)"], {}, "not a placement"),
        (["S(0) R -> S(0)"], {}, "gradient of operand 1.*differs"),
        (lambda call: 1 / 0, {}, "raised ZeroDivisionError"),
    ],
)
def test_a_wrong_rule_is_refused_at_once_where_there_are_samples(rule: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RuleError, match=words):
        autopar.register_rule("autopar_tests::gated", rule, samples=[SAMPLE], **options)
    assert not register.ALL


def test_a_wrong_rule_without_samples_is_refused_when_a_plan_is_made() -> None:
    autopar.register_rule("autopar_tests::project_heads", "b s h, n h, n -> b s n")
    with pytest.raises(RuleError, match=r"autopar_tests::project_heads.*Put loops that cannot be split in brackets"):
        autopar.plan(Custom(), (torch.randn(4, 6, 16),), "cpu:2")


@pytest.mark.parametrize("name", ["gated", "a::b::c", "", "a.b.c.d"])
def test_what_names_no_operator_is_refused(name: str) -> None:
    with pytest.raises(RuleError, match="names no operator"):
        autopar.register_rule(name, "m -> m")


def test_a_sample_that_the_operator_does_not_take_is_told() -> None:
    with pytest.raises(RuleError, match="does not take its sample"):
        autopar.register_rule("autopar_tests::gated", "... h, h -> ... h", samples=[(torch.randn(2, 3), 1.5)])
