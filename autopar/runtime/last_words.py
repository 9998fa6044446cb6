"""What a rank leaves in the job's store when it raises, for the others to quote: they only see its connections close, or nothing at all.

Nothing is written or asked while all goes well. A store that does not answer must not hold up an error: each question has a short limit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import torch.distributed as dist

# Private in PyTorch; see `autopar.runtime.handshake`.
from torch.distributed.distributed_c10d import _get_default_store

from autopar.errors import PeerError

_KEY = "autopar/last words"
_LIMIT_S = 2.0


def leave(error: BaseException) -> None:
    """Write down that this rank raised `error`, unless another rank's words are there already: what comes later may follow from them.
    That a rank was lost is no news."""
    if isinstance(error, PeerError):
        return
    words = f"rank {dist.get_rank()} had raised {type(error).__name__}: {error}" if dist.is_initialized() else ""
    _ask(lambda: _get_default_store().compare_set(_KEY, "", words).decode() if words else "")


def take_back() -> None:
    """This rank goes on after all."""
    _ask(lambda: str(_get_default_store().delete_key(_KEY)))


def read() -> str:
    """The words that some rank left, or nothing."""
    return _ask(lambda: _get_default_store().get(_KEY).decode() if _get_default_store().check([_KEY]) else "")


def _ask(question: Callable[[], str]) -> str:
    if not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return ""
    answers: list[str] = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # with the rank that held it the store may be gone
            answers.append(question())

    thread = threading.Thread(target=ask, name="autopar-last-words", daemon=True)
    thread.start()
    thread.join(_LIMIT_S)
    return answers[0] if answers else ""
