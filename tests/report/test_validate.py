"""Contradictions that the file alone shows. Against models: tests/cli."""

from __future__ import annotations

import pytest

from autopar.ir.plan import Plan
from autopar.report.validate import contradictions
from tests.report.sample import sample_plan


def test_a_sound_plan_has_none() -> None:
    assert contradictions(sample_plan()) == []


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ('"gather": "use"', '"gather": "never"', "stored split on `dp` and used whole"),
        (
            '"R"}, "gather": "never", "used": {"dp": "R/P", "tp": "R/P"}',
            '"R"}, "gather": "step", "used": {"dp": "R", "tp": "R"}',
            "used as it is stored",
        ),
        ('"cost_s": 0.8', '"cost_s": 0.9', "add up to"),
        ('"dp": 2, "tp": 4}', '"dp": 4, "tp": 4}', "16 ranks and the cluster 8 devices"),
        ('{0-31}.mlp.up_proj', '{0-30}.mlp.up_proj', "the parameters listed have"),
    ],
)  # fmt: skip
def test_contradictions_are_told(good: str, bad: str, message: str) -> None:
    text = sample_plan().text()
    assert good in text
    found = contradictions(Plan.parse(text.replace(good, bad, 1)))
    assert any(message in line for line in found), found
