"""The simulator: closed formulas where there are some, laws that hold for every workload, and memory over time."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.errors import PlanError
from autopar.ir.pipelining.schedule_check import live
from autopar.ir.pipelining.schedules import SCHEDULES
from autopar.search.simulator.flows import Tasks
from autopar.search.simulator.quick import StageTime, as_workload, quick
from autopar.search.simulator.simulate import Simulation, run, simulate
from autopar.search.simulator.timeline import receives
from autopar.search.simulator.workload import Flow, Piece, Stage, Workload, of_plan
from tests.report.pipelines import pipeline_plan

SECONDS = st.sampled_from([0.0, 0.25, 1.0, 1.5, 7.0])


def equal_stages(schedule: str, groups: int, per_group: int, microbatches: int, forward_s: float = 1.0, rest_s: float = 2.0) -> Workload:
    stages = [StageTime(forward_s, rest_s, rest_s / 2, live_bytes=1.0)] * (groups * per_group)
    return as_workload(schedule, groups, stages, microbatches)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, int, list[StageTime], int]:
    """Any schedule with any stages."""
    schedule = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    groups, per_group = draw(st.integers(1, 4)), schedule.stages_per_group or draw(st.integers(1, 3))
    stages = []
    for _ in range(groups * per_group):
        forward_s, inputs_s, weight_s, before_s, after_s, receive_s, returns_s = draw(st.tuples(*[SECONDS] * 7))
        sizes = draw(st.tuples(*[st.sampled_from([0.0, 1.0, 3.0])] * 3))
        stages.append(StageTime(forward_s, inputs_s + weight_s, weight_s, before_s, after_s, receive_s, returns_s, *sizes))
    return schedule.name, groups, stages, draw(st.integers(1, 9))


# ---- closed formulas ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize(("groups", "microbatches"), [(1, 1), (1, 5), (2, 4), (3, 7), (4, 8), (8, 32)])
def test_bubble_is_the_formula(schedule: str, groups: int, microbatches: int) -> None:
    row = SCHEDULES[schedule]
    if row.bubble is None or microbatches < row.bubble_from * groups:
        pytest.skip("no formula")
    for per_group in (row.stages_per_group,) if row.stages_per_group else (1, 2, 3):
        simulation = run(equal_stages(schedule, groups, per_group, microbatches))
        expected = row.bubble(groups, per_group, microbatches)
        assert simulation.bubble == pytest.approx(expected)
        assert [group.bubble for group in simulation.groups] == pytest.approx([expected] * groups)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 16), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([0.5, 2.0, 5.0]))
def test_gpipe_and_1f1b_take_the_same_time(groups: int, microbatches: int, forward_s: float, backward_s: float) -> None:
    for schedule in ("gpipe", "1f1b"):
        simulation = run(equal_stages(schedule, groups, 1, microbatches, forward_s, backward_s))
        assert simulation.step_s == pytest.approx((microbatches + groups - 1) * (forward_s + backward_s))


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 16))
def test_zero_bubble_schedules_take_less_than_1f1b(groups: int, microbatches: int) -> None:
    plain = run(equal_stages("1f1b", groups, 1, microbatches)).bubble
    for row in SCHEDULES.values():
        if row.splits_backward:
            assert run(equal_stages(row.name, groups, row.stages_per_group or 1, microbatches)).bubble < plain


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from(sorted(SCHEDULES)))
def test_peak_memory_is_the_schedules_live_microbatches(groups: int, microbatches: int, schedule: str) -> None:
    per_group = SCHEDULES[schedule].stages_per_group or 2
    simulation = run(equal_stages(schedule, groups, per_group, microbatches))
    assert simulation.peak_bytes == live(SCHEDULES[schedule].orders(groups, per_group, microbatches))


# ---- laws -----------------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(cases())
def test_the_quick_simulator_says_the_same(case: tuple[str, int, list[StageTime], int]) -> None:
    whole, fast = run(as_workload(*case)), quick(*case)
    assert (fast.step_s, fast.bubble, fast.communication_s) == pytest.approx((whole.step_s, whole.bubble, whole.communication_s))
    assert fast.memory_bytes == pytest.approx(whole.peak_bytes)


@settings(deadline=None)
@given(cases(), st.data())
def test_nothing_gets_faster_when_something_gets_slower(case: tuple[str, int, list[StageTime], int], data: st.DataObject) -> None:
    schedule, groups, stages, microbatches = case
    number = data.draw(st.integers(0, len(stages) - 1))
    name = data.draw(st.sampled_from(["forward_s", "backward_s", "before_s", "after_s", "receive_s", "returns_s"]))
    values = {field: getattr(stages[number], field) for field in StageTime.__slots__}
    values[name] += 0.75
    slower = [*stages[:number], StageTime(**values), *stages[number + 1 :]]
    assert quick(schedule, groups, slower, microbatches).step_s >= quick(*case).step_s - 1e-9


def layers(count: int, **fields: object) -> tuple[Piece, ...]:
    return tuple(Piece(f"layer {index}", 1.0, 2.0, 1.0, **fields) for index in range(count))  # type: ignore[arg-type]


def one_group(pieces: tuple[Piece, ...], microbatches: int = 1, felt_share: float = 0.0) -> Workload:
    return Workload((Stage("all", 0, pieces),), SCHEDULES["1f1b"].orders(1, 1, microbatches), felt_share)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Stages of several pieces that communicate in every way, over links that they share."""
    schedule = SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))]
    groups, per_group = draw(st.integers(1, 3)), schedule.stages_per_group or draw(st.integers(1, 2))

    def flows(streams: tuple[str, ...] = ("dp", "tp")) -> tuple[Flow, ...]:
        links = st.lists(st.sampled_from(["a", "b", "c"]), max_size=2, unique=True)
        return tuple(
            Flow(draw(SECONDS), tuple((link, draw(st.sampled_from([0.5, 1.0, 2.0]))) for link in draw(links)), stream)
            for stream in draw(st.lists(st.sampled_from(streams), max_size=2))
        )

    def piece(index: int) -> Piece:
        recompute = draw(st.booleans())
        return Piece(
            f"piece {index}", draw(SECONDS), 2.0, draw(st.sampled_from([0.0, 1.0, 2.0])), flows(), flows(), flows(), flows(), flows(),
            flows(), draw(SECONDS), recompute, 5.0, 1.0, 2.0, 2.0, 4.0, 3.0, 1.0, 2.0, 1.0, 2.0,
        )  # fmt: skip

    stages: list[Stage] = []
    for index in range(groups * per_group):
        group = schedule.group_of(index, groups)
        moved = flows(("",)) if stages and stages[-1].group != group else ()
        receive, returns = (moved[0], moved[-1]) if moved else (None, None)
        stages.append(Stage(str(index), group, tuple(piece(i) for i in range(draw(st.integers(0, 3)))), receive, returns))
    orders = schedule.orders(groups, per_group, draw(st.integers(1, 4)))
    return Workload(tuple(stages), orders, draw(st.sampled_from([0.0, 0.25, 1.0])), (7.0,) * groups)


