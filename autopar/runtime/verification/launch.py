"""Local ranks: start N gloo processes on this machine and run a function on each. Used by `verify`, the tests and the demo.

    with RankPool(4) as ranks:
        losses = ranks.run(train, plan, steps=3)      # one result per rank

Ranks are fresh interpreters (no fork: a forked torch may hang in its thread pools), joined in one gloo group through a store that
the parent holds on a free port. A function is sent by reference, so it must be importable; one of the parent's `__main__` is
found by importing that script under another name, which needs the usual `if __name__ == "__main__":` around its start. Arguments
and results are pickled through files in a temporary directory, tensors included.

Whatever goes wrong ends in `RanksFailedError`: a rank raises, dies or does not answer in time; then all ranks are ended, and the
next `run` starts fresh ones. A rank ends with its parent, however the parent ends.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from autopar.errors import RanksFailedError, RuntimeSetupError
from autopar.runtime.verification.rank_process import RANK_PROCESS, Answer, Call, Main, Start

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

GRACE_S = 3.0
"""How long the other ranks may take to report the same failure once one rank has reported."""


class _Rank:
    """One child process: its number, pipe and lifeline."""

    def __init__(self, start: Start) -> None:
        self.number = start.rank
        self.stack_path = Path(start.stack_path)
        connection, child_connection = Pipe()
        self.connection: Connection[Any, Any] = connection
        child_lifeline, self.lifeline = os.pipe()
        fds = (child_connection.fileno(), child_lifeline)
        command = [sys.executable, "-m", "autopar.runtime.verification.rank_process", *map(str, fds)]
        self.process = subprocess.Popen(command, env=_environment(start.threads), pass_fds=fds, stdin=subprocess.DEVNULL)
        child_connection.close()
        os.close(child_lifeline)
        self.connection.send(start)

    def stack(self) -> str:
        """Where the rank is right now, for the message about a rank that does not answer."""
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
            return self.stack_path.read_text().strip()
        return ""

    def died(self) -> str:
        """How the process ended, in words."""
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        if code >= 0:
            return f"exited with code {code}"
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"died of {signal.Signals(-code).name}{hint}"

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.connection.close()
        with contextlib.suppress(OSError):
            os.close(self.lifeline)


def _environment(threads: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment[RANK_PROCESS] = "1"
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    if sys.platform.startswith("linux"):
        # Gloo otherwise binds to what the host name resolves to, which in containers is often nothing.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return environment


def _main() -> Main:
    main = sys.modules.get("__main__")
    spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    if spec is not None:
        return Main(name=spec.name)
    return Main(path=os.path.abspath(path)) if path else Main()


def _end(ranks: list[_Rank], folder: str) -> None:
    for rank in ranks:
        rank.end()
    ranks.clear()
    shutil.rmtree(folder, ignore_errors=True)


class RankPool:
    """`world_size` local ranks that stay up between calls. A context manager; also closed when collected or at exit.

    `threads`: CPU threads of one rank, by default the machine's cores divided by the ranks. `collective_timeout_s`: after which a
    collective that some rank does not join fails. `start_timeout_s`: for all ranks to be up.
    Raises `RuntimeSetupError` when constructed inside a rank process.
    """

    def __init__(
        self, world_size: int, *, threads: int | None = None, collective_timeout_s: float = 60.0, start_timeout_s: float = 180.0
    ) -> None:
        assert world_size >= 1
        if os.environ.get(RANK_PROCESS):
            raise RuntimeSetupError(
                "a local rank tried to start local ranks. This happens when the script that starts them is imported by a rank; "
                'put its start under `if __name__ == "__main__":`, or move the function you run on the ranks to a module of its own'
            )
        self.world_size = world_size
        self.threads = threads or max(1, (os.cpu_count() or 1) // world_size)
        self.collective_timeout_s = collective_timeout_s
        self.start_timeout_s = start_timeout_s
        self._ranks: list[_Rank] = []
        self._store: Any = None
        self._folder = ""
        self._calls = 0
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks. The pool may be used again: the next `run` starts new ones."""
        if self._finalizer is not None:
            self._finalizer()
        self._finalizer = self._store = None

    def start(self) -> None:
        """Start the ranks now, if they are not up. `run` does so by itself."""
        if self._ranks:
            return
        self._folder = tempfile.mkdtemp(prefix="autopar-ranks-")
        self._finalizer = weakref.finalize(self, _end, self._ranks, self._folder)
        timeout = timedelta(seconds=self.start_timeout_s)
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout
        )
        for rank in range(self.world_size):
            self._ranks.append(
                _Rank(
                    Start(
                        rank=rank,
                        world_size=self.world_size,
                        store_port=self._store.port,
                        collective_timeout_s=self.collective_timeout_s,
                        threads=self.threads,
                        sys_path=tuple(os.path.abspath(entry) for entry in sys.path),
                        main=_main(),
                        stack_path=str(Path(self._folder, f"stack-{rank}.txt")),
                    )
                )
            )
        self._calls = 0
        self._collect(0, self.start_timeout_s, "starting the ranks")

    def run(
        self, function: Callable[..., _Result], *args: Any, timeout_s: float = 600.0, importing: Sequence[str] = (), **kwargs: Any
    ) -> list[_Result]:
        """Run `function(*args, **kwargs)` on every rank (where the default process group is up) and return the results by rank.

        `importing`: modules that the ranks import before, for the operators that they register.
        Raises `RanksFailedError` naming every failed rank with its traceback when a rank raises, dies, or has not answered after
        `timeout_s`, and `RuntimeSetupError` when the function or an argument cannot be pickled.
        """
        name = getattr(function, "__qualname__", repr(function))
        try:
            request = pickle.dumps((function, args, kwargs))
        except Exception as error:
            raise RuntimeSetupError(
                f"`{name}` cannot be sent to the ranks: {error}. Functions travel by name: define it at the top level of a module, "
                "and pass what it needs as arguments that pickle"
            ) from error
        self.start()
        self._calls += 1
        request_path = Path(self._folder, f"request-{self._calls}.pickle")
        request_path.write_bytes(request)
        answers = [Path(self._folder, f"answer-{self._calls}-{rank.number}.pickle") for rank in self._ranks]
        for rank, answer_path in zip(self._ranks, answers, strict=True):
            with contextlib.suppress(OSError):  # a rank that is gone shows below, with the way it went
                rank.connection.send(Call(self._calls, str(request_path), str(answer_path), tuple(importing)))
        self._collect(self._calls, timeout_s, f"running `{name}`")
        results = [pickle.loads(path.read_bytes()) for path in answers]
        for path in (request_path, *answers):
            path.unlink()
        return results

    def _collect(self, number: int, timeout_s: float, doing: str) -> None:
        """Wait until every rank has answered call `number`; on any failure end all ranks and raise."""
        waiting = {rank.connection: rank for rank in self._ranks}
        failures: dict[int, tuple[str, str]] = {}
        deadline = time.monotonic() + timeout_s
        try:
            while waiting:
                ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for rank, answer in _read(ready, waiting):
                    if answer is None:
                        failures[rank.number] = (rank.died(), "")
                    elif not answer.ok:
                        failures[rank.number] = (answer.error, answer.trace)
                    else:
                        assert answer.number == number
                if failures:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        except BaseException:  # Ctrl-C among others: ranks in the middle of a call are of no further use
            self.close()
            raise
        if not waiting and not failures:
            return
        if not failures:
            failures = {rank.number: (f"did not answer within {timeout_s:g} s", f"It is at:\n{rank.stack()}") for rank in waiting.values()}
        self.close()
        raise RanksFailedError(_message(failures, self.world_size, doing), failures)


