"""Ranks that share a part of the batch get the same samples; together the parts are the data."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from autopar.errors import InputError, PlanMismatchError
from autopar.ir.placement import R, S
from autopar.ir.plan import ClusterInfo, InputPlan, ModelInfo, Plan, Predicted
from autopar.runtime.inputs import given_states
from autopar.runtime.sampler import batch_axes, batch_part, sampler

DATA = TensorDataset(torch.arange(24))


def plan(mesh: dict[str, int], *inputs: tuple[tuple[int, ...], dict[str, str]]) -> Plan:
    return Plan(
        name="test",
        model=ModelInfo(name="m", fingerprint="f", training=True, parameters=0, operations=0),
        cluster=ClusterInfo(name="c", device="cpu", devices_per_node=1, nodes=1, memory_bytes=1),
        mesh=mesh,
        inputs=tuple(InputPlan(path=str(i), shape=shape, dtype="int64", placement=where) for i, (shape, where) in enumerate(inputs)),
        outputs=(),
        pins={},
        predicted=Predicted(
            cost_s=0.0,
            lower_bound_s=0.0,
            compute_s=0.0,
            communication_s=0.0,
            memory_bytes={},
            memory_limit_bytes=0,
            fits=True,
            optimizer="sgd",
            effort="fast",
        ),
        replicated=(),
        parameters=(),
        segments=(),
        collectives=(),
    )


@pytest.mark.parametrize(
    ("mesh", "where", "parts"),
    [
        ({"dp": 2, "tp": 2}, {"dp": "S(0)", "tp": "R"}, [0, 0, 1, 1]),
        ({"dp": 2, "tp": 2}, {"dp": "S(1)", "tp": "S(0)"}, [0, 1, 0, 1]),
        ({"dp": 2, "tp": 2}, {"dp": "S(0)", "tp": "S(0)"}, [0, 1, 2, 3]),
        ({"dp": 1, "tp": 4}, {"dp": "S(0)", "tp": "S(1)"}, [0, 0, 0, 0]),
    ],
)
def test_parts_by_rank(mesh: dict[str, int], where: dict[str, str], parts: list[int]) -> None:
    made = plan(mesh, ((8, 16), where), ((8,), {"dp": "R", "tp": "R"}), ((16,), {"dp": "S(0)", "tp": "S(0)"}))
    found = [batch_part(made, rank) for rank in range(4)]
    assert [index for _, index in found] == parts
    assert {count for count, _ in found} == {max(parts) + 1}
    samples = [list(sampler(made, DATA, shuffle=True, seed=3, rank=rank)) for rank in range(4)]
    for one, index in zip(samples, parts, strict=True):
        assert one == samples[parts.index(index)]
    assert sorted(i for part in set(parts) for i in samples[parts.index(part)]) == list(range(24))


def test_given_states() -> None:
    made = plan(
        {"dp": 2, "tp": 2}, ((8, 16), {"dp": "S(0)", "tp": "S(1)"}), ((8,), {"dp": "R", "tp": "R"}), ((16,), {"dp": "S(0)", "tp": "R"})
    )
    assert batch_axes(made) == ("dp",)
    assert given_states(made, "per-rank") == {"0": (S(0), R), "1": (S(0), R), "2": (R, R)}
    assert set(given_states(made, "global").values()) == {(R, R)}
    with pytest.raises(InputError, match="unequal parts"):
        given_states(plan({"dp": 2, "tp": 1}, ((3,), {"dp": "S(0)", "tp": "R"})), "per-rank")
    with pytest.raises(InputError, match="is not known"):
        given_states(made, "local")  # type: ignore[arg-type]
    with pytest.raises(PlanMismatchError, match="rank 4 is none"):
        sampler(made, DATA, rank=4)
