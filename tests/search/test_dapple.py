"""benchmarks/dapple.py on a small profile: prices by hand, plans that are given, the printed line."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from autopar.errors import PlanError
from autopar.search.stages.profile import parse_profile
from autopar.search.stages.stage_costs import Devices, Group


def _load() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks/dapple.py"
    spec = importlib.util.spec_from_file_location("dapple_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


dapple: Any = _load()

# Four layers with much activation and few parameters, then one of the opposite: where hybrids win.
LAYERS = "".join(
    f"node{place} -- conv{place} -- forward_compute_time=4, backward_compute_time=8, activation_size=4000000, parameter_size=1000000\n"
    for place in range(1, 5)
)
LAYERS += "node5 -- fc -- forward_compute_time=1, backward_compute_time=2, activation_size=1000, parameter_size=400000000\n"
TOY = LAYERS + "".join(f"\tnode{place} -- node{place + 1}\n" for place in range(1, 5))


def costs(config: str = "B", global_batch: int = 64, whole: bool = False) -> Any:
    profile = parse_profile(TOY, 4, "toy-pbs-4")
    return dapple.ProfiledCosts(profile, dapple.units_of(profile), dapple.CONFIGS[config], global_batch, whole, 4.0)


def test_prices_by_hand() -> None:
    (cost,) = costs().options(0, 2, Group(((0, 1), (1, 1))), 4, 1)
    samples = 64 / 4 / 2
    assert cost.forward_s == pytest.approx(samples * 2 * 4e-3 / 4)
    assert cost.backward_s == pytest.approx(samples * 2 * 8e-3 / 4)
    assert cost.after_s == pytest.approx(2 * 2e6 * (1 / 2) / 3e9)
    assert cost.fixed_bytes == 4 * 2e6
    assert cost.live_bytes == pytest.approx(samples * 2 * 1e6)
    (slow,) = costs("C").options(0, 2, Group(((0, 1), (1, 1))), 4, 1)
    assert slow.after_s == pytest.approx(cost.after_s * 2.5)
    (inside,) = costs("A").options(0, 2, Group(((0, 2),)), 4, 1)
    assert inside.after_s == pytest.approx(2 * 2e6 * (1 / 2) / 25e9)


def test_whole_samples_are_the_largest_replicas() -> None:
    three = Group(((0, 1), (1, 1), (2, 1)))
    assert costs(whole=True).options(0, 1, three, 8, 1)[0].forward_s == pytest.approx(3 * 1e-3)
    assert costs().options(0, 1, three, 8, 1)[0].forward_s == pytest.approx(8 / 3 * 1e-3)


def test_transfers() -> None:
    size = 64 / 4 * 1e6  # of a microbatch
    one, other = Group(((0, 1),)), Group(((1, 1),))
    assert costs().transfer(2, one, other, 4) == pytest.approx((size / 1e9, size / 1e9))
    assert costs("C").transfer(2, one, other, 4) == pytest.approx((size / 0.4e9, size / 0.4e9))
    near = costs("A")
    assert near.transfer(2, Group(((0, 4),)), Group(((0, 2),)), 4) == pytest.approx((size / 2 / 25e9,) * 2)
    assert near.transfer(2, Group(((0, 8),)), Group(((1, 8),)), 4) == pytest.approx((size / 1e9,) * 2)
    # Receivers take from their own machine what is there: half of all has to move.
    assert near.transfer(2, Group(((0, 4), (1, 4))), Group(((1, 2),)), 4) == pytest.approx((size / 2 / 1e9,) * 2)


def test_microbatches_have_at_least_the_profiles_batch() -> None:
    assert dapple.microbatch_counts(64, 4) == (1, 2, 4, 8, 16)
    assert dapple.microbatch_counts(2, 4) == (1,)


def test_many_layers_make_fewer_units() -> None:
    count = 2 * dapple.MOST_UNITS
    lines = [
        f"n{place} -- l{place} -- forward_compute_time={1 + place % 2 * 9}, backward_compute_time=0, activation_size=1, parameter_size=1\n"
        for place in range(count)
    ]
    profile = parse_profile("".join(lines) + "".join(f"n{place} -- n{place + 1}\n" for place in range(count - 1)), 1, "long")
    bounds = dapple.units_of(profile, (1, 7))
    assert len(bounds) - 1 == dapple.MOST_UNITS
    assert bounds[0] == 0 and bounds[-1] == count and {1, 7} <= set(bounds)
    assert max(stop - start for start, stop in itertools.pairwise(bounds)) <= 3


def test_given_stages() -> None:
    profile = parse_profile(TOY, 4, "toy")
    assert dapple.read_stages("data-parallel", profile, 16) == dapple.Wanted((16,), (0,))
    assert dapple.read_stages("straight", profile, 16) == dapple.Wanted((1,) * 16, None)
    assert dapple.read_stages("15:conv1, 1:fc", profile, 16) == dapple.Wanted((15, 1), (0, 4))
    assert dapple.read_stages("15,1", profile, 16) == dapple.Wanted((15, 1), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [("15:conv1,2:fc", "take 17 devices"), ("15:conv1,1:nothing", "no layer 'nothing'"), ("x:conv1", "write devices and first layer"),
     ("15:fc,1:conv1", "in order"), ("15:conv1,1", "first layer of every stage")],
)  # fmt: skip
def test_given_stages_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        dapple.read_stages(text, parse_profile(TOY, 4, "toy"), 16)


def test_prints_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dapple.CONFIGS, "B", dapple.Machines(Devices(4, 1), 1.0))
    path = tmp_path / "toy-5-pbs-4.txt"
    path.write_text(TOY)
    given = [str(path), "--config", "B", "--global-batch", "64"]
    assert dapple.main([*given, "--paper", "data-parallel"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ratio"] > 1.2  # the layer with the parameters has a device of its own
    assert said["found"]["stages"][-1] == {"devices": 1, "machines": 1, "layers": 1, "first": "fc", "last": "fc"}
    assert said["lower_bound_s"] == pytest.approx(said["found"]["step_s"], rel=2e-3)
    assert [row["stages"] for row in said["by_stages"]] == [1, 2, 3, 4]
    assert dapple.main([*given, "--paper", "3,1"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["ratio"] == pytest.approx(1.0, abs=2e-3)
    assert again["paper"]["stages"] == again["found"]["stages"]


def test_errors_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "toy-5-pbs-4.txt"
    path.write_text(TOY.replace("=4,", "=four,", 1))
    assert dapple.main([str(path), "--config", "B", "--global-batch", "64"]) == 2
    assert "toy-5-pbs-4.txt:1: layer conv1: forward_compute_time is 'four'" in capsys.readouterr().err
