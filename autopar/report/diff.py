"""What differs between two plans: `autopar diff`. Decisions first, then what follows from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from autopar.ir import folded_names, units
from autopar.ir.folded_names import pattern
from autopar.ir.plan import OpPlan, ParameterPlan, Plan
from autopar.ir.plan_digest import bytes_moved, placements, traffic
from autopar.ir.plan_roles import is_heavy, operator_words
from autopar.report.terminal import heading, table

MAX_OPERATIONS = 1_000_000
"""Plans of more operations are compared by their segments as written; no traced model has as many."""


@dataclass(frozen=True, slots=True)
class Change:
    """One difference: `before` in the first plan, `after` in the second; empty where a plan has nothing of the kind.

    `section` is `"model"`, `"decisions"` or `"consequences"`; `remark` is said beside (a percentage, or how many there are).
    `minor` changes are operations that only follow the heavy ones; reports sum them up.
    """

    section: str
    what: str
    before: str
    after: str
    remark: str = ""
    minor: bool = False


SECTIONS = {
    "model": "these are plans for different things",
    "decisions": "decisions",
    "consequences": "what follows",
}


def changes(a: Plan, b: Plan) -> list[Change]:
    """Everything in which `a` and `b` differ, in the order to read it; empty exactly where they are equal."""
    found = [*_settings(a, b), *_mesh_and_pins(a, b), *_parameters(a, b), *_operations(a, b), *_consequences(a, b)]
    if not found and a != b:
        fields = [name for name in type(a).model_fields if getattr(a, name) != getattr(b, name)]
        found = [Change("consequences", f"details of {name}", "as in the first", "as in the second") for name in fields]
    return found


def _settings(a: Plan, b: Plan) -> Iterator[Change]:
    for field in ("name", "fingerprint", "training", "parameters", "operations"):
        yield from _differ("model", f"model {field}", getattr(a.model, field), getattr(b.model, field))
    for field in ("name", "device", "devices_per_node", "nodes", "memory_bytes"):
        yield from _differ("model", f"cluster {field.replace('_', ' ')}", getattr(a.cluster, field), getattr(b.cluster, field))
    limits = a.predicted.memory_limit_bytes, b.predicted.memory_limit_bytes
    if limits[0] != limits[1]:
        yield Change("model", "memory limit", *_distinct(*limits, units.size))
    for field in ("optimizer", "effort"):
        yield from _differ("model", field, getattr(a.predicted, field), getattr(b.predicted, field))
    yield from _differ("model", "replicated operators", ", ".join(a.replicated), ", ".join(b.replicated))
    for word, ours, theirs in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        kinds = [{item.path: f"{units.shape(item.shape)} {item.dtype}" for item in items} for items in (ours, theirs)]
        yield from _mappings("model", word, *kinds)


def _differ(section: str, what: str, before: object, after: object) -> Iterator[Change]:
    if before != after:
        yield Change(section, what, str(before), str(after))


def _mappings(section: str, what: str, before: dict[str, str], after: dict[str, str]) -> Iterator[Change]:
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            yield Change(section, f"{what} {key}", before.get(key, ""), after.get(key, ""))


def _mesh_and_pins(a: Plan, b: Plan) -> Iterator[Change]:
    meshes = [" x ".join(f"{axis} {size}" for axis, size in plan.mesh.items()) for plan in (a, b)]
    yield from _differ("decisions", "mesh", *meshes)
    yield from _differ("decisions", "plan", a.name, b.name)
    yield from _mappings("decisions", "pin", a.pins, b.pins)


def _storage(item: ParameterPlan) -> str:
    stored = " ".join(f"{text}@{axis}" for axis, text in item.stored.items() if text != "R") or "R"
    return stored + {"never": "", "step": ", gathered per step", "use": ", gathered per use"}[item.gather]


def _parameters(a: Plan, b: Plan) -> Iterator[Change]:
    """Storage of parameters; rows of one plan that the other folds differently are compared name by name."""
    ours, theirs = ({item.name: item for item in plan.parameters} for plan in (a, b))
    rows: list[tuple[str, str, str]] = []
    for name in [name for name in ours if name in theirs]:
        rows.append((name, _storage(ours[name]), _storage(theirs[name])))
    left, right = _unfolded(ours, theirs), _unfolded(theirs, ours)
    rows += [(name, left.get(name, ""), right.get(name, "")) for name in dict.fromkeys([*left, *right])]
    yield from _grouped("parameter", [row for row in rows if row[1] != row[2]])


def _unfolded(rows: dict[str, ParameterPlan], other: dict[str, ParameterPlan]) -> dict[str, str]:
    """Storage by single name of the rows that `other` does not have under the same folded name."""
    return {name: _storage(item) for key, item in rows.items() if key not in other for name in folded_names.expand(key)}


def _grouped(what: str, rows: list[tuple[str, str, str]]) -> Iterator[Change]:
    """Changes that are the same for names which differ in numbers only, as one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, before, after in rows:
        groups.setdefault((pattern(name), before, after), []).append(name)
    for (shared, before, after), names in groups.items():
        count = sum(folded_names.count(name) for name in names)
        name = names[0] if len(names) == 1 else _joined(names, shared)
        yield Change("decisions", f"{what} {name}", before, after, f"x{count}" if count > 1 else "")