def _read(ready: list[Any], waiting: dict[Connection[Any, Any], _Rank]) -> Iterator[tuple[_Rank, Answer | None]]:
    """The answers on the `ready` connections, which leave `waiting`; None for a rank that is gone."""
    for connection in ready:
        rank = waiting.pop(connection)
        try:
            yield rank, connection.recv()
        except (EOFError, OSError):
            yield rank, None


def _message(failures: dict[int, tuple[str, str]], world_size: int, doing: str) -> str:
    """Each failed rank and its error; equal tracebacks are written once."""
    lines = [f"{len(failures)} of {world_size} ranks failed while {doing}:"]
    traces: dict[str, list[int]] = {}
    for rank, (error, trace) in sorted(failures.items()):
        lines.append(f"  rank {rank}: {error}")
        if trace:
            traces.setdefault(trace.strip(), []).append(rank)
    for trace, ranks in traces.items():
        lines.append(f"\nrank {', '.join(map(str, ranks))}:\n{trace}")
    return "\n".join(lines)


def run_ranks(
    world_size: int,
    function: Callable[..., _Result],
    *args: Any,
    timeout_s: float = 600.0,
    collective_timeout_s: float = 60.0,
    **kwargs: Any,
) -> list[_Result]:
    """Start `world_size` local ranks, run `function(*args, **kwargs)` on each, end them, and return the results by rank.

    Raises what `RankPool.run` raises.
    """
    with RankPool(world_size, collective_timeout_s=min(collective_timeout_s, math.inf)) as pool:
        return pool.run(function, *args, timeout_s=timeout_s, **kwargs)
