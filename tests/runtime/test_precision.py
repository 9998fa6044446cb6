"""Mixed precision: ranks under a plan with a `precision` against the same policy written by hand on one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call

import autopar
from autopar.errors import PlanError, RuntimeSetupError, TraceError
from autopar.ir.assignment import expand_stages
from autopar.ir.plan import Plan
from autopar.ir.tracing.trace import split_example, trace
from autopar.runtime.module import ParallelModule
from autopar.runtime.precision import stored_dtypes
from autopar.runtime.state.checkpoint import whole_tensor
from autopar.runtime.state.materialize import local_state
from autopar.runtime.verification.launch import RankPool
from tests.runtime.counted import Sent, counted
from tests.runtime.simulated import simulate
from tests.zoo import ZOO, talkative

STEPS = 3
BF16 = {"compute": "bfloat16", "reduce": "bfloat16"}
AUTOCAST = {"compute": "bfloat16", "by": "autocast"}
Numbers = tuple[list[float], dict[str, Tensor]]
"""The loss of every step, and all parameters after the last."""


class Net(nn.Module):
    """Tokens, two blocks, one table for the tokens it reads and predicts, a norm, a float32 buffer; floating-point weights as input."""

    def __init__(self, vocabulary: int = 24, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + F.gelu(block(self.norm(x))) * self.scale
        rows = F.cross_entropy(self.head(x).float().flatten(0, 1), target.flatten(), reduction="none")
        return (rows * weight.flatten().float()).mean()


def inputs(rows: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(24, (rows, 4), generator=generator)
    return {"tokens": tokens, "target": tokens.roll(1, 1), "weight": torch.rand(rows, 4, generator=generator)}


def by_hand(model: nn.Module, example: dict[str, Tensor], compute: torch.dtype, stored: torch.dtype, autocast: bool = False) -> Numbers:
    """Masters in `stored`; every step computes with copies in `compute`, whose gradients go to the masters."""
    model = copy.deepcopy(model)
    masters = {name: parameter.detach().to(stored) for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(masters.values(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        copies = {
            name: master.detach().to(master.dtype if autocast else compute, copy=True).requires_grad_() for name, master in masters.items()
        }
        given = {name: x.to(compute) if x.is_floating_point() and not autocast else x for name, x in example.items()}
        with torch.autocast("cpu", compute) if autocast else nullcontext():
            loss = functional_call(model, copies, (), given)
        loss.backward()
        for name, master in masters.items():
            master.grad = copies[name].grad.to(stored)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, masters


def trained(module: nn.Module, plan: Plan, example: dict[str, Tensor]) -> Numbers:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        if plan.microbatches > 1 or plan.pipeline:
            loss = module.step(**example)
        else:
            loss = module(**example)
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: whole_tensor(parameter) for name, parameter in module.named_parameters()}


def on_ranks(model: nn.Module, example: dict[str, Tensor], plan: Plan, story: Callable[[ParallelModule], Any]) -> list[Any]:
    """What `story` gives on every simulated rank with a module of its own."""
    args, kwargs = split_example(example)
    traced = trace(model, args, kwargs, precision=plan.precision)
    expanded = expand_stages(plan, traced.graph)
    (assignment,) = expanded.assignments
    stored = {name: item.stored for name, item in assignment.storage.items()}

    def rank(mesh: DeviceMesh) -> Any:
        dtypes = stored_dtypes(plan.precision, traced.graph)
        state = local_state(model, traced.graph, stored, mesh, torch.device("cpu"), dtypes=dtypes, sync_module_states=False)
        return story(ParallelModule(traced, plan, mesh, state, assignment=assignment, batched=expanded.microbatched))

    return simulate((plan.mesh["dp"], plan.mesh["tp"]), rank)


def agrees(found: Numbers, wanted: Numbers, tolerance: float) -> None:
    for ours, theirs in zip(found[0], wanted[0], strict=True):
        assert abs(ours - theirs) <= tolerance * abs(theirs)
    assert found[1].keys() == wanted[1].keys()
    for name, tensor in found[1].items():
        assert tensor.dtype == wanted[1][name].dtype
        error = float((tensor - wanted[1][name]).norm() / wanted[1][name].norm())
        assert error <= tolerance, (name, error)


PLANS: dict[str, dict[str, Any]] = {
    "ddp": {"baseline": "ddp"},
    "zero1": {"baseline": "zero1"},
    "fsdp": {"baseline": "fsdp"},
    "tp": {"baseline": "tp"},
    "both axes": {"mesh": {"dp": 2, "tp": 2}},
    "microbatches": {"mesh": {"dp": 4, "tp": 1}, "microbatches": 2},
    "recomputed": {"baseline": "fsdp", "recompute": "all"},
}


@pytest.mark.parametrize("options", PLANS.values(), ids=PLANS)
def test_bfloat16_with_float32_masters_is_the_policy_written_by_hand(options: dict[str, Any]) -> None:
    """Sums in another order differ by bfloat16's rounding; where no sum does, by nothing."""
    torch.manual_seed(0)
    model, example = Net(), inputs()
    plan = autopar.plan(model, example, talkative(4), precision="bfloat16", **options)
    wanted = by_hand(model, example, torch.bfloat16, torch.float32)
    for found in on_ranks(model, example, plan, lambda module: trained(module, plan, example)):
        agrees(found, wanted, 2e-2)