def check_laws(workload: Workload, simulation: Simulation) -> None:
    step_s = simulation.step_s
    for group, row in enumerate(simulation.groups):
        parts = (row.compute_s, row.optimizer_s, row.communication_s, row.idle_s)
        assert min(parts) >= -1e-9
        assert sum(parts) == pytest.approx(step_s)
        own = [stage for stage in workload.stages if stage.group == group]
        pieces = [piece for stage in own for piece in stage.pieces]
        again = [piece.forward_s for piece in pieces if piece.recompute]
        once = sum(piece.forward_s + piece.backward_s for piece in pieces) + sum(again)
        assert row.compute_s == pytest.approx(once * workload.microbatches)
        assert row.optimizer_s == pytest.approx(sum(piece.optimizer_s for piece in pieces))
        streams = {event.stream for event in simulation.events if event.group == group}
        for stream in streams:
            events = [event for event in simulation.events if event.group == group and event.stream == stream]
            assert all(one.end_s <= two.start_s + 1e-9 for one, two in pairwise(events))
            assert all(0.0 <= event.start_s <= event.end_s <= step_s + 1e-9 for event in events)
        memory = simulation.memory[group]
        assert sum(memory.peak) == max(sum(level) for level in memory.levels)
        assert list(memory.times_s) == sorted(memory.times_s)
        assert memory.levels[-1] == memory.levels[0], "the step ends with what it began with"
        assert memory.levels[0] == (2.0 * len(pieces), 0.0, 4.0 * len(pieces), 0.0, 7.0)


