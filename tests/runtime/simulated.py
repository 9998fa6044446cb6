"""Simulated ranks: threads of one process that meet in PyTorch's own threaded process group. Starting eight takes milliseconds.

Every rank runs its own program (unlike under `LocalTensorMode`, which runs one program for all), so uneven parts and actions that
only the first rank takes are tried as they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Test helpers of PyTorch; should they go, gloo processes from `autopar.runtime.verification.launch` run the same functions.
from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup, _install_threaded_pg, _uninstall_threaded_pg

from autopar.runtime.convert import Place


def simulate(mesh: tuple[int, int], function: Callable[[DeviceMesh], Any]) -> list[Any]:
    """Run `function(device mesh)` on every simulated rank of a `("dp", "tp")` mesh; results by rank. The first failure is raised."""
    world_size = mesh[0] * mesh[1]
    results: list[Any] = [None] * world_size
    failures: list[BaseException] = []
    store = dist.HashStore()
    dtype = torch.get_default_dtype()

    def run(rank: int) -> None:
        try:
            torch.set_default_dtype(dtype)
            dist.init_process_group("threaded", rank=rank, world_size=world_size, store=store)
            results[rank] = function(init_device_mesh("cpu", mesh, mesh_dim_names=("dp", "tp")))
        except BaseException as error:
            failures.append(error)
            ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    _install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a simulated rank hangs"
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        _uninstall_threaded_pg()
        ProcessLocalGroup.reset()
    if failures:
        raise failures[0]
    return results


def place_of(mesh: DeviceMesh) -> Place:
    """The `Place` of the calling rank on a two-axis device mesh."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    names = tuple(mesh.get_group(axis).group_name for axis in range(mesh.ndim))
    return Place(tuple(mesh.shape), tuple(coordinate), names)
