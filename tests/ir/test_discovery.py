"""Rules that are found by trial: what is found is right, what is doubtful runs whole, and what was found is remembered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from autopar.errors import PlanMismatchError
from autopar.ir.graph import Graph, Op
from autopar.ir.placement import P, S
from autopar.ir.rules import complete, remembered, splits, unruled
from autopar.ir.rules.complete import confirm, with_rules
from autopar.ir.rules.discover import discover
from autopar.ir.rules.given import GivenRule
from autopar.ir.text import parse, to_text
from autopar.ir.tracing.trace import trace
from tests import custom_ops  # noqa: F401  (registers the operators)
from tests.ir.checking import check
from tests.ir.rule_samples import call, f


def own(name: str, *args: Any) -> tuple[Graph, Op]:
    return call(f"autopar_tests.{name}.default", *args)


@pytest.mark.parametrize(
    ("given", "notation", "uneven", "linear"),
    [
        (("autopar_tests.gated.default", f(8, 12, 16), f(16), 1.5), "i j k, k -> i j k", "i j k", ((1,),)),
        (("autopar_tests.project_heads.default", f(8, 4, 64), f(32, 64), f(32), 4), "i j [a], k [b], k -> i j k", "i j k", ((1, 2),)),
        (("autopar_tests.blocks_of_128.default", f(8, 512)), "i [a] -> i [b]", "i", ()),
        (("autopar_tests.doubled.default", f(1, 8)), "1 i -> 1 i", "i", ((0,),)),
        (("aten.linalg_inv_ex.default", f(4, 3, 3)), "i [a] [b] -> i [c] [d], i", "i", ()),
        (("aten.mm.default", f(8, 12), f(12, 20)), "i j, j k -> i k", "i j k", ((0,), (1,))),
        (("aten.addmm.default", f(20), f(8, 12), f(12, 20)), "+i, j k, k i -> j i", "i j k", ((0, 1), (0, 2))),
        (("aten.flatten.using_ints", f(8, 4, 6), 0, 1), "i [a] j -> (i [b]) j", "j", ((0,),)),
    ],
    ids=lambda item: item[0].split(".")[1] if isinstance(item, tuple) and item and isinstance(item[0], str) else "",
)
def test_what_is_found(given: tuple[Any, ...], notation: str, uneven: str, linear: tuple[tuple[int, ...], ...]) -> None:
    graph, op = call(*given)
    found = discover(op, graph)
    assert (found.notation, found.uneven, found.linear) == (notation, uneven, linear), found
    assert found.checks > 8 and not found.why
    graph = replace(graph, rules=(found,))
    assert unruled(graph) == ()
    for split in splits(graph, op):
        for parts in (2, 3):
            if split.fits(parts):
                check(graph, op, split, parts)


def test_equal_sizes_are_not_taken_for_one_loop() -> None:
    graph, op = call("aten.mm.default", f(8, 8), f(8, 8))
    assert discover(op, graph).notation == "i j, j k -> i k"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("noisy", "random, or with a memory"),
        ("counting", "random, or with a memory"),
        ("peeking", "looks at the values of tensors (`bool`)"),
        ("clipped", "no dim can be split"),
        ("changing", "changes its arguments"),
        ("constant", "the same everywhere"),
    ],
)
def test_what_is_doubtful_runs_whole_and_says_why(name: str, why: str) -> None:
    graph, op = own(name, f(8, 12))
    found = discover(op, graph)
    assert found.whole and why in found.why
    assert [split.name for split in splits(replace(graph, rules=(found,)), op)] == ["replicate"]
    assert unruled(replace(graph, rules=(found,))) == (op.target,)


def test_trying_is_given_up_after_a_while() -> None:
    graph, op = own("gated", f(8, 12, 16), f(16), 1.5)
    assert "too long" in discover(op, graph, budget_s=0.0).why


def test_a_rule_is_for_other_sizes_of_what_it_splits_and_no_others() -> None:
    graph, op = own("project_heads", f(8, 4, 64), f(32, 64), f(32), 4)
    rule = discover(op, graph)
    for given, fits in (((f(2, 6, 64), f(10, 64), f(10), 4), True), ((f(8, 4, 128), f(32, 128), f(32), 4), False)):
        other, its = own("project_heads", *given)
        assert rule.fits(its, other.values) is fits
    other, its = own("project_heads", f(8, 4, 64), f(32, 64), f(32), 8)
    assert not rule.fits(its, other.values)


def test_nothing_is_tried_where_all_operators_have_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complete, "discover", lambda *_: pytest.fail("tried"))
    graph = trace(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()), (torch.randn(2, 4),)).graph
    assert with_rules(graph) is graph


def test_trial_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(complete.SWITCH, "0")
    graph, op = own("gated", f(8, 12, 16), f(16), 1.5)
    assert with_rules(graph) is graph and unruled(graph) == (op.target,)


# ---- remembering ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(remembered.DIRECTORY, str(tmp_path))
    monkeypatch.setattr(remembered, "_KNOWN", {})
    return tmp_path / "rules"


def found_for(graph: Graph) -> GivenRule:
    (rule,) = with_rules(graph).rules
    return rule


def test_what_was_found_is_remembered_in_a_file_and_checked_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = own("gated", f(8, 12, 16), f(16), 1.5)
    first = found_for(graph)
    assert [path.suffix for path in cache.iterdir()] == [".json"]
    assert list(remembered.all_filed()) == [first]
    remembered._KNOWN.clear()
    with monkeypatch.context() as patch:
        patch.setattr(complete, "discover", lambda *_: pytest.fail("tried again"))
        assert found_for(graph) == first
    (path,) = cache.iterdir()
    wrong = json.loads(path.read_text()) | {"notation": "i j k, k -> j i k"}
    for damaged in (json.dumps(wrong), "{", "[]", '{"key": 1}', "\x00", json.dumps(wrong | {"checks": "many"})):
        path.write_text(damaged)
        remembered._KNOWN.clear()
        assert found_for(graph) == first


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _ = own("gated", f(8, 12, 16), f(16), 1.5)
    blocked = tmp_path / "file"
    blocked.write_text("")
    for place in (str(blocked), "/proc/nowhere", ""):
        monkeypatch.setenv(remembered.DIRECTORY, place)
        monkeypatch.setattr(remembered, "_KNOWN", {})
        assert found_for(graph).notation
        assert list(remembered.all_filed()) == []


# ---- travelling -------------------------------------------------------------------------------------------------------------------------


def test_rules_are_in_the_text_of_a_graph_and_not_in_its_fingerprint() -> None:
    graph, _ = own("project_heads", f(8, 4, 64), f(32, 64), f(32), 4)
    for rule in (
        found_for(graph),
        GivenRule("a.b.c", splits=("S(0) R/P -> S(0)",), origin="registered"),
        GivenRule("a.b.c", "a.b.c(int64[2])", why='it "draws"'),
    ):
        complete_graph = replace(graph, rules=(rule,))
        assert parse(to_text(complete_graph)).rules == (rule,)
        assert complete_graph.fingerprint() == graph.fingerprint()


def test_a_plan_with_a_wrong_rule_is_refused() -> None:
    graph, _ = own("gated", f(8, 12, 16), f(16), 1.5)
    rule = found_for(graph)
    confirm((rule,), graph)
    with pytest.raises(PlanMismatchError, match=r"the plan's rule for autopar_tests::gated.*differs"):
        confirm((replace(rule, linear=((0,),)),), graph)


def test_a_registered_list_of_splits_is_what_is_offered() -> None:
    graph, op = own("gated", f(8, 12, 16), f(16), 1.5)
    rule = GivenRule(op.target, splits=("S(0) R/P -> S(0)", "R/P P -> P(sum)"))
    first, second = splits(replace(graph, rules=(rule,)), op)[1:]
    assert (first.inputs[0], first.size, first.work) == (S(0), 8, "split")
    assert (second.inputs[1], second.size, second.work) == (P, 0, "whole")
