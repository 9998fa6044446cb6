"""What all distributed modules have in common: how they are called, and that they stay what and where they were made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self, TypedDict

import torch
from torch import Tensor, nn

from autopar.errors import InputError, RuntimeSetupError
from autopar.ir.conversion import State
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import TracedModel
from autopar.runtime import inputs, last_words
from autopar.runtime.convert import Place
from autopar.runtime.evaluation import EvaluationCheck
from autopar.runtime.handshake import agree
from autopar.runtime.lower import Mode
from autopar.runtime.precision import Dtypes, dtypes_of, without_autocast


class Options(TypedDict, total=False):
    """How a distributed module is called.

    `inputs`: `"global"` (the default) where every rank passes the whole batch, `"per-rank"` where each passes its part.
    `signature`: that of the model's `forward`, so that arguments may come by position or by name.
    `device`: where this rank computes; by default where its parameters are.
    `evaluation`: asked once, before the first call in evaluation mode.
    `timeout_s`: for what ranks tell each other through the store.
    `dtypes`: of parameters and gradients; by default as the plan's precision says.
    """

    inputs: inputs.Mode
    signature: inspect.Signature | None
    device: torch.device | None
    evaluation: EvaluationCheck | None
    timeout_s: float
    dtypes: Dtypes | None


class DistributedModule(nn.Module):
    """A module whose programs are made for one dtype, one device and one job: `traced` under `plan`."""

    _dropout: bool = True
    """Whether dropout is on in training mode; see `autopar.runtime.operators.dropout.without_dropout`."""

    _left_words = False
    _binder: inputs.InputBinder

    def __init__(self, traced: TracedModel, plan: Plan, local_state: Mapping[str, Tensor], options: Options) -> None:
        super().__init__()
        self._traced, self._plan, self._options = traced, plan, options
        self._evaluation = options.get("evaluation")
        self._dtypes = options.get("dtypes") or dtypes_of(plan.precision, traced.graph)
        self._timeout_s = options.get("timeout_s", 600.0)
        self._inputs = options.get("inputs", "global")
        self._device = options.get("device") or next((tensor.device for tensor in local_state.values()), torch.device("cpu"))
        self._constants = {name: tensor.to(self._device) for name, tensor in traced.constants.items()}
        # Masks of dropout must agree between ranks that hold the same part.
        seed = agree(torch.initial_seed, "sharing rank 0's random seed", self._timeout_s) & ((1 << 62) - 1)
        self._counter = torch.tensor([seed, 0])

    @property
    def random_state(self) -> Tensor:
        """`(2,)` int64 on CPU, the same on every rank: the seed of the masks of dropout and how often they were drawn.

        It is the state itself: save it in a checkpoint, and load into it (`torch.distributed.checkpoint.load` writes in place), to go on
        with the masks that would have come. They are the same only under the same plan.
        """
        return self._counter

    def _binder_of(self, given: Mapping[str, State], place: Place) -> inputs.InputBinder:
        """What checks calls whose inputs come in the states `given`, by path."""
        return inputs.InputBinder(
            self._traced,
            given,
            place,
            whole=self._inputs == "global",
            device=self._device,
            signature=self._options.get("signature"),
            timeout_s=self._timeout_s,
        )

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """The call's tensors, checked. Ranks that are not told of a problem on this one wait for it."""
        try:
            found = self._binder.bind(args, kwargs)
        except InputError as error:
            self._left_words = True
            last_words.leave(error)
            raise
        if self._left_words:  # all ranks may have skipped the same bad batch
            self._left_words = False
            last_words.take_back()
        return found

    def _as_planned(self) -> AbstractContextManager[None]:
        """Around all that computes: nothing casts but the program. Raises `RuntimeSetupError` under an autocast that is not the plan's."""
        return without_autocast(self._device, self._plan.precision)

    def _check_mode(self) -> None:
        """Raise `RuntimeSetupError` where this plan is not one for the mode, training or evaluation, that the module is in."""
        if self.training and not self._traced.graph.training:
            raise RuntimeSetupError(
                "this module was planned in evaluation mode but is called in training mode; call `.eval()`, or plan after `model.train()`"
            )
        if not self.training and self._evaluation is not None:
            if why := self._evaluation.problem():
                raise RuntimeSetupError(
                    f"this module was planned in training mode, and the model does something else in evaluation mode: {why}. "
                    "Plan a second module after `model.eval()` for evaluation"
                )
            self._evaluation = None

    @property
    def _mode(self) -> Mode:
        return Mode(dropout=self.training and self._dropout, statistics=self.training)

    def _next_counter(self) -> Tensor:
        """For one more microbatch. A copy: a region that is recomputed must find the counter as it was."""
        self._counter[1] += 1
        return self._counter.clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.half`, `.cuda` and the like do to every tensor. The program is made for one dtype and one device."""
        for tensor in (*self.parameters(), *self.buffers()):
            probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            made = fn(probe)
            if (made.dtype, made.device) != (probe.dtype, probe.device):
                raise RuntimeSetupError(
                    f"a distributed module cannot move from {probe.dtype} on {probe.device} to {made.dtype} on {made.device}: its program "
                    "and plan are made for the former; convert the model first, then plan and parallelize it"
                )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call,no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses `pickle` and `copy.deepcopy`: a process group has no copy."""
        raise RuntimeSetupError(
            "a distributed module can be neither pickled nor copied; save and load `state_dict()`, or parallelize a second model"
        )