@settings(deadline=None)
@given(workloads())
def test_laws(workload: Workload) -> None:
    """Busy and idle time make up the step, streams do one thing at a time, memory goes back to where it was."""
    check_laws(workload, run(workload))


@settings(deadline=None)
@given(workloads())
def test_sharing_links_and_feeling_traffic_take_time(workload: Workload) -> None:
    """For each schedule at least the longest chain of a step in which nobody is in the other's way."""
    free = Workload(workload.stages, workload.orders, 0.0, workload.resident_bytes)
    bare = [Stage(s.name, s.group, tuple(map(_apart, s.pieces)), _alone(s.receive), _alone(s.returns)) for s in free.stages]
    assert run(workload).step_s >= run(Workload(tuple(bare), free.orders, 0.0, free.resident_bytes)).step_s - 1e-9


def _alone(flow: Flow | None) -> Flow | None:
    return None if flow is None else Flow(flow.seconds, (), flow.stream)


def _apart(piece: Piece) -> Piece:
    values = {name: getattr(piece, name) for name in Piece.__slots__}
    return Piece(**{name: tuple(map(_alone, value)) if isinstance(value, tuple) else value for name, value in values.items()})


# ---- overlap --------------------------------------------------------------------------------------------------------------------------


def test_without_communication_a_step_is_its_computing() -> None:
    assert run(one_group(layers(4, optimizer_s=0.5))).step_s == 4 * 3.0 + 2.0


def test_blocking_collectives_add_up() -> None:
    comm = (Flow(0.5, (), "tp"),)
    simulation = run(one_group(layers(4, forward_comm=comm, backward_comm=comm), microbatches=3))
    assert simulation.step_s == 3 * 4 * (3.0 + 1.0)
    assert simulation.communication_s == 3 * 4 * 1.0


def test_parameters_fetched_ahead_are_hidden_but_for_the_first() -> None:
    gather = (Flow(0.75, (), "dp"),)
    assert run(one_group(layers(4, gather=gather, regather=gather))).step_s == 12.0 + 0.75  # the last piece's are still there
    slow = (Flow(1.5, (), "dp"),)
    assert run(one_group(layers(4, gather=slow))).step_s == 4 * 1.5 + 1.0 + 8.0  # forward now waits for the link
    assert run(one_group(layers(4, gather=gather), microbatches=3)).step_s == 3 * (12.0 + 0.75)
    assert run(one_group(layers(4, step_gather=gather), microbatches=3)).step_s == 3 * 12.0 + 0.75


def test_gradients_are_reduced_behind_the_last_backward_pass() -> None:
    assert run(one_group(layers(4, reduce=(Flow(1.5, (), "dp"),)))).step_s == 12.0 + 1.5
    assert run(one_group(layers(4, reduce=(Flow(5.0, (), "dp"),)))).step_s == 4.0 + 2.0 + 4 * 5.0
    assert run(one_group(layers(4, reduce=(Flow(1.5, (), "dp"),)), microbatches=3)).step_s == 36.0 + 1.5


def pipeline(groups: int, microbatches: int = 8, **fields: object) -> Simulation:
    stages = [Stage(str(g), g, layers(2, **fields), *((Flow(0.0), Flow(0.0)) if g else ())) for g in range(groups)]
    return run(Workload(tuple(stages), SCHEDULES["1f1b"].orders(groups, 1, microbatches)))


def test_groups_gather_for_the_step_while_they_wait_for_their_first_microbatch() -> None:
    bare_s = pipeline(4).step_s
    assert pipeline(4, step_gather=(Flow(1.0, (), "dp"),)).step_s == bare_s + 1.0, "for the first layer of the first group"
    assert pipeline(4, step_gather=(Flow(3.0, (), "dp"),)).step_s == bare_s + 3.0 + 2.0, "the first group's second layer waits too"


