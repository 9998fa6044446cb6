"""From model and plan to a training module on real processes: what works, and that what does not ends every rank with a clear error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

import autopar
from autopar.errors import AutoparError
from autopar.ir.cluster import resolve
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import TracedModel, split_example, trace
from autopar.runtime.build import build
from autopar.runtime.module import ParallelModule
from autopar.runtime.process_mesh import mesh_for
from autopar.runtime.sampler import batch_part
from autopar.runtime.state.checkpoint import whole_tensor
from autopar.runtime.verification.launch import RankPool
from autopar.search.planner import plan_graph
from tests.zoo import ZOO, talkative

TIMEOUT_S = 120.0


def traced(model: nn.Module, example: Any) -> TracedModel:
    return trace(model, *split_example(example))


def attempt(call: Callable[[], Any]) -> str:
    try:
        call()
    except AutoparError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@dataclass(frozen=True)
class Made:
    """The one-layer Llama of the zoo, traced, and plans for it on 4 ranks by name."""

    traced: TracedModel
    plans: dict[str, Plan]


@pytest.fixture(scope="module")
def llama() -> Made:
    model = ZOO["llama"].build(layers=1)
    whole = traced(model, ZOO["llama"].inputs(model))
    graph = whole.graph
    four, two = resolve("cpu:4"), resolve("cpu:2")
    made = {name: plan_graph(graph, four, baseline=name) for name in ("ddp", "fsdp", "tp")}
    made["other mesh"] = plan_graph(graph, two, baseline="ddp")
    # A batch axis and an axis that splits the weights.
    pins = {"*.up_proj.weight": "S(0)@tp", "*.down_proj.weight": "S(1)@tp"}
    made["mixed"] = plan_graph(graph, talkative(4), mesh=(2, 2), pins=pins)
    return Made(whole, made)


def losses(module: nn.Module, example: Any, steps: int = 2) -> list[float]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = module(**example).loss
        loss.backward()
        autopar.clip_grad_norm_(module, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def train_and_move(llama: Made, path: str) -> dict[str, Any]:
    """Train under one plan, save, go on under another; the losses must be those of one device that never stopped."""
    rank = dist.get_rank()
    model = ZOO["llama"].build(layers=1, seed=rank)  # rank 0's values count
    example = ZOO["llama"].inputs(model)
    made, plans = llama.traced, llama.plans
    module = build(model, made, plans["mixed"], timeout_s=TIMEOUT_S)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    found: dict[str, Any] = {"first": [], "second": []}

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, into: list[float]) -> None:
        optimizer.zero_grad()
        loss = module(**example).loss
        loss.backward()
        autopar.clip_grad_norm_(module, 0.5)
        optimizer.step()
        into.append(loss.item())

    for _ in range(2):
        step(module, optimizer, found["first"])
    dcp.save({"model": module.state_dict(), "optimizer": autopar.optimizer_state_dict(module, optimizer)}, checkpoint_id=path)
    other = build(ZOO["llama"].build(layers=1, device="meta"), made, plans["fsdp"], timeout_s=TIMEOUT_S)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
    loaded = {"model": other.state_dict(), "optimizer": autopar.optimizer_state_dict(other, theirs)}
    dcp.load(loaded, checkpoint_id=path)
    other.load_state_dict(loaded["model"])
    autopar.load_optimizer_state_dict(other, theirs, loaded["optimizer"])
    for _ in range(2):
        step(other, theirs, found["second"])
    found["names"] = [name for name, _ in other.named_parameters()]
    found["whole"] = autopar.full_state_dict(other)
    found["sharded"] = any(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in other.parameters())
    # The first module still is what it was: two plans on two meshes do not disturb each other.
    found["module again"] = attempt(lambda: step(module, optimizer, found["first"]))
    return found


def reference() -> tuple[list[float], nn.Module]:
    model = ZOO["llama"].build(layers=1, seed=0)
    example = ZOO["llama"].inputs(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**example).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        found.append(loss.item())
    return found, model


@pytest.mark.processes
def test_train_save_and_go_on_under_another_plan(ranks4: RankPool, llama: Made, tmp_path: Path) -> None:
    expected, model = reference()
    results = ranks4.run(train_and_move, llama, str(tmp_path / "checkpoint"))
    for rank, found in enumerate(results):
        assert found["first"][:2] + found["second"] == pytest.approx(expected, rel=1e-5)
        assert found["first"][2] == pytest.approx(expected[2], rel=1e-5) and found["module again"] == "" and found["sharded"]
        assert found["names"] == [name for name, _ in model.named_parameters()]
        assert bool(found["whole"]) == (rank == 0)
    assert results[0]["whole"].keys() == model.state_dict().keys()
    model.load_state_dict(results[0]["whole"])


def per_rank_inputs(llama: Made) -> dict[str, Any]:
    model = ZOO["llama"].build(layers=1)
    example = ZOO["llama"].inputs(model)
    made, plans = llama.traced, llama.plans
    found = {}
    for name in ("ddp", "mixed", "tp"):
        parts, index = batch_part(plans[name], dist.get_rank())
        module = build(model, made, plans[name], inputs="per-rank", timeout_s=TIMEOUT_S)
        mine = {key: value.chunk(parts)[index] for key, value in example.items()}
        found[name] = (parts, module(**mine).loss.item())
    return found


@pytest.mark.processes
def test_per_rank_inputs(ranks4: RankPool, llama: Made) -> None:
    expected = reference()[0][0]
    for found in ranks4.run(per_rank_inputs, llama):
        assert found["ddp"][0] == 4 and found["tp"][0] == 1 and found["mixed"][0] in (2, 4)
        assert [loss for _, loss in found.values()] == pytest.approx([expected] * 3, rel=1e-5)


def refusals(llama: Made) -> dict[str, str]:
    odd = dist.get_rank() == 2
    model = ZOO["llama"].build(layers=1)
    example = ZOO["llama"].inputs(model)
    made, plans = llama.traced, llama.plans
    found = {"mesh": attempt(lambda: build(model, made, plans["other mesh"], timeout_s=TIMEOUT_S))}
    found["plan"] = attempt(lambda: build(model, made, plans["fsdp" if odd else "ddp"], timeout_s=TIMEOUT_S))
    found["mode"] = attempt(lambda: build(model, made, plans["ddp"], inputs="per-rank" if odd else "global", timeout_s=TIMEOUT_S))
    deeper = ZOO["llama"].build(layers=2)
    found["another model"] = attempt(lambda: build(deeper, traced(deeper, example), plans["ddp"], timeout_s=TIMEOUT_S))
    changed = ZOO["llama"].build(layers=1)
    changed.model.norm.weight = nn.Parameter(torch.ones(3)) if odd else changed.model.norm.weight
    found["a changed model on one rank"] = attempt(lambda: build(changed, made, plans["ddp"], timeout_s=TIMEOUT_S))
    batch = {key: value.flip(0) if odd else value for key, value in example.items()}
    found["batch"] = attempt(lambda: build(model, made, plans["ddp"], timeout_s=TIMEOUT_S)(**batch))
    short = {key: value[:2] if odd else value for key, value in example.items()}
    module = build(model, made, plans["ddp"], timeout_s=TIMEOUT_S)
    found["shape"] = attempt(lambda: module(**short))
    module(**example)
    found["later shape"] = attempt(lambda: module(**{key: value[:2] for key, value in example.items()}))
    return found


@pytest.mark.processes
def test_what_does_not_fit_ends_every_rank(ranks4: RankPool, llama: Made) -> None:
    for rank, found in enumerate(ranks4.run(refusals, llama)):
        odd = rank == 2
        assert "PlanMismatchError" in found["mesh"] and "a mesh of 2 ranks (dp=2, tp=1), but this job has 4" in found["mesh"]
        assert found["plan"].startswith("RankDisagreementError") and "rank 2: the plan is" in found["plan"]
        assert "rank 2: `inputs` is per-rank, but global on ranks 0, 1, 3" in found["mode"]
        assert found["another model"].startswith("PlanMismatchError")
        message = found["a changed model on one rank"]
        assert "`model.norm.weight` was traced as [64]" in message and message.startswith("PlanMismatch" if odd else "RankDisagreement")
        assert found["batch"].startswith("RankDisagreementError") and "rank 2: input `input_ids`" in found["batch"]
        assert found["shape"].startswith("InputError") and "has shape [2, 16], expected [4, 16]" in found["shape"]
        assert ("rank 2" in found["shape"]) != odd
        assert found["later shape"].startswith("InputError")


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def move_blocks_and_tied_weights(made: TracedModel, there: Plan, here: Plan, path: str) -> tuple[list[float], list[float], bool]:
    """Train, save with PyTorch's own tools, load under another plan; the losses of going on here and there."""
    model = ZOO["gpt2"].build(layers=1, **NO_DROPOUT)
    example = ZOO["gpt2"].inputs(model)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = module(**example).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    one = build(model, made, there, timeout_s=TIMEOUT_S)
    optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
    step(one, optimizer)
    model_state, optimizer_state = get_state_dict(one, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    other = build(ZOO["gpt2"].build(layers=1, device="meta", **NO_DROPOUT), made, here, timeout_s=TIMEOUT_S)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
    model_state, optimizer_state = get_state_dict(other, theirs)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=path)
    set_state_dict(other, theirs, model_state_dict=model_state, optim_state_dict=optimizer_state)
    model.load_state_dict(autopar.full_state_dict(other) or model.state_dict())
    return (
        [step(one, optimizer) for _ in range(2)],
        [step(other, theirs) for _ in range(2)],
        other.lm_head.weight is other.transformer.wte.weight,
    )


