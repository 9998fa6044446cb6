"""Names of repeats written once, and back."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.ir import folded_names


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["h.0.w", "h.1.w", "h.2.w"], "h.{0-2}.w"),
        (["h.0.w", "h.2.w", "h.4.w"], "h.{0-4:2}.w"),
        (["h.0.w", "h.1.w", "h.5.w"], "h.{0-1,5}.w"),
        (["h.4.w", "h.7.w", "h.17.w", "h.27.w"], "h.{4,7-27:10}.w"),
        (["h.9.w", "h.3.w", "h.3.w"], "h.{9,3,3}.w"),
        (["h.3.w"], "h.3.w"),
        (["h.1.x.2.w", "h.1.x.3.w"], "h.1.x.{2-3}.w"),
        (["a.0.b.7", "a.1.b.9"], "a.{0-1}.b.{7-9:2}"),
        (["add_3", "add_5"], "add_{3-5:2}"),
    ],
)
def test_fold_and_expand(names: list[str], folded: str) -> None:
    assert folded_names.fold(names) == folded
    assert folded_names.expand(folded) == names
    assert folded_names.count(folded) == len(names)
    assert all(folded_names.stands_for(folded, name) for name in names)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 999), min_size=1, max_size=8, unique=True))
def test_any_numbers_fold_and_expand(numbers: list[int]) -> None:
    names = [f"model.layers.{number}.w" for number in numbers]
    assert folded_names.expand(folded_names.fold(names)) == names


def test_braces_vary_together() -> None:
    name = "a.{0-1}.b.{4-5}"
    assert folded_names.expand(name) == ["a.0.b.4", "a.1.b.5"]
    assert folded_names.stands_for(name, "a.1.b.5")
    assert not folded_names.stands_for(name, "a.0.b.5")
    assert not folded_names.stands_for(name, "a.2.b.6")
    assert not folded_names.stands_for(name, "a.1")


@pytest.mark.parametrize("name", ["a.{}", "a.{x}", "a.{3-1}", "a.{0-3:0}", "a.{0-1}.{0-2}", "a.{0-9999999}", "a.{-1}"])
def test_wrong_ranges_are_refused_in_words(name: str) -> None:
    with pytest.raises(ValueError, match=r"range|numbers"):
        folded_names.expand(name)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("model.layers.3.mlp.w", "model.layers.#.mlp.w"),
        ("model.layers.{0-31}.mlp.w", "model.layers.#.mlp.w"),
        ("h.0.ln_1.weight", "h.#.ln_1.weight"),
        ("layer1.0.conv1.weight", "layer1.#.conv1.weight"),
        ("linear_13", "linear_#"),
        ("0.weight", "#.weight"),
        ("0", "#"),
    ],
)
def test_pattern_is_what_repeats_share(name: str, shared: str) -> None:
    assert folded_names.pattern(name) == shared
