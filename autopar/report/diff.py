"""What differs between two plans: `autopar diff`. Decisions first, then what follows from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from autopar.ir import folded_names, units
from autopar.ir.folded_names import pattern
from autopar.ir.plan import InputPlan, OpPlan, OutputPlan, ParameterPlan, Plan, SegmentPlan
from autopar.ir.plan_digest import Traffic, bytes_moved, join, placements, traffic
from autopar.ir.plan_roles import is_heavy, operator_words
from autopar.ir.plan_stages import RECEIVE, SEND
from autopar.ir.plan_text import mesh_words
from autopar.report.diff_stages import Change, stage_changes
from autopar.report.terminal import heading, table

MAX_OPERATIONS = 1_000_000
"""Plans of more operations are compared by their segments as written; no traced model has as many."""


SECTIONS = {
    "model": "these are plans for different things",
    "decisions": "decisions",
    "consequences": "what follows",
}


def changes(a: Plan, b: Plan) -> list[Change]:
    """Everything in which `a` and `b` differ, in the order to read it; empty exactly where they are equal."""
    found = [*_settings(a, b), *_mesh_and_pins(a, b), *stage_changes(a, b)]
    found += [*_parameters(a, b), *_operations(a, b), *_consequences(a, b)]
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
    rules = [{f"{rule.target} {rule.form}".strip(): rule.words() for rule in plan.given_rules} for plan in (a, b)]
    yield from _mappings("model", "rule", *rules)
    for word, ours, theirs in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        kinds = [_by_path(items, lambda item: f"{units.shape(item.shape)} {item.dtype}") for items in (ours, theirs)]
        yield from _mappings("model", word, *kinds)


def _by_path(items: Iterable[InputPlan | OutputPlan], words: Callable[[InputPlan | OutputPlan], str]) -> dict[str, str]:
    """What is to say of each path; of several stages that read it, what they say differently."""
    found: dict[str, list[str]] = {}
    for item in items:
        found.setdefault(item.path, []).append(words(item))
    return {path: " and ".join(dict.fromkeys(texts)) for path, texts in found.items()}


def _differ(section: str, what: str, before: object, after: object) -> Iterator[Change]:
    if before != after:
        yield Change(section, what, str(before), str(after))


def _mappings(section: str, what: str, before: dict[str, str], after: dict[str, str]) -> Iterator[Change]:
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            yield Change(section, f"{what} {key}", before.get(key, ""), after.get(key, ""))


def _mesh_and_pins(a: Plan, b: Plan) -> Iterator[Change]:
    meshes = [mesh_words(plan).split(" = ")[0] for plan in (a, b)]
    yield from _differ("decisions", "mesh", *meshes)
    yield from _differ("decisions", "plan", a.name, b.name)
    yield from _mappings("decisions", "precision", *(plan.precision.model_dump() if plan.precision else {} for plan in (a, b)))
    yield from _mappings("decisions", "pin", a.pins, b.pins)


def _storage(item: ParameterPlan) -> str:
    stored = " ".join(f"{text}@{axis}" for axis, text in item.stored.items() if text != "R") or "R"
    return stored + {"never": "", "step": ", gathered per step", "use": ", gathered per use"}[item.gather]


def _parameters(a: Plan, b: Plan) -> Iterator[Change]:
    """Storage of parameters; rows of one plan that the other folds differently are compared name by name."""
    ours, theirs = _storages(a), _storages(b)
    rows: list[tuple[str, str, str]] = []
    for name in [name for name in ours if name in theirs]:
        rows.append((name, ours[name], theirs[name]))
    left, right = _unfolded(ours, theirs), _unfolded(theirs, ours)
    rows += [(name, left.get(name, ""), right.get(name, "")) for name in dict.fromkeys([*left, *right])]
    yield from _grouped("parameter", [row for row in rows if row[1] != row[2]])


def _storages(plan: Plan) -> dict[str, str]:
    """Storage by name; of a tied weight, what the stages that read it store differently."""
    found: dict[str, list[str]] = {}
    for item in plan.parameters:
        found.setdefault(item.name, []).append(_storage(item))
    return {name: " and ".join(dict.fromkeys(texts)) for name, texts in found.items()}


def _unfolded(rows: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """The rows, by single name, that `other` does not have under the same folded name."""
    return {name: text for key, text in rows.items() if key not in other for name in folded_names.expand(key)}


def _grouped(what: str, rows: list[tuple[str, str, str]]) -> Iterator[Change]:
    """Changes that are the same for names which differ in numbers only, as one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, before, after in rows:
        groups.setdefault((pattern(name), before, after), []).append(name)
    for (shared, before, after), names in groups.items():
        count = sum(folded_names.count(name) for name in names)
        name = names[0] if len(names) == 1 else join(names, shared)
        yield Change("decisions", f"{what} {name}", before, after, f"x{count}" if count > 1 else "")


