"""`autopar explain` from the file alone."""

from __future__ import annotations

import io

import pytest

from autopar.errors import PlanError
from autopar.report.explain import explain
from autopar.report.terminal import console
from tests.report.sample import sample_plan

UP = "model.layers.{0-31}.mlp.up_proj.weight"


def explained(name: str, instead: str | None = None) -> str:
    file = io.StringIO()
    explain(sample_plan(), name, console(file), instead)
    return file.getvalue()


@pytest.mark.parametrize("name", ["model.layers.7.mlp.up_proj.weight", UP, "*.up_proj.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_parameter_by_any_of_its_names(name: str) -> None:
    text = explained(name)
    for fact in [
        "3584 x 2048 on each rank",
        "ZeRO-3",
        "by `model.layers.*.mlp.up_proj.weight`",
        "chosen",
        "+1.2%",
        "cannot",
        "reduce-scatter",
        "28.0 MiB",
    ]:
        assert fact in text, fact


@pytest.mark.parametrize("name", ["linear_13", "model.layers.0.self_attn.o_proj", "model.layers.31.self_attn.o_proj", "*.o_proj"])
def test_an_operation_by_any_of_its_names(name: str) -> None:
    text = explained(name)
    for fact in ["linear_13", "in features", "P(sum)", "in each of 32"]:
        assert fact in text, fact


def test_the_collectives_that_serve_an_operation() -> None:
    assert "all-gather" in explained("reshard_6")


@pytest.mark.parametrize(
    ("instead", "fact"),
    [
        ("R@dp", "810 ms"),
        ("R@dp S(0)@tp", "810 ms"),
        ("R@dp, S(1)@tp", "no split of `linear`"),
        ("S(1)@dp", "That is how it is stored"),
        ("S(0)@dp", "was not priced; the file has `S(0)@tp`, `S(1)@tp`"),
        ("R", "810 ms"),
    ],
)
def test_instead(instead: str, fact: str) -> None:
    assert fact in explained(UP, instead)


@pytest.mark.parametrize("instead", ["S(0)@pp", "columns", "", "S(9)@tp", "S(0) S(1)"])
def test_instead_that_means_nothing(instead: str) -> None:
    with pytest.raises(PlanError, match="--instead"):
        explained(UP, instead)


def test_instead_asks_about_parameters_only() -> None:
    with pytest.raises(PlanError, match="name a parameter"):
        explained("linear_13", "S(0)")


def test_a_plan_without_alternatives_says_how_to_get_them() -> None:
    assert "--alternatives" in explained("lm_head.weight")


@pytest.mark.parametrize(
    ("name", "near"), [("up_prj", "up_proj"), ("model.layers.0.mlp.upproj.weight", "mlp.up_proj.weight"), ("lmhead", "lm_head")]
)
def test_unknown_names_get_suggestions(name: str, near: str) -> None:
    with pytest.raises(PlanError, match=rf"did you mean .*{near}"):
        explained(name)


def test_a_name_like_nothing() -> None:
    with pytest.raises(PlanError, match="autopar show --full"):
        explained("qqqqqq")
    with pytest.raises(PlanError):
        explained("model.layers.99.mlp.up_proj.weight")


def test_a_glob_that_matches_much_names_the_rest() -> None:
    assert "more match" in explained("*")
