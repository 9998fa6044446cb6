r"""The text of a graph, and back.

    graph MLP training
    input %x: float32[4, 16] = "0"
    parameter %up.weight: float32[32, 16] grad = "up.weight" also "tied.weight"
    buffer %seen: int64[] = "seen" persistent updated %add_1
    constant %constant_0: float32[]
    %linear_0: float32[4, 32] grad = aten.linear.default(%x, %up.weight) in "up" at "model.py:7"
    %split_0.0: float32[2, 32] grad, %split_0.1: float32[2, 32] grad = aten.split.Tensor(%linear_0, 2, dim=0) as split_0
    output %split_0.0 = "loss"
    rule "mylib.scale.default" for "mylib.scale.default(float32[_, 16], 0.5)" = "m n -> m n" uneven "m n" linear [[0]] found 24

One line a statement; `#` starts a comment line. `as` gives an operation's name where it is not that of its only result. `in` is the
user's module, `at` the user's line. Arguments: `%value`, `torch.float32`, `None`, `True`, numbers (`inf`, `nan` too), `"text"` and
`[lists]`. A `rule` came with the graph (`autopar.ir.rules.given`); it may say `splits [...]` or `because "..."`.
`parse(to_text(graph)) == graph` for every graph that verifies (but for `nan`, which equals nothing).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator

from autopar.errors import GraphError
from autopar.ir.graph import Arg, Buffer, Constant, Graph, Input, Op, Output, Parameter, Ref, Symbol, Value
from autopar.ir.rules.given import FOUND, REGISTERED, GivenRule

_WORD = r"[A-Za-z_][\w.]*"
_NAME = r"[\w.]+"
_TOKEN = re.compile(
    rf"""\s*(?:
      (?P<ref>%(?:{_NAME}|"(?:[^"\\]|\\.)*"))
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<number>-?(?:inf\b|nan\b|\d+(?:\.\d*)?(?:[eE][+-]?\d+)?))
    | (?P<word>{_WORD})
    | (?P<mark>[:=,()\[\]])
    )""",
    re.VERBOSE,
)
_IS_NAME, _IS_WORD = re.compile(_NAME, re.ASCII).fullmatch, re.compile(_WORD, re.ASCII).fullmatch
_KEYWORDS = {"None": None, "True": True, "False": False}


def to_text(graph: Graph, *, origins: bool = True) -> str:
    """The text of `graph`; without `origins`, the user's modules and lines are left out (two texts are then equal if the work is)."""
    return "\n".join(_lines(graph, origins)) + "\n"


def _lines(graph: Graph, origins: bool) -> Iterator[str]:
    yield f"graph {_title(graph.name)} {'training' if graph.training else 'evaluation'}"

    types: dict[tuple[str, tuple[int, ...], bool], str] = {}

    def typed(name: str) -> str:
        value = graph.values[name]
        key = (value.dtype, value.shape, value.requires_grad)
        if key not in types:
            types[key] = f"{value.dtype}{list(value.shape)}{' grad' if value.requires_grad else ''}"
        return f"%{_name(name)}: {types[key]}"

    for item in graph.inputs:
        yield f"input {typed(item.value)} = {_quote(item.path)}"
    for parameter in graph.parameters:
        also = "".join(f" also {_quote(alias)}" for alias in parameter.aliases)
        yield f"parameter {typed(parameter.value)} = {_quote(parameter.fqn)}{also}"
    for buffer in graph.buffers:
        updated = "" if buffer.updated is None else f" updated %{_name(buffer.updated)}"
        yield f"buffer {typed(buffer.value)} = {_quote(buffer.fqn)}{' persistent' if buffer.persistent else ''}{updated}"
    for constant in graph.constants:
        yield f"constant {typed(constant.value)}"
    for op in graph.ops:
        arguments = [_arg(arg) for arg in op.args] + [f"{key}={_arg(arg)}" for key, arg in op.kwargs]
        line = f"{', '.join([typed(name) for name in op.outputs])} = {op.target}({', '.join(arguments)})".lstrip()
        if op.outputs != (op.name,):
            line += f" as {_title(op.name)}"
        if origins and op.module:
            line += f" in {_quote(op.module)}"
        if origins and op.source:
            line += f" at {_quote(op.source)}"
        yield line
    for output in graph.outputs:
        yield f"output %{_name(output.value)} = {_quote(output.path)}"
    if origins:  # what is computed does not depend on them
        yield from map(_rule, graph.rules)


