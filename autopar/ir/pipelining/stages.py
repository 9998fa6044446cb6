"""Stages: the graph of one microbatch cut into graphs that run one after the other on different ranks.

A stage's graph is an ordinary one. It begins with an operation `autopar.receive` per value that it takes from the stage before and ends
with an `autopar.send` per value for the stage after. A value read several stages later is *relayed*: received and sent on by all
stages between. Three kinds of values do not travel:

* the user's inputs and the prologue's values: every stage that reads one gets it;
* what depends on no parameter and draws no random numbers (masks, positions, rotary tables): computed again where it is read;
* parameters, and what is merely a view of one: every stage lists the parameters that it reads, a tied weight stands in several.

So a result of the model that is a loss is relayed to the last stage; all other results are returned by the stage that makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from autopar.errors import PlanError
from autopar.ir.fold import fold
from autopar.ir.graph import Buffer, Graph, Op, Ref, Value
from autopar.ir.pipelining.microbatch_ways import draws
from autopar.ir.rules.neighbours import RECEIVE, RESHARD, SEND

__all__ = ["RECEIVE", "SEND", "Stage", "candidates", "crossing", "cut"]

_VIEWS = frozenset(
    (RESHARD, *(f"aten.{name}" for name in (
        "view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims",
        "t.default", "transpose.int", "permute.default", "expand.default", "slice.Tensor", "select.int", "alias.default", "detach.default",
    )))
)  # fmt: skip
"""Operators whose result is a view of their operand: nothing to compute again."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Operations `start` to `stop` of the body (positions in `body.ops`) as stage `index` of `count`.

    `receives`, `sends`: names of the values it takes from the stage before and gives to the one after, in wire order.
    """

    index: int
    count: int
    start: int
    stop: int
    graph: Graph
    receives: tuple[str, ...]
    sends: tuple[str, ...]


def cut(body: Graph, starts: Sequence[int]) -> tuple[Stage, ...]:
    """`body` cut in front of the operations at positions `starts`, of which the first is 0.

    Run in order, each receiving what the one before sends, the stages do what the body does. With one stage its graph is `body` itself.
    Raises `PlanError` where `starts` are no ascending positions from 0, or where a stage would read a buffer that a later one updates.
    """
    starts = tuple(starts)
    if not starts or starts[0] != 0 or any(not a < b for a, b in zip(starts, (*starts[1:], max(len(body.ops), 1)), strict=True)):
        raise PlanError(
            f"stages start at operations {list(starts)}; they must ascend from 0 and end below {len(body.ops)}, the number of operations"
        )
    if len(starts) == 1:
        return (Stage(0, 1, 0, len(body.ops), body, (), ()),)
    return _Cut(body, starts).stages()


def crossing(body: Graph, position: int) -> tuple[str, ...]:
    """The values that a cut in front of the operation at `position` sends, in wire order."""
    flow = _flow(body)
    return tuple(name for name, (made, read) in flow.spans.items() if made < position <= read)


def candidates(body: Graph) -> tuple[int, ...]:
    """Positions at which a cut makes sense, ascending: 0 and the end are none.

    The boundaries between the repeats of `fold`; and of the positions between two operations that read parameters, the one that fewest
    bytes cross: where that is a single value, or where it is fewer than before and behind.
    """
    flow = _flow(body)
    count = len(body.ops)
    crossed = flow.crossed_bytes()
    values = flow.crossed_values()
    found = places(body)
    boundaries = {
        segment.start + repeat * segment.length for segment in fold(body) if segment.count > 1 for repeat in range(segment.count + 1)
    }
    chosen = {at for at in boundaries if 0 < at < count}
    levels = [list(level) for _, level in groupby(found, key=crossed.__getitem__)]  # neighbours that equally many bytes cross
    heights = [crossed[level[0]] for level in levels]
    for index, level in enumerate(levels):
        if all(heights[index] < other for other in (*heights[max(0, index - 1) : index], *heights[index + 1 : index + 2])):
            chosen.add(level[0])
        chosen.update(at for at in level if values[at] == 1)
    return tuple(sorted(at for at in chosen if flow.worth(at)))


def places(body: Graph) -> tuple[int, ...]:
    """Positions that leave parameters to read on both sides, ascending: between each two operations that read some the one that fewest
    bytes cross. More than `candidates`, for who wants more stages than these make."""
    flow = _flow(body)
    crossed = flow.crossed_bytes()
    working = [at for at, op in enumerate(body.ops) if op.name not in flow.copied and any(name in flow.weights for name in op.operands)]
    return tuple(min(range(before + 1, after + 1), key=lambda at: (crossed[at], at)) for before, after in pairwise(working))


class _Flow:
    """What travels: for every value that a cut may have to send, the position that makes it and the last that reads it."""

    def __init__(self, body: Graph) -> None:
        self.body = body
        self.weights = {item.value for item in body.parameters}
        self.copyable = self._find_copyable()
        self.copied = {op.name for op in body.ops if op.outputs and all(name in self.copyable for name in op.outputs)}
        self.weights.update(name for op in body.ops if op.name in self.copied for name in op.outputs if body.values[name].requires_grad)
        self.losses = {item.value for item in body.outputs if is_loss(body.values[item.value])}
        read: dict[str, int] = {}
        for at, op in enumerate(body.ops):
            for name in op.operands:
                read[name] = at
        read |= dict.fromkeys(self.losses, len(body.ops))
        for buffer in body.buffers:
            if buffer.updated is not None and buffer.updated not in self.copyable:  # wherever the buffer is read
                last = read.get(buffer.value, -1)
                read[buffer.updated] = max(read.get(buffer.updated, -1), last)
        self.spans: dict[str, tuple[int, int]] = {}
        for at, op in enumerate(body.ops):
            for name in op.outputs:
                if name not in self.copyable and name in read:
                    self.spans[name] = (at, read[name])

    def _find_copyable(self) -> set[str]:
        """Sources, and values that any stage can make from sources at little cost: see the module's docstring."""
        values = self.body.values
        free = {name for name, kind in self.body.source_kind.items() if kind != "parameter" and not values[name].requires_grad}
        views = {name for name, kind in self.body.source_kind.items() if kind == "parameter" or name not in free}
        for op in self.body.ops:
            operands = op.operands
            if all(name in free for name in operands) and not draws(op) and op.target != RECEIVE:
                free.update(op.outputs)
            elif op.target in _VIEWS and all(name in views for name in operands):
                views.update(op.outputs)
        return free | views

    def crossed_bytes(self) -> list[int]:
        return self._along([self.body.values[name].size_bytes for name in self.spans])

    def crossed_values(self) -> list[int]:
        return self._along([1] * len(self.spans))

    def _along(self, weights: Iterable[int]) -> list[int]:
        """Per position of a cut the sum of the weights of the values that cross it."""
        changes = [0] * (len(self.body.ops) + 2)
        for (made, read), weight in zip(self.spans.values(), weights, strict=True):
            changes[made + 1] += weight
            changes[read + 1] -= weight
        total = 0
        for at, change in enumerate(changes):
            total += change
            changes[at] = total
        return changes

    def worth(self, position: int) -> bool:
        """Whether there is something to do on both sides of a cut there."""
        first, last = self._ends
        return first < position <= last

    @property
    def _ends(self) -> tuple[int, int]:
        working = [at for at, op in enumerate(self.body.ops) if op.name not in self.copied]
        return (working[0], working[-1]) if working else (0, 0)


