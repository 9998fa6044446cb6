"""What a reader of a plan must find in `print(plan)` and in `autopar show`."""

from __future__ import annotations

import io

import pytest
from hypothesis import HealthCheck, given, settings

from autopar.errors import PlanError
from autopar.ir.plan import Plan
from autopar.report.compare import compare
from autopar.report.show import show
from autopar.report.terminal import console
from tests.report.plans import plans
from tests.report.sample import sample_plan


def shown(plan: Plan, width: int = 160, full: bool = False) -> str:
    file = io.StringIO()
    show(plan, console(file, width), full)
    return file.getvalue()


@pytest.mark.parametrize("text", [str(sample_plan()), shown(sample_plan())], ids=["print", "show"])
def test_the_facts_are_there(text: str) -> None:
    for fact in [
        "LlamaForCausalLM",
        "dp 2 x tp 4 = 8 ranks",
        "800 ms a step",
        "at most 0.4% above the optimum",
        "53.0 GiB of 72.0 GiB per rank: fits, 19.0 GiB to spare",
        "activations 40.0 GiB",
        "sequence, attention heads, out features, in features, vocabulary",
        "self_attn.q_proj, k_proj, v_proj",
        "model.layers.{0-31} (x32)",
        "mlp.down_proj.weight",
        "reduce-scatter@tp 128 MiB",
        "no sharding rule, so every rank runs all of aten.div.Tensor",
        "rotary tables are computed on every rank",
        "model.layers.*.mlp.up_proj.weight to S(0)@tp",
    ]:
        assert fact in text, fact


def test_what_runs_in_some_repeats_only_says_so() -> None:
    """The first of 32 layers reads what comes from outside, and moves it; the others do not."""
    plan = sample_plan()
    first, *others = plan.collectives
    once = plan.model_copy(update={"collectives": (first.model_copy(update={"count": 1}), *others)})
    for text in (str(once), shown(once)):
        assert "all-gather@tp 128 MiB in 1 of 32" in text
        assert "reduce-scatter@tp 128 MiB in" not in text


def test_axes_of_one_rank_are_left_out() -> None:
    plan = sample_plan().model_copy(update={"mesh": {"dp": 1, "tp": 4}})
    assert "@dp" not in str(plan).split("collectives a step")[0]


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    plan = sample_plan(fits=False)
    for text in (str(plan), shown(plan)):
        assert "does not fit: 13.0 GiB are missing" in text
        assert "no plan was found that fits" in text


def test_an_optimal_plan_says_so() -> None:
    plan = sample_plan()
    optimal = plan.model_copy(update={"predicted": plan.predicted.model_copy(update={"lower_bound_s": plan.cost_s})})
    assert "optimal under the cost model" in str(optimal)
    assert "optimal" not in str(optimal.model_copy(update={"name": "ddp"}))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("full", [False, True])
def test_lines_keep_to_the_width_and_no_name_is_cut(width: int, full: bool) -> None:
    text = shown(sample_plan(), width, full)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_full_tells_every_operation_and_collective() -> None:
    plan = sample_plan()
    text = shown(plan, full=True)
    for segment in plan.segments:
        assert all(op.name in text for op in segment.ops)
    assert all(item.op in text for item in plan.collectives)


def test_depth_does_not_lengthen_the_report() -> None:
    assert len(str(sample_plan(8)).splitlines()) == len(str(sample_plan(80)).splitlines())


def test_piped_reports_are_plain_and_have_no_blanks_at_line_ends() -> None:
    file = io.StringIO()
    show(sample_plan(), console(file))
    text = file.getvalue()
    assert "\x1b" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans())
def test_every_sound_plan_can_be_shown(plan: Plan) -> None:
    assert str(plan)
    assert shown(plan, 80)
    assert shown(plan, 120, full=True)


def test_markup_in_names_is_text() -> None:
    plan = sample_plan()
    odd = plan.model_copy(update={"model": plan.model.model_copy(update={"name": "[bold]Net[/nothing]"}), "notes": ("[red]x[/blue]",)})
    assert "[bold]Net[/nothing]" in shown(odd)
    assert "[red]x[/blue]" in shown(odd)


def test_compare_tells_the_price_of_each_and_why_one_cannot_be() -> None:
    file = io.StringIO()
    slow = sample_plan(name="ddp", fits=False)
    slow = slow.model_copy(update={"predicted": slow.predicted.model_copy(update={"cost_s": 1.6})})
    compare({"searched": sample_plan(), "ddp": slow, "tp": PlanError("8 heads cannot be split\nover 16 ranks")}, console(file))
    text = file.getvalue()
    assert "x2.00" in text
    assert "does not fit: 13.0 GiB missing" in text
    assert "cannot: 8 heads cannot be split over 16 ranks" in text
