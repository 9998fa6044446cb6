"""Models on `meta` get their own initialisation, shard by shard; models with values give every rank those of rank 0."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autopar.errors import RuntimeSetupError
from autopar.ir.conversion import State
from autopar.ir.graph import Buffer, Graph, Parameter, Value
from autopar.ir.placement import R, S
from autopar.runtime.process_mesh import mesh_for
from autopar.runtime.state.initialise import initialised
from autopar.runtime.state.materialize import local_state, materialize_whole
from autopar.runtime.state.shards import local_part
from autopar.runtime.verification.launch import RankPool
from tests.zoo import ZOO

CPU = torch.device("cpu")


def tensors_of(model: nn.Module) -> Graph:
    """A graph that has the parameters and buffers of `model` and nothing else."""
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Graph(
        name="m",
        values={name: Value(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in named.items()},
        inputs=(),
        parameters=tuple(Parameter(name, name) for name, _ in model.named_parameters()),
        buffers=tuple(Buffer(name, name) for name, _ in model.named_buffers()),
        constants=(),
        ops=(),
        outputs=(),
    )


def sharded(graph: Graph) -> dict[str, State]:
    """A mix of storages that fit the shapes."""
    options: list[State] = [(S(0), R), (R, S(0)), (S(0), S(0)), (R, R)]
    stored: dict[str, State] = {}
    for index, item in enumerate(graph.parameters):
        dims = len(graph.values[item.value].shape)
        stored[item.fqn] = (S(0), S(1)) if dims > 1 and index % 2 else options[index % 4]
    return stored


@pytest.mark.parametrize("name", list(ZOO))
def test_every_architecture_initialises_as_its_constructor_does(name: str) -> None:
    real, bare = ZOO[name].build(layers=1), ZOO[name].build(layers=1, device="meta")
    found = dict(initialised(bare, CPU, seed=3))
    expected = {**dict(real.named_parameters()), **dict(real.named_buffers())}
    assert found.keys() == expected.keys()
    assert all(tensor.is_meta for tensor in bare.parameters())
    for fqn, tensor in expected.items():
        value = found[fqn]
        assert value.shape == tensor.shape and value.dtype == tensor.dtype, fqn
        if isinstance(tensor, nn.Parameter) and tensor.float().std(correction=0) > 0:
            few = 4 / value.numel() ** 0.5  # four standard errors of a mean of so few numbers; of a deviation they are less
            assert value.float().std() == pytest.approx(tensor.float().std().item(), rel=max(0.35, few)), fqn
            assert value.float().mean().abs() < max(0.5, few) * value.float().std(), fqn
        else:
            torch.testing.assert_close(value, tensor.detach(), msg=fqn)


def test_values_depend_on_seed_and_name_alone() -> None:
    build = ZOO["llama"].build
    one, two = (materialize_whole(build(layers=1, device="meta"), CPU, seed=1) for _ in range(2))
    longer = dict(materialize_whole(build(layers=3, device="meta"), CPU, seed=1).named_parameters())
    other = dict(materialize_whole(build(layers=1, device="meta"), CPU, seed=2).named_parameters())
    for fqn, tensor in one.named_parameters():
        assert torch.equal(tensor, two.get_parameter(fqn)) and torch.equal(tensor, longer[fqn])
        assert torch.equal(tensor, other[fqn]) == ("norm" in fqn)


def test_tied_and_real_tensors_stay() -> None:
    model = ZOO["gpt2"].build(layers=1, device="meta")
    norm = nn.LayerNorm(64)
    model.transformer.ln_f = norm
    weight = norm.weight
    materialize_whole(model, CPU)
    assert model.lm_head.weight is model.transformer.wte.weight and model.transformer.ln_f.weight is weight
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


class Scale(nn.Module):
    """A parameter that its constructor fills and nothing can fill again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.tensor(3))


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 2))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.table[1:])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Scale, r"`block.scale`, `block.count`: on `meta`, and Scale has no `reset_parameters` that fills it"),
        (Half, r"`block.table`: on `meta`"),
    ],
)
def test_what_cannot_be_initialised_is_named(module: type[nn.Module], message: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential()
        model.add_module("block", module())
    with pytest.raises(RuntimeSetupError, match=message):
        dict(initialised(model, CPU, 0))


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it, on real devices, have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.data_ptr() and storage.data_ptr() not in self.alive:
                    self.alive[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage.data_ptr(), None)
                self.peak = max(self.peak, sum(self.alive.values()))
        return result


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def from_meta(name: str) -> dict[str, Any]:
    model = ZOO[name].build(layers=4, device="meta")
    graph = tensors_of(model)
    mesh = mesh_for({"dp": 2, "tp": 2})
    stored: dict[str, State] = {item.fqn: (S(0), S(0)) for item in graph.parameters}
    torch.manual_seed(dist.get_rank())  # rank 0's seed counts
    with Peak() as peak:
        held = local_state(model, graph, stored, mesh, CPU)
    largest = max(size([*module.parameters(recurse=False), *module.buffers(recurse=False)]) for module in model.modules())
    return {"held": held, "peak": peak.peak, "held_bytes": size(held.values()), "largest": largest, "whole": size(model.parameters())}


def from_values() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(dist.get_rank())
    model = ZOO["gpt2"].build(layers=1, seed=dist.get_rank())
    graph = tensors_of(model)
    mesh = mesh_for({"dp": 2, "tp": 2})
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    synced = local_state(model, graph, sharded(graph), mesh, CPU)
    own = local_state(model, graph, sharded(graph), mesh, CPU, sync_module_states=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    for tensor in synced.values():
        tensor.zero_() if tensor.dtype.is_floating_point else None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_parameters())
    return {"synced": local_state(model, graph, sharded(graph), mesh, CPU), "own": own}


def only_rank_0_has_values() -> dict[str, Tensor]:
    model = ZOO["mlp"].build(device="cpu" if dist.get_rank() == 0 else "meta", seed=7)
    graph = tensors_of(model)
    return local_state(model, graph, {}, mesh_for({"dp": 2, "tp": 2}), CPU)


@pytest.mark.processes
def test_from_meta_shard_by_shard(ranks4: RankPool) -> None:
    results = ranks4.run(from_meta, "llama")
    bare = ZOO["llama"].build(layers=4, device="meta")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = materialize_whole(bare, CPU)
    for rank, result in enumerate(results):
        for fqn, parameter in whole.named_parameters():
            expected = local_part(parameter, (S(0), S(0)), (2, 2), (rank // 2, rank % 2))
            assert torch.equal(result["held"][fqn], expected), fqn
        assert result["held"]["model.rotary_emb.inv_freq"].shape == (8,)
        # What is held, one module, and what its initialisation itself takes (a copy of it at most).
        assert result["held_bytes"] <= result["peak"] <= result["held_bytes"] + 2 * result["largest"] + 4096 < result["whole"]


@pytest.mark.processes
def test_values_come_from_rank_0(ranks4: RankPool) -> None:
    models = [ZOO["gpt2"].build(layers=1, seed=rank) for rank in range(4)]
    stored = sharded(tensors_of(models[0]))
    for rank, result in enumerate(ranks4.run(from_values)):
        for key, model in {"synced": models[0], "own": models[rank]}.items():
            named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            for fqn, tensor in named.items():
                expected = local_part(tensor, stored.get(fqn, (R, R)), (2, 2), (rank // 2, rank % 2))
                assert torch.equal(result[key][fqn], expected), (key, fqn)


@pytest.mark.processes
def test_values_on_rank_0_alone(ranks4: RankPool) -> None:
    expected = dict(ZOO["mlp"].build(seed=7).named_parameters())
    for result in ranks4.run(only_rank_0_has_values):
        assert all(torch.equal(result[fqn], tensor) for fqn, tensor in expected.items())