def test_nothing_is_in_the_way_of_the_last_backward_passes() -> None:
    """Each waits for the one behind it, and so all of them would pay for what delays one."""
    bare = pipeline(4)
    slow = pipeline(4, reduce=(Flow(3.0, (), "dp"), Flow(0.25, (), "tp")), backward_comm=(Flow(0.0, (), "tp"),))
    assert slow.groups[0].compute_s == bare.groups[0].compute_s
    # The first stage's reductions: two of 3.0 behind its last-but-one layer, then the small ones over the other axis.
    assert slow.step_s == bare.step_s - 2.0 + 3.0 + 3.0 + 0.25
    assert sum(group.communication_s for group in slow.groups[1:]) == pytest.approx(3 * (3.0 + 3.0 + 0.25))


def test_axes_do_not_wait_for_each_other_and_flows_of_an_axis_do() -> None:
    apart = layers(2, reduce=(Flow(4.0, (), "dp"),), backward_comm=(Flow(1.0, (), "tp"),))
    assert run(one_group(apart)).step_s == 2.0 + 3.0 + max(4.0, 3.0) + 4.0
    same = layers(2, reduce=(Flow(4.0, (), "dp"),), backward_comm=(Flow(1.0, (), "dp"),))
    assert run(one_group(same)).step_s == 2.0 + 3.0 + 4.0 + 1.0 + 4.0


def test_computing_feels_traffic_beside_it() -> None:
    reduce = (Flow(1.0, (), "dp"),)
    assert run(one_group(layers(2, reduce=reduce), felt_share=0.25)).step_s == pytest.approx(2.0 + 2.0 + (1.0 + (2.0 - 0.75)) + 1.0)
    assert run(one_group(layers(2, reduce=reduce), felt_share=1.0)).step_s == pytest.approx(2.0 + 2.0 + (1.0 + 2.0) + 1.0)


def test_recomputation_takes_a_forward_pass_and_keeps_a_checkpoint() -> None:
    sizes = {"activation_bytes": 10.0, "checkpoint_bytes": 1.0}
    kept, again = one_group(layers(4, **sizes)), one_group(layers(4, recompute=True, **sizes))
    assert run(again).step_s == run(kept).step_s + 4.0
    assert run(kept).peak_bytes == (40.0,)
    assert run(again).peak_bytes == (13.0,)
    half = one_group(layers(4, **sizes)[:2] + layers(4, recompute=True, **sizes)[2:])
    assert run(half).peak_bytes == (31.0,)


def test_gradients_come_as_activations_go() -> None:
    sizes = {"activation_bytes": 10.0, "gradient_bytes": 4.0, "parameter_bytes": 4.0, "optimizer_bytes": 8.0}
    simulation = run(one_group(layers(4, backward_workspace_bytes=5.0, **sizes)))
    assert simulation.peak_bytes == (4 * 12.0 + 40.0 + 5.0,)
    assert simulation.memory[0].at_peak() == {
        "parameters": 16.0, "gradients": 0.0, "optimizer": 32.0, "activations": 40.0, "buffers": 5.0,
    }  # fmt: skip
    at_end = [sum(level) for level in simulation.memory[0].levels][-2]
    assert at_end == 4 * 12.0 + 16.0
    several = run(one_group(layers(4, activation_bytes=10.0, gradient_bytes=4.0), microbatches=2))
    assert several.peak_bytes == (16.0 + 40.0,), "they are there when the second microbatch comes"


def test_gradients_on_their_way_are_as_large_as_they_were() -> None:
    """Layers of 10 MiB: messages leave with three of them; what is reduced of them stays half as large."""
    mib = 2.0**20
    row = layers(8, gradient_bytes=5 * mib, unreduced_bytes=5 * mib, reduce=(Flow(0.0, (), "dp"),))
    memory = run(one_group(row)).memory[0]
    # Behind the last: all eight stored parts, what is beyond of the eight (the first message left before the last piece's did, and two may
    # be on their way), and the copies that pack the last two.
    assert memory.peak_bytes == (8 * 5 + 8 * 5 + 2 * 20) * mib
    assert run(one_group(row * 2)).memory[0].peak_bytes == (15 * 5 + (3 + 3 + 3) * 5 + 2 * 25) * mib, "as the fifth message leaves"


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize(("groups", "microbatches"), [(2, 4), (3, 6), (4, 8)])
def test_receives_are_posted_where_torch_posts_them(schedule: str, groups: int, microbatches: int) -> None:
    runtime = pytest.importorskip("torch.distributed.pipelining.schedules")
    row = SCHEDULES[schedule]
    per_group = row.stages_per_group or 2
    orders = row.orders(groups, per_group, microbatches)
    actions = {group: [runtime._Action.from_str(str(action)) for action in order] for group, order in enumerate(orders)}
    laid = runtime._add_send_recv(actions, stage_to_rank=lambda stage: row.group_of(stage, groups), num_stages=groups * per_group)
    for group, order in enumerate(orders):
        expected, position = set(), 0
        for item in map(str, laid[group]):
            if "RECV" in item:
                stage, rest = item.split("RECV_")
                kinds = ("F",) if rest[0] == "F" else ("B", "I")
                read = next(at for at, action in enumerate(order) if str(action) in {f"{stage}{kind}{rest[1:]}" for kind in kinds})
                expected.add((position, read))
            elif "SEND" not in item:
                position += 1
        assert set(receives(orders)[group]) == {(posted, read) for posted, read in expected if posted < read}