@pytest.mark.parametrize("name", ["zero1", "both axes", "microbatches"])
def test_float32_with_float64_masters_is_the_policy_to_rounding(name: str) -> None:
    torch.manual_seed(0)
    model, example = Net(), inputs()
    precision = {"compute": "float32", "stored": "float64", "reduce": "float64"}
    plan = autopar.plan(model, example, talkative(4), precision=precision, **PLANS[name])
    wanted = by_hand(model, example, torch.float32, torch.float64)
    for found in on_ranks(model, example, plan, lambda module: trained(module, plan, example)):
        agrees(found, wanted, 2e-5)


@pytest.mark.parametrize("name", ["fsdp", "tp"])
def test_autocast_is_that_of_one_device(name: str) -> None:
    torch.manual_seed(0)
    model, example = Net(), inputs()
    plan = autopar.plan(model, example, talkative(4), precision=AUTOCAST, **PLANS[name])
    wanted = by_hand(model, example, torch.bfloat16, torch.float32, autocast=True)
    for found in on_ranks(model, example, plan, lambda module: trained(module, plan, example)):
        agrees(found, wanted, 2e-2)
    assert {item.dtype for item in plan.parameters} == {"bfloat16", "float32"}, "a norm is read as it is stored, products are not"


def sent_in_a_step(plan: Plan, model: nn.Module, example: dict[str, Tensor]) -> list[Sent]:
    def story(module: ParallelModule) -> list[Sent]:
        mine = sent.setdefault(dist.get_rank(), [])
        before = len(mine)
        module(**example).backward()
        assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in module.parameters())
        return mine[before:]

    with counted() as sent:
        return on_ranks(model, example, plan, story)[0]


def test_what_travels_has_the_dtypes_of_the_plan() -> None:
    model, example = Net(), inputs()
    options = {"mesh": {"dp": 2, "tp": 1}, "baseline": "fsdp"}
    whole = sent_in_a_step(autopar.plan(model, example, talkative(2), **options), model, example)
    mixed = sent_in_a_step(autopar.plan(model, example, talkative(2), precision="bfloat16", **options), model, example)
    narrow = sent_in_a_step(autopar.plan(model, example, talkative(2), precision=BF16, **options), model, example)

    def sizes(sent: list[Sent], kind: str) -> dict[str, int]:
        return {dtype: sum(item.bytes for item in sent if (item.kind, item.dtype) == (kind, dtype)) for dtype in {i.dtype for i in sent}}

    gathered, reduced = "all_gather_single", "reduce_scatter_single"
    assert sizes(mixed, gathered)["bfloat16"] == sizes(narrow, gathered)["bfloat16"] == sizes(whole, gathered)["float32"] // 2
    assert sizes(mixed, reduced)["float32"] == sizes(whole, reduced)["float32"] == 2 * sizes(narrow, reduced)["bfloat16"]
    assert not sizes(mixed, reduced)["bfloat16"] and not sizes(narrow, reduced).get("float32")