def _joined(names: list[str], shared: str) -> str:
    if not any("{" in name for name in names):
        folded = folded_names.fold(names)
        if folded.count("{") == 1:
            return folded
    return shared.replace("#", "*")


def _operations(a: Plan, b: Plan) -> Iterator[Change]:
    if a.model.fingerprint != b.model.fingerprint or max(a.model.operations, b.model.operations) > MAX_OPERATIONS:
        ours, theirs = ({op.name: op for segment in plan.segments for op in segment.ops} for plan in (a, b))
        pairs = [(ours.get(name), theirs.get(name)) for name in dict.fromkeys([*ours, *theirs])]
        yield from _splits(a, b, [(left, right, 1) for left, right in pairs])
        return
    counted: Counter[tuple[int, int]] = Counter()
    rows: dict[int, OpPlan] = {}
    left, right = (_positions(plan, rows) for plan in (a, b))
    for pair in zip(left, right, strict=False):
        counted[pair] += 1
    yield from _splits(a, b, [(rows[one], rows[other], count) for (one, other), count in counted.items()])


def _positions(plan: Plan, rows: dict[int, OpPlan]) -> Iterator[int]:
    """For every operation of the unfolded graph the key of its row, which is put into `rows`."""
    for segment in plan.segments:
        keys = [id(op) for op in segment.ops]
        rows.update(zip(keys, segment.ops, strict=True))
        for _ in range(segment.count):
            yield from keys


def _splits(a: Plan, b: Plan, pairs: list[tuple[OpPlan | None, OpPlan | None, int]]) -> Iterator[Change]:
    """Changed splits; operations of one module pattern and operator that change alike are told once."""
    groups: dict[tuple[str, str, str, bool], list[tuple[str, int]]] = {}
    for left, right, count in _comparable(pairs):
        before, after = _split_words(a, left), _split_words(b, right)
        op = left or right
        if before != after and op is not None:
            where = f"{operator_words(op.target)} in {op.module or 'the model'}"
            groups.setdefault((pattern(where), before, after, is_heavy(op)), []).append((where, count))
    for (shared, before, after, heavy), items in groups.items():
        count = sum(number for _, number in items)
        names = dict.fromkeys(name for name, _ in items)
        name = next(iter(names)) if len(names) == 1 else shared.replace("#", "*")
        yield Change("decisions", name, before, after, f"x{count}" if count > 1 else "", not heavy)


def _comparable(pairs: list[tuple[OpPlan | None, OpPlan | None, int]]) -> Iterator[tuple[OpPlan | None, OpPlan | None, int]]:
    """The pairs, taken apart where the two are different operations that happen to have one name."""
    for left, right, count in pairs:
        if left is not None and right is not None and (left.target, left.module) != (right.target, right.module):
            yield left, None, count
            yield None, right, count
        else:
            yield left, right, count


def _split_words(plan: Plan, op: OpPlan | None) -> str:
    """`d0@dp n@tp`: axes of one rank split nothing, whatever their split is called."""
    if op is None:
        return ""
    return " ".join(f"{split}@{axis}" for axis, split in op.split.items() if plan.mesh[axis] > 1) or "on one rank"


