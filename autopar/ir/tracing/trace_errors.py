"""What went wrong while tracing, in the user's terms: the line of the user's model, the cause, and the ways out."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from autopar.errors import TraceError

_OWN = str(Path(__file__).parent)

_REGISTER = "register its type with `torch.utils._pytree.register_pytree_node`"


@dataclass(frozen=True, slots=True)
class _Cause:
    """If one of `words` is in an exception, `meaning` is what happened and `remedy` what to do; `opaque`: a leaf module may do it."""

    words: tuple[str, ...]
    meaning: str
    remedy: str
    opaque: bool = False


_STAY_IN_TENSORS = "stay in tensors: choose with `torch.where` or a mask of fixed shape, or make it depend on Python numbers"

_CAUSES = (
    _Cause(
        ("is an `autograd.Function`",),
        "the model has a backward pass of its own, which a trace of its forward would lose",
        "write the forward in PyTorch's operations and leave the backward to autograd (`detach` or `x + (y - x).detach()` for a "
        "straight-through estimate)",
        opaque=True,
    ),
    _Cause(
        ("numpy() is not supported", "numpy() on tensor", "Tensor.__array__", "__array__"),
        "the model hands a tensor to numpy, which a trace cannot follow",
        "do the same with PyTorch's operations",
        opaque=True,
    ),
    _Cause(
        ("unsupported format string passed to FakeTensor", "unhashable type: non-nested SymInt"),
        "the model looks at the values of a tensor (to print or look something up)",
        "leave the print to the code around the model; " + _STAY_IN_TENSORS,
        opaque=True,
    ),
    _Cause(
        ("GuardOnDataDependentSymNode", "data-dependent", "Could not guard", "DynamicOutputShape", "DataDependentOutput"),
        "the model looks at the values of a tensor (as in `if x.sum() > 0`, `.item()`, `int(x)`, `.tolist()`, `x[mask]` or `nonzero`)",
        _STAY_IN_TENSORS,
        opaque=True,
    ),
    _Cause(
        ("nsupported output type", "output type", "It looks like one of the outputs", "in output, which is not a known type"),
        "the model returns an object that is no tree of tensors",
        f"return tensors, tuples, dicts, or a transformers `ModelOutput`, or {_REGISTER}",
    ),
    _Cause(
        ("nsupported input type", "input type", "It looks like one of the inputs"),
        "an input is an object that is no tree of tensors",
        f"pass tensors, numbers, strings and None in lists, tuples and dicts, or {_REGISTER}",
    ),
    _Cause(
        (
            "required positional argument",
            "missing a required argument",
            "unexpected keyword argument",
            "positional arguments but",
            "multiple values for argument",
        ),
        "the example inputs do not fit a forward",
        "give a tuple for positional arguments or a dict for keywords, as the model is called in training",
    ),
    _Cause(
        ("Unhandled FakeTensor Device Propagation", "found two different devices"),
        "tensors of different devices meet",
        "create tensors inside of forward on the device of an input (`torch.arange(n, device=x.device)`)",
    ),
)
"""The first row that fits is used."""

_LONGEST_QUOTE = 200
"""Characters of torch's message that are repeated in ours; the whole is in `__cause__`."""

_OTHER_REMEDY = "`torch.export.export(model, args, kwargs, strict=False)` must work on the model alone"


def as_trace_error(error: BaseException, model: nn.Module) -> TraceError:
    """The `TraceError` that says what `error`, raised while `model` was traced, means."""
    chain = list(chain_of(error))
    text = " ".join(f"{type(item).__name__} {item}" for item in chain)
    said = next((line for line in str(error).splitlines() if line.strip()), "no message").strip()
    said = said if len(said) <= _LONGEST_QUOTE else said[:_LONGEST_QUOTE] + "..."
    cause = next((cause for cause in _CAUSES if any(word in text for word in cause.words)), None)
    meaning = f"{type(error).__name__}: {said}" if cause is None else f"{cause.meaning}: {said}"
    where = _user_line(chain)
    if cause is not None and cause.opaque:
        path, name = _module_of(chain, model)
        where += f" (in `{path}`, a {name})" if path and where else ""
        remedy = ways_out(path, cause.remedy)
    else:
        remedy = f"  Remedy: {_OTHER_REMEDY if cause is None else cause.remedy}"
    return TraceError(f"{where + ': ' if where else ''}{type(model).__name__} cannot be traced: {meaning}\n{remedy}")


def ways_out(path: str, first: str = _STAY_IN_TENSORS) -> str:
    """What to do about what cannot be traced in the module at `path` (empty: the model itself), `first` and what may be done instead."""
    leaf = (
        f'leave the module as it is, one operation whose body is your code: leaf_modules=["{path}"] (or `--leaf {path}`)'
        if path
        else 'move it into a module of its own, and leave that as it is: leaf_modules=["name_of_it"]'
    )
    return "\n".join(
        (
            f"  Remedy: 1. {first};",
            f"  2. {leaf};",
            "  3. make it an operator by `torch.library.custom_op` and `register_autograd`: its splits are found by trial, or "
            "give it a rule, `autopar.register_rule`;",
            "  4. split the model there: return what is decided on, and decide in the code that calls it",
        )
    )


def _module_of(chain: list[BaseException], model: nn.Module) -> tuple[str, str]:
    """Path and class of the innermost module of the user's whose forward was under way."""
    paths = {id(module): path for path, module in model.named_modules()}
    for error in chain:
        found = ("", "")
        for frame, _ in traceback.walk_tb(error.__traceback__):
            names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
            module = frame.f_locals.get(names[0]) if names else None
            known = isinstance(module, nn.Module) and id(module) in paths
            if known and not type(module).__module__.startswith("torch.") and frame.f_code.co_name == "forward":
                found = (paths[id(module)], type(module).__name__)
        if found[1]:
            return found
    return "", ""


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it came from, the nearest first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def _user_line(chain: list[BaseException]) -> str:
    """The user's innermost line inside of a forward, and the library's line it led to, if it did."""
    for error in chain:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_model(frame)]
        if not frames:
            continue
        mine = [index for index, frame in enumerate(frames) if not _is_installed(frame)]
        if mine and mine[-1] == len(frames) - 1:
            return _say(frames[-1])
        if all(_is_python(frame) for frame in frames):
            continue  # the call itself was wrong, and reached no model
        # a call of the model from a script is no line of the model: only a forward of the user's own is worth naming
        forwards = [index for index in mine if frames[index].name == "forward"]
        inner = next(frame for frame in reversed(frames) if "/transformers/utils/" not in frame.filename)
        return f"{_say(inner)} (called from {_say(frames[forwards[-1]])})" if forwards else _say(inner)
    return ""


def _is_model(frame: traceback.FrameSummary) -> bool:
    """Whether `frame` may be a line of a model: not torch's, not autopar's, and inside of the call that is traced."""
    return "/torch/" not in frame.filename and _OWN not in frame.filename and not frame.filename.startswith("<")


def _is_installed(frame: traceback.FrameSummary) -> bool:
    return "site-packages" in frame.filename or "dist-packages" in frame.filename or "/lib/python" in frame.filename


def _is_python(frame: traceback.FrameSummary) -> bool:
    return "/lib/python" in frame.filename and "-packages" not in frame.filename


def _say(frame: traceback.FrameSummary) -> str:
    code = f" `{frame.line}`" if frame.line else ""
    return f"{frame.filename}:{frame.lineno}{code}"
