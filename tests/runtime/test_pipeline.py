"""`PipelineModule` on real ranks, under random plans with stages, against the model on one device; and what users do with one."""

from __future__ import annotations

import copy
import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import InputError, PlanError, RanksFailedError, RuntimeSetupError
from autopar.ir.pipelining.schedule_check import live_by_stage
from autopar.ir.pipelining.schedules import named
from autopar.ir.placement import R
from autopar.ir.plan import Plan
from autopar.runtime.convert import Place
from autopar.runtime.lower import Borders, lower
from autopar.runtime.operators.alike import draws
from autopar.runtime.operators.dropout import without_dropout
from autopar.runtime.pipelining.pipeline import PipelineModule
from autopar.runtime.pipelining.pipeline_schedule import PipelineStage
from autopar.runtime.pipelining.pipeline_stage import LiveStage
from autopar.runtime.sampler import batch_part, batch_parts
from autopar.runtime.state.checkpoint import accept_whole_tensors, whole_tensor
from autopar.runtime.verification.launch import RankPool
from tests.runtime import pipelined
from tests.runtime.pipeline_plans import Case, made, plan_of, prepared, run_case
from tests.runtime.random_plans import Facts, Wide, difference, float64
from tests.zoo import ZOO, talkative

ONE, DP, TP = (1, 1), (2, 1), (1, 2)

ON_TWO = [
    Case("gpt2", schedule="gpipe", microbatches=4),
    Case("gpt2", schedule="zbv", microbatches=4, stages_per_group=2, seed=1),
    Case("llama", schedule="1f1b", microbatches=1, seed=2),
    Case("llama", schedule="interleaved-1f1b", microbatches=4, stages_per_group=2, seed=3),
    Case("t5", schedule="1f1b", microbatches=2, seed=4),
    Case("t5", schedule="interleaved-zb", microbatches=4, stages_per_group=2, seed=5),
    Case("t5", schedule="zbv", microbatches=2, stages_per_group=2, seed=6),
    Case("unet", schedule="1f1b", microbatches=4, seed=7),
    Case("unet", schedule="interleaved-zb", microbatches=2, stages_per_group=2, seed=8),
    Case("unet-batch", schedule="1f1b", microbatches=1, seed=9),
    Case("bart", schedule="interleaved-1f1b", microbatches=2, stages_per_group=2, seed=10),
]

ON_FOUR = [
    Case("gpt2", (DP, TP), "1f1b", 2, seed=1),
    Case("gpt2", (ONE,) * 4, "1f1b", 4, seed=2),
    Case("gpt2", (TP, DP), "zbv", 2, 2, seed=3),
    Case("llama", (TP, TP), "interleaved-zb", 4, 2, seed=4),
    Case("t5", (ONE, (3, 1)), "1f1b", 2, seed=5),
    Case("t5", (DP, DP), "zbv", 4, 2, seed=6),
    Case("unet", (DP, ONE, ONE), "gpipe", 4, seed=7),
    Case("unet-batch", (DP, TP), "1f1b", 1, seed=8),
    Case("bart", (TP, DP), "interleaved-1f1b", 2, 2, seed=9),
]


def limit(case: Case) -> float:
    """Behind a batch norm the gradient of a bias is zero, and what is left of it rounding."""
    return 1e-9 if case.model == "unet-batch" else 1e-10


def name_of(case: Case) -> str:
    meshes = "+".join("x".join(map(str, mesh)) for mesh in case.meshes)
    return f"{case.model}-{meshes}-{case.schedule}-{case.microbatches}"


@pytest.mark.processes
@pytest.mark.parametrize("case", ON_TWO, ids=name_of)
def test_two_ranks_agree_with_one_device(case: Case, ranks2: RankPool) -> None:
    for error, where in ranks2.run(run_case, case):
        assert error < limit(case), where


@pytest.mark.processes
@pytest.mark.parametrize("case", ON_FOUR, ids=name_of)
def test_four_ranks_agree_with_one_device(case: Case, ranks4: RankPool) -> None:
    for error, where in ranks4.run(run_case, case):
        assert error < limit(case), where


# ---- training ------------------------------------------------------------------------------------------------------------------


