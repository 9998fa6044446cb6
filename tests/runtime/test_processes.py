"""Random plans on real gloo processes: what simulated ranks cannot show, such as the order of messages and gloo's own limits."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from autopar.ir.tracing.trace import trace
from autopar.runtime.operators.dropout import without_dropout
from autopar.runtime.verification.launch import RankPool
from tests.runtime.random_plans import (
    Mesh,
    difference,
    example,
    facts,
    float64,
    output_states,
    parallel_module,
    random_assignment,
    reference,
    total,
    whole,
    widened,
)  # fmt: skip


def differences(cases: list[tuple[str, int]], mesh: Mesh, compiled: bool = False) -> list[tuple[float, str]]:
    """On a rank: for each model and seed the largest difference from one device after two backward passes."""
    device_mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("dp", "tp"))
    found = []
    for name, seed in cases:
        model, args, kwargs = example(name, **({"layers": 1} if compiled else {}))  # compiling takes its time
        expected = reference(model, args, kwargs)
        with float64():
            traced = widened(trace(model, args, kwargs))
            assignment = random_assignment(traced.graph, mesh, seed)
            module = parallel_module(model, traced, assignment, device_mesh, output_states(traced, assignment))
            call = torch.compile(module, backend="aot_eager") if compiled else module
            with without_dropout(module):
                for _ in range(2):
                    module.zero_grad()
                    result = call(*args, **kwargs)
                    loss = total(result)
                    loss.backward()
            here = facts(module, result, whole(loss))
        here = {key: value for key, value in here.items() if not key.startswith("buffer")}
        error, where = difference({key: value for key, value in expected.items() if key in here or not key.startswith("buffer")}, here)
        found.append((error, f"{name} {seed}: {where}"))
    return found


@pytest.mark.processes
def test_four_processes(ranks4: RankPool) -> None:
    for found in ranks4.run(differences, [("gpt2", 0), ("convnet", 1), ("llama", 2)], (2, 2)):
        assert max(found) < (1e-10, ""), found


@pytest.mark.processes
def test_compiled_on_two_processes(ranks2: RankPool) -> None:
    for found in ranks2.run(differences, [("mlp", 0), ("encoder", 1)], (1, 2), compiled=True):
        assert max(found) < (1e-10, ""), found