def test_terms_of_many_backward_passes_add_up_in_the_stored_dtype() -> None:
    """In bfloat16 a sum stops growing when it is 256 times what is added."""
    model, example = Net(), inputs()
    plan = autopar.plan(model, example, talkative(2), mesh={"dp": 2, "tp": 1}, baseline="ddp", precision="bfloat16")

    def story(module: ParallelModule) -> list[dict[str, Tensor]]:
        found = []
        for count in (1, 300):
            module.zero_grad()
            with module.no_sync():
                for _ in range(count - 1):
                    module(**example).backward()
            module(**example).backward()
            found.append({name: whole_tensor(parameter.grad) for name, parameter in module.named_parameters()})
        return found

    for one, many in on_ranks(model, example, plan, story):
        for name, gradient in one.items():
            torch.testing.assert_close(many[name], 300 * gradient, rtol=1e-4, atol=1e-6)


def test_copies_are_freed_behind_a_step_and_made_anew_for_the_next() -> None:
    model, example = Net(), inputs()
    plan = autopar.plan(model, example, talkative(2), mesh={"dp": 2, "tp": 1}, baseline="ddp", precision="bfloat16")

    def story(module: ParallelModule) -> bool:
        before = float(module(**example).detach())
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)
        loss = module(**example)
        loss.backward()
        assert all(leaf.tensor.untyped_storage().size() == 0 for leaf in module._leaves)
        module.eval()
        with torch.no_grad():
            assert float(module(**example)) == float(loss.detach()) != before
        return True

    assert on_ranks(model, example, plan, story) == [True, True]


def test_a_narrow_model_gets_wide_masters_on_request() -> None:
    model, example = Net().bfloat16(), inputs() | {"weight": torch.ones(8, 4)}
    own = autopar.plan(model, example, talkative(2), mesh={"dp": 2, "tp": 1}, baseline="fsdp")
    masters = autopar.plan(model, example, talkative(2), mesh={"dp": 2, "tp": 1}, baseline="fsdp", precision="bfloat16")
    narrow = {"compute": "bfloat16", "stored": "bfloat16"}
    reduced = autopar.plan(model, example, talkative(2), mesh={"dp": 2, "tp": 1}, baseline="fsdp", precision=narrow)
    assert masters.memory_bytes["optimizer"] == 2 * own.memory_bytes["optimizer"] == 2 * reduced.memory_bytes["optimizer"]

    def story(module: ParallelModule) -> set[torch.dtype]:
        module(**example).backward()
        return {dtype for parameter in module.parameters() for dtype in (parameter.dtype, parameter.grad.dtype)}

    assert on_ranks(model, example, masters, story) == [{torch.float32}] * 2
    assert on_ranks(model, example, reduced, story) == [{torch.bfloat16}] * 2


def test_surrounding_autocast() -> None:
    model, example = Net(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        plan = autopar.plan(model, example, talkative(1))
        with pytest.raises(PlanError, match="leave one away"):
            autopar.plan(model, example, talkative(1), precision="bfloat16")
    assert plan.precision is not None and plan.precision.by == "autocast"
    plain = autopar.plan(model, example, talkative(1))
    assert plain.precision is None

    def story(module: ParallelModule) -> list[float]:
        outside = float(module(**example).detach())
        with torch.autocast("cpu", torch.bfloat16):
            inside = float(module(**example).detach())
        with torch.autocast("cpu", torch.float16), pytest.raises(RuntimeSetupError, match="float16, which its program would not follow"):
            module(**example)
        return [outside, inside]

    def refused(module: ParallelModule) -> bool:
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeSetupError, match="planned for the model's own dtypes"):
            module(**example)
        return True

    with torch.autocast("cpu", torch.bfloat16):
        exact = float(model(**example).detach())
    assert on_ranks(model, example, plan, story) == [[exact, exact]]
    assert on_ranks(model, example, plain, refused) == [True]


