"""`register_rule`: rules of the user's for operators that autopar has none for, or where another is wanted.

    autopar.register_rule("mylib::scale", "... h, h -> ... h", uneven="h", linear=[(0,)])

A rule is checked numerically with `samples` at once, and with the shapes of the model when a plan is first made with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from autopar.errors import RuleError
from autopar.ir.graph import Op, Value, refs
from autopar.ir.rules import notation
from autopar.ir.rules.given import REGISTERED, GivenRule, form, operator_name, read_split, write_split
from autopar.ir.rules.neighbours import LEAF
from autopar.ir.rules.nest import Call, lacking
from autopar.ir.rules.split import Split

Written = str | Sequence[Split | str]
"""Index notation; or a list of splits, as `Split`s or as lines `"S(0) R/P -> S(0)"`, which stands for no split where it is empty."""

Rule = Written | Callable[[Call], Written | None]


@dataclass(frozen=True, slots=True)
class Registered:
    """A rule as it was registered."""

    target: str
    rule: Rule
    uneven: str
    linear: tuple[tuple[int, ...], ...]

    def given(self, op: Op, values: dict[str, Value]) -> GivenRule:
        """What the rule says of `op`. Raises `RuleError` where a function gives something that is no rule."""
        if op.target == LEAF:
            return _of_leaf(_given(LEAF, cast(Written, self.rule), self.uneven, self.linear), op, values)
        if not callable(self.rule):
            return _given(self.target, self.rule, self.uneven, self.linear)
        call = Call(op, tuple(values[name] for name in op.operands), tuple(values[name] for name in op.outputs))
        try:
            written = self.rule(call)
        except Exception as error:  # the user's function may raise anything
            raise RuleError(
                f"the rule registered for {operator_name(self.target)} raised {type(error).__name__}: {error}, for {form(op, values)}"
            ) from error
        everything = tuple(frozenset[int]() for _ in op.operands)
        if written is None:
            return GivenRule(self.target, form(op, values, everything), origin=REGISTERED, why="its registered rule has no split for it")
        found = _given(self.target, written, self.uneven, self.linear)
        return replace(found, form=form(op, values, found.free_dims(op, values)))


ALL: dict[str, Registered] = {}
"""What has been registered, by operator."""


def register_rule(
    op: Any,
    rule: Rule,
    *,
    uneven: str = "",
    linear: Sequence[Sequence[int]] = (),
    samples: Sequence[Sequence[Any]] = (),
) -> None:
    """Say how the operator `op` can be split, in place of what autopar's table says or discovery finds.

    `op`: `"mylib::scale"`, or the operator itself: `torch.ops.mylib.scale`, or what `torch.library.custom_op` gave. Or the class of a leaf
    module (see `leaf_modules` of `plan`): then the terms of `rule` are its tensor inputs and results, `"b ... -> b ..."` where every row
    has its own result.
    `rule`: index notation (`"m k, k n -> m n"`); or a list of splits, each a line of placements of operands and results
    (`"S(0) R/P -> S(0)"`) or a `Split`; an empty list: always replicated. Or a function of the call (operation, operands, results) that
    returns either, or None where the operator is to run replicated.
    `uneven`: the loops, separated by blanks, that may be split in unequal parts; `linear`: sets of terms, by number, in which the operator
    is jointly linear; both as in autopar's own table.
    `samples`: arguments to check the rule with at once: random tensors of shapes that 2 and 3 ranks can share, as the operator is called.

    A later registration replaces an earlier one. Plans carry the rules they were made with.
    Raises `RuleError` for an operator or notation that cannot be read, and where a check refutes the rule: it names operator, split and
    the difference. Without `samples` that is when a plan is made for a model which has the operator.
    """
    is_module = isinstance(op, type) and hasattr(op, "named_parameters")
    if is_module and (callable(rule) or samples):
        raise RuleError(f"the rule of leaf module {op.__qualname__} is a line or a list of splits, and is checked when a plan is made")
    target = leaf_key(op.__qualname__) if is_module else _target(op)
    together = tuple(tuple(item) for item in linear)
    entry = Registered(target, rule, uneven, together)
    if not callable(rule):
        _given(target, rule, uneven, together)
    if samples and not is_module:
        from autopar.ir.rules.complete import check_samples  # with torch

        check_samples(entry, samples)
    ALL[target] = entry


def leaf_key(kind: str) -> str:
    """Under which name the rule for leaf modules of class `kind` is registered."""
    return f"{LEAF}:{kind}"


def key_of(op: Op) -> str:
    """Under which name a rule for `op` is registered."""
    return leaf_key(str(op.args[0])) if op.target == LEAF else op.target


def _of_leaf(rule: GivenRule, op: Op, values: dict[str, Value]) -> GivenRule:
    """`rule`, which speaks of the inputs of a leaf module, for the operation, which reads its parameters and buffers before them."""
    state = [values[name] for name in refs(op.args[3])]
    terms = [" ".join(f"[p{slot}_{dim}]" for dim in range(len(value.shape))) for slot, value in enumerate(state)]
    if rule.notation:
        linear = tuple(tuple(term + len(state) for term in together) for together in rule.linear)
        rule = replace(rule, notation=", ".join([*terms, rule.notation]), linear=linear)
    else:
        lacks = " ".join(str(lacking(value)) for value in state)
        rule = replace(rule, splits=tuple(f"{lacks} {line}".strip() for line in rule.splits))
    if isinstance(op.args[2], tuple) and len(op.outputs) > len(op.args[2]) and not rule.whole:
        raise RuleError(
            f"leaf module {op.args[0]} changes its buffers, so that it must run whole; register [] for it, or keep it from that"
        )
    return replace(rule, form=form(op, values, rule.free_dims(op, values)))


def _given(target: str, written: Written, uneven: str, linear: tuple[tuple[int, ...], ...]) -> GivenRule:
    if isinstance(written, str):
        pattern = notation.read(written)
        loops = {loop for term in (*pattern.operands, *pattern.outputs) for group in term for loop in group}
        if unknown := [loop for loop in uneven.split() if loop not in loops or loop in pattern.whole]:
            raise RuleError(f"rule `{written}` for {operator_name(target)}: `uneven` names `{unknown[0]}`, which is no loop that it splits")
        if any(not 0 <= term < len(pattern.operands) for item in linear for term in item):
            raise RuleError(f"rule `{written}` for {operator_name(target)}: `linear` names a term that it has not; the first is 0")
        return GivenRule(target, notation=written, uneven=uneven, linear=linear, origin=REGISTERED)
    lines = tuple(write_split(item) if isinstance(item, Split) else item for item in written)
    if any(not isinstance(item, str) for item in lines):
        raise RuleError(f"the rule for {operator_name(target)} must be index notation, or a list of lines such as `S(0) R/P -> S(0)`")
    if uneven or linear:
        raise RuleError(f"the rule for {operator_name(target)} is a list of splits; `uneven` and `linear` belong to index notation")
    for line in lines:
        read_split(line)
    return GivenRule(target, splits=lines, origin=REGISTERED, why="" if lines else "registered so")


def _target(op: Any) -> str:
    """The operator's name with its overload, `mylib.scale.default`."""
    overload = getattr(op, "_opoverload", None)  # of torch.library.custom_op
    text = str(op if overload is None else overload)
    if isinstance(op, str) or "::" in text:
        space, colons, name = text.partition("::")
        text = f"{space}.{name}" if colons else text
    parts = text.split(".")
    if len(parts) == 2:
        parts.append("default")
    if len(parts) != 3 or not all(part.isidentifier() for part in parts):
        raise RuleError(f"`{op}` names no operator; write `mylib::scale`, or `mylib::scale.overload`, or give `torch.ops.mylib.scale`")
    return ".".join(parts)
