"""A trace means what the model means, on every model of the zoo, and leaves the model as it was."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.ir.graph import Ref
from autopar.ir.text import parse, to_text
from autopar.ir.tracing.trace import TracedModel, split_example, trace
from tests.ir.interpreter import run
from tests.zoo import ZOO

STOCHASTIC = {"autopar.dropout"}


def without_dropout(model: nn.Module) -> nn.Module:
    """Deterministic in training mode, and without the caches that traces have not."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def traced_with(model: nn.Module, example: Any, **options: Any) -> TracedModel:
    args, kwargs = split_example(example)
    return trace(model, args, kwargs, **options)


def called(model: nn.Module, example: Any) -> Any:
    args, kwargs = split_example(example)
    return model(*args, **kwargs)


def leaves_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_means_what_the_model_means(name: str, training: bool) -> None:
    """Outputs, gradients of every parameter, and updated buffers, in float64."""
    entry = ZOO[name]
    model = without_dropout(entry.build(layers=2).double()).train(training)
    example = entry.inputs(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    traced = traced_with(model, example)
    assert traced.graph.training == training
    assert not STOCHASTIC & {op.target for op in traced.graph.ops}
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())

    got, updated = run(traced, model, leaves_of(example))
    got[0].sum().backward()
    gradients = {fqn: parameter.grad for fqn, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    wanted = called(model, example)
    assert pytree.tree_structure(wanted) == traced.out_spec
    for one, other in zip(got, leaves_of(wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    leaves_of(wanted)[0].sum().backward()
    for fqn, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[fqn], parameter.grad, rtol=1e-10, atol=1e-12)
    buffers = dict(model.named_buffers())
    assert updated.keys() == {fqn for fqn, tensor in buffers.items() if fqn in before and not torch.equal(before[fqn], tensor)}
    for fqn, tensor in updated.items():
        torch.testing.assert_close(tensor, buffers[fqn], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_meta_model_traces_the_same_and_text_parses_back(name: str) -> None:
    entry = ZOO[name]
    real, meta = entry.build(layers=1), entry.build(layers=1, device="meta")
    graph = traced_with(real, entry.inputs(real)).graph
    text = to_text(graph)
    assert parse(text) == graph
    assert text == to_text(traced_with(meta, entry.inputs(meta, device="meta" if name < "m" else "cpu")).graph)
    assert graph.fingerprint() == parse(text).fingerprint()


def test_attention_stays_whole_and_causal() -> None:
    """Tracing must not build the masks that eager mode does not build."""
    for name, causal in (("gpt2", True), ("llama", True), ("bert", False)):
        model = ZOO[name].build(device="meta")
        graph = traced_with(model, ZOO[name].inputs(model, device="meta")).graph
        attention = [op for op in graph.ops if op.target == "aten.scaled_dot_product_attention.default"]
        assert len(attention) == 2
        assert all(op.args[3] is None and op.arg(5, "is_causal", False) is causal for op in attention)


def test_positions_of_the_user_are_looked_at() -> None:
    model = without_dropout(ZOO["llama"].build().double())
    example = ZOO["llama"].inputs(model)
    example["position_ids"] = torch.arange(8).repeat(2).expand(4, 16).contiguous()
    got, _ = run(traced_with(model, example), model, leaves_of(example))
    torch.testing.assert_close(got[0], model(**example).loss)


def test_model_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.masking_utils as masking

    model = ZOO["gpt2"].build(layers=3)
    example = ZOO["gpt2"].inputs(model)
    model.gradient_checkpointing_enable()
    before = [(module, dict(vars(module)), dict(module._parameters)) for module in model.modules()]
    functions = masking.find_packed_sequence_indices, masking.is_torchdynamo_exporting
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(type(model.lm_head), "forward", lambda self, x: x if x.sum() > 0 else -x)
            with pytest.raises(Exception, match="cannot be traced"):
                traced_with(model, example)
        else:
            assert not any("cache" in output.path or "past" in output.path for output in traced_with(model, example).graph.outputs)
        assert model.config.use_cache is True
        assert functions == (masking.find_packed_sequence_indices, masking.is_torchdynamo_exporting)
        for module, attributes, parameters in before:
            assert vars(module) == attributes
            assert all(module._parameters[name] is parameter for name, parameter in parameters.items())


def test_tied_weights_are_one_parameter() -> None:
    model = ZOO["gpt2"].build()
    graph = traced_with(model, ZOO["gpt2"].inputs(model)).graph
    (tied,) = [parameter for parameter in graph.parameters if parameter.aliases]
    assert (tied.fqn, tied.aliases) == ("transformer.wte.weight", ("lm_head.weight",))
    assert {op.target for op in graph.consumers[tied.value]} == {"aten.embedding.default", "aten.linear.default"}


class Odd(nn.Module):
    """Literals, nested inputs, a constant, a buffer that counts, unused state, parts without gradient, literal outputs."""

    Pair = namedtuple("Pair", "first second")

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: dict[str, Tensor], scale: float, *, flag: bool = True, names: Any = None) -> dict[str, Any]:
        self.count += 1
        with torch.no_grad():
            still = self.linear(x["a"]) * 2
        y = self.frozen(self.linear(x["b"][0])) + still + self.table + torch.tensor([1.0, 2.0, 3.0, 4.0])
        y = y * scale if flag else y
        return {"pair": Odd.Pair(y, still), "none": None, "three": 3, "x": x["a"], "detached": y.detach()}


def odd_example() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ({"a": torch.randn(2, 4), "b": [torch.randn(2, 4)]}, 0.5), {"flag": True, "names": None}


def test_odd_model() -> None:
    model = Odd()
    args, kwargs = odd_example()
    traced = trace(model, args, kwargs)
    graph = traced.graph
    assert traced.input_paths == ("0.a", "0.b.0", "1", "flag", "names")
    assert traced.literals == {"1": 0.5, "flag": True, "names": None}
    assert [item.path for item in graph.inputs] == ["0.a", "0.b.0"]
    assert [item.path for item in graph.outputs] == ["pair.first", "pair.second", "x", "detached"]
    assert [(slot.index, slot.literal) for slot in traced.output_slots] == [
        (0, None),
        (1, None),
        (None, None),
        (None, 3),
        (2, None),
        (3, None),
    ]
    assert [item.fqn for item in graph.parameters] == ["unused", "linear.weight", "linear.bias", "frozen.weight", "frozen.bias"]
    assert [(item.fqn, item.persistent, item.updated is not None) for item in graph.buffers] == [
        ("count", True, True),
        ("table", False, False),
    ]
    assert [list(tensor) for tensor in traced.constants.values()] == [[1.0, 2.0, 3.0, 4.0]]
    grads = [graph.values[item.value].requires_grad for item in graph.outputs]
    assert grads == [True, False, False, False]

    got, updated = run(traced, model, [args[0]["a"], args[0]["b"][0]])
    got[0].sum().backward()
    gradient = model.linear.weight.grad
    model.zero_grad(set_to_none=True)
    wanted = model(*args, **kwargs)
    for one, other in zip(got, leaves_of(wanted), strict=True):
        torch.testing.assert_close(one, other)
    wanted["pair"].first.sum().backward()
    torch.testing.assert_close(gradient, model.linear.weight.grad)
    assert updated["count"] == 1


def test_modules_and_lines_are_the_users() -> None:
    model = ZOO["mlp"].build(device="meta")
    graph = traced_with(model, ZOO["mlp"].inputs(model, device="meta")).graph
    gelu = [op for op in graph.ops if op.target == "aten.gelu.default"]
    assert [op.module for op in gelu] == ["blocks.0", "blocks.1"]
    assert all(op.source.startswith("zoo.py:") for op in graph.ops)


@dataclass
class Batch:
    x: Tensor


def test_split_example() -> None:
    t = torch.zeros(1)
    assert split_example(t) == ((t,), {})
    assert split_example((t, 1)) == ((t, 1), {})
    assert split_example({"x": t}) == ((), {"x": t})
    assert split_example([t]) == (([t],), {})
    batch = Batch(t)
    assert split_example(batch) == ((batch,), {})


def test_reshard_points_group_readers_by_operator_and_layer() -> None:
    model = ZOO["llama"].build(layers=3, device="meta")
    graph = traced_with(model, ZOO["llama"].inputs(model, device="meta")).graph
    for op in graph.ops:
        if op.target == "autopar.reshard":
            readers = graph.consumers[op.outputs[0]]
            assert len(readers) > 1 and len({reader.target for reader in readers}) == 1
            assert graph.ops[graph.op_index[op.name] + 1].name == readers[0].name
        elif "q_proj" in op.module and op.target == "aten.linear.default":
            (x, _) = op.args
            assert isinstance(x, Ref) and x.name.startswith("reshard")
            assert [reader.module.rpartition(".")[2] for reader in graph.consumers[x.name]] == ["q_proj", "k_proj", "v_proj"]
    for value in graph.values:
        targets = [(op.target, op.module.split(".")[:3]) for op in graph.consumers[value] if op.module.startswith("model.layers")]
        assert graph.producers.get(value, graph.ops[0]).target == "autopar.reshard" or all(targets.count(item) == 1 for item in targets)
    layers = [
        [
            (op.target, op.args[1:] if op.target == "aten.view.default" else ())
            for op in graph.ops
            if op.module.startswith(f"model.layers.{i}.") or op.module == f"model.layers.{i}"
        ]
        for i in range(3)
    ]
    assert layers[0] == layers[1] == layers[2]


def test_sizes_that_grow_do_not_grow_memory() -> None:
    """A model of 70 billion parameters on `meta` is traced without its memory."""
    import resource

    model = ZOO["llama"].build(
        layers=80, device="meta", hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, vocab_size=32000
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    traced = traced_with(model, ZOO["llama"].inputs(model, batch=16, sequence=4096, device="meta"))
    assert sum(traced.graph.values[item.value].numel for item in traced.graph.parameters) > 60e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KiB


@pytest.mark.parametrize("name", ["gpt2", "encoder"])
def test_one_tensor_for_two_inputs_is_two_inputs(name: str) -> None:
    """`{"input_ids": tokens, "labels": tokens}`: the trace must not take it that they are always equal."""
    model = ZOO[name].build(device="meta")
    example = ZOO[name].inputs(model, device="meta")
    twice = dict.fromkeys(example, example["input_ids"]) if isinstance(example, dict) else (example[0], example[0])
    apart, together = (trace(model, (), given) if isinstance(given, dict) else trace(model, given) for given in (example, twice))
    assert together.graph == apart.graph
    assert all(together.graph.consumers[item.value] for item in together.graph.inputs)
