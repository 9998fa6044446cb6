"""Repeated layers are exported once: tracing time does not grow with depth.

1. `find_repeats` groups sibling modules that must trace alike: same classes, same parameters and buffers by shape, dtype and
   requires_grad, equal attributes. Whole numbers that differ (`layer_idx`) are allowed, but the traced one is `_Unseen`: a forward
   that so much as looks at it is traced whole.
2. While exporting, the forward of the first of a group is framed by two marker operators, `enter` and `leave`; the forwards of the
   others are one operator, `repeat`, that gives tensors like those the first one gave. Their parameters and children are taken off
   them, since walking over 10,000 of them costs torch more than all else; a model that asks for them is traced whole. What the
   arguments are is part of the comparison at each call: shapes, strides, dtypes, which argument is which tensor, and everything that
   is not a tensor.
3. `expand` puts a copy of what stands between `enter` and `leave` in place of each `repeat`, with the parameters of the module that
   was called.

Whenever something is not certain (`_Uncertain`), the caller traces whole. A test holds both ways equal on every model of the zoo.
"""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

_LIBRARY = torch.library.Library("autopar_trace", "DEF")  # type: ignore[no-untyped-call]
for _marker in ("enter", "leave", "repeat"):
    _LIBRARY.define(f"{_marker}(Tensor[] tensors, int call) -> Tensor[]")  # type: ignore[no-untyped-call]

ENTER, LEAVE, REPEAT = (f"autopar_trace.{marker}.default" for marker in ("enter", "leave", "repeat"))

_results: dict[int, list[Tensor]] = {}
"""What `repeat` number `call` gives, by example; only while a trace is under way."""


def _fake_same(tensors: list[Tensor], call: int) -> list[Tensor]:
    return [torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=item.device) for item in tensors]


def _fake_repeat(tensors: list[Tensor], call: int) -> list[Tensor]:
    return _fake_same(_results[call], call)


torch.library.register_fake("autopar_trace::enter", _fake_same, lib=_LIBRARY)
torch.library.register_fake("autopar_trace::leave", _fake_same, lib=_LIBRARY)
torch.library.register_fake("autopar_trace::repeat", _fake_repeat, lib=_LIBRARY)


class Uncertain(Exception):
    """It is not certain that repeats may be traced once; trace whole."""