def _operations(a: Plan, b: Plan) -> Iterator[Change]:
    """Splits of operations: place by place where both plans cut one graph alike, else by what operations are and where in the model."""
    rows: dict[int, _Row] = {}
    left, right = (_positions(plan, rows) for plan in (a, b))
    same = a.model.fingerprint == b.model.fingerprint
    if same and left and [len(stage) for stage in left] == [len(stage) for stage in right]:
        counted = Counter(pair for ours, theirs in zip(left, right, strict=True) for pair in zip(ours, theirs, strict=True))
        yield from _splits(a, b, [(rows[one], rows[other], count) for (one, other), count in counted.items()])
    elif same and (a.pipeline or b.pipeline):
        yield from _kinds(a, b)
    else:
        ours, theirs = ({row[1].name: row for row in _rows(plan)} for plan in (a, b))
        yield from _splits(a, b, [(ours.get(name), theirs.get(name), 1) for name in dict.fromkeys([*ours, *theirs])])


_Row = tuple[SegmentPlan, OpPlan]


def _rows(plan: Plan) -> Iterator[_Row]:
    """The listed operations, but for those that only a cut adds."""
    for segment in plan.segments:
        yield from ((segment, op) for op in segment.ops if op.target not in (RECEIVE, SEND))


def _positions(plan: Plan, rows: dict[int, _Row]) -> list[list[int]]:
    """Stage by stage, for every operation of the unfolded graph the key of its row, which is put into `rows`; none for very many."""
    if sum(segment.length * segment.count for segment in plan.segments) > MAX_OPERATIONS:
        return []
    stages: list[list[int]] = [[] for _ in range(plan.stage_count)]
    for segment in plan.segments:
        keys = [id(op) for op in segment.ops]
        rows.update(zip(keys, ((segment, op) for op in segment.ops), strict=True))
        stages[segment.stage] += keys * segment.count
    return stages


def _kinds(a: Plan, b: Plan) -> Iterator[Change]:
    """Splits by operator and place in the model, whichever stage it is in: what a moved cut carries along did not change."""
    found: dict[tuple[str, str, bool], tuple[Counter[str], Counter[str]]] = {}
    for side, plan in enumerate((a, b)):
        for row in _rows(plan):
            segment, op = row
            key = operator_words(op.target), pattern(op.module), is_heavy(op)
            found.setdefault(key, (Counter(), Counter()))[side][_split_words(plan, row)] += segment.count
    for (operator, module, heavy), (before, after) in found.items():
        if set(before) == set(after) and (before == after or before.total() != after.total()):
            continue  # masks and the like are computed in each stage that reads them: more of the same
        count = max(before.total(), after.total())
        what = f"{operator} in {module.replace('#', '*') or 'the model'}"
        one, two = (
            ", ".join(f"{text} (x{number})" if len(side) > 1 else text for text, number in side.items()) for side in (before, after)
        )
        yield Change("decisions", what, one, two, f"x{count}" if count > 1 else "", not heavy)


def _splits(a: Plan, b: Plan, pairs: Iterable[tuple[_Row | None, _Row | None, int]]) -> Iterator[Change]:
    """Changed splits; operations of one module pattern and operator that change alike are told once."""
    groups: dict[tuple[str, str, str, bool], list[tuple[str, int]]] = {}
    for left, right, count in _comparable(pairs):
        before, after = _split_words(a, left), _split_words(b, right)
        op = (left or right or (None, None))[1]
        if before != after and op is not None:
            where = f"{operator_words(op.target)} in {op.module or 'the model'}"
            groups.setdefault((pattern(where), before, after, is_heavy(op)), []).append((where, count))
    for (shared, before, after, heavy), items in groups.items():
        count = sum(number for _, number in items)
        names = dict.fromkeys(name for name, _ in items)
        name = next(iter(names)) if len(names) == 1 else shared.replace("#", "*")
        yield Change("decisions", name, before, after, f"x{count}" if count > 1 else "", not heavy)


