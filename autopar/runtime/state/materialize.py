"""What each rank holds at the start: its part of every parameter and every buffer whole, from a model with values or one on `meta`.

Values are rank 0's, as in DistributedDataParallel: one whole tensor at a time is sent to all, cut, and dropped. A model on `meta` is
initialised module by module (`autopar.runtime.state.initialise`), each tensor cut and dropped before the next module is made, so that no
rank ever holds more than its parts and one module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.ir.conversion import State
from autopar.ir.graph import Graph
from autopar.ir.placement import R
from autopar.runtime.handshake import agree
from autopar.runtime.state.initialise import initialised
from autopar.runtime.state.shards import coordinate_of, local_part


def local_state(
    model: nn.Module,
    graph: Graph,
    stored: Mapping[str, State],
    mesh: DeviceMesh,
    device: torch.device,
    *,
    keep: Collection[str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    sync_module_states: bool = True,
    timeout_s: float = 600.0,
) -> dict[str, Tensor]:
    """This rank's part of every parameter and buffer of `graph`, by fully-qualified name, contiguous and on `device`.

    `stored[fqn]`: the state a parameter is stored in; buffers are whole. The tensors share no memory with `model`.
    `keep`: names of those that this rank holds, by default all. `dtypes[fqn]`: that it is stored in, by default the model's own.
    With `sync_module_states` all values come from rank 0, whose model decides what is initialised; without, each rank takes its own.
    A collective call. Raises `RuntimeSetupError` where a module on `meta` cannot be initialised.
    """
    sources: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = [item.fqn for item in graph.parameters] + [item.fqn for item in graph.buffers]
    bare = {name for name in names if sources[name].is_meta}
    seed, bare_on_rank_0 = agree(lambda: (torch.initial_seed(), bare), "sharing rank 0's random seed", timeout_s)
    if sync_module_states:
        bare = bare_on_rank_0
    whole: State = (R,) * mesh.ndim
    coordinate = coordinate_of(mesh)

    def cut(name: str, tensor: Tensor) -> Tensor:
        part = local_part(tensor, stored.get(name, whole), mesh.shape, coordinate).detach()
        return part.to((dtypes or {}).get(name, tensor.dtype), copy=True, memory_format=torch.contiguous_format)

    held = set(names if keep is None else keep)
    found: dict[str, Tensor] = {}
    for name in names:
        if name not in bare and (sync_module_states or name in held):
            tensor = _from_rank_0(sources[name], device) if sync_module_states else sources[name].detach().to(device)
            if name in held:
                found[name] = cut(name, tensor)
            del tensor
    if bare & held:
        for name, tensor in initialised(model, device, seed, bare & held):
            found[name] = cut(name, tensor)
            del tensor
    return {name: found[name] for name in names if name in held}


def _from_rank_0(tensor: Tensor, device: torch.device) -> Tensor:
    """Rank 0's `tensor`, whole, on `device` of every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor.detach().to(device)
    mine = dist.get_rank() == 0
    sent = tensor.detach().to(device).contiguous() if mine else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if sent.numel():
        dist.broadcast(sent.view(-1).view(torch.uint8), src=0)  # bytes: not every backend sends every dtype
    return sent


def materialize_whole(
    model: nn.Module, device: torch.device, seed: int | None = None, otherwise: Callable[[str, Tensor], Tensor] | None = None
) -> nn.Module:
    """`model` itself with every tensor that is on `meta` made on `device` and initialised; tied tensors stay tied.

    `seed` is by default torch's current one. `otherwise(name, blank)` gives what no module initialises; without it that is a
    `RuntimeSetupError`.
    """
    made = dict(initialised(model, device, torch.initial_seed() if seed is None else seed, otherwise=otherwise))
    first_names: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for store in (module._parameters, module._buffers):
            for name, tensor in list(store.items()):
                if tensor is None or not tensor.is_meta:
                    continue
                first = first_names.setdefault(id(tensor), f"{path}.{name}" if path else name)
                if first not in tensors:
                    value = made[first]
                    tensors[first] = nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                    tensors[f"{first} on meta"] = tensor  # kept, so that no other tensor gets its id while we look
                store[name] = tensors[first]
    return model
