"""Meshes over the running job: cached, separate, timed out, and refused where they do not fit."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from autopar.errors import PlanMismatchError, RuntimeSetupError
from autopar.runtime.process_mesh import _meshes, ensure_process_group, mesh_for
from autopar.runtime.verification.launch import RankPool


def two_meshes() -> dict[str, Any]:
    square, flat = mesh_for({"dp": 2, "tp": 2}), mesh_for({"dp": 1, "tp": 4})
    before = len(dist.distributed_c10d._world.pg_map)
    again = [mesh_for({"dp": 2, "tp": 2}) for _ in range(3)]
    sums = {}
    for name, mesh in {"square": square, "flat": flat}.items():
        for axis in ("dp", "tp"):
            value = torch.tensor(float(dist.get_rank()))
            dist.all_reduce(value, group=mesh.get_group(axis))
            sums[name, axis] = value.item()
    refused = ""
    try:
        mesh_for({"dp": 2, "tp": 4})
    except PlanMismatchError as error:
        refused = str(error)
    return {
        "cached": all(mesh is square for mesh in again) and len(dist.distributed_c10d._world.pg_map) == before,
        "coordinate": square.get_coordinate(),
        "sums": sums,
        "refused": refused,
        "own": flat.get_group("tp") is not dist.group.WORLD,
    }


def timeout_of_a_missing_rank() -> str:
    mesh = mesh_for({"dp": 2, "tp": 1}, timeout_s=1.0)
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.ones(1), group=mesh.get_group("dp"))
        except Exception as error:
            return str(error)
    return ""


def released() -> tuple[bool, int]:
    mesh_for({"dp": 2})
    default = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    return default() is None, len(_meshes)


@pytest.mark.processes
def test_two_meshes_in_one_job(ranks4: RankPool) -> None:
    results = ranks4.run(two_meshes)
    assert [result["coordinate"] for result in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [result["sums"]["square", "dp"] for result in results] == [2.0, 4.0, 2.0, 4.0]
    assert [result["sums"]["square", "tp"] for result in results] == [1.0, 1.0, 5.0, 5.0]
    assert [result["sums"]["flat", "dp"] for result in results] == [0.0, 1.0, 2.0, 3.0]
    assert all(result["sums"]["flat", "tp"] == 6.0 and result["cached"] and result["own"] for result in results)
    assert all("8 ranks (dp=2, tp=4), but this job has 4" in result["refused"] for result in results)
    assert "torchrun --nproc-per-node 8" in results[0]["refused"]


@pytest.mark.processes
def test_timeouts_and_release(ranks2: RankPool) -> None:
    ranks2.close()  # what PyTorch imports for pipelines binds the running group as a default argument, and so keeps it
    assert "imed out" in ranks2.run(timeout_of_a_missing_rank)[0]
    assert ranks2.run(released) == [(True, 0)] * 2
    ranks2.close()  # the group is gone; the next test gets fresh ranks


def test_one_process_needs_no_group() -> None:
    mesh = mesh_for({"dp": 1, "tp": 1})
    assert mesh.get_coordinate() == (0, 0) and not dist.is_initialized()
    with pytest.raises(PlanMismatchError, match="for a mesh of 2 ranks"):
        mesh_for({"dp": 2, "tp": 1})


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeSetupError, match="has no RANK"):
        ensure_process_group()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeSetupError, match="rank 1 of 2 could not join"):
        ensure_process_group("cpu", timeout_s=1.0)
