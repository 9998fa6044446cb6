"""Local ranks: results, errors, deaths and silence all come back, and nothing stays behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from autopar.errors import RanksFailedError, RuntimeSetupError
from autopar.runtime.verification.launch import RankPool, run_ranks

pytestmark = pytest.mark.processes


def summed(value: torch.Tensor, *, scale: float = 1.0) -> tuple[int, torch.Tensor]:
    value = value * scale * (dist.get_rank() + 1)
    dist.all_reduce(value)
    return os.getpid(), value


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"trouble on {rank}")
    dist.barrier()


def fail_everywhere() -> None:
    raise SystemExit(f"rank {dist.get_rank()} leaves")


def kill(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep(seconds: float) -> None:
    if dist.get_rank() == 1:
        time.sleep(seconds)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_results_by_rank_from_persistent_processes(ranks2: RankPool) -> None:
    first = ranks2.run(summed, torch.ones(3, dtype=torch.float64), scale=2.0)
    second = ranks2.run(summed, torch.ones(3, dtype=torch.float64))
    assert [value.tolist() for _, value in first] == [[6.0] * 3] * 2
    assert [value.tolist() for _, value in second] == [[3.0] * 3] * 2
    assert [pid for pid, _ in first] == [pid for pid, _ in second]


def test_every_kind_of_failure_ends_all_ranks() -> None:
    with RankPool(2, threads=1, collective_timeout_s=3600) as pool:  # nobody may wait for a collective to time out
        pids = [pid for pid, _ in pool.run(summed, torch.ones(1))]
        with pytest.raises(RanksFailedError, match=r"rank 1: ValueError: trouble on 1") as caught:
            pool.run(fail_on, 1)
        assert "fail_on" in caught.value.failures[1][1]  # the traceback
        assert not alive(pids)

        pids = [pid for pid, _ in pool.run(summed, torch.ones(1))]  # starts fresh ranks
        with pytest.raises(RanksFailedError, match="died of SIGKILL"):
            pool.run(kill, 0)
        assert not alive(pids)

        pool.run(sleep, 0.0)  # fresh ranks have to import this file first
        with pytest.raises(RanksFailedError, match=r"(?s)rank 1: did not answer within 3 s.*in sleep"):
            pool.run(sleep, 600.0, timeout_s=3.0)

        with pytest.raises(RuntimeSetupError, match="top level of a module"):
            pool.run(lambda: None)


def test_a_dropped_pool_leaves_nothing() -> None:
    pool = RankPool(1, threads=1)
    pids = [pid for pid, _ in pool.run(summed, torch.ones(1))]
    folder = Path(pool._folder)
    del pool
    gc.collect()
    assert not alive(pids) and not folder.exists()
    with pytest.raises(RanksFailedError, match="rank 0: SystemExit: rank 0 leaves"):
        run_ranks(1, fail_everywhere)


def test_functions_of_a_script_and_the_missing_guard(tmp_path: Path) -> None:
    guarded = tmp_path / "guarded.py"
    guarded.write_text(
        "import torch.distributed as dist\nfrom autopar.runtime.verification.launch import run_ranks\n"
        "def work(x):\n    return x + dist.get_rank()\n"
        "if __name__ == '__main__':\n    print(run_ranks(1, work, 41))\n"
    )
    done = subprocess.run([sys.executable, guarded], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[41]", done.stderr
    done = subprocess.run([sys.executable, "-m", "guarded"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.strip() == "[41]", done.stderr
    bare = tmp_path / "bare.py"
    bare.write_text(guarded.read_text().replace("if __name__ == '__main__':\n    ", ""))
    done = subprocess.run([sys.executable, bare], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and 'if __name__ == "__main__"' in done.stderr
