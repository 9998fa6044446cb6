"""A rank is killed in the middle of a step: the others end with an error that says so, and training goes on elsewhere."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from autopar.ir.plan import Plan
from autopar.runtime.verification.launch import RankPool
from tests.runtime.failing import LAST, STEPS, TIMEOUT_S, build, step
from tests.runtime.pipelined import planned

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_until_a_rank_dies(plan: Plan, folder: Path, victim: int) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of every rank."""
    path = folder / "plan.json"
    plan.save(path)
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"WORLD_SIZE": str(plan.world_size)}
    command = [sys.executable, "-m", "tests.runtime.failing", str(folder), str(path), str(victim)]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(plan.world_size)
    ]
    try:
        ranks[victim].wait(timeout=240)
        died = time.monotonic()
        ends = []
        for process in ranks:
            output, errors = process.communicate(timeout=max(1.0, TIMEOUT_S + 30 - (time.monotonic() - died)))
            ends.append((process.returncode, output, errors))
        return ends
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def resume(plan: Plan | None, folder: str) -> list[float]:
    module, optimizer = build(plan)
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return [step(module, optimizer, number) for number in range(LAST, STEPS)]


@pytest.mark.parametrize(
    ("mesh", "microbatches", "victim", "others"),
    [
        ({"pp": 2, "dp": 2, "tp": 1}, 2, 3, {"dp": 2, "tp": 1}),
        ({"dp": 2, "tp": 1}, 2, 0, {"pp": 2, "dp": 1, "tp": 1}),
    ],
)
def test_a_killed_rank_ends_all_and_training_resumes(
    ranks2: RankPool, tmp_path: Path, mesh: dict[str, int], microbatches: int, victim: int, others: dict[str, int]
) -> None:
    ends = run_until_a_rank_dies(planned("tiny", mesh, microbatches, layers=4), tmp_path, victim)
    module, optimizer = build(None)
    curve = [step(module, optimizer, number) for number in range(STEPS)]
    for rank, (code, output, errors) in enumerate(ends):
        if rank == victim:
            assert code == -signal.SIGKILL
            continue
        assert code not in (0, None) and re.search(rf"PeerError: rank {rank} lost (another rank|rank \d) while ", errors), errors
        assert [float(text) for text in re.findall(r"step \d: (.*)", output)] == pytest.approx(curve[:LAST], rel=1e-12)
    plan = planned("tiny", others, 2, layers=4)
    for losses in ranks2.run(resume, plan, str(tmp_path / str(LAST - 1))):
        assert losses == pytest.approx(curve[LAST:], rel=1e-12)


def losses_of_the_example(folder: Path, ranks: int, *options: str) -> list[float]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, str(ROOT / "examples" / "resume.py"), "--every", "2", "--folder", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [float(text) for text in re.findall(r"loss ([\d.]+)", done.stdout)]


def test_the_example(tmp_path: Path) -> None:
    curve = losses_of_the_example(tmp_path, 2, "--mesh", "pp=2,dp=1,tp=1", "--steps", "4")
    (tmp_path / "4" / ".metadata").unlink()  # as if it had been lost while it was written
    assert losses_of_the_example(tmp_path, 1, "--steps", "4") == pytest.approx(curve[2:], abs=1e-4)