def _rule(rule: GivenRule) -> str:
    words = [f"rule {_quote(rule.target)} for {_quote(rule.form)} = {_quote(rule.notation)}"]
    words += [f"uneven {_quote(rule.uneven)}"] * bool(rule.uneven)
    words += [f"linear {_arg(rule.linear)}"] * bool(rule.linear)
    words += [f"splits {_arg(rule.splits)}"] * bool(rule.splits)
    words += [f"because {_quote(rule.why)}"] * bool(rule.why)
    return f"{' '.join(words)} {rule.origin} {rule.checks}"


def _name(name: str) -> str:
    return name if _IS_NAME(name) else _quote(name)


def _title(name: str) -> str:
    """A name that stands without `%`: it must not look like a number."""
    return name if _IS_WORD(name) else _quote(name)


def _quote(text: str) -> str:
    return json.dumps(text)


def _arg(arg: Arg) -> str:
    if isinstance(arg, Ref):
        return f"%{_name(arg.name)}"
    if isinstance(arg, tuple):
        return f"[{', '.join([_arg(item) for item in arg])}]"
    if isinstance(arg, Symbol):
        assert re.fullmatch(_WORD, arg.name) and arg.name not in (*_KEYWORDS, "inf", "nan"), arg
        return arg.name
    return _quote(arg) if isinstance(arg, str) else repr(arg)


def parse(text: str) -> Graph:
    """The graph that prints as `text`, verified. Raises `GraphError` naming the line that cannot be read."""
    return _Parser(text).graph().verify()