class Inside(nn.Module):
    """An autocast inside of `forward`, around layers that repeat and a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                x = layer(x).relu()
            with torch.no_grad():
                scale = x.float().mean()
        return F.mse_loss(self.head(x.float()) * (1 + scale), y)


def test_autocast_inside_of_forward_is_traced() -> None:
    torch.manual_seed(0)
    model, example = Inside(), {"x": torch.randn(8, 16), "y": torch.randn(8, 1)}
    plan = autopar.plan(model, example, talkative(2), mesh={"dp": 1, "tp": 2})
    loss = model(**example)
    loss.backward()

    def story(module: ParallelModule) -> dict[str, Tensor]:
        ours = module(**example)
        assert abs(float(ours.detach()) - float(loss.detach())) < 2e-2 * float(loss.detach())
        ours.backward()
        return {name: whole_tensor(parameter.grad) for name, parameter in module.named_parameters()}

    for found in on_ranks(model, example, plan, story):
        for name, parameter in model.named_parameters():
            assert float((found[name] - parameter.grad).norm() / parameter.grad.norm()) < 2e-2


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale).sum()


def test_a_model_that_mixes_dtypes_is_told_the_ways_out() -> None:
    with pytest.raises(TraceError, match=r"in `layer`.* of float32 and bfloat16, which torch does not multiply\n.*Try by autocast"):
        autopar.plan(Mixing(), (torch.randn(2, 4),), talkative(1), precision="bfloat16")
    autopar.plan(Mixing(), (torch.randn(2, 4),), talkative(1), precision=AUTOCAST)


@pytest.mark.parametrize(
    "option, words",
    [
        ("bf16", "did you mean `bfloat16`"),
        ({"compute": "bfloat16", "by": "hand"}, "write 'parameters' or 'autocast'"),
        ({"compute": "float32", "by": "autocast"}, "computes in bfloat16 or float16"),
        ({"compute": "float32", "stored": "bfloat16"}, "narrower than float32"),
        ({"dtype": "bfloat16"}, "no field `dtype`"),
        (torch.bfloat16, "precision is a dtype"),
    ],
)
def test_what_is_no_precision_is_refused(option: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        autopar.plan(Net(), inputs(), talkative(1), precision=option)


def parallelized(precision: dict[str, str], options: dict[str, Any]) -> tuple[Numbers, list[str]]:
    torch.manual_seed(0)
    model, example = Net(), inputs()
    cluster = talkative(dist.get_world_size())
    module = autopar.parallelize(model, example, cluster=cluster, precision=precision, **options)
    numbers = trained(module, module._plan, example)
    module.eval()
    module(**example)
    return numbers, sorted({str(tensor.dtype) for tensor in (*module.parameters(), *module.state_dict().values())})


@pytest.mark.processes
@pytest.mark.parametrize(
    "options",
    [{"mesh": {"dp": 2, "tp": 1}}, {"mesh": {"pp": 2, "dp": 1, "tp": 1}, "microbatches": 2, "schedule": "interleaved-zb"}],
    ids=["flat", "pipeline"],
)
def test_parallelize_stores_and_saves_masters(ranks2: RankPool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, example = Net(), inputs()
    wanted = by_hand(model, example, torch.bfloat16, torch.float32)
    held: set[str] = set()
    for (losses, parameters), dtypes in ranks2.run(parallelized, {"compute": "bfloat16"}, options):
        assert dtypes == ["torch.float32"]
        agrees((losses, parameters), (wanted[0], {name: wanted[1][name] for name in parameters}), 2e-2)
        held |= parameters.keys()
    assert held == wanted[1].keys()


@pytest.mark.processes
@pytest.mark.parametrize("precision", [BF16, AUTOCAST], ids=["by parameters", "by autocast"])
def test_verify_takes_plans_with_a_precision(ranks2: RankPool, precision: dict[str, str]) -> None:
    model = ZOO["llama"].build()
    example = ZOO["llama"].inputs(model)
    plan = autopar.plan(model, example, talkative(2), mesh={"pp": 2, "dp": 1, "tp": 1}, microbatches=2, schedule="zbv", precision=precision)
    report = autopar.verify(model, example, plan, ranks=ranks2)
    assert report.ok and report.max_relative_error < 1e-10, report
