"""One rank of a job that saves a checkpoint after every step, and that one of its ranks does not survive. A command:

    RANK=0 WORLD_SIZE=4 MASTER_ADDR=.. MASTER_PORT=.. python -m tests.runtime.failing FOLDER PLAN.JSON VICTIM

The victim kills itself in the middle of the backward passes of the third step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

import autopar
from autopar.ir.plan import Plan
from autopar.runtime.gradients import Reducer
from tests.runtime.pipelined import example
from tests.runtime.random_plans import float64

TIMEOUT_S = 60.0
STEPS, LAST = 5, 2
"""Steps that the job wants to take; steps that it has a checkpoint of when the victim dies."""


def build(plan: Plan | None) -> tuple[Any, torch.optim.Optimizer]:
    model, inputs = example("tiny", layers=4)
    with float64():
        module: Any = autopar.parallelize(model, inputs, plan=plan, timeout_s=TIMEOUT_S)
    return module, torch.optim.AdamW(module.parameters(), lr=1e-2)


def step(module: Any, optimizer: torch.optim.Optimizer, number: int) -> float:
    _, inputs = example("tiny", layers=4)
    optimizer.zero_grad()
    loss = module.step(**{name: tokens.roll(number, 0) for name, tokens in inputs.items()})
    optimizer.step()
    return float(loss)


def die_at_the_second_gradient() -> None:
    taken, count = Reducer._arrived, iter(range(100))

    def arrived(self: Reducer, leaf: Any) -> None:
        taken(self, leaf)
        if next(count) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Reducer._arrived = arrived  # type: ignore[method-assign]


def main(folder: str, plan: str, victim: str) -> None:
    module, optimizer = build(Plan.load(plan))
    for number in range(STEPS):
        if number == LAST and dist.get_rank() == int(victim):
            die_at_the_second_gradient()
        loss = step(module, optimizer, number)
        print(f"step {number}: {loss!r}", flush=True)
        model_state, optimizer_state = get_state_dict(module, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=Path(folder, str(number)))


if __name__ == "__main__":
    main(*sys.argv[1:])