def _flow(body: Graph) -> _Flow:
    kept = body.__dict__.get("_flow_of_values")
    if kept is None:
        kept = body.__dict__["_flow_of_values"] = _Flow(body)
    assert isinstance(kept, _Flow)
    return kept


def is_loss(value: Value) -> bool:
    """Whether a value that a model returns is a loss: a floating scalar that requires a gradient."""
    return value.shape == () and value.requires_grad


class _Cut:
    """One way to cut a body, worked out in the order of the methods."""

    def __init__(self, body: Graph, starts: tuple[int, ...]) -> None:
        self.body, self.flow = body, _flow(body)
        self.starts, self.stops, self.count = starts, (*starts[1:], len(body.ops)), len(starts)
        self.home = [index for index in range(self.count) for _ in range(self.starts[index], self.stops[index])]  # by position
        self.made: dict[str, int] = {name: stage for op, stage in zip(body.ops, self.home, strict=True) for name in op.outputs}

    def stages(self) -> tuple[Stage, ...]:
        returned = self._place_outputs()
        copies, own = zip(*(self._ops(index, returned[index]) for index in range(self.count)), strict=True)
        reads = [{name for op in (*copies[index], *own[index]) for name in op.operands} for index in range(self.count)]
        for index, names in enumerate(reads):
            names.update(self.body.outputs[position].value for position in returned[index])
        buffers = self._place_buffers(reads)
        anywhere: set[str] = set().union(*reads)
        reads[0].update(name for name in self.body.source_kind if name not in anywhere)
        wires = self._wires(reads)
        return tuple(
            Stage(
                index,
                self.count,
                self.starts[index],
                self.stops[index],
                self._graph(wires[index], copies[index], own[index], wires[index + 1], reads[index], buffers[index], returned[index]),
                wires[index],
                wires[index + 1],
            )
            for index in range(self.count)
        )

    def _place_outputs(self) -> list[list[int]]:
        """Per stage the positions of the outputs that it returns."""
        first_reader: dict[str, int] = {}
        for op, stage in zip(self.body.ops, self.home, strict=True):
            for name in op.operands:
                first_reader.setdefault(name, stage)
        found: list[list[int]] = [[] for _ in range(self.count)]
        for position, item in enumerate(self.body.outputs):
            name = item.value
            stage = self.count - 1 if name in self.flow.losses else self.made.get(name, first_reader.get(name, 0))
            found[stage].append(position)
        return found

    def _ops(self, index: int, returned: list[int]) -> tuple[list[Op], list[Op]]:
        """The operations that a stage copies from others, and its own but for those copyable ones that only others read."""
        body, copied = self.body, self.flow.copied
        wanted = {body.outputs[position].value for position in returned}
        updated = {item.updated for item in body.buffers}
        inside = range(self.starts[index], self.stops[index])
        taken: set[str] = set()
        waiting: list[str] = list(wanted)
        for at in inside:
            op = body.ops[at]
            if op.name not in copied or any(name in updated for name in op.outputs):
                taken.add(op.name)
                waiting += op.operands
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            op = body.producers.get(name)  # type: ignore[assignment]
            if op is not None and op.name in copied:
                taken.add(op.name)
                waiting += op.operands
        position = body.op_index
        chosen = sorted(position[name] for name in taken)
        return [body.ops[at] for at in chosen if at not in inside], [body.ops[at] for at in chosen if at in inside]

    def _place_buffers(self, reads: list[set[str]]) -> list[dict[str, Buffer]]:
        """Per stage its buffers, by value. Every stage that reads a buffer keeps it up to date."""
        found: list[dict[str, Buffer]] = [{} for _ in range(self.count)]
        for item in self.body.buffers:
            readers = [index for index in range(self.count) if item.value in reads[index]]
            if item.updated is None:
                for index in readers or [0]:
                    found[index][item.value] = item
                continue
            maker = self.made.get(item.updated, 0)
            if early := [index for index in readers if index < maker]:
                op = self.body.producers[item.updated]
                raise PlanError(
                    f"{op.module or 'the model'}: buffer `{item.fqn}` is read in stage {early[0]} and updated by `{op.name}` in stage "
                    f"{maker}, which cannot send it back; cut elsewhere, so that one stage does both"
                )
            for index in dict.fromkeys((maker, *readers)):
                found[index][item.value] = item
                reads[index].update((item.value, item.updated))
        return found

    def _wires(self, reads: list[set[str]]) -> list[tuple[str, ...]]:
        """Entry `i`: what stage `i` receives from the one before. Read off from the last stage backwards."""
        order = {name: number for number, name in enumerate(self.flow.spans)}
        found: list[tuple[str, ...]] = [()] * (self.count + 1)
        pending: set[str] = set()
        for index in range(self.count - 1, 0, -1):
            pending = {name for name in pending | (reads[index] & order.keys()) if self.made[name] < index}
            found[index] = tuple(sorted(pending, key=order.__getitem__))
        return found

    def _graph(
        self,
        receives: tuple[str, ...],
        copies: list[Op],
        own: list[Op],
        sends: tuple[str, ...],
        reads: set[str],
        buffers: dict[str, Buffer],
        returned: list[int],
    ) -> Graph:
        body = self.body
        taking = [Op(f"receive_{name}", RECEIVE, (), (), (name,), *self._origin(name)) for name in receives]
        giving = [Op(f"send_{name}", SEND, (Ref(name),), (), (), *self._origin(name)) for name in sends]
        ops = (*taking, *copies, *own, *giving)
        sources = [name for name in body.source_kind if name in reads or name in buffers]
        values = {name: body.values[name] for name in (*sources, *(name for op in ops for name in op.outputs))}
        return Graph(
            body.name,
            values,
            tuple(item for item in body.inputs if item.value in values),
            tuple(item for item in body.parameters if item.value in values),
            tuple(buffers[item.value] for item in body.buffers if item.value in buffers),
            tuple(item for item in body.constants if item.value in values),
            ops,
            tuple(body.outputs[position] for position in returned),
            body.training,
            body.rules,
        )

    def _origin(self, name: str) -> tuple[str, str]:
        op = self.body.producers[name]
        return op.module, op.source
