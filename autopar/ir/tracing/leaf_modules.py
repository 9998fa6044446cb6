"""Leaf modules: modules of the user's that are not traced into. Each call is one operation, `autopar.leaf`, whose body is the module.

    traced = trace(model, args, leaf_modules=chosen(model, ["router", "*.head"]))

What a leaf gives, by shape, is seen by running the model once before it is traced: on fake tensors, where the leaf allows that, or else
with real values. While it is traced, the leaf's forward is one operator that takes its parameters and buffers, and its inputs:
`autopar.leaf(kind, nth call, [which results carry a gradient], [state], [inputs]) -> [results, new values of buffers]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import TraceError
from autopar.ir.rules.neighbours import LEAF

__all__ = ["LEAF", "Chosen", "LeafCall", "LeafModule", "as_operators", "chosen", "recording", "without_values"]

LIKE = Callable[..., Any]
"""Called as the leaf is, gives tensors like those the leaf gives."""

Chosen = Sequence["str | type[nn.Module] | LeafModule"] | Mapping[str | type[nn.Module], LIKE | None]
"""Globs over paths of modules, or classes, each maybe with a stand-in; or the leaves of another trace of the model."""

_LIBRARY = torch.library.Library("autopar_leaf", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("call(str kind, int nth, int call, bool[] follows, Tensor[] state, Tensor[] inputs) -> Tensor[]")  # type: ignore[no-untyped-call]
TRACED = "autopar_leaf.call.default"
"""What the tracer calls it. `call`, its third argument, numbers all calls of a trace, and goes no further."""

_templates: dict[int, tuple[Template, ...]] = {}
"""What each call gives, by number; only while a trace is under way."""


def _fake(kind: str, nth: int, call: int, follows: list[bool], state: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    device = next((item.device for item in (*inputs, *state)), torch.device("cpu"))
    return [torch.empty(item.shape, dtype=item.dtype, device=device) for item in _templates[call]]


torch.library.register_fake("autopar_leaf::call", _fake, lib=_LIBRARY)


@dataclass(frozen=True, slots=True)
class Template:
    """A result by `shape` and `dtype`; `follows`: whether a gradient flows to it where one flows to the operands."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    follows: bool


