"""`torch.export` of a model whose tensors are all fake, with the model put back as it was afterwards.

Private names of torch used here: `FakeTensorMode` and `ShapeEnv` (torch builds the same pair inside `export`; making them ourselves
lets `meta` parameters be traced as if they were on an ordinary device). Should they move, `export` on `meta` tensors still works for
models that never create a tensor on the default device. `torch.export._trace` is named to leave out what it prints; should it move, that
is printed.
"""

from __future__ import annotations

import logging
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any, TextIO, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from autopar.ir.tracing.library_patches import library_patches
from autopar.ir.tracing.own_backward import backward_is_that_of_forward

SET_GRAD = "wrap_with_set_grad_enabled"


def export_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], check: Callable[[ExportedProgram], None] = lambda program: None
) -> ExportedProgram:
    """The functional ATen program of `model(*args, **kwargs)` with every shape fixed; nothing is computed and nothing is allocated.

    `check` sees the program before it is made functional, and may raise.
    Raises what `torch.export` raises; `trace` turns that into a `TraceError`.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_quiet())
        stack.enter_context(library_patches(frozenset(kwargs)))
        stack.enter_context(_attributes_while_tracing(model))
        stack.enter_context(_own_backward_refused())
        _, fake_args, fake_kwargs = stack.enter_context(_faked(model, args, kwargs))
        program = torch.export.export(model, fake_args, fake_kwargs, strict=False)
        inline_grad_regions(program.graph_module)
        check(program)
        functional: ExportedProgram = program.run_decompositions({})
        return functional


@contextmanager
def running_on_fakes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Within, `model` can be called with the arguments that are given, and computes nothing; otherwise as while it is exported."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(library_patches(frozenset(kwargs)))
        stack.enter_context(_attributes_while_tracing(model))
        mode, fake_args, fake_kwargs = stack.enter_context(_faked(model, args, kwargs))
        stack.enter_context(mode)
        yield fake_args, fake_kwargs


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch logs while it fails, and the graph that `export` prints then, would bury the error that says the same in a line. Other
    output is let through, and all of it where the user asks torch for logs."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] == "torch"]
    handlers = {handler for logger in loggers for handler in logger.handlers}

    def nothing(record: logging.LogRecord) -> bool:
        return False

    for handler in handlers:
        handler.addFilter(nothing)
    try:
        with redirect_stderr(cast(TextIO, _WithoutExport(sys.stderr))):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(nothing)


class _WithoutExport:
    """Standard error, but for what the module of `torch.export` itself prints there."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        printed = sys._getframe(1).f_globals.get("__name__") == "torch.export._trace"
        return len(text) if printed else self._file.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def _own_backward_refused() -> Iterator[None]:
    """An `autograd.Function` is traced as the operations of its `forward`: a backward pass of its own would be lost without a word, and is
    refused where it is another than the forward's. Checkpointing is the exception: its backward is that of the function it runs, which
    is traced in its place."""
    function: Any = torch.autograd.Function
    original = function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__ == "torch.utils.checkpoint" and cls.__name__ == "CheckpointFunction":
            return args[0](*args[2:])  # (function, preserve_rng_state, *arguments)
        bound = original.__get__(None, cls)
        theirs = not cls.__module__.startswith("torch.") or cls.__module__.startswith("torch.nn.")
        if theirs and torch.is_grad_enabled() and not backward_is_that_of_forward(cls, bound, args):
            raise TypeError(f"`{cls.__qualname__}` is an `autograd.Function`")
        return bound(*args, **kwargs)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = original


@contextmanager
def _attributes_while_tracing(model: nn.Module) -> Iterator[None]:
    """No key-value caches and no gradient checkpointing: the plan decides on recomputation, and a cache is no output of a training step."""
    undo: list[tuple[Any, str, Any]] = []
    seen: set[int] = set()

    def put(owner: Any, name: str, value: Any) -> None:
        old = getattr(owner, name)
        if old != value:
            undo.append((owner, name, old))
            setattr(owner, name, value)

    try:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False) is True:
                put(module, "gradient_checkpointing", False)
            for owner in (getattr(module, "config", None), getattr(getattr(module, "config", None), "decoder", None)):
                if owner is not None and id(owner) not in seen and isinstance(getattr(owner, "use_cache", None), bool):
                    seen.add(id(owner))
                    put(owner, "use_cache", False)
        yield
    finally:
        for owner, name, old in reversed(undo):
            setattr(owner, name, old)


@contextmanager
def _faked(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[FakeTensorMode, tuple[Any, ...], dict[str, Any]]]:
    """Parameters, buffers and inputs as fake tensors on one device: that of the parameters, or the CPU where that is `meta`."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, export=True)
    device = next(
        (tensor.device for tensor in [*model.parameters(), *model.buffers()] if tensor.device.type != "meta"), torch.device("cpu")
    )
    fakes: dict[int, Tensor] = {}

    def fake(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) not in fakes:
            with mode, torch.no_grad():
                made: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            elif tensor.requires_grad:
                made.requires_grad_()
            fakes[id(tensor)] = made
        return fakes[id(tensor)]

    undo: list[tuple[Any, str, Tensor]] = []
    try:
        for module in model.modules():
            for owned in (module._parameters, module._buffers):
                for name, tensor in owned.items():
                    if tensor is not None:
                        undo.append((owned, name, tensor))
                        owned[name] = fake(tensor)
        yield mode, *pytree.tree_map(fake, (args, kwargs))
    finally:
        for owned, name, tensor in undo:
            owned[name] = tensor


def inline_grad_regions(module: GraphModule) -> None:
    """Replace every `torch.no_grad()` region by its own operations on detached operands, in place.

    `run_decompositions` would inline the region too, but forget that no gradient leaves it.
    """
    for node in list(module.graph.nodes):
        if node.op == "call_function" and getattr(node.target, "_name", "") == SET_GRAD:
            _inline(module, node)
    for child in module.children():
        if isinstance(child, GraphModule):
            inline_grad_regions(child)
    module.graph.eliminate_dead_code()
    module.recompile()


def _inline(module: GraphModule, call: Node) -> None:
    enabled, body_ref, *operands = call.args
    assert isinstance(body_ref, Node)
    body = getattr(module, str(body_ref.target))
    inline_grad_regions(body)
    stands_for: dict[Node, Any] = {}
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    with module.graph.inserting_before(call):
        for placeholder, operand in zip(placeholders, operands, strict=True):
            value = operand.meta.get("val") if isinstance(operand, Node) else None
            if not enabled and isinstance(value, Tensor) and value.is_floating_point():
                detached = module.graph.call_function(torch.ops.aten.detach.default, (operand,))
                detached.meta = {key: item for key, item in call.meta.items() if key in ("nn_module_stack", "stack_trace")} | {"val": value}
                stands_for[placeholder] = detached
            else:
                stands_for[placeholder] = operand
        for node in body.graph.nodes:
            if node.op == "output":
                results = torch.fx.map_arg(node.args[0], lambda inner: stands_for[inner])
            elif node.op == "get_attr":
                name = f"{body_ref.target}_{node.target}"
                setattr(module, name, getattr(body, str(node.target)))
                stands_for[node] = module.graph.get_attr(name)
                stands_for[node].meta = dict(node.meta)
            elif node.op != "placeholder":
                stands_for[node] = module.graph.node_copy(node, lambda inner: stands_for[inner])
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(call)