def _comparable(pairs: Iterable[tuple[_Row | None, _Row | None, int]]) -> Iterator[tuple[_Row | None, _Row | None, int]]:
    """The pairs, taken apart where the two are different operations that happen to have one name or place."""
    for left, right, count in pairs:
        if left is not None and right is not None and _differ_in_kind(left[1], right[1]):
            yield left, None, count
            yield None, right, count
        else:
            yield left, right, count


def _differ_in_kind(one: OpPlan, other: OpPlan) -> bool:
    """Whether the two rows cannot be of one operation: those of repeats list the first, which moves with a cut."""
    return one.target != other.target or pattern(one.module) != pattern(other.module)


def _split_words(plan: Plan, row: _Row | None) -> str:
    """`d0@dp n@tp`: axes of one rank split nothing, whatever their split is called."""
    if row is None:
        return ""
    mesh = plan.stage_mesh(row[0].stage)
    return " ".join(f"{split}@{axis}" for axis, split in row[1].split.items() if mesh[axis] > 1) or "on one rank"


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
    if ratio > 10:
        return f"x{after / before:.3g}"
    return f"{'+' if ratio > 0 else '-'}{units.percent(abs(ratio))}"


def _consequences(a: Plan, b: Plan) -> Iterator[Change]:
    one, two = a.predicted, b.predicted
    for what, before, after in [
        ("step time", one.cost_s, two.cost_s),
        ("computing", one.compute_s, two.compute_s),
        ("exposed communication", one.communication_s, two.communication_s),
        ("lower bound", one.lower_bound_s, two.lower_bound_s),
        ("simulated step", one.step_s, two.step_s),
    ]:
        again = what == "simulated step" and (before, after) == (one.cost_s, two.cost_s)
        if before != after and not again:
            yield Change("consequences", what, *_distinct(before, after, units.seconds), _change(before, after))
    if one.bubble != two.bubble:
        yield Change("consequences", "bubble", *_distinct(one.bubble, two.bubble, units.percent))
    yield from _differ("consequences", "fits in memory", _yes(one.fits), _yes(two.fits))
    for kind in dict.fromkeys([*one.memory_bytes, *two.memory_bytes]):
        amounts = one.memory_bytes.get(kind, 0), two.memory_bytes.get(kind, 0)
        if amounts[0] != amounts[1]:
            yield Change("consequences", f"memory for {kind}", *_distinct(*amounts, units.size), _change(*amounts))
    totals = sum(one.memory_bytes.values()), sum(two.memory_bytes.values())
    if totals[0] != totals[1]:
        yield Change("consequences", "memory in all", *_distinct(*totals, units.size), _change(*totals))
    yield from _traffic(a, b)
    rules = [{f"{rule.target} {rule.form}".strip(): rule.words() for rule in plan.given_rules} for plan in (a, b)]
    yield from _mappings("model", "rule", *rules)
    for word, ours, theirs in (("input", a.inputs, b.inputs), ("output", a.outputs, b.outputs)):
        texts = [
            _by_path(items, lambda item, plan=plan: placements(item.placement, plan.stage_mesh(item.stage)))  # type: ignore[misc]
            for plan, items in ((a, ours), (b, theirs))
        ]
        yield from _mappings("consequences", f"placement of {word}", *texts)
    for note in dict.fromkeys([*a.notes, *b.notes]):
        if (note in a.notes) != (note in b.notes):
            yield Change("consequences", "note", note if note in a.notes else "", note if note in b.notes else "")


def _yes(fits: bool) -> str:
    return "yes" if fits else "no"


def _traffic(a: Plan, b: Plan) -> Iterator[Change]:
    ours, theirs = _by_kind(a), _by_kind(b)
    for key in dict.fromkeys([*ours, *theirs]):
        left, right = ours.get(key), theirs.get(key)
        texts = [f"{row.count:,} of {units.size(row.bytes)} in all" if row else "none" for row in (left, right)]
        if texts[0] != texts[1]:
            remark = _change(left.bytes, right.bytes) if left and right else ""
            yield Change("consequences", key, texts[0], texts[1], remark)
    moved = bytes_moved(a), bytes_moved(b)
    if moved[0] != moved[1]:
        yield Change("consequences", "bytes moved in all", *_distinct(*moved, units.size), _change(*moved))


def _by_kind(plan: Plan) -> dict[str, Traffic]:
    """Of groups of ranks that move different amounts, the one that moves most."""
    found: dict[str, Traffic] = {}
    for row in traffic(plan):
        key = f"{row.phase} {row.kind}@{row.axis}"
        if key not in found or row.bytes > found[key].bytes:
            found[key] = row
    return found


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
