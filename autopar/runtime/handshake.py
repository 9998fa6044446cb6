"""Ranks compare notes before they work together: plans, models, first batches. A difference ends every rank alike, with an error.

The notes travel through the job's store, not through a collective: a rank that never comes is then named, a rank that fails can
still say so, and nothing depends on devices or backends. Each exchange has a number, so that ranks which make different exchanges
wait for each other in vain and say for whom.
"""

from __future__ import annotations

import hashlib
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# Private in PyTorch; should it move, `all_gather_object` on a gloo group does the same without naming who is missing.
from torch.distributed.distributed_c10d import _get_default_store

from autopar.errors import AutoparError, InputError, RankDisagreementError, RuntimeSetupError

_Result = TypeVar("_Result")
_exchanges: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
"""How many exchanges this process has begun, by default process group."""


def exchange(value: Any, what: str, timeout_s: float) -> list[Any]:
    """`value` of every rank (pickled), by rank; `what` is this exchange's purpose for messages. A collective call.

    A single process, and PyTorch's `fake` backend, are alone: their own value stands for all.
    Raises `RankDisagreementError` naming the ranks that did not come within `timeout_s`.
    """
    if not dist.is_initialized():
        return [value]
    world, rank = dist.get_world_size(), dist.get_rank()
    if world == 1 or dist.get_backend() == "fake":
        return [value] * world
    number = _exchanges.get(dist.group.WORLD, 0)
    _exchanges[dist.group.WORLD] = number + 1
    store = _get_default_store()
    store.set(_key(number, rank), pickle.dumps((what, value)))  # type: ignore[arg-type]  # bytes are welcome, says its C++
    try:
        store.wait([_key(number, peer) for peer in range(world)], timedelta(seconds=timeout_s))
    except Exception as error:
        missing = [peer for peer in range(world) if not store.check([_key(number, peer)])]
        raise RankDisagreementError(
            f"{_ranks(missing)} did not come to {what} within {timeout_s:g} s. Every rank must take the same steps in the same order; "
            "look at what they print for how they ended"
        ) from error
    notes = [pickle.loads(store.get(_key(number, peer))) for peer in range(world)]
    if number >= 2:  # whoever is at exchange n has seen all come to n-1, so all have read the notes of n-2
        store.delete_key(_key(number - 2, rank))
    differing = [peer for peer, (purpose, _) in enumerate(notes) if purpose != what]
    if differing:
        raise RankDisagreementError(
            f"rank {rank} came to {what}, but {_ranks(differing)} to {notes[differing[0]][0]}; "
            "every rank must take the same steps in the same order"
        )
    return [note for _, note in notes]


def _key(number: int, rank: int) -> str:
    return f"autopar/{number}/{rank}"


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def agree(make: Callable[[], _Result], what: str = "making a plan", timeout_s: float = 600.0) -> _Result:
    """What `make` returns on rank 0, on every rank; what it raises there, everywhere. A collective call."""
    outcome: tuple[bool, Any] = (True, None)
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = (True, make())
        except Exception as error:
            outcome = (False, error)
    try:
        pickle.dumps(outcome)
    except Exception:
        assert not outcome[0], "what ranks agree on must pickle"
        outcome = (False, RuntimeSetupError(f"rank 0 failed while {what}: {type(outcome[1]).__name__}: {outcome[1]}"))
    good, result = exchange(outcome, what, timeout_s)[0]
    if not good:
        raise result
    return result  # type: ignore[no-any-return]


def compare(notes: Mapping[str, str], problem: AutoparError | None, timeout_s: float) -> None:
    """Raise on every rank, or on none: where some rank has a `problem`, or where `notes` (subject -> digest) differ. A collective call.

    Raises the rank's own `problem` where it has one, else `RankDisagreementError` saying which ranks differ and in what.
    """
    reports = exchange(
        (dict(notes), None if problem is None else f"{type(problem).__name__}: {problem}"), "the comparison of plans and models", timeout_s
    )
    if problem is not None:
        raise problem
    failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(reports) if error is not None]
    if failed:
        raise RankDisagreementError("other ranks cannot run the plan:\n" + "\n".join(failed))
    differences = [line for subject in notes for line in _differences(subject, [report[subject] for report, _ in reports])]
    if differences:
        raise RankDisagreementError(
            "the ranks were not started alike:\n" + "\n".join(differences) + "\nGive every rank the same plan file, model code and versions"
        )


def _differences(subject: str, values: list[str]) -> list[str]:
    """Which ranks differ from the most common value (the lowest rank's where there is a tie), in words."""
    common, _ = Counter(values).most_common(1)[0]
    lines = []
    for value in dict.fromkeys(values):
        if value != common:
            differing = [rank for rank, item in enumerate(values) if item == value]
            others = [rank for rank, item in enumerate(values) if item == common]
            lines.append(f"{_ranks(differing)}: {subject} is {value}, but {common} on {_ranks(others)}")
    return lines


def compare_first_batch(tensors: Mapping[str, Tensor], problem: InputError | None, whole: bool, timeout_s: float) -> None:
    """Raise on every rank, or on none: where some rank's first batch has a `problem`, or, where every rank should have the same
    `whole` batch, contents differ. `tensors`: the batch by input path. A collective call.

    Raises the rank's own `problem` where it has one, `InputError` telling the other ranks' problems where it has none, and
    `RankDisagreementError` for batches that differ.
    """
    digests = {path: digest(tensor) for path, tensor in tensors.items()} if whole and problem is None else {}
    reports = exchange((digests, None if problem is None else str(problem)), "the comparison of first batches", timeout_s)
    if problem is not None:
        raise problem
    failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(reports) if error is not None]
    if failed:
        raise InputError("other ranks have inputs that the plan does not fit:\n" + "\n".join(failed))
    differences = [line for path in digests for line in _differences(f"input `{path}`", [report[path] for report, _ in reports])]
    if differences:
        raise RankDisagreementError(
            "the ranks have different first batches, but each must pass the same global batch:\n"
            + "\n".join(differences)
            + '\nSeed the data loaders alike, or pass inputs="per-rank" and give each rank its own part (see `Plan.sampler`)'
        )


def digest(tensor: Tensor) -> str:
    """A short checksum of shape, dtype and contents."""
    plain = tensor.detach().cpu().contiguous()
    hashed = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=6)
    hashed.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
