"""The child side of `launch`: one local rank that joins a gloo group and then runs the functions its parent sends.

Started as `python -m autopar.runtime.verification.rank_process CONNECTION_FD LIFELINE_FD`; it is no command for people.
"""

from __future__ import annotations

import faulthandler
import importlib
import io
import os
import pickle
import signal
import sys
import threading
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import spawn
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RANK_PROCESS = "AUTOPAR_RANK_PROCESS"
"""Environment variable that is set in rank processes, so that none starts ranks of its own while it imports the user's script."""


@dataclass(frozen=True, slots=True)
class Main:
    """Where the parent's `__main__` came from: a module by `name` (`python -m`), or a script by `path`; neither in a notebook."""

    name: str | None = None
    path: str | None = None

    def load(self) -> None:
        """Import it as `__mp_main__`, so that its `if __name__ == "__main__":` does not run, and let it stand for `__main__`."""
        # What multiprocessing's own spawn does; should these go, `runpy.run_path` and `runpy.run_module` replace them.
        if self.name is not None:
            spawn._fixup_main_from_name(self.name)  # type: ignore[attr-defined]
        elif self.path is not None:
            spawn._fixup_main_from_path(self.path)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Start:
    """What a rank must know to join: its place, the parent's store, where to find code, and where to write its stack when asked."""

    rank: int
    world_size: int
    store_port: int
    collective_timeout_s: float
    threads: int
    sys_path: tuple[str, ...]
    main: Main
    stack_path: str


@dataclass(frozen=True, slots=True)
class Call:
    """A function to run: the pickled `(function, args, kwargs)` lies in `request_path`, the answer goes to `answer_path`. Modules named in
    `importing` are imported before, for what they register."""

    number: int
    request_path: str
    answer_path: str
    importing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """How call `number` ended. On failure `error` is the exception's type name and text, and `trace` its traceback."""

    number: int
    ok: bool
    error: str = ""
    trace: str = ""


class _Unpickler(pickle.Unpickler):
    """Imports the parent's `__main__` only when something of it is really sent."""

    main = Main()

    def find_class(self, module: str, name: str) -> Any:
        if module == "__main__":
            self.main.load()
        return super().find_class(module, name)


def _load(path: str, main: Main) -> Any:
    unpickler = _Unpickler(io.BytesIO(Path(path).read_bytes()))
    unpickler.main = main
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own trees warn about themselves
        return unpickler.load()


def _die_with_parent(lifeline_fd: int) -> None:
    """End this process when the parent's end of the lifeline closes, however the parent ended and whatever this rank is doing."""

    def wait() -> None:
        while os.read(lifeline_fd, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="autopar-lifeline", daemon=True).start()


def _join(start: Start) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(start.threads)
    timeout = timedelta(seconds=start.collective_timeout_s)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", start.store_port, is_master=False, timeout=timeout
    )
    dist.init_process_group("gloo", store=store, rank=start.rank, world_size=start.world_size, timeout=timeout)


def _answer(call: Call, main: Main) -> Answer:
    try:
        for name in call.importing:
            if name == "__main__":
                main.load()
            else:
                importlib.import_module(name)
        function, args, kwargs = _load(call.request_path, main)
        result = function(*args, **kwargs)
        Path(call.answer_path).write_bytes(pickle.dumps(result))
    except BaseException as error:  # a SystemExit in the user's function must reach the parent, not end the rank in silence
        return Answer(call.number, False, f"{type(error).__name__}: {error}", traceback.format_exc())
    return Answer(call.number, True)


def main() -> None:
    connection_fd, lifeline_fd = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it then closes the lifeline
    _die_with_parent(lifeline_fd)
    connection: Connection[Any, Any] = Connection(connection_fd)
    start: Start = connection.recv()
    sys.path[:] = start.sys_path
    with open(start.stack_path, "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        try:
            _join(start)
        except Exception as error:
            connection.send(Answer(0, False, f"{type(error).__name__}: {error}", traceback.format_exc()))
            return
        connection.send(Answer(0, True))
        while True:
            try:
                call: Call | None = connection.recv()
            except EOFError:
                break
            if call is None:
                break
            connection.send(_answer(call, start.main))
    os._exit(0)  # tearing a gloo group down waits for peers that may be gone


if __name__ == "__main__":
    # Run the importable module's `main`, so that the classes received are those of `autopar.runtime.verification.rank_process`.
    from autopar.runtime.verification.rank_process import main as importable_main

    importable_main()
