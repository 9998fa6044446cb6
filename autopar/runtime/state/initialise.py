"""A model on `meta` gets its values: module by module, by the module's own initialisation, never two modules at once.

What initialises a module is what its constructor ran: `reset_parameters` (PyTorch's convention), then `_init_weights` of the
transformers model around it. Both are run for the module and then for every module around it, outwards, since some scale their
children's weights (GPT-2's residual projections); while they run, only this one module has memory and everything else is on `meta`.

Random numbers are seeded by module name, so that every rank draws the same values whatever its plan and whatever came before.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import RuntimeSetupError


def initialised(
    model: nn.Module,
    device: torch.device,
    seed: int,
    names: set[str] | None = None,
    otherwise: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Fully-qualified name and fresh values of every parameter and buffer of `model` that is on `meta` (or in `names`), on `device`.

    Tied tensors come once, under their first name. `model` stays as it is. The caller should keep no whole tensor: each module's
    tensors are alone in memory. What a module has no initialisation for, `otherwise` gives, from its name and a blank tensor; without
    it, `RuntimeSetupError` names the tensors.
    """
    skeleton = _on_meta(model)
    first_names = {id(tensor): name for name, tensor in reversed(_named_tensors(skeleton))}
    original = dict(_named_tensors(model))
    for path, module in skeleton.named_modules():
        own = {name: tensor for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
        wanted = {}
        for name, tensor in own.items():
            fqn = f"{path}.{name}" if path else name
            if first_names[id(tensor)] == fqn and (original[fqn].is_meta if names is None else fqn in names):
                wanted[name] = fqn
        if wanted:
            values = _fill(skeleton, path, module, wanted, device, seed, otherwise)
            while values:
                yield values.popitem()


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of `model` without memory: tied tensors stay tied."""
    memo: dict[int, Any] = {}
    for _, tensor in _named_tensors(model):
        if id(tensor) not in memo:
            bare = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(bare, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)


def _fill(
    skeleton: nn.Module,
    path: str,
    module: nn.Module,
    wanted: dict[str, str],
    device: torch.device,
    seed: int,
    otherwise: Callable[[str, Tensor], Tensor] | None,
) -> dict[str, Tensor]:
    """Values of the tensors `wanted` (attribute name -> fully-qualified name) of `module`, which is bare again afterwards."""
    bare = {name: module._parameters.get(name, module._buffers.get(name)) for name in wanted}
    blanks: dict[str, Tensor] = {}
    for name, tensor in bare.items():
        assert tensor is not None
        # Not-a-number where nothing is written shows what the initialisation leaves out.
        blank = torch.full_like(tensor, torch.nan if tensor.dtype.is_floating_point else 0, device=device)
        _put(module, name, nn.Parameter(blank, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank)
        blanks[name] = _get(module, name)
    versions = {name: tensor._version for name, tensor in blanks.items()}
    try:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(_seed(seed, path))
            for around, initialise in _initialisers(skeleton, path):
                try:
                    initialise()
                except Exception as error:
                    raise RuntimeSetupError(
                        f"`{path}` is on `meta` and the initialisation of `{around or type(skeleton).__name__}` failed on it: "
                        f"{type(error).__name__}: {error}. Give a model with values instead of one on `meta`"
                    ) from error
        found = {name: _get(module, name) for name in wanted}
        missing = [
            name
            for name, tensor in found.items()
            if tensor.is_meta
            or (tensor is blanks[name] and tensor.numel() and tensor._version == versions[name])
            or (tensor.dtype.is_floating_point and bool(tensor.isnan().any()))
        ]
        if missing and otherwise is not None:
            found |= {name: otherwise(wanted[name], torch.zeros_like(found[name], device=device)) for name in missing}
        elif missing:
            names = ", ".join(f"`{wanted[name]}`" for name in missing)
            raise RuntimeSetupError(
                f"{names}: on `meta`, and {type(module).__name__} has no `reset_parameters` that fills it. Give it one, or give a model "
                "with values instead of one on `meta` (a checkpoint can be loaded into either)"
            )
        return {wanted[name]: tensor.detach() for name, tensor in found.items()}
    finally:
        for name, tensor in bare.items():
            _put(module, name, tensor)


def _get(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters[name] if name in module._parameters else module._buffers[name]
    assert tensor is not None
    return tensor


def _put(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    if name in module._parameters:
        module._parameters[name] = tensor  # type: ignore[assignment]  # a parameter for a parameter
    else:
        module._buffers[name] = tensor


def _seed(seed: int, path: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {path}".encode(), digest_size=7).digest(), "big")


def _initialisers(skeleton: nn.Module, path: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What to call, and for the module at which path, to initialise the tensors of the module at `path`."""
    parts = path.split(".") if path else []
    around = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    modules = [skeleton.get_submodule(item) for item in around]
    for place, module in zip(around, modules, strict=True):
        for name in ("reset_parameters", "_reset_parameters"):
            if callable(method := getattr(module, name, None)):
                yield place, method
                break
    for index, (place, module) in enumerate(zip(around, modules, strict=True)):
        owner = next((item for item in modules[index:] if callable(getattr(item, "_init_weights", None))), None)
        if owner is not None:
            yield place, lambda owner=owner, module=module: owner._init_weights(module)  # type: ignore[misc]