@pytest.mark.processes
def test_blocks_and_tied_weights_move(ranks2: RankPool, tmp_path: Path) -> None:
    model = ZOO["gpt2"].build(layers=1, **NO_DROPOUT)
    made = traced(model, ZOO["gpt2"].inputs(model))
    there, here = (plan_graph(made.graph, resolve("cpu:2"), baseline=name) for name in ("tp", "fsdp"))
    assert any("S(1, 3)" in item.stored.values() for item in there.parameters)  # a fused query-key-value weight, by heads
    for stayed, moved, tied in ranks2.run(move_blocks_and_tied_weights, made, there, here, str(tmp_path / "checkpoint")):
        assert moved == pytest.approx(stayed, rel=1e-5) and tied


def compiled(plan: Plan) -> tuple[list[float], list[float], bool]:
    model = ZOO["convnet"].build(layers=1)
    example = ZOO["convnet"].inputs(model)
    found = []
    for compile_it in (False, True):
        module = build(model, traced(model, example), plan, timeout_s=TIMEOUT_S)
        called = torch.compile(module, backend="aot_eager") if compile_it else module
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        found.append([])
        for _ in range(2):
            result = called(**example)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            found[-1].append(result["loss"].item())
    return found[0], found[1], isinstance(result["scores"], DTensor)


