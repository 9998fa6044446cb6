"""`DeferredModule`: a module that becomes distributed at its first call, when it sees the inputs it is planned for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autopar.ir.placement import R
from autopar.runtime.module import ParallelModule, owner_of, sharded


class DeferredModule(nn.Module):
    """Stands for `model` until the first call, then turns into the `ParallelModule` that `build` makes for that call's arguments.

    Until then it holds the model's parameters as replicated DTensors on `mesh` and its buffers, under their own names and in the
    model's own memory. At the first call the very same DTensor objects become the sharded ones, so that an optimizer, a scheduler or
    a parameter group made before it trains the distributed module.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, build: Callable[[tuple[Any, ...], dict[str, Any]], ParallelModule]) -> None:
        super().__init__()
        whole: dict[int, nn.Parameter] = {}
        for fqn, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in whole:
                wrapped = sharded(parameter.data, mesh, (R,) * mesh.ndim, tuple(parameter.shape))
                whole[id(parameter)] = nn.Parameter(wrapped, requires_grad=parameter.requires_grad)
            owner, name = owner_of(self, fqn)
            owner.register_parameter(name, whole[id(parameter)])
        for fqn, buffer in model.named_buffers(remove_duplicate=False):
            owner, name = owner_of(self, fqn)
            path, _, _ = fqn.rpartition(".")
            owner.register_buffer(name, buffer, persistent=name not in model.get_submodule(path)._non_persistent_buffers_set)
        self.train(model.training)
        # Not through nn.Module's own attribute setter, which would register the model as a child.
        object.__setattr__(self, "_deferred", (model, build))

    @torch._dynamo.disable  # type: ignore[untyped-decorator]  # the class changes under the caller's feet; nothing here is worth compiling
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Plan for these arguments, become the distributed module, and run it."""
        self._become(args, kwargs)
        return self.forward(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Plan for these arguments, become the distributed module, and train one step of it."""
        self._become(args, kwargs)
        return self.step(*args, **kwargs)

    def _become(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model, build = self.__dict__["_deferred"]
        mine, mode = dict(self.named_parameters()), self.training
        for fqn, parameter in model.named_parameters():
            parameter.requires_grad_(mine[fqn].requires_grad)
        model.train(mode)
        module = build(args, kwargs)
        module.adopt(mine)
        hooks = {name: value for name, value in self.__dict__.items() if name.endswith("_hooks") and value}
        self.__class__ = type(module)
        self.__dict__ = module.__dict__
        self.__dict__.update(hooks)
        self.train(mode)
