"""Ranks that differ all raise, and say who differs in what; ranks that do not come are named."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from autopar.errors import AutoparError, InputError, PlanError, PlanMismatchError, RankDisagreementError
from autopar.runtime import handshake
from autopar.runtime.verification.launch import RankPool


def raised(error: type[AutoparError], call: object, *args: object) -> str:
    try:
        call(*args)  # type: ignore[operator]
    except AutoparError as found:
        assert type(found) is error, found
        return str(found)
    return ""


def scenarios() -> dict[str, str]:
    rank = dist.get_rank()
    odd = rank == 2
    compare, batch = handshake.compare, handshake.compare_first_batch
    same = torch.arange(6.0).view(2, 3)
    mine = PlanMismatchError("this model is another") if odd else None
    found = {"alike": raised(PlanError, compare, {"plan": "a", "model": "m"}, None, 120)}
    found["plan"] = raised(RankDisagreementError, compare, {"plan": "b" if odd else "a", "model": "m"}, None, 120)
    found["problem"] = raised(PlanMismatchError if odd else RankDisagreementError, compare, {"plan": "a"}, mine, 120)
    found["batch alike"] = raised(InputError, batch, {"x": same}, None, True, 120)
    found["batch"] = raised(RankDisagreementError, batch, {"x": same + odd, "y": same}, None, True, 120)
    found["own parts"] = raised(RankDisagreementError, batch, {"x": same + odd}, None, False, 120)
    found["shape"] = raised(InputError, batch, {}, InputError("`x` has shape [3]") if odd else None, True, 120)
    found["agree"] = str(handshake.agree(lambda: ["made on", dist.get_rank()]))
    found["agree on an error"] = raised(PlanError, handshake.agree, broken)
    return found


def broken() -> None:
    raise PlanError("nothing fits") if dist.get_rank() == 0 else AssertionError("rank 0 alone makes it")


def absent(rank: int) -> str:
    return "" if dist.get_rank() == rank else raised(RankDisagreementError, handshake.compare, {"plan": "a"}, None, 0.5)


def out_of_step() -> str:
    if dist.get_rank() == 0:
        return raised(RankDisagreementError, handshake.agree, lambda: 1)
    return raised(RankDisagreementError, handshake.compare, {"plan": "a"}, None, 120)


@pytest.mark.processes
def test_every_rank_raises_or_none(ranks4: RankPool) -> None:
    for rank, found in enumerate(ranks4.run(scenarios)):
        assert found["alike"] == found["batch alike"] == found["own parts"] == ""
        assert "rank 2: plan is b, but a on ranks 0, 1, 3" in found["plan"]
        assert found["problem"] == "this model is another" if rank == 2 else "rank 2: PlanMismatchError: this model is" in found["problem"]
        assert "rank 2: input `x` is" in found["batch"] and "`y`" not in found["batch"]
        assert "`x` has shape [3]" in found["shape"] and (rank == 2 or "rank 2" in found["shape"])
        assert found["agree"] == "['made on', 0]" and found["agree on an error"] == "nothing fits"


@pytest.mark.processes
def test_absent_ranks_are_named(ranks2: RankPool) -> None:
    message, _ = ranks2.run(absent, 1)
    assert "rank 1 did not come to the comparison of plans and models within 0.5 s" in message
    ranks2.close()  # the ranks are out of step now
    one, two = ranks2.run(out_of_step)
    assert "rank 0 came to making a plan, but rank 1 to the comparison" in one and "rank 1 came to" in two


def test_alone() -> None:
    handshake.compare({"plan": "a"}, None, 1)
    assert handshake.agree(lambda: 3) == 3
    assert handshake.digest(torch.ones(3, dtype=torch.bfloat16)) != handshake.digest(torch.ones(3))