@pytest.mark.processes
def test_compiled_on_processes(ranks2: RankPool) -> None:
    model = ZOO["convnet"].build(layers=1)
    plan = autopar.plan(model, ZOO["convnet"].inputs(model), "cpu:2", baseline="fsdp")
    for eager, fast, sharded in ranks2.run(compiled, plan):
        assert fast == pytest.approx(eager, rel=1e-5) and fast[0] != fast[1] and sharded


def absent(llama: Made) -> str:
    model = ZOO["llama"].build(layers=1)
    made, plan = llama.traced, llama.plans["other mesh"]
    return "" if dist.get_rank() == 1 else attempt(lambda: build(model, made, plan, timeout_s=2.0))


@pytest.mark.processes
def test_a_rank_that_does_not_come(ranks2: RankPool, llama: Made) -> None:
    message, _ = ranks2.run(absent, llama)
    assert "rank 1 did not come to the comparison of plans and models within 2 s" in message
    ranks2.close()


def test_one_rank_without_a_process_group() -> None:
    model = ZOO["mlp"].build()
    (x,) = ZOO["mlp"].inputs(model)
    made = trace(model, (x,))
    module = build(model, made, autopar.plan(model, x, "cpu:1"))
    assert isinstance(module, ParallelModule) and not dist.is_initialized()
    result = module(x)
    torch.testing.assert_close(result, model(x))
    result.sum().backward()
    model(x).sum().backward()
    gradients: dict[str, Tensor | None] = {name: parameter.grad for name, parameter in module.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient = gradients[name]
        assert gradient is not None and parameter.grad is not None
        torch.testing.assert_close(whole_tensor(gradient), parameter.grad)
    assert autopar.clip_grad_norm_(module, 1.0).item() == pytest.approx(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
    assert mesh_for({"dp": 1, "tp": 1}).shape == (1, 1)