def test_what_is_sent_stays_until_the_next_is_sent() -> None:
    sender, receiver = Piece("a", 1.0, 2.0, sent_bytes=3.0), Piece("b", 1.0, 2.0)
    stages = (Stage("0", 0, (sender,)), Stage("1", 1, (receiver,), Flow(0.0), Flow(0.0), receives_bytes=3.0))
    memory = run(Workload(stages, SCHEDULES["gpipe"].orders(2, 1, 3))).memory
    assert memory[0].peak_bytes == 3.0
    assert memory[1].peak_bytes == 3.0 + 0.0, "what comes next, and later the last gradient on its way back"


def test_what_a_group_hands_to_itself_is_kept_once() -> None:
    """The turn of a V: the stage behind reads what the stage before keeps."""

    def peak(sent: float) -> float:
        pieces = [Piece(str(i), 1.0, 2.0, 1.0, activation_bytes=5.0, sent_bytes=sent if i == 1 else 0.0) for i in range(4)]
        groups = (0, 1, 1, 0)
        stages = [Stage(str(i), groups[i], (pieces[i],), receives_bytes=2.0 if i == 2 else 0.0) for i in range(4)]
        return run(Workload(tuple(stages), SCHEDULES["zbv"].orders(2, 2, 1))).peak_bytes[1]

    assert peak(0.0) == 5.0 + 5.0 - 2.0, "it is among what the stage before keeps"
    assert peak(2.0) == 5.0 + 5.0, "nobody else keeps it"


def test_split_backward_passes_hold_what_is_postponed() -> None:
    def peaks(postponed: float) -> tuple[float, ...]:
        piece = Piece("all", 1.0, 2.0, 1.0, activation_bytes=10.0, postponed_bytes=postponed)
        stages = (Stage("0", 0, (piece,)), Stage("1", 1, (piece,), Flow(0.0), Flow(0.0)))
        return run(Workload(stages, SCHEDULES["interleaved-zb"].orders(2, 1, 4))).peak_bytes

    assert peaks(0.0) == (20.0, 20.0)
    assert peaks(1.0) == (21.0, 22.0), "group 1 owes one microbatch's gradients of weights when it makes the next one's"


# ---- links that are shared ------------------------------------------------------------------------------------------------------------


def ends(felt_share: float, *flows: tuple[float, tuple[tuple[str, float], ...]]) -> list[float]:
    tasks = Tasks(felt_share)
    for seconds, links in flows:
        tasks.add(seconds, (), links)
    tasks.run()
    return tasks.end_s


def test_flows_on_one_link_share_it() -> None:
    link = (("a", 1.0),)
    assert ends(0.0, (1.0, link)) == [1.0]
    assert ends(0.0, (1.0, link), (1.0, link)) == [2.0, 2.0]
    assert ends(0.0, (1.0, link), (3.0, link)) == [2.0, 4.0]
    assert ends(0.0, (1.0, link), (3.0, (("b", 1.0),))) == [1.0, 3.0]
    assert ends(0.0, (1.0, (("a", 0.5),)), (1.0, (("a", 0.5),))) == [1.0, 1.0], "half of the link is enough for each"
    assert ends(0.0, (1.0, (("a", 2.0),))) == [2.0], "one that wants two links' worth"
    assert ends(0.0, (2.0, (("a", 1.0), ("b", 1.0))), (1.0, link), (1.0, (("b", 1.0),))) == [3.0, 2.0, 2.0], "the busiest link counts"


