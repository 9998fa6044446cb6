"""What went wrong while tracing, in the user's terms: the line of the user's model, the cause, and the ways out."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from autopar.errors import TraceError

_CAUSES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("GuardOnDataDependentSymNode", "data-dependent", "Could not guard", "DynamicOutputShape", "DataDependentOutput"),
        "the model looks at the values of a tensor (as in `if x.sum() > 0`, `.item()`, `int(x)`, boolean indexing or `nonzero`)",
        "choose with `torch.where` or a mask of fixed shape, take the decision outside of the model, or make it depend on plain Python numbers",
    ),
    (
        ("Unsupported output type", "unsupported output", "output type"),
        "the model returns an object that is no tree of tensors",
        "return tensors, tuples, dicts, dataclasses or a transformers `ModelOutput`, or register the type with "
        "`torch.utils._pytree.register_pytree_node`",
    ),
    (
        ("Unsupported input type", "input type"),
        "an input is an object that is no tree of tensors",
        "pass tensors, numbers, strings and None in lists, tuples and dicts, or register the type with `torch.utils._pytree.register_pytree_node`",
    ),
    (
        ("required positional argument", "unexpected keyword argument", "positional arguments but"),
        "the example inputs do not fit the model's forward",
        "give a tuple for positional arguments or a dict for keywords, as the model is called in training",
    ),
    (
        ("Unhandled FakeTensor Device Propagation", "found two different devices"),
        "tensors of different devices meet",
        "create tensors inside of forward on the device of an input (`torch.arange(n, device=x.device)`)",
    ),
)
"""Words in an exception, what they mean, and what to do; the first row that fits is used."""

_OTHER_REMEDY = "try `torch.export.export(model, args, kwargs, strict=False)` alone: the model must pass it"


def as_trace_error(error: BaseException, model: nn.Module) -> TraceError:
    """The `TraceError` that says what `error`, raised while `model` was traced, means."""
    chain = list(chain_of(error))
    text = " ".join(f"{type(item).__name__} {item}" for item in chain)
    for words, cause, remedy in _CAUSES:
        if any(word in text for word in words):
            break
    else:
        first_line = next((line for line in str(error).splitlines() if line.strip()), "no message")
        cause, remedy = f"{type(error).__name__}: {first_line}", _OTHER_REMEDY
    return TraceError(f"{_user_line(chain) or type(model).__name__}: {type(model).__name__} cannot be traced: {cause}; {remedy}")


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """`error` and what it came from, the nearest first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def _user_line(chain: list[BaseException]) -> str:
    """`file.py:line: code` of the user's innermost frame, and where inside a library it led, if it did."""
    own = str(Path(__file__).parent)
    for error in chain:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "/torch/" not in frame.filename and not frame.filename.startswith(("<", own)) and "/contextlib.py" not in frame.filename
        ]
        mine = [frame for frame in frames if "site-packages" not in frame.filename and "dist-packages" not in frame.filename]
        mine = [frame for frame in mine if frame.name == "forward" or mine[-1] is frame]
        library = [frame for frame in frames if frame not in mine and "/transformers/utils/" not in frame.filename]
        in_forward = [frame for frame in mine if frame.name not in ("<module>",)]
        if in_forward and (not library or frames.index(in_forward[-1]) >= 0):
            place = _say(in_forward[-1])
            after = [frame for frame in library if frames.index(frame) > frames.index(in_forward[-1])]
            return f"{_say(after[-1])} (called from {place})" if after else place
        if library:
            return _say(library[-1])
    return ""


def _say(frame: traceback.FrameSummary) -> str:
    code = f" `{frame.line}`" if frame.line else ""
    return f"{frame.filename}:{frame.lineno}{code}"