def _distinct(before: float, after: float, words: Callable[[float], str]) -> tuple[str, str]:
    """Both quantities in words, or in as many digits as it takes to tell them apart."""
    for text in (words, *(f"{{:.{digits}g}}".format for digits in range(4, 17))):
        if text(before) != text(after):
            return text(before), text(after)
    return repr(before), repr(after)


def _change(before: float, after: float) -> str:
    if not before:
        return ""
    ratio = after / before - 1
    return f"{'+' if ratio > 0 else '-'}{units.percent(abs(ratio))}"


def _consequences(a: Plan, b: Plan) -> Iterator[Change]:
    one, two = a.predicted, b.predicted
    for what, before, after in [
        ("step time", one.cost_s, two.cost_s),
        ("computing", one.compute_s, two.compute_s),
        ("exposed communication", one.communication_s, two.communication_s),
        ("lower bound", one.lower_bound_s, two.lower_bound_s),
    ]:
        if before != after:
            yield Change("consequences", what, *_distinct(before, after, units.seconds), _change(before, after))
    yield from _differ("consequences", "fits in memory", _yes(one.fits), _yes(two.fits))
    for kind in dict.fromkeys([*one.memory_bytes, *two.memory_bytes]):
        amounts = one.memory_bytes.get(kind, 0), two.memory_bytes.get(kind, 0)
        if amounts[0] != amounts[1]:
            yield Change("consequences", f"memory for {kind}", *_distinct(*amounts, units.size), _change(*amounts))
    totals = sum(one.memory_bytes.values()), sum(two.memory_bytes.values())
    if totals[0] != totals[1]:
        yield Change("consequences", "memory in all", *_distinct(*totals, units.size), _change(*totals))
    yield from _traffic(a, b)
    for word, ours, theirs in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        texts = [{item.path: placements(item.placement, plan.mesh) for item in items} for plan, items in ((a, ours), (b, theirs))]
        yield from _mappings("consequences", f"placement of {word}", *texts)
    for note in dict.fromkeys([*a.notes, *b.notes]):
        if (note in a.notes) != (note in b.notes):
            yield Change("consequences", "note", note if note in a.notes else "", note if note in b.notes else "")


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"


def _traffic(a: Plan, b: Plan) -> Iterator[Change]:
    ours, theirs = ({f"{row.phase} {row.kind}@{row.axis}": row for row in traffic(plan)} for plan in (a, b))
    for key in dict.fromkeys([*ours, *theirs]):
        left, right = ours.get(key), theirs.get(key)
        texts = [f"{row.count:,} of {units.size(row.bytes)} in all" if row else "none" for row in (left, right)]
        if texts[0] != texts[1]:
            remark = _change(left.bytes, right.bytes) if left and right else ""
            yield Change("consequences", key, texts[0], texts[1], remark)
    moved = bytes_moved(a), bytes_moved(b)
    if moved[0] != moved[1]:
        yield Change("consequences", "bytes moved in all", *_distinct(*moved, units.size), _change(*moved))


def diff(a: Plan, b: Plan, console: Console, names: tuple[str, str] = ("a", "b"), full: bool = False) -> bool:
    """Print how `a` and `b` differ, with `full` to the last operation; whether they do."""
    found = changes(a, b)
    if not found:
        console.print("The plans are equal.")
        return False
    blank = False
    for section, title in SECTIONS.items():
        rows = [item for item in found if item.section == section]
        if rows or section == "decisions":
            if blank:
                console.print()
            blank = True
            console.print(heading(title) if rows else Text("The decisions are the same.", style="bold"))
        if rows:
            made = table("", *names, "", fold=("", *names))
            told = [item for item in rows if full or not item.minor]
            for item in told:
                cells = Text(item.before or "-", style="red"), Text(item.after or "-", style="green"), Text(item.remark, style="dim")
                made.add_row(item.what, *cells)
            if len(told) < len(rows):
                rest = f"and {units.times(len(rows) - len(told), 'smaller operation')} (--full lists them)"
                made.add_row(Text(rest, style="dim"))
            console.print(Padding(made, (0, 0, 0, 1)))
    return True