def test_transfers_of_a_machine_get_in_each_others_way() -> None:
    def step_s(*links: str) -> float:
        stages = [Stage("0", 0, layers(1))]
        stages += [Stage(str(i), i, layers(1), Flow(1.0, ((links[i - 1], 1.0),)), Flow(1.0, ((links[i - 1], 1.0),))) for i in (1, 2)]
        return run(Workload(tuple(stages), SCHEDULES["gpipe"].orders(3, 1, 4))).step_s

    assert step_s("card", "card") > step_s("card 0", "card 1")


def test_a_transfer_beside_a_reduction_is_slower() -> None:
    def step_s(link: str) -> float:
        last = layers(1, reduce=(Flow(1.0, ((link, 1.0),), "dp"),))
        stages = (Stage("0", 0, layers(1)), Stage("1", 1, last, Flow(1.0), Flow(1.0, (("card", 1.0),))))
        return run(Workload(stages, SCHEDULES["1f1b"].orders(2, 1, 1))).step_s

    assert step_s("another card") == 8.0
    assert step_s("card") == 9.0


# ---- plans ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "per_group"), [("gpipe", 1), ("1f1b", 1), ("interleaved-1f1b", 2), ("interleaved-zb", 2), ("zbv", 2)])
def test_plans_with_stages(schedule: str, per_group: int) -> None:
    plan = pipeline_plan(2, per_group, schedule, 8)
    simulation = simulate(plan)
    assert simulation.ranks == (range(4), range(4, 8))
    assert simulation.step_s > 0.0
    for group in simulation.groups:
        assert group.compute_s + group.optimizer_s + group.communication_s + group.idle_s == pytest.approx(simulation.step_s)
    assert {event.kind for event in simulation.events} >= {"forward", "transfer"}


def test_links_of_groups_follow_from_where_they_lie() -> None:
    inside = of_plan(pipeline_plan(2, 1, "1f1b", 4))
    assert inside.stages[1].receive is not None
    assert [link for link, _ in inside.stages[1].receive.links] == ["group 0 inside out", "group 1 inside in"]
    across = of_plan(pipeline_plan(2, 1, "1f1b", 4, meshes=({"dp": 2, "tp": 4}, {"dp": 1, "tp": 4})))
    receive, returns = across.stages[1].receive, across.stages[1].returns
    assert receive is not None
    assert returns is not None
    assert dict(receive.links) == {"group 0 out": 1.0, "group 1 in": 1.0, "node 0 out": 1.0, "node 1 in": 0.5}
    assert dict(returns.links) == {"group 1 out": 2.0, "group 0 in": 1.0, "node 1 out": 1.0, "node 0 in": 1.0}


def test_plans_that_cannot_be_simulated_say_so() -> None:
    plan = pipeline_plan(2, 1, "1f1b", 8)
    assert plan.pipeline is not None
    swapped = [stage.model_copy(update={"group": 1 - stage.group}) for stage in plan.pipeline.stages]
    for changes, words in (
        ({"schedule": "zbv"}, "2 stages on each group"),
        ({"schedule": "faster"}, "no schedule is called 'faster'"),
        ({"stages": plan.pipeline.stages[:1]}, "cannot be laid on 2 groups"),
        ({"stages": tuple(swapped)}, "schedule 1f1b has it on group 0"),
    ):
        with pytest.raises(PlanError, match=words):
            simulate(plan.model_copy(update={"pipeline": plan.pipeline.model_copy(update=changes)}))
    endless = plan.segments[0].model_copy(update={"count": 10**12})
    with pytest.raises(PlanError, match="cannot be simulated"):
        simulate(plan.model_copy(update={"segments": (endless,)}))


def test_many_devices_are_as_many_groups() -> None:
    """16 groups of 1,024 ranks, 64 layers, 32 microbatches: nothing here may grow with the ranks of a group."""
    meshes = ({"dp": 128, "tp": 8},) * 16
    started = time.process_time()
    simulation = simulate(pipeline_plan(16, 1, "1f1b", 32, layers=64, meshes=meshes))
    assert time.process_time() - started < 60.0  # seconds; a guard against growth, not a measurement
    assert sum(map(len, simulation.ranks)) == 16_384
