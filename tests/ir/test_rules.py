"""Sharding rules: every split of every sample is run in parts and put together, results and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from autopar.errors import RuleError
from autopar.ir.graph import Graph, Input, Op, Ref, Value
from autopar.ir.placement import RP, P, R, S
from autopar.ir.rules import REPLICATE, REPLICATE_PARTIAL_GRADIENT, has_rule, notation, splits, unruled
from autopar.ir.rules.check import check_split
from autopar.ir.rules.split import Split
from autopar.ir.rules.table import RANDOM, RULES
from tests.ir.checking import check
from tests.ir.rule_samples import UNTRIED, b, call, f, i, samples


def check_all(graph: Graph, op: Op) -> None:
    """Every split on 2 and 3 ranks, on as many as there are elements (parts of size 1 must not be taken for dims to broadcast or drop),
    and where parts may be unequal on more than that (they are right even where they are empty)."""
    for split in splits(graph, op):
        for parts in dict.fromkeys((2, 3, split.size or 2, split.size + 1)):
            if split.fits(parts) or split.uneven:
                check(graph, op, split, parts)
    if any(graph.values[name].requires_grad for name in op.operands):
        prepared = replace(graph, inputs=())  # as if it read parameters only
        check(prepared, op, named(prepared, op, REPLICATE_PARTIAL_GRADIENT), 2)


def names(graph: Graph, op: Op) -> list[str]:
    return [split.name for split in splits(graph, op)]


def named(graph: Graph, op: Op, name: str) -> Split:
    return next(split for split in splits(graph, op) if split.name == name)


@pytest.mark.parametrize("target", sorted(set(RULES) - RANDOM))
def test_every_split_of_every_sample_is_right(target: str) -> None:
    tried = 0
    for graph, op in samples(target):
        assert splits(graph, op)[0].name == REPLICATE
        assert len(set(names(graph, op))) == len(splits(graph, op))
        check_all(graph, op)
        tried += 1
    assert tried or target.removeprefix("aten.") in UNTRIED, f"{target} has a rule but no sample"


@pytest.mark.parametrize("target", sorted(RANDOM))
def test_random_operators_run_whole(target: str) -> None:
    assert has_rule(target)


def test_a_wrong_rule_is_refuted() -> None:
    graph, op = call("aten.linear.default", f(4, 6), f(8, 6), f(8))
    right = named(graph, op, "k")
    assert check_split(op, graph, right, 2).ok
    wrong = {
        "bias counted once per rank": replace(right, inputs=(S(1), S(1), R)),
        "result not summed": replace(right, outputs=(R,)),
        "wrong dim of the weight": replace(right, inputs=(S(1), S(0), P)),
    }
    column = named(graph, op, "n")
    wrong |= {
        "input's gradient taken for complete": replace(column, inputs=(R, S(0), S(0))),
        "output along the wrong dim": replace(column, outputs=(S(0),)),
        "blocks that are not the weight's": replace(column, outputs=(S(1, 2),)),
    }
    for what, split in wrong.items():
        assert not check_split(op, graph, split, 2).ok, what


@pytest.mark.parametrize(
    "given, wrong",
    [
        (("aten.softmax.int", f(4, 6), -1), Split("d1", (S(1),), (S(1),), 6)),
        (("aten.mean.dim", f(4, 6), (1,)), Split("d1", (S(1),), (P,), 6)),
        (("aten.relu.default", f(4, 6)), Split("partial", (P,), (P,))),
        (("aten.add.Tensor", f(4, 6), 1.0), Split("partial", (P,), (P,))),
        (("aten.mul.Tensor", f(4, 6), f(4, 6)), Split("partial", (P, P), (P,))),
        (("aten.mul.Tensor", f(4, 6), f(6)), Split("d0", (S(0), R), (S(0),), 4)),
        (("aten.view.default", f(4, 6, 2), (24, 2)), Split("d0.1", (S(1),), (S(0),), 6)),
        (("aten.cumsum.default", f(4, 6), 1), Split("d1", (S(1),), (S(1),), 6)),
        (("aten.split.Tensor", f(4, 12), 6, 1), Split("d1", (S(1),), (S(1), S(1)), 6)),
        (("aten.embedding.default", f(12, 6), i(4)), Split("v", (S(0), R), (P,), 12)),
    ],
)
def test_wrong_splits_are_refuted(given: tuple[Any, ...], wrong: Split) -> None:
    graph, op = call(*given)
    assert not check_split(op, graph, wrong, 2).ok


def test_replicate_with_partial_gradient_is_right() -> None:
    graph, op = call("aten.layer_norm.default", f(4, 6), (6,), f(6), f(6))
    assert check_split(op, graph, Split("replicate/P", (RP, RP, RP), (RP,)), 3).ok
    assert not check_split(op, graph, Split("replicate/P", (RP, R, RP), (RP,)), 3).ok


def test_batch_coupled_operators_have_no_batch_split() -> None:
    for given in [("aten.amin.default", f(4, 6), (0,)), ("aten.sort.default", f(4, 6), 0), ("aten.std.correction", f(4, 6), (0,))]:
        assert "d0" not in names(*call(*given))
    graph, op = call("autopar.batch_norm", f(4, 6, 5), f(6), f(6), f(6), f(6), 0.1, 1e-5)
    assert named(graph, op, "b").implementation == "sync_batch_norm"


def test_attention_is_split_over_the_sequence_where_that_is_exact() -> None:
    def ways(*args: Any, **kwargs: Any) -> set[str]:
        return {"l", "ring"} & set(names(*call("aten.scaled_dot_product_attention.default", *args, **kwargs)))

    q, odd, short = f(2, 4, 8, 4), f(2, 4, 6, 4), f(2, 4, 4, 4)
    assert ways(q, q, q) == {"l", "ring"}
    assert ways(q, q, q, None, 0.0, True) == {"l", "ring"}
    assert ways(q, short, short) == {"l", "ring"}
    assert ways(q, q, q, b(8, 8)) == {"l", "ring"}
    assert ways(q, q, q, f(8, 8)) == {"l"}  # numbers may have a gradient
    assert ways(q, short, short, None, 0.0, True) == set()  # where the mask lies is another matter
    assert ways(odd, odd, odd, None, 0.0, True) == set()  # two halves for each of two ranks
    assert ways(q, q, q, None, 0.1) == {"l"}
    assert ways(q, q, q, None, 0.1, True) == set()


def test_scaling_gradients_by_frequency_couples_the_batch() -> None:
    graph, op = call("aten.embedding.default", f(12, 6), i(4, 6), -1, True)
    assert names(graph, op) == [REPLICATE, "h"]


def test_a_vocabulary_of_50257_splits_from_embedding_to_loss() -> None:
    size = 50257
    for given, name in [
        (("aten.linear.default", f(2, 3, 4), f(size, 4)), "n"),
        (("aten.view.default", f(1, 2, size), (-1, size)), "d1"),
        (("aten._to_copy.default", f(2, size)), "d1"),
        (("aten.mul.Tensor", f(2, size), 0.5), "d1"),
        (("aten.tanh.default", f(2, size)), "d1"),
        (("autopar.cross_entropy", f(2, size), i(2), -100, 0.0), "v"),
        (("aten.cross_entropy_loss.default", f(2, size), i(2), None, 0, -100, 0.1), "v"),
        (("aten.log_softmax.int", f(2, size), -1), "d1"),
        (("aten.nll_loss_nd.default", f(2, size), i(2), None, 0), "v"),
        (("aten.logsumexp.default", f(2, size), (-1,)), "d1"),
        (("aten.gather.default", f(2, size), 1, i(2, 1)), "v"),
        (("aten.argmax.default", f(2, size), -1), "d1"),
        (("aten.embedding.default", f(size, 4), i(2)), "v"),
        (("aten.t.default", f(size, 4)), "d1"),
    ]:
        graph, op = call(*given)
        split = named(graph, op, name)
        assert split.uneven and split.fits(2) and split.fits(4) and split.fits(2, 2), given[0]
        check(graph, op, split, 2)


def test_uneven_parts_are_never_empty() -> None:
    split = Split("v", (S(0),), (S(0),), size=5, uneven=True)
    assert split.fits(2) and split.fits(3) and split.fits(5)
    assert not split.fits(4)  # parts of 2, 2, 1 and 0
    assert not split.fits(6)
    assert not replace(split, uneven=False).fits(2)
    assert replace(split, size=0).fits(64)


def test_an_operator_without_a_rule_runs_replicated_and_is_named() -> None:
    graph, op = call("aten.linalg_inv_ex.default", f(2, 3, 3))
    assert names(graph, op) == [REPLICATE]
    assert unruled(graph) == ("aten.linalg_inv_ex.default",)


def test_a_form_that_a_rule_does_not_cover_is_named() -> None:
    graph, op = call("aten.index.Tensor", f(4, 6), (b(4),))
    assert names(graph, op) == [REPLICATE]
    assert unruled(graph) == ("aten.index.Tensor",)


def test_a_value_read_twice_is_read_in_one_placement() -> None:
    graph, op = call("aten.mul.Tensor", f(4, 6), f(4, 6))
    twice = replace(op, args=(op.args[0], op.args[0]))
    assert "partial" in names(graph, op)
    assert "partial" not in names(replace(graph, ops=(twice,)), twice)


def test_equal_operations_share_their_splits() -> None:
    graph, op = call("aten.linear.default", f(4, 6), f(8, 6), f(8))
    other_graph, other = call("aten.linear.default", f(4, 6), f(8, 6), f(8))
    assert splits(graph, op) is splits(other_graph, other)


def test_grouped_products_of_experts_split_their_columns_and_their_sum() -> None:
    pytest.importorskip("transformers.integrations.moe")
    names_ = {"x": ((6, 4), "float64"), "w": ((2, 4, 8), "float64"), "offsets": ((2,), "int32"), "y": ((6, 8), "float64")}
    values = {name: Value(name, *rest) for name, rest in names_.items()}
    op = Op("op", "transformers.grouped_mm_fallback.default", (Ref("x"), Ref("w"), Ref("offsets")), (), ("y",))
    graph = Graph("experts", values, tuple(Input(name, name) for name in "xw"), (), (), (), (op,), ())
    assert set(names(graph, op)) == {REPLICATE, "k", "n", "partial"}
    for split in splits(graph, op):
        check(graph, op, split, 2)  # offsets are drawn as in `samples.py`: increasing, the last the number of rows


@pytest.mark.parametrize("text", ["m k, k n", "m $ -> m", "(m k -> m"])
def test_notation_that_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(RuleError, match="rule"):
        notation.read(text)
