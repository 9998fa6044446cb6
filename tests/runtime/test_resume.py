"""Training goes on from a checkpoint under another plan, with and without a pipeline, on more ranks and on fewer, as if it had never
been interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import autopar
from autopar.errors import RuntimeSetupError
from autopar.ir.plan import Plan
from autopar.runtime.verification.launch import RankPool
from tests.runtime.pipelined import example, planned
from tests.runtime.random_plans import float64

pytestmark = pytest.mark.processes
STEPS = 2


def batch(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    _, inputs = example("tiny")
    return {name: x[torch.randperm(len(x), generator=generator)].roll(step, 1) for name, x in inputs.items()}


def build(plan: Plan | None, cold: bool = False) -> tuple[Any, torch.optim.AdamW]:
    """The model under `plan` (None: on one device), and an optimizer with two groups of parameters."""
    model, inputs = example("tiny")
    if cold:
        for parameter in model.parameters():
            parameter.data.zero_()
    with float64():
        module: Any = autopar.parallelize(model, inputs, plan=plan)
    flat = [parameter for parameter in module.parameters() if parameter.dim() < 2]
    wide = [parameter for parameter in module.parameters() if parameter.dim() >= 2]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    return module, torch.optim.AdamW(groups, lr=1e-2, eps=1e-4)


def train(module: Any, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    losses = []
    for step in range(first, first + STEPS):
        optimizer.zero_grad()
        losses.append(float(module.step(**batch(step))))
        optimizer.step()
    return losses


def go_on(plan: Plan | None, load: str | None, save: str | None, first: int, how: str) -> list[float]:
    """On a rank: load, train, save."""
    module, optimizer = build(plan, cold=load is not None)
    options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
    if load is not None:
        if how == "ours":
            state = {"model": module.state_dict(), "optimizer": autopar.optimizer_state_dict(module, optimizer)}
            dcp.load(state, checkpoint_id=load)
            module.load_state_dict(state["model"])
            autopar.load_optimizer_state_dict(module, optimizer, state["optimizer"])
        else:
            model_state, optimizer_state = get_state_dict(module, optimizer, options=options)
            state = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(state, checkpoint_id=load)
            set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    losses = train(module, optimizer, first)
    if save is not None:
        model_state, optimizer_state = get_state_dict(module, optimizer, options=options)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=save)
    return losses


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    found = {
        "pp2": planned("tiny", {"pp": 2, "dp": 1, "tp": 1}, 2),
        "pp2 tp2": planned("tiny", {"pp": 2, "dp": 1, "tp": 2}, 2, "gpipe"),
        "dp2": planned("tiny", {"dp": 2, "tp": 1}),
    }
    # The tied weight in other parts on the first group than on the last.
    plan = found["pp2 tp2"]
    rows = [
        row.model_copy(update={"stored": {"dp": "R", "tp": "S(0)" if row.stage else "S(1)"}}) if "embed" in row.name else row
        for row in plan.parameters
    ]
    found["pp2 tp2"] = plan.model_copy(update={"parameters": tuple(rows)})
    return found


@pytest.mark.parametrize("how", ["ours", "torch's", "flat"])
def test_one_loss_curve_under_four_plans(ranks2: RankPool, ranks4: RankPool, plans: dict[str, Plan], tmp_path: Path, how: str) -> None:
    model, optimizer = build(None)
    expected = [train(model, optimizer, first) for first in (0, STEPS, 2 * STEPS, 3 * STEPS)]
    stops = [None, *(str(tmp_path / str(index)) for index in range(3)), None]
    stations = [(ranks4, "pp2 tp2"), (ranks2, "dp2"), (ranks2, "pp2"), (ranks4, "pp2 tp2")]
    for index, (ranks, name) in enumerate(stations):
        for losses in ranks.run(go_on, plans[name], stops[index], stops[index + 1], index * STEPS, how):
            assert losses == pytest.approx(expected[index], rel=1e-12), name


def one_file(plan: Plan) -> tuple[dict[str, Any], dict[str, Any], list[float], list[str]]:
    """On a rank: whole state dicts on rank 0, and into a fresh module."""
    module, optimizer = build(plan)
    train(module, optimizer, 0)
    weights = autopar.full_state_dict(module)
    state = autopar.optimizer_state_dict(module, optimizer, full=True)
    assert bool(weights) == bool(state) == (dist.get_rank() == 0)
    fresh, fresh_optimizer = build(plan, cold=True)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, dict(weights), options=options)
    autopar.load_optimizer_state_dict(fresh, fresh_optimizer, state)
    refused = []
    for call in (
        lambda: get_model_state_dict(module, options=StateDictOptions(full_state_dict=True)),
        lambda: get_optimizer_state_dict(module, optimizer, options=StateDictOptions(full_state_dict=True)),
        lambda: set_optimizer_state_dict(module, optimizer, state, options=options),
    ):
        try:
            call()
        except RuntimeSetupError as error:
            refused.append(str(error))
    return weights, state, train(fresh, fresh_optimizer, STEPS), refused


def test_whole_state_dicts(ranks2: RankPool, ranks4: RankPool, plans: dict[str, Plan]) -> None:
    model, optimizer = build(None)
    train(model, optimizer, 0)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {names[id(parameter)]: state["exp_avg"].clone() for parameter, state in optimizer.state.items()}
    losses = train(model, optimizer, STEPS)
    for ranks, name in ((ranks2, "pp2"), (ranks4, "pp2 tp2")):
        results = ranks.run(one_file, plans[name])
        weights, state, _, _ = results[0]
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-9, atol=1e-12)
        assert state["state"].keys() == moments.keys()
        for key, tensor in moments.items():
            torch.testing.assert_close(state["state"][key]["exp_avg"], tensor, rtol=1e-9, atol=1e-12)
        assert sorted(item for group in state["param_groups"] for item in group["params"]) == sorted(moments)
        for _, _, found, refused in results:
            assert found == pytest.approx(losses, rel=1e-12)
            assert len(refused) == 3 and all("autopar." in message for message in refused)


def with_masks(plan: Plan, folder: str, resumed: bool) -> list[float]:
    """On a rank: train under dropout, and save half-way; or go on from there in a run that began from another seed."""
    model, inputs = example("tiny", dropout=0.5)
    torch.manual_seed(int(resumed))
    with float64():
        module: Any = autopar.parallelize(model, inputs, plan=plan)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    state = {"model": module.state_dict(), "random": module.random_state}
    if resumed:
        dcp.load(state, checkpoint_id=folder)
        module.load_state_dict(state["model"])
        return train(module, optimizer, STEPS)
    losses = train(module, optimizer, 0)
    dcp.save(state, checkpoint_id=folder)
    return losses + train(module, optimizer, STEPS)


@pytest.mark.parametrize("mesh", [{"pp": 2, "dp": 1, "tp": 1}, {"dp": 1, "tp": 2}])
def test_masks_of_dropout_go_on(mesh: dict[str, int], ranks2: RankPool, tmp_path: Path) -> None:
    plan = planned("tiny", mesh, 2, dropout=0.5)
    whole = ranks2.run(with_masks, plan, str(tmp_path), False)
    rest = ranks2.run(with_masks, plan, str(tmp_path), True)
    assert rest == [losses[STEPS:] for losses in whole]
