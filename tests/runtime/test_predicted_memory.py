"""The simulator's peak memory beside that of the running rank program: one rank of two, whose partner is pretended (collectives return
at once and transfers bring nothing), so that a case takes seconds. Real ranks: `benchmarks/memory_prediction.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

import autopar
from autopar.ir.tracing.trace import split_example
from autopar.runtime import handshake, module  # noqa: F401  # whoever agrees on something is loaded
from autopar.runtime.pipelining import pipeline  # noqa: F401  # whoever agrees on something is loaded
from autopar.search.simulator.simulate import simulate
from benchmarks.memory import StorageTracker
from tests.zoo import ZOO

SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": ({"layers": 4, "n_embd": 128, "n_head": 4, "vocab_size": 1024, "n_positions": 64}, {"batch": 8, "sequence": 64}),
    "llama": (
        {"layers": 4, "hidden_size": 128, "intermediate_size": 352, "vocab_size": 1024, "num_attention_heads": 4},
        {"batch": 8, "sequence": 64},
    ),
    "unet-groups": ({"layers": 3, "width": 16}, {"batch": 16}),
    "bert": ({"layers": 4, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 1024}, {"batch": 8, "sequence": 64}),
}
STAGES = {"mesh": {"pp": 2, "dp": 1, "tp": 1}, "microbatches": 4}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Be a given rank of two, whom the other agrees with in everything."""
    monkeypatch.setattr(handshake, "exchange", lambda value, what, timeout_s: [value] * dist.get_world_size())
    for name, place in list(sys.modules.items()):
        if name.startswith("autopar.runtime") and hasattr(place, "agree"):
            monkeypatch.setattr(place, "agree", lambda make, *_, **__: make())

    def be(rank: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)

    yield be
    if dist.is_initialized():
        dist.destroy_process_group()


def peak_bytes(model: torch.nn.Module, batch: Any, plan: autopar.Plan) -> int:
    """Of the forward and backward pass of the second step, with the optimizer's state in place."""
    args, kwargs = split_example(batch)
    program: Any = autopar.parallelize(model, batch, plan=plan)
    optimizer = torch.optim.AdamW(program.parameters(), foreach=False)
    program.step(*args, **kwargs)
    optimizer.step()
    optimizer.zero_grad()
    tracker = StorageTracker()
    tracker.track([*program.parameters(), *program.buffers(), *tree_leaves(batch)])
    tracker.track(tree_leaves([list(state.values()) for state in optimizer.state.values()]))
    with tracker:
        program.step(*args, **kwargs)
    return tracker.peak_bytes


@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        ("llama", {"baseline": "fsdp"}, (0,)),
        ("unet-groups", {"mesh": (2, 1), "microbatches": 4}, (0,)),
        ("unet-groups", {**STAGES, "schedule": "1f1b"}, (0, 1)),
        ("gpt2", {**STAGES, "schedule": "zbv"}, (0, 1)),
        ("unet-groups", {**STAGES, "schedule": "1f1b", "recompute": "all"}, (0,)),
        ("unet-groups", {**STAGES, "schedule": "zbv"}, (1,)),
        ("bert", {**STAGES, "schedule": "gpipe"}, (0,)),
        ("llama", {"baseline": "fsdp", "precision": "bfloat16"}, (0,)),
        ("llama", {**STAGES, "schedule": "zbv", "precision": "bfloat16"}, (0,)),
    ],
    ids=lambda value: str(value.get("schedule") or value.get("baseline") or "accumulation") if isinstance(value, dict) else str(value),
)
def test_peak_is_within_a_tenth(alone: Callable[[int], None], name: str, options: dict[str, Any], ranks: tuple[int, ...]) -> None:
    build, inputs = SIZES[name]
    found = {}
    plan = None
    for rank in ranks:
        alone(rank)
        model = ZOO[name].build(**build)
        batch = ZOO[name].inputs(model, **inputs)
        plan = plan or autopar.plan(model, batch, "cpu:2", optimizer="adamw", **options)
        predicted = simulate(plan).peak_bytes[rank if plan.pipeline else 0]
        found[rank] = predicted / peak_bytes(model, batch, plan)
    assert found == {rank: pytest.approx(1.0, abs=0.1) for rank in ranks}