class UnseenSignature(Uncertain):
    """The module at `path` is called in a way in which no module of its group was called before."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Looked(Uncertain):
    """Forward uses the attribute `name`, in which the modules of a group differ."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Unseen:
    """Stands for a number in which repeats differ; whoever looks at it gives `Looked`, and leaves the name in `looked`."""

    def __init__(self, name: str, looked: set[str]) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_looked", looked)

    def _look(self, *_: Any) -> NoReturn:
        name = object.__getattribute__(self, "_name")
        object.__getattribute__(self, "_looked").add(name)
        raise Looked(name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` asks for. `torch.export` asks it of every attribute of every module, which is no look of forward's."""
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch._export."):
            return _Unseen
        return self._look()


_WAYS_TO_LOOK = (
    "abs", "add", "and", "bool", "divmod", "eq", "float", "floordiv", "format", "ge", "getattr", "gt", "hash", "index", "int",
    "invert", "iter", "le", "len", "lshift", "lt", "mod", "mul", "ne", "neg", "or", "pos", "pow", "radd", "rand", "rdivmod",
    "repr", "rfloordiv", "rlshift", "rmod", "rmul", "ror", "round", "rpow", "rrshift", "rshift", "rsub", "rtruediv", "rxor",
    "str", "sub", "truediv", "trunc", "xor",
)  # fmt: skip
"""Every special method by which something about a number can be learned."""

for _way in _WAYS_TO_LOOK:
    setattr(_Unseen, f"__{_way}__", _Unseen._look)


@dataclass(frozen=True, slots=True)
class Group:
    """Paths of modules that trace alike; `differing` are the attributes (path below the module, name) in which they differ harmlessly."""

    paths: tuple[str, ...]
    differing: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One call, the `nth`, of the module at `path`. `template` is the number of the call whose operations it has, maybe its own.

    `operands` say for each tensor it is given: `(None, i)` is tensor `i` of the `repeat` operator that stands for it in the program,
    `(call, i)` is result `i` of an earlier call that the same `repeat` stands for.
    """

    path: str
    template: int
    nth: int
    operands: tuple[tuple[int | None, int], ...] = ()


@dataclass(slots=True)
class _Template:
    """What the first call of its kind gave: the tree of its result, and for each leaf the number of a tensor or a literal."""

    call: int
    out_spec: pytree.TreeSpec
    slots: list[tuple[int | None, Any]]
    results: list[Tensor]
    gradients: list[bool]


@dataclass(slots=True)
class Recording:
    """The calls of repeated modules in one trace by number; `chains` maps the number in a `repeat` to the calls it stands for, in order."""

    chained: bool
    calls: dict[int, Call] = field(default_factory=dict)
    chains: dict[int, list[int]] = field(default_factory=dict)
    templates: dict[Any, _Template] = field(default_factory=dict)
    times_called: dict[str, int] = field(default_factory=dict)
    looked: set[str] = field(default_factory=set)
    missed: list[str] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    pending_tensors: list[Tensor] = field(default_factory=list)
    pending_results: dict[int, tuple[int, int, Tensor]] = field(default_factory=dict)
    gradients: dict[int, tuple[bool, Tensor]] = field(default_factory=dict)

    def has_gradient(self, tensor: Tensor) -> bool:
        """Whether `tensor` requires a gradient in the model as it is: markers give tensors that all do."""
        return self.gradients.get(id(tensor), (tensor.requires_grad,))[0]

    def give(self, template: _Template, results: list[Tensor]) -> Any:
        """The result of a module with `results` as its tensors."""
        for tensor, gradient in zip(results, template.gradients, strict=True):
            self.gradients[id(tensor)] = (gradient, tensor)
        return pytree.tree_unflatten(_filled(template.slots, results), template.out_spec)


# ---- which modules repeat ----------------------------------------------------------------------------------------------------------

_MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
_HOOKS = tuple(name for name in _MODULE_ATTRIBUTES if "hooks" in name and "state_dict" not in name)
_PLAIN = (type(None), bool, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.Size, enum.Enum, type)


def find_repeats(model: nn.Module, significant: frozenset[str]) -> list[Group]:
    """Groups of two or more siblings, the outermost ones, that must trace alike. Numbers named in `significant` must be equal too."""
    groups: list[Group] = []
    owners: Counter[int] = Counter()
    parents: Counter[int] = Counter()
    for module in model.modules():
        owners.update([id(tensor) for owned in (module._parameters, module._buffers) for tensor in owned.values() if tensor is not None])
        parents.update([id(child) for child in module._modules.values() if child is not None])

    def visit(module: nn.Module, path: str) -> None:
        alike: dict[Any, list[tuple[str, nn.Module, dict[tuple[str, str], int]]]] = {}
        for name, child in module._modules.items():
            if child is None:
                continue
            child_path = f"{path}.{name}" if path else name
            state = _state(child, significant, owners, parents) if child._modules else None
            if state is None:
                visit(child, child_path)
            else:
                alike.setdefault(state[0], []).append((child_path, child, state[1]))
        for members in alike.values():
            if len(members) == 1:
                visit(members[0][1], members[0][0])
                continue
            numbers = [member[2] for member in members]
            differing = tuple(key for key in numbers[0] if any(other[key] != numbers[0][key] for other in numbers[1:]))
            groups.append(Group(tuple(member[0] for member in members), differing))

    visit(model, "")
    return groups


def _below(module: nn.Module, path: str, found: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """`module` and all below it by path; faster than `named_modules`, which is a generator in a generator for each level."""
    found.append((path, module))
    for name, child in module._modules.items():
        if child is not None:
            _below(child, f"{path}.{name}" if path else name, found)
    return found


def _state(
    root: nn.Module, significant: frozenset[str], owners: Counter[int], parents: Counter[int]
) -> tuple[Any, dict[tuple[str, str], int]] | None:
    """All that forward may depend on, to compare, and apart from it the numbers that may differ; None if it cannot be compared."""
    modules = _below(root, "", [])
    inside = {id(module): path for path, module in modules}
    key: list[Any] = []
    numbers: dict[tuple[str, str], int] = {}
    counts: Counter[int] = Counter()
    for path, module in modules:
        state = module.__dict__
        if module is not root and (parents[id(module)] > 1 or any(state.get(name) for name in _HOOKS)):
            return None  # shared with others, or watched; hooks of the root itself run around what stands in place of its forward
        tensors: list[Any] = []
        for owned in (module._parameters, module._buffers):
            for name, tensor in owned.items():
                if tensor is None:
                    tensors.append(name)
                    continue
                place = counts[id(tensor)]
                counts[id(tensor)] += 1
                tensors.append((name, type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad, place))
        attributes: list[Any] = []
        for name in state.keys() - _MODULE_ATTRIBUTES:
            value = state[name]
            if type(value) is int and name not in significant:
                numbers[path, name] = value
                attributes.append(name)
            else:
                attributes.append((name, _comparable(value, inside)))
        attributes.sort(key=lambda item: item if isinstance(item, str) else item[0])
        key.append(
            (path, type(module), module.training, tuple(tensors), tuple(attributes), tuple(sorted(module._non_persistent_buffers_set)))
        )
    if any(owners[tensor] != count or count > 1 for tensor, count in counts.items()):
        return None  # tied to a weight elsewhere
    return tuple(key), numbers


def _comparable(value: Any, inside: dict[int, str]) -> Any:
    """Something equal for attributes that mean the same: by value where the type is plain, else the very same object."""
    if isinstance(value, _PLAIN) or type(value) is int:
        return (type(value), value)
    if type(value) in (list, tuple):
        return (type(value), tuple(_comparable(item, inside) for item in value))
    if type(value) in (set, frozenset):
        return (type(value), frozenset(_comparable(item, inside) for item in value))
    if type(value) is dict:
        return (dict, tuple((_comparable(key, inside), _comparable(item, inside)) for key, item in value.items()))
    if isinstance(value, functools.partial):
        return (functools.partial, *(_comparable(part, inside) for part in (value.func, value.args, value.keywords)))
    if isinstance(value, types.MethodType):
        return (value.__func__, inside.get(id(value.__self__), id(value.__self__)))
    if id(value) in inside:
        return ("module", inside[id(value)])
    return ("same", id(value))


# ---- while exporting ---------------------------------------------------------------------------------------------------------------


@contextmanager
def once_per_repeat(model: nn.Module, groups: list[Group], traced: frozenset[str], *, chained: bool) -> Iterator[Recording]:
    """Frame the first of each group and the modules in `traced`, and make the others operators, for the time of the block.

    With `chained`, one operator stands for a whole row of repeats, of which each gets its tensors from the ones before; the tensors
    between them are then unknown to the tracer, so this fails for a model that uses them otherwise too.
    Raises (out of the model's forward) `Uncertain` where that is not safe; `UnseenSignature` asks to be called again with one more
    path in `traced`.
    """
    recording = Recording(chained)
    undo: list[Callable[[], None]] = []
    repeated = {path for group in groups for path in group.paths}
    last = {path.rpartition(".")[0]: path for path, _ in _below(model, "", []) if path in repeated}
    walking = functools.partial(_runs, getattr(inspect.unwrap(model.forward), "__code__", None))
    try:
        for number, group in enumerate(groups):
            for path in group.paths:
                module = model.get_submodule(path)
                whole = path == group.paths[0] or path in traced
                ends = not chained or last[path.rpartition(".")[0]] == path
                _put(module, "forward", _Framed(module.forward, path, number, whole, ends, recording), undo)
                for child_path, name in group.differing if whole else ():
                    child = module.get_submodule(child_path)
                    _put(child, name, _Unseen(name, recording.looked), undo)
                if not whole:
                    for owned in ("_parameters", "_buffers", "_modules"):
                        _put(module, owned, _Hidden(path, getattr(module, owned), recording.missed, walking), undo)
        yield recording
        if recording.looked:
            raise Looked(min(recording.looked))
        if recording.missed:
            raise Uncertain(f"{recording.missed[0]} is used without its parent")
        if recording.pending:
            raise Uncertain("the last of the repeated modules was not called")
    finally:
        for step in reversed(undo):
            step()
        _results.clear()


class _Hidden(dict[str, Any]):
    """Nothing, in place of the parameters, buffers or children (`names`) of a repeat that is not traced; whoever asks for one of them
    gives `Uncertain`, and so does who walks over all of them while `forward` runs (`walking`), as a penalty on all parameters does."""

    def __init__(self, path: str, names: Iterable[str], missed: list[str], walking: Callable[[], bool]) -> None:
        super().__init__()
        self.path, self.names, self.missed, self.walking = path, frozenset(names), missed, walking

    def _miss(self, name: object) -> NoReturn:
        self.missed.append(f"{self.path}.{name}")
        raise Uncertain(f"{self.path}.{name} is used without its parent")

    def __contains__(self, name: object) -> bool:
        if name in self.names:
            self._miss(name)
        return False

    def __getitem__(self, name: str) -> Any:
        assert name not in self
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        assert name not in self
        return default

    def _walk(self) -> None:
        if self.names and self.walking():
            self._miss(min(self.names))

    def __len__(self) -> int:
        self._walk()
        return 0

    def __iter__(self) -> Iterator[str]:
        self._walk()
        return iter(())

    def keys(self) -> Any:
        self._walk()
        return super().keys()

    def values(self) -> Any:
        self._walk()
        return super().values()

    def items(self) -> Any:
        self._walk()
        return super().items()


def _runs(code: types.CodeType | None) -> bool:
    """Whether the function of `code` is under way: what torch's exporter looks at on its own is none of the model's doing."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _put(module: nn.Module, name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    had, old = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = value

    def back() -> None:
        if had:
            module.__dict__[name] = old
        else:
            del module.__dict__[name]

    undo.append(back)


@dataclass(slots=True)
class _Framed:
    """What stands in place of `forward`: for a module that is traced `whole` the frame, for another the operator."""

    forward: Callable[..., Any]
    path: str
    group: int
    whole: bool
    ends: bool
    recording: Recording

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recording = self.recording
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors, slots = _distinct(leaves)
        like = tuple((item.shape, item.stride(), item.dtype, recording.has_gradient(item)) for item in tensors)
        signature = (self.group, spec, tuple((index, type(literal), literal) for index, literal in slots), like)
        template = recording.templates.get(signature)
        if template is None and not self.whole:
            raise UnseenSignature(self.path)
        number = len(recording.calls)
        nth = recording.times_called.get(self.path, 0)
        recording.times_called[self.path] = nth + 1
        if template is not None:
            recording.calls[number] = Call(self.path, template.call, nth, _operands(recording, tensors))
            recording.pending.append(number)
            results = _run_chain(recording, template) if self.ends else _results_between(recording, template, number)
            return recording.give(template, results)

        if any(id(tensor) in recording.pending_results for tensor in tensors):
            raise Uncertain(f"{self.path} reads what a repeat gave")
        recording.calls[number] = Call(self.path, number, nth)
        inner = torch.ops.autopar_trace.enter(tensors, number)
        for tensor, outside in zip(inner, tensors, strict=True):
            recording.gradients[id(tensor)] = (recording.has_gradient(outside), tensor)
        inner_args, inner_kwargs = pytree.tree_unflatten(_filled(slots, inner), spec)
        out_leaves, out_spec = pytree.tree_flatten(self.forward(*inner_args, **inner_kwargs))
        out_tensors, out_slots = _distinct(out_leaves)
        results = torch.ops.autopar_trace.leave(out_tensors, number)
        gradients = [recording.has_gradient(tensor) for tensor in out_tensors]
        recording.templates[signature] = template = _Template(number, out_spec, out_slots, results, gradients)
        return recording.give(template, results)


def _operands(recording: Recording, tensors: list[Tensor]) -> tuple[tuple[int | None, int], ...]:
    found: list[tuple[int | None, int]] = []
    outer = {id(tensor): index for index, tensor in enumerate(recording.pending_tensors)}
    for tensor in tensors:
        if id(tensor) in recording.pending_results:
            found.append(recording.pending_results[id(tensor)][:2])
            continue
        if id(tensor) not in outer:
            outer[id(tensor)] = len(recording.pending_tensors)
            recording.pending_tensors.append(tensor)
        found.append((None, outer[id(tensor)]))
    return tuple(found)


def _run_chain(recording: Recording, template: _Template) -> list[Tensor]:
    """End the row of pending calls: one operator in the program, which gives what the last of them gives."""
    number = recording.pending[-1]
    _results[number] = template.results
    recording.chains[number] = list(recording.pending)
    results: list[Tensor] = torch.ops.autopar_trace.repeat(recording.pending_tensors, number)
    recording.pending.clear()
    recording.pending_tensors.clear()
    recording.pending_results.clear()
    return results


def _results_between(recording: Recording, template: _Template, number: int) -> list[Tensor]:
    """Tensors of the right shapes that only the next repeat may read: the tracer has not seen them made."""
    made: list[Tensor] = []
    with _disable_current_modes():
        for index, like in enumerate(template.results):
            assert isinstance(like, FakeTensor)
            elements = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")
            tensor = FakeTensor(like.fake_mode, elements, like.device)
            recording.pending_results[id(tensor)] = (number, index, tensor)  # keeps the tensor alive, so that its id stays its own
            made.append(tensor)
    return made


def _distinct(leaves: list[Any]) -> tuple[list[Tensor], list[tuple[int | None, Any]]]:
    """The different tensors among `leaves`, and for each leaf its number among them or the literal it is."""
    tensors: list[Tensor] = []
    number: dict[int, int] = {}
    slots: list[tuple[int | None, Any]] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if id(leaf) not in number:
                number[id(leaf)] = len(tensors)
                tensors.append(leaf)
            slots.append((number[id(leaf)], None))
        elif isinstance(leaf, (int, *_PLAIN)):
            slots.append((None, leaf))
        else:
            raise Uncertain(f"argument or result of type {type(leaf).__name__}")
    return tensors, slots


def _filled(slots: list[tuple[int | None, Any]], tensors: list[Tensor]) -> list[Any]:
    return [literal if index is None else tensors[index] for index, literal in slots]