class _Parser:
    """Reads one line after the other; `tokens` are those of the current line, `at` the next one."""

    def __init__(self, text: str) -> None:
        self.rows = [(number, row) for number, row in enumerate(text.split("\n"), 1) if row.strip() and not row.lstrip().startswith("#")]
        self.number = 1
        self.tokens: list[tuple[str, str]] = []
        self.at = 0
        self.values: dict[str, Value] = {}

    def graph(self) -> Graph:
        if not self.rows:
            raise GraphError("line 1: the text is empty; a graph starts with `graph NAME training`")
        inputs: list[Input] = []
        parameters: list[Parameter] = []
        buffers: list[Buffer] = []
        constants: list[Constant] = []
        ops: list[Op] = []
        outputs: list[Output] = []
        rules: list[GivenRule] = []
        self.start(*self.rows[0])
        self.word("graph")
        name = self.title()
        training = self.word("training", "evaluation") == "training"
        self.end()
        for number, row in self.rows[1:]:
            self.start(number, row)
            kind = self.tokens[0][1] if self.tokens[0][0] == "word" and len(self.tokens) > 1 and self.tokens[1][0] == "ref" else ""
            self.at += bool(kind)
            if not kind and self.accept("rule"):
                rules.append(self.rule())
                self.end()
                continue
            if kind == "input":
                inputs.append(Input(*self.named()))
            elif kind == "parameter":
                value, fqn = self.named()
                aliases = []
                while self.accept("also"):
                    aliases.append(self.string())
                parameters.append(Parameter(value, fqn, tuple(aliases)))
            elif kind == "buffer":
                value, fqn = self.named()
                persistent = self.accept("persistent")
                buffers.append(Buffer(value, fqn, persistent, self.ref() if self.accept("updated") else None))
            elif kind == "constant":
                constants.append(Constant(self.typed()))
            elif kind == "output":
                value = self.ref()
                self.mark("=")
                outputs.append(Output(value, self.string()))
            elif kind:
                raise self.error(f"`{kind}` is no kind of statement; write input, parameter, buffer, constant or output")
            else:
                ops.append(self.operation())
            self.end()
        return Graph(
            name,
            self.values,
            tuple(inputs),
            tuple(parameters),
            tuple(buffers),
            tuple(constants),
            tuple(ops),
            tuple(outputs),
            training,
            tuple(rules),
        )

    def start(self, number: int, row: str) -> None:
        self.number, self.at, self.tokens = number, 0, []
        position = 0
        while row[position:].strip():
            match = _TOKEN.match(row, position)
            if match is None:
                raise self.error(f"cannot read `{row[position:].strip()[:30]}`")
            assert match.lastgroup is not None
            self.tokens.append((match.lastgroup, match[match.lastgroup]))
            position = match.end()

    def error(self, what: str) -> GraphError:
        return GraphError(f"line {self.number}: {what}")

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "the end of the line")

    def take(self, kind: str, wanted: str) -> str:
        found, text = self.peek()
        if found != kind:
            raise self.error(f"expected {wanted}, found `{text}`")
        self.at += 1
        return text

    def mark(self, mark: str) -> None:
        if self.take("mark", f"`{mark}`") != mark:
            raise self.error(f"expected `{mark}`, found `{self.tokens[self.at - 1][1]}`")

    def accept(self, text: str) -> bool:
        kind, found = self.peek()
        hit = found == text and kind in ("mark", "word")
        self.at += hit
        return hit

    def word(self, *choices: str) -> str:
        word = self.take("word", " or ".join(f"`{choice}`" for choice in choices) or "a word")
        if choices and word not in choices:
            raise self.error(f"expected {' or '.join(f'`{choice}`' for choice in choices)}, found `{word}`")
        return word

    def string(self) -> str:
        try:
            return str(json.loads(self.take("string", 'a text in "quotes"')))
        except json.JSONDecodeError as error:
            raise self.error(f"the text in quotes is damaged: {error.msg}") from None

    def ref(self) -> str:
        return self.unquoted(self.take("ref", "a `%value`")[1:])

    def unquoted(self, text: str) -> str:
        if not text.startswith('"'):
            return text
        try:
            return str(json.loads(text))
        except json.JSONDecodeError as error:
            raise self.error(f"the name in quotes is damaged: {error.msg}") from None

    def title(self) -> str:
        return self.string() if self.peek()[0] == "string" else self.take("word", "a name")

    def end(self) -> None:
        if self.at < len(self.tokens):
            raise self.error(f"did not expect `{self.peek()[1]}` here")

    def typed(self) -> str:
        """`%name: dtype[sizes] grad`; the value is entered under its name, which is returned."""
        name = self.ref()
        self.mark(":")
        dtype = self.word()
        self.mark("[")
        shape = self.items("]")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise self.error(f"the shape of `%{name}` must be whole numbers, found {list(shape)}")
        if name in self.values:
            raise self.error(f"`%{name}` is defined a second time")
        self.values[name] = Value(name, tuple(size for size in shape if isinstance(size, int)), dtype, self.accept("grad"))
        return name

    def named(self) -> tuple[str, str]:
        name = self.typed()
        self.mark("=")
        return name, self.string()

    def rule(self) -> GivenRule:
        target = self.string()
        self.word("for")
        form = self.string()
        self.mark("=")
        notation = self.string()
        uneven = self.string() if self.accept("uneven") else ""
        linear = self.listed("linear")
        splits = self.listed("splits")
        why = self.string() if self.accept("because") else ""
        if not all(isinstance(item, tuple) and all(type(term) is int for term in item) for item in linear):
            raise self.error("`linear` is followed by lists of numbers, such as [[0, 2]]")
        if not all(isinstance(item, str) for item in splits):
            raise self.error('`splits` is followed by texts, such as ["S(0) R -> S(0)"]')
        origin = self.word(FOUND, REGISTERED)
        checks = self.number_of(self.take("number", "a number of checks"))
        return GivenRule(target, form, notation, uneven, linear, splits, origin, int(checks), why)  # type: ignore[arg-type]

    def listed(self, word: str) -> tuple[Arg, ...]:
        """The list behind `word`; empty where that does not stand here."""
        if not self.accept(word):
            return ()
        self.mark("[")
        return self.items("]")

    def operation(self) -> Op:
        outputs: list[str] = []
        while self.peek()[0] == "ref":
            outputs.append(self.typed())
            if not self.accept(","):
                break
        self.mark("=")
        target = self.word()
        self.mark("(")
        args: list[Arg] = []
        kwargs: list[tuple[str, Arg]] = []
        while not self.accept(")"):
            if self.peek()[0] == "word" and self.tokens[self.at + 1 : self.at + 2] == [("mark", "=")]:
                key = self.word()
                self.mark("=")
                kwargs.append((key, self.arg()))
            elif kwargs:
                raise self.error("a positional argument follows a keyword argument")
            else:
                args.append(self.arg())
            if not self.accept(","):
                self.mark(")")
                break
        name = self.title() if self.accept("as") else ""
        if not name:
            if len(outputs) != 1:
                raise self.error(f"an operation with {len(outputs)} results needs a name: `as NAME`")
            (name,) = outputs
        module = self.string() if self.accept("in") else ""
        source = self.string() if self.accept("at") else ""
        return Op(name, target, tuple(args), tuple(kwargs), tuple(outputs), module, source)

    def arg(self) -> Arg:
        kind, text = self.peek()
        self.at += 1
        if kind == "ref":
            return Ref(self.unquoted(text[1:]))
        if kind == "string":
            self.at -= 1
            return self.string()
        if kind == "number":
            return self.number_of(text)
        if kind == "word":
            return _KEYWORDS[text] if text in _KEYWORDS else math.inf if text == "inf" else math.nan if text == "nan" else Symbol(text)
        if text == "[":
            return self.items("]")
        raise self.error(f"expected an argument, found `{text}`")

    def items(self, close: str) -> tuple[Arg, ...]:
        found: list[Arg] = []
        while not self.accept(close):
            found.append(self.arg())
            if not self.accept(","):
                self.mark(close)
                break
        return tuple(found)

    def number_of(self, text: str) -> int | float:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