def trained(case: Case) -> tuple[float, str, dict[str, Tensor]]:
    """Three steps of AdamW here and on one device: how far losses and parameters are apart; and this rank's parameters, whole."""
    model, args, kwargs, _ = prepared(case)
    one, module = copy.deepcopy(model), made(case)
    found: Facts = {}
    expected: Facts = {}
    ours = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4)
    theirs = torch.optim.AdamW(one.parameters(), lr=1e-2, eps=1e-4)
    with float64(), without_dropout(module), Wide(), without_dropout(one):
        for step in range(3):
            ours.zero_grad()
            found[f"loss {step}"] = module.step(*args, **kwargs)
            ours.step()
            theirs.zero_grad()
            loss = one(*args, **kwargs).loss
            loss.backward()
            theirs.step()
            expected[f"loss {step}"] = loss.detach()
    values = {name: whole_tensor(parameter) for name, parameter in module.named_parameters()}
    found |= values
    expected |= {name: parameter.detach() for name, parameter in one.named_parameters() if name in values}
    return *difference(expected, found), values


@pytest.mark.processes
def test_tied_weights_stay_equal_to_the_last_bit(ranks4: RankPool) -> None:
    results = ranks4.run(trained, Case("gpt2", (DP, TP), "1f1b", 2, seed=3))
    assert all(error < 1e-8 for error, _, _ in results), results
    ours, theirs = results[0][2], results[-1][2]
    shared = ours.keys() & theirs.keys()
    assert shared == {"transformer.wte.weight"}
    assert torch.equal(ours["transformer.wte.weight"], theirs["transformer.wte.weight"])


def accumulated(case: Case) -> tuple[float, str]:
    """Gradients of two batches: added up step by step, and under `no_sync`; and dropped by `zero_grad`."""
    _, args, kwargs, _ = prepared(case)
    module = made(case)
    worst = (0.0, "")
    with float64(), without_dropout(module):
        module.step(*args, **kwargs)
        once = gradients(module)
        module.step(*args, **kwargs)
        worst = max(worst, difference(once, {name: tensor / 2 for name, tensor in gradients(module).items()}))
        module.zero_grad()
        with module.no_sync():
            module.step(*args, **kwargs)
        assert all(parameter.grad is None for parameter in module.parameters())
        module.step(*args, **kwargs)
        worst = max(worst, difference(once, {name: tensor / 2 for name, tensor in gradients(module).items()}))
        with module.no_sync():
            module.step(*args, **kwargs)
        module.zero_grad()
        module.step(*args, **kwargs)
        return max(worst, difference(once, gradients(module)))


