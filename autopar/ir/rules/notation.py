"""Index notation: `"... k, n k, +n -> ... n"` read into a pattern and bound to an operation's shapes.

- terms stand for tensor arguments in order, then `->` and the results; `m k` are the loops of the dims;
- `...` stands for any number of leading dims, broadcast from the right;
- `(g c)` is one dim made of two loops, outermost first;
- `[h w]` are dims that cannot be split; `1` is a dim that has no loop;
- `+` before a term: the operand is added to the result.

Absent optional arguments (`None`, or not given) skip their term. A dim of size 1 where the loop is longer is broadcast.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from autopar.errors import RuleError
from autopar.ir.graph import Arg, Op, Ref, refs
from autopar.ir.rules.nest import Call, Group, Nest, Term

ELLIPSIS: Group = ("...",)
_TOKEN = re.compile(r"\.\.\.|\(|\)|\[|\]|\+|[A-Za-z_]\w*|1|\S")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A rule as written: `operands` and `outputs` as terms (`ELLIPSIS` for `...`), the `added` operands and the loops kept `whole`."""

    text: str
    operands: tuple[Term, ...]
    outputs: tuple[Term, ...]
    added: frozenset[int]
    whole: frozenset[str]


def _term(text: str, rule: str) -> tuple[Term, bool, set[str]]:
    groups: list[Group] = []
    merged: list[str] | None = None
    whole: set[str] = set()
    bracket = added = False
    for token in _TOKEN.findall(text):
        if token == "+":
            added = True
        elif token in "[]":
            bracket = token == "["
        elif token == "(":
            merged = []
        elif token == ")" and merged is not None:
            groups.append(tuple(merged))
            merged = None
        elif token == "...":
            groups.append(ELLIPSIS)
        elif token == "1":
            groups.append(())
        elif token.isidentifier():
            if bracket:
                whole.add(token)
            if merged is None:
                groups.append((token,))
            else:
                merged.append(token)
        else:
            raise RuleError(f"rule `{rule}`: `{token}` is not index notation; write loops as names, `...`, `(a b)`, `[a b]`, `1` or `+`")
    if merged is not None:
        raise RuleError(f"rule `{rule}`: `(` without `)`")
    return tuple(groups), added, whole


@cache
def read(text: str) -> Pattern:
    """The pattern that `text` says. Raises `RuleError` where it is not index notation."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"rule `{text}` has no `->`")
    operands = [_term(part, text) for part in left.split(",")]
    outputs = [_term(part, text) for part in right.split(",")]
    return Pattern(
        text,
        tuple(term for term, _, _ in operands),
        tuple(term for term, _, _ in outputs),
        frozenset(index for index, (_, added, _) in enumerate(operands) if added),
        frozenset().union(*(whole for _, _, whole in (*operands, *outputs))),
    )


def _unfold(term: Term, rank: int, lead: int) -> Term:
    """`term` with `...` replaced by as many dims as a tensor of `rank` dims has there, counted from the right of `lead` dims."""
    if ELLIPSIS not in term:
        return term
    at = term.index(ELLIPSIS)
    count = rank - (len(term) - 1)
    return (*term[:at], *((f"d{lead - count + i}",) for i in range(count)), *term[at + 1 :])


def tensor_arguments(args: tuple[Arg, ...]) -> list[bool]:
    """For every argument that can be a tensor, whether it is one (False: `None`); one for each tensor of a list."""
    found: list[bool] = []
    for arg in args:
        if arg is None or isinstance(arg, Ref):
            found.append(arg is not None)
        elif isinstance(arg, tuple):
            found += [True for _ in refs(arg)]
    return found


def present_terms(pattern: Pattern, op: Op) -> tuple[int, ...] | None:
    """Which terms of `pattern` stand for the operands of `op`, in their order; None where it has another number of tensor arguments."""
    present = tensor_arguments((*op.args, *(arg for _, arg in op.kwargs)))
    kept = tuple(index for index, there in enumerate(present) if there)
    fits = len(kept) == len(op.operands) and all(index < len(pattern.operands) for index in kept)
    return kept if fits else None


def bind(pattern: Pattern, call: Call, uneven: frozenset[str] = frozenset(), linear: tuple[tuple[int, ...], ...] = ()) -> Nest | None:
    """The nest of `call` under `pattern`; None where ranks or sizes do not fit it.

    `uneven` and `linear` (in numbers of the pattern's terms) go into the nest.
    """
    kept = present_terms(pattern, call.op)
    if kept is None or len(pattern.outputs) != len(call.outputs):
        return None
    terms = [pattern.operands[index] for index in kept] + list(pattern.outputs)
    shapes = [value.shape for value in (*call.operands, *call.outputs)]
    leads = [len(shape) - len(term) + 1 for term, shape in zip(terms, shapes, strict=True) if ELLIPSIS in term]
    lead = max(leads, default=0)
    if leads and min(leads) < 0:
        return None
    bound = [_unfold(term, len(shape), lead) for term, shape in zip(terms, shapes, strict=True)]
    if any(len(term) != len(shape) for term, shape in zip(bound, shapes, strict=True)):
        return None
    loops: dict[str, int] = {}
    for term, shape in zip(reversed(bound), reversed(shapes), strict=True):
        for group, size in zip(term, shape, strict=True):
            if len(group) == 1:
                loops[group[0]] = max(loops.get(group[0], 1), size)
    merged = [
        (group, size) for term, shape in zip(bound, shapes, strict=True) for group, size in zip(term, shape, strict=True) if len(group) > 1
    ]
    for group, size in merged:
        unknown = [name for name in group if name not in loops]
        known = 1
        for name in group:
            known *= loops.get(name, 1)
        if len(unknown) > 1 or size % known:
            return None
        if unknown:
            loops[unknown[0]] = size // known
        elif size != known:
            return None
    final: list[Term] = []
    for term, shape in zip(bound, shapes, strict=True):
        groups: list[Group] = []
        for group, size in zip(term, shape, strict=True):
            if len(group) == 1 and size != loops[group[0]]:
                if size != 1:
                    return None
                groups.append(())
            else:
                groups.append(group)
        final.append(tuple(groups))
    position = {term: slot for slot, term in enumerate(kept)}
    count = len(call.operands)
    return Nest(
        loops=loops,
        operands=tuple(final[:count]),
        outputs=tuple(final[count:]),
        whole=pattern.whole,
        added=frozenset(position[index] for index in pattern.added if index in position),
        linear=tuple(tuple(position[index] for index in together if index in position) for together in linear),
        uneven=uneven,
    )