@dataclass(frozen=True, slots=True)
class LeafCall:
    """How a leaf is called, and what it gives: trees, literals by their place among the leaves of the tree, tensors in order.

    `updated`: the buffers that the call changes, whose new values follow the results.
    """

    in_spec: pytree.TreeSpec
    in_literals: Mapping[int, Any]
    out_spec: pytree.TreeSpec
    out_literals: Mapping[int, Any]
    results: tuple[Template, ...]
    updated: tuple[str, ...]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call, with these tensors in their places."""
        found: tuple[tuple[Any, ...], dict[str, Any]] = _filled(self.in_spec, self.in_literals, tensors)
        return found


@dataclass(slots=True)
class LeafModule:
    """A leaf at `path`: the `module`, and its `calls` in one forward pass of the model. `like` stands in for it where shapes are asked."""

    path: str
    module: nn.Module
    like: LIKE | None = None
    calls: list[LeafCall] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return kind_of(type(self.module))

    def state(self) -> dict[str, Tensor]:
        """Parameters, then buffers, each tensor once."""
        return dict(self.module.named_parameters()) | dict(self.module.named_buffers())

    def run(self, kind: str, nth: int, follows: list[bool], state: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """The operation on one device: the results, and new values of the buffers that it changes."""
        call = self.calls[nth]
        given = dict(zip(self.state(), state, strict=True))
        given |= {name: given[name].clone() for name in call.updated}
        args, kwargs = call.arguments(inputs)
        result = torch.func.functional_call(self.module, given, args, kwargs)
        found = [item for item in pytree.tree_leaves(result) if isinstance(item, Tensor)]
        return found + [given[name] for name in call.updated]


def kind_of(cls: type) -> str:
    """What a plan calls leaves of class `cls`: without its module, which has another name where a script is imported."""
    return cls.__qualname__


def chosen(model: nn.Module, leaf_modules: Chosen) -> dict[str, LeafModule]:
    """The leaves that `leaf_modules` names, by path: globs over module paths, or classes; each maybe with a stand-in for shapes.

    Raises `TraceError` where a name fits no module.
    """
    if isinstance(leaf_modules, str) or not isinstance(leaf_modules, (Sequence, Mapping)):
        raise TraceError("leaf_modules is a list of module names, globs over them, or classes; as in leaf_modules=['layers.*.router']")
    stand_ins = list(leaf_modules.items()) if isinstance(leaf_modules, Mapping) else [(item, None) for item in leaf_modules]
    paths = {path: module for path, module in model.named_modules() if path}
    found: dict[str, LeafModule] = {}
    for wanted, like in stand_ins:
        if isinstance(wanted, LeafModule):
            found[wanted.path] = LeafModule(wanted.path, model.get_submodule(wanted.path), wanted.like, list(wanted.calls))
            continue
        if isinstance(wanted, str):
            hits = [path for path in paths if fnmatchcase(path, wanted)]
        elif isinstance(wanted, type):
            hits = [path for path, module in paths.items() if isinstance(module, wanted)]
        else:
            raise TraceError(f"leaf_modules holds a {type(wanted).__name__}; name modules by path or glob, or give their class")
        if not hits:
            name = wanted if isinstance(wanted, str) else wanted.__name__
            near = get_close_matches(name, paths, 2)
            hint = f"; did you mean {' or '.join(f'`{item}`' for item in near)}?" if near else ""
            raise TraceError(f"leaf_modules: `{name}` is no module of {type(model).__name__}{hint}")
        for path in hits:
            found.setdefault(path, LeafModule(path, paths[path], like))
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    return {path: found[path] for path in outer}


def without_values(module: nn.Module) -> nn.Module:
    """A copy of `module` that holds no memory: its parameters and buffers are on `meta`. The module itself where it cannot be copied."""
    import copy

    memo: dict[int, Any] = {
        id(item): nn.Parameter(item.detach().to("meta"), requires_grad=item.requires_grad) for item in module.parameters()
    }
    memo |= {id(item): item.to("meta") for item in module.buffers()}
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # a module may refuse to be copied in any way it likes
        return module


# ---- a call as data --------------------------------------------------------------------------------------------------------------


def _taken_apart(tree: Any, where: str) -> tuple[pytree.TreeSpec, dict[int, Any], list[Tensor]]:
    leaves, spec = pytree.tree_flatten(tree)
    literals = {index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    for item in literals.values():
        if item is not None and not isinstance(item, (bool, int, float, str, torch.dtype)):
            raise TraceError(
                f"leaf module {where} a {type(item).__name__}; a leaf takes and gives tensors, numbers, strings and None in lists, tuples "
                "and dicts"
            )
    return spec, literals, [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _filled(spec: pytree.TreeSpec, literals: Mapping[int, Any], tensors: Sequence[Tensor]) -> Any:
    given = iter(tensors)
    return pytree.tree_unflatten([literals[index] if index in literals else next(given) for index in range(spec.num_leaves)], spec)


# ---- seeing what leaves give -----------------------------------------------------------------------------------------------------


@contextmanager
def recording(leaves: Mapping[str, LeafModule]) -> Iterator[None]:
    """Within, every call of a leaf is noted in its `calls`, which begin anew."""

    def noted(leaf: LeafModule, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            in_spec, in_literals, tensors = _taken_apart((args, kwargs), f"`{leaf.path}` is given")
            state = leaf.state()
            before = {name: (id(item), item._version) for name, item in state.items()}
            with torch.enable_grad():  # whatever comes in may carry a gradient
                own = [item.detach().requires_grad_(item.is_floating_point()).clone() for item in tensors]
                versions = [item._version for item in own]
                args, kwargs = _filled(in_spec, in_literals, own)
                result = leaf.like(*args, **kwargs) if leaf.like is not None else forward(*args, **kwargs)
            if any(item._version != version for item, version in zip(own, versions, strict=True)):
                raise TraceError(f"leaf module `{leaf.path}` changes its inputs in place; work on a copy, as in `x = x.clone()`")
            out_spec, out_literals, results = _taken_apart(result, f"`{leaf.path}` returns")
            after = {name: (id(item), item._version) for name, item in leaf.state().items()}
            parameters = dict(leaf.module.named_parameters())
            changed = [name for name in after if after[name] != before.get(name)]
            if after.keys() != before.keys() or any(name in parameters or after[name][0] != before[name][0] for name in changed):
                raise TraceError(
                    f"leaf module `{leaf.path}` changes or replaces its parameters, or replaces its buffers; a leaf may change buffers in "
                    "place, as in `self.count.add_(1)`, and Python state of its own"
                )
            templates = tuple(Template(tuple(item.shape), item.dtype, item.requires_grad) for item in results)
            leaf.calls.append(LeafCall(in_spec, in_literals, out_spec, out_literals, templates, tuple(changed)))
            return pytree.tree_map(lambda item: item.detach() if isinstance(item, Tensor) else item, result)

        return run

    for leaf in leaves.values():
        leaf.calls.clear()
    with _forwards(leaves, noted):
        yield


@contextmanager
def as_operators(leaves: Mapping[str, LeafModule]) -> Iterator[None]:
    """Within, every call of a leaf is one operator, which gives what was noted of it."""

    def opaque(leaf: LeafModule, forward: Callable[..., Any]) -> Callable[..., Any]:
        nth = iter(range(len(leaf.calls)))

        def run(*args: Any, **kwargs: Any) -> Any:
            number = next(nth, None)
            if number is None:
                raise TraceError(f"leaf module `{leaf.path}` is called more often while tracing than before")
            call, state = leaf.calls[number], leaf.state()
            _, _, tensors = _taken_apart((args, kwargs), f"`{leaf.path}` is given")
            follows = [item.follows for item in call.results]
            news = tuple(Template(tuple(state[name].shape), state[name].dtype, False) for name in call.updated)
            _templates[key := len(_templates)] = (*call.results, *news)
            results = torch.ops.autopar_leaf.call(leaf.kind, number, key, follows, list(state.values()), tensors)
            for name, new in zip(call.updated, results[len(call.results) :], strict=True):
                with torch.no_grad():
                    state[name].copy_(new)
            return _filled(call.out_spec, call.out_literals, results[: len(call.results)])

        return run

    try:
        with _forwards(leaves, opaque):
            yield
    finally:
        _templates.clear()


@contextmanager
def _forwards(leaves: Mapping[str, LeafModule], made: Callable[[LeafModule, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within, the forward of every leaf is what `made` makes of it."""
    undo: list[tuple[nn.Module, Any]] = []
    try:
        for leaf in leaves.values():
            own = leaf.module.__dict__.get("forward")
            undo.append((leaf.module, own))
            leaf.module.__dict__["forward"] = made(leaf, leaf.module.forward)
        yield
    finally:
        for module, own in undo:
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own