def gradients(module: nn.Module) -> Facts:
    return {f"gradient of {name}": whole_tensor(p.grad).clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.processes
@pytest.mark.parametrize("schedule, stages", [("1f1b", 1), ("zbv", 2)])
def test_gradients_accumulate(schedule: str, stages: int, ranks2: RankPool) -> None:
    for error, where in ranks2.run(accumulated, Case("gpt2", (ONE, ONE), schedule, 2, stages, seed=5)):
        assert error < 1e-10, where


def frozen(case: Case) -> tuple[set[str], float]:
    """Names with gradients where all but biases are frozen after the module was made; how far those are from one device's."""
    model, args, kwargs, _ = prepared(case)
    one, module = copy.deepcopy(model), made(case)
    for name, parameter in (*one.named_parameters(), *module.named_parameters()):
        parameter.requires_grad_(name.endswith("bias"))
    with float64(), without_dropout(module), Wide(), without_dropout(one):
        module.step(*args, **kwargs)
        one(*args, **kwargs).loss.backward()
    found = gradients(module)
    expected = {name: tensor for name, tensor in gradients(one).items() if name in found}
    return set(found), difference(expected, found)[0]


@pytest.mark.processes
def test_frozen_parameters_get_no_gradients(ranks2: RankPool) -> None:
    for names, error in ranks2.run(frozen, Case("gpt2", (ONE, ONE), "1f1b", 2)):
        assert names and all(name.endswith("bias") for name in names)
        assert error < 1e-10


# ---- evaluation, state, refusals -------------------------------------------------------------------------------------------------


def evaluated(case: Case) -> tuple[float, str]:
    """Outputs, in evaluation mode and under `no_grad`, between training steps, against one device."""
    model, args, kwargs, _ = prepared(case)
    module = made(case)
    expected: Facts = {}
    found: Facts = {}
    with float64(), without_dropout(module), Wide(), without_dropout(model):
        module.step(*args, **kwargs)
        module.eval()
        first = module(*args, **kwargs)
        module.train()
        with torch.no_grad():
            second = module(*args, **kwargs)
            theirs = model(*args, **kwargs)
    assert type(first) is type(theirs)
    for key, tensor in theirs.items():
        if isinstance(tensor, Tensor):
            assert not first[key].requires_grad
            expected |= {f"{key} 1": tensor, f"{key} 2": tensor}
            found |= {f"{key} 1": first[key], f"{key} 2": second[key]}
    return difference(expected, found)


@pytest.mark.processes
@pytest.mark.parametrize("case", [Case("t5", (DP, TP), "1f1b", 2), Case("llama", (ONE, (1, 3)), "interleaved-1f1b", 4, 2)], ids=name_of)
def test_outputs_are_whole_on_every_rank(case: Case, ranks4: RankPool) -> None:
    for error, where in ranks4.run(evaluated, case):
        assert error < 1e-10, where


def restored(case: Case) -> tuple[bool, set[str]]:
    """A whole state dict loads on every rank, and a rank's own into itself; returns the rank's names."""
    model, *_ = prepared(case)
    module = made(case)
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.register_load_state_dict_pre_hook(accept_whole_tensors)  # as `build` does
    module.load_state_dict(own)
    module.load_state_dict(model.state_dict())
    state, theirs = module.state_dict(), model.state_dict()
    assert all(not isinstance(tensor, DTensor) or tensor.device_mesh.mesh.numel() == 1 for tensor in state.values())
    return all(torch.equal(whole_tensor(tensor), theirs[name]) for name, tensor in state.items()), set(state)


@pytest.mark.processes
def test_state_dicts_hold_a_ranks_own_stages(ranks2: RankPool) -> None:
    (same, first), (also, second) = ranks2.run(restored, Case("gpt2", (ONE, ONE), "1f1b", 2, seed=1))
    assert same and also
    model, *_ = prepared(Case("gpt2"))
    assert first | second == model.state_dict().keys()
    assert first & second == {"transformer.wte.weight", "lm_head.weight"}


def refused(case: Case) -> list[str]:
    _, args, kwargs, _ = prepared(case)
    module = made(case)
    messages = []
    for call in (lambda: module(*args, **kwargs), lambda: torch.no_grad()(module.step)(*args, **kwargs), lambda: module.half()):
        with pytest.raises(RuntimeSetupError) as caught:
            call()
        messages.append(str(caught.value))
    with pytest.raises(InputError):
        module.step(*args, **{**kwargs, "input_ids": kwargs["input_ids"][:1]})
    module.step(*args, **kwargs)  # none of this does harm
    return messages


@pytest.mark.processes
def test_what_cannot_be_done_is_refused(ranks2: RankPool) -> None:
    for messages in ranks2.run(refused, Case("llama")):
        assert "module.step" in messages[0]
        assert "no_grad" in messages[1]
        assert "cannot move" in messages[2]


def parts_of_the_batch(plan: Plan) -> tuple[Facts, Facts]:
    """The same step from whole batches, and from what this rank has of every microbatch."""
    model, inputs = pipelined.example("llama")
    parts, index = batch_part(plan, torch.distributed.get_rank())
    rows = torch.arange(4).view(plan.microbatches, parts, -1)[:, index].flatten()
    found = []
    with float64():
        for how, given in (("global", inputs), ("per-rank", {name: tensor[rows] for name, tensor in inputs.items()})):
            module = autopar.parallelize(model, given if how == "global" else inputs, plan=plan, inputs=how)  # type: ignore[arg-type]
            found.append({"loss": module.step(**given)} | gradients(module))
    return found[0], found[1]


@pytest.mark.processes
def test_every_rank_may_pass_its_part_of_the_batch(ranks4: RankPool) -> None:
    plan = pipelined.planned("llama", {"pp": 2, "dp": 2, "tp": 1}, 2)
    assert batch_parts(plan) == 2
    for whole, apart in ranks4.run(parts_of_the_batch, plan):
        assert difference(whole, apart)[0] < 1e-12


def late() -> str:
    model = ZOO["llama"].build()
    plan = autopar.plan(model, ZOO["llama"].inputs(model), "cpu:2", mesh={"pp": 2, "dp": 1, "tp": 1}, microbatches=2, schedule="1f1b")
    with pytest.raises(PlanError) as caught:
        autopar.parallelize(model, plan=plan)
    return str(caught.value)


@pytest.mark.processes
def test_a_pipeline_needs_example_inputs(ranks2: RankPool) -> None:
    assert all("pass `example_inputs`" in message for message in ranks2.run(late))


# ---- what is alive, and where masks come from ------------------------------------------------------------------------------------


def alive(case: Case) -> dict[int, int]:
    """By stage of this rank, the most microbatches that had an autograd graph at once."""
    _, args, kwargs, _ = prepared(case)
    module = made(case)
    peaks: dict[int, int] = {}
    keep = LiveStage._keep

    def noted(stage: LiveStage, *arguments: Any) -> None:
        keep(stage, *arguments)
        held = stage._alive.keys() | stage._owed.keys()
        peaks[stage.stage.index] = max(peaks.get(stage.stage.index, 0), len(held))

    LiveStage._keep = noted  # type: ignore[method-assign]
    try:
        with float64(), without_dropout(module):
            module.step(*args, **kwargs)
    finally:
        LiveStage._keep = keep  # type: ignore[method-assign]
    assert not any(stage.live._alive or stage.live._owed for stage in module._stages)
    return peaks


@pytest.mark.processes
@pytest.mark.parametrize("schedule, stages", [("gpipe", 1), ("1f1b", 1), ("zbv", 2)])
def test_as_many_microbatches_are_alive_as_the_schedule_says(schedule: str, stages: int, ranks2: RankPool) -> None:
    case = Case("llama", (ONE, ONE), schedule, 4, stages)
    found = {stage: count for peaks in ranks2.run(alive, case) for stage, count in peaks.items()}
    expected = live_by_stage(named(schedule).orders(2, stages, 4))
    assert found == dict(enumerate(expected))


def gathered(case: Case) -> tuple[float, int, int]:
    """Of parameters that are gathered for use: their bytes in all, the most that were there between two actions, and those there after
    the step."""
    _, args, kwargs, _ = prepared(case)
    module = made(case)
    for stage in module._stages:
        for bucket in stage.live._buckets:
            bucket.keep = False
    buckets = [bucket for stage in module._stages for bucket in stage.live._buckets]
    most = 0
    perform = PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk

    def here() -> int:
        return sum(leaf.data.untyped_storage().nbytes() for bucket in buckets for leaf in bucket.leaves)

    def noting(action: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            nonlocal most
            result = action(*arguments, **options)
            most = max(most, here())
            return result

        return noted

    PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk = map(noting, perform)  # type: ignore[method-assign]
    try:
        with float64(), without_dropout(module):
            module.step(*args, **kwargs)
    finally:
        PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk = perform  # type: ignore[method-assign]
    total = sum(leaf.data.shape.numel() * leaf.data.element_size() for bucket in buckets for leaf in bucket.leaves)
    return most / total, here(), len(buckets)


@pytest.mark.processes
def test_what_is_gathered_for_use_is_freed_between_actions(ranks2: RankPool) -> None:
    case = Case("llama", (DP,), "interleaved-1f1b", 2, 2, seed=3, sizes=(("layers", 8),), stored="S(0)")
    for share, left, count in ranks2.run(gathered, case):
        assert count > 6
        assert share < 0.5
        assert left == 0


@pytest.mark.processes
def test_all_stages_on_one_group(ranks2: RankPool) -> None:
    for schedule in ("interleaved-1f1b", "zbv"):
        for error, where in ranks2.run(run_case, Case("gpt2", (DP,), schedule, 2, 2, seed=4)):
            assert error < 1e-10, where


def test_no_two_operations_draw_the_same_mask() -> None:
    case = Case("gpt2", (DP, ONE), seed=1)
    _, _, _, traced = prepared(case)
    _, expanded = plan_of(case, traced.graph)
    drawn: list[int] = []
    draws_of_all = draws(traced.graph)
    for stage, assignment in zip(expanded.stages, expanded.assignments, strict=True):
        for index in range(assignment.mesh[0]):
            place = Place(assignment.mesh, (index, 0), ("", ""))
            borders = Borders(
                {},
                {item.value: assignment.storage[item.fqn].stored for item in stage.graph.parameters},
                ((R, R),) * len(stage.graph.outputs),
            )
            program = lower(stage.graph, assignment, place, borders, torch.device("cpu"), drawn=draws_of_all)
            drawn += _parts_drawn(program)
    by_op: dict[int, set[int]] = {}
    for number in drawn:
        by_op.setdefault(number >> 32, set()).add(number)
    assert len(by_op) == sum(op.target == "autopar.dropout" for op in expanded.microbatched.body.ops) > 2


def _parts_drawn(program: Any) -> list[int]:
    return [node.args[2] for node in program.graph.nodes if node.op == "call_function" and node.target.__name__ == "dropout"]


def recomputed(plans: list[Plan]) -> list[Facts]:
    """Loss and gradients of the same step, with dropout, under each of `plans`."""
    found = []
    for plan in plans:
        model, inputs = pipelined.example("gpt2", dropout=0.3, layers=4)
        with float64():
            module = autopar.parallelize(model, inputs, plan=plan)
            found.append({"loss": module.step(**inputs)} | gradients(module))
    return found


@pytest.mark.processes
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_recomputation_changes_nothing(schedule: str, ranks2: RankPool) -> None:
    mesh = {"pp": 2, "dp": 1, "tp": 1}
    plans = [pipelined.planned("gpt2", mesh, 2, schedule, recompute, dropout=0.3, layers=4) for recompute in (0, 1)]
    assert any(segment.recompute for segment in plans[1].segments)
    for plain, again in ranks2.run(recomputed, plans):
        assert difference(plain, again)[0] < 1e-12


def masked(plan: Plan) -> list[Tensor]:
    """The loss of three steps with dropout from one seed, and of three more from the same."""
    model, inputs = pipelined.example("gpt2", dropout=0.3)
    losses = []
    for _ in range(2):
        torch.manual_seed(7)
        with float64():
            module = autopar.parallelize(model, inputs, plan=plan)
            losses += [module.step(**inputs) for _ in range(3)]
    return losses


@pytest.mark.processes
def test_masks_follow_the_seed(ranks2: RankPool) -> None:
    results = ranks2.run(masked, pipelined.planned("gpt2", {"pp": 2, "dp": 1, "tp": 1}, 2, "gpipe", dropout=0.3))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    losses = [float(loss) for loss in results[0]]
    assert losses[:3] == losses[3:]
    assert len(set(losses[:3])) == 3


class TwoScalars(nn.Module):
    """Its loss is the first of two scalars, and needs the first half of its layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers[0](x)
        other = self.layers[1](x)
        for layer in self.layers[2:]:
            other = torch.tanh(layer(other))
        return y.pow(2).mean(), other.mean()


@pytest.mark.processes
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_what_the_loss_does_not_reach_has_no_gradient(schedule: str, ranks2: RankPool) -> None:
    model, x = TwoScalars(), torch.randn(8, 8)
    plan = autopar.plan(model, x, talkative(2), mesh={"pp": 2, "dp": 1, "tp": 1}, schedule=schedule, microbatches=2)
    report = autopar.verify(model, x, plan, steps=2, ranks=ranks2)
    assert report.ok, report


# ---- ranks that are lost ---------------------------------------------------------------------------------------------------------


def losing(case: Case, how: str, at: int) -> str:
    """Rank 1 ends, or stops, in the middle of its second step; what the others are told, or that they were not."""
    _, args, kwargs, _ = prepared(case)
    torch.distributed.barrier()  # making groups has the same limit of time
    module = made(case, timeout_s=4.0)
    rank = torch.distributed.get_rank()
    with float64(), without_dropout(module):
        module.step(*args, **kwargs)
        if rank == 1:
            forward = LiveStage.forward

            def failing(stage: LiveStage, microbatch: int, *arguments: Any, **options: Any) -> Any:
                if microbatch == at:
                    if how == "dies":
                        raise ValueError("no luck")
                    time.sleep(60)
                return forward(stage, microbatch, *arguments, **options)

            LiveStage.forward = failing  # type: ignore[method-assign]
        started = time.monotonic()
        try:
            module.step(*args, **kwargs)
        except autopar.errors.PeerError as error:
            assert time.monotonic() - started < 40
            with pytest.raises(RuntimeSetupError, match="cannot go on"):
                module.step(*args, **kwargs)
            raise RuntimeError(f"told: {error}") from None
        except ValueError:
            os._exit(7)
    return "not told"


@pytest.mark.processes
@pytest.mark.parametrize("how", ["dies", "stops"])
def test_a_lost_rank_ends_the_others(how: str) -> None:
    with RankPool(2, threads=1, collective_timeout_s=60) as pool, pytest.raises(RanksFailedError) as caught:
        pool.run(losing, Case("unet", microbatches=4), how, 2, timeout_s=120)
    told = caught.value.failures[0][0]
    assert "told: rank 0 lost rank 1 while" in told, told
    assert "of microbatch" in told
    assert how != "dies" or "rank 1 had raised ValueError: no luck" in told


def test_the_module_is_public() -> None:
    assert issubclass(PipelineModule, nn.Module)
