"""Models by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autopar.errors import TraceError
from autopar.ir.tracing.sources import load_model
from autopar.ir.tracing.trace import split_example, trace

SMALL = "num_hidden_layers=1&hidden_size=32&intermediate_size=32&num_attention_heads=2&vocab_size=64"

FACTORIES = """
import torch

def both(batch=3):
    return torch.nn.Linear(4, 2), (torch.zeros(batch, 4),)

def fixed():
    return torch.nn.Linear(4, 2), (torch.zeros(3, 4),)

def no_inputs():
    return torch.nn.Linear(4, 2)

def nothing():
    return 3

def raises():
    return {}["size"]

number = 7
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (f"hf:llama?{SMALL}&num_key_value_heads=1", "LlamaForCausalLM"),
        (f"hf:bert?{SMALL}", "BertForMaskedLM"),
        ("hf:t5?num_layers=1&d_model=32&d_ff=32&num_heads=2&vocab_size=64", "T5ForConditionalGeneration"),
        ("hf:vit?num_hidden_layers=1&hidden_size=32&intermediate_size=32&num_attention_heads=2&image_size=32", "ViTForImageClassification"),
    ],
)
def test_transformers_model_by_type_traces(spec: str, name: str) -> None:
    model, inputs = load_model(spec, batch=2, seq=8)
    assert type(model).__name__ == name
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    args, kwargs = split_example(inputs)
    assert "loss" in [output.path for output in trace(model, args, kwargs).graph.outputs]


def test_transformers_model_by_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "architectures": ["GPT2LMHeadModel"]}))
    model, inputs = load_model(f"hf:{file}?vocab_size=100", dtype="bfloat16")
    assert model.config.vocab_size == 100 and next(model.parameters()).dtype is torch.bfloat16
    assert inputs["input_ids"].shape == (8, 1024)
    assert load_model(f"hf:{tmp_path}")[0].config.n_embd == 32


def test_factory(factories: None) -> None:
    model, (x,) = load_model("my_factories:both", batch=5, dtype="float64")
    assert x.shape == (5, 4) and x.dtype is torch.float64 and next(model.parameters()).dtype is torch.float64


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("llama", "write MODULE:FACTORY"),
        ("hf:lama", "did you mean hf:llama"),
        ("hf:no/such/config.json", "there is no file"),
        ("hf:llama?num_hidden_layer=1", "did you mean `num_hidden_layers`"),
        ("hf:llama?num_attention_heads=7", "transformers cannot"),
        ("hf:wav2vec2?num_hidden_layers=1", "MODULE:FACTORY"),
        ("no_such_module:f", "there is no module `no_such_module`"),
        ("my_factories:bot", "did you mean `both`"),
        ("my_factories:fixed", "let the factory take `batch`"),
        ("my_factories:no_inputs", "returned no example inputs"),
        ("my_factories:nothing", "returned a int"),
        ("my_factories:number", "is a int"),
        ("my_factories:raises", "raises() raised KeyError: 'size' (my_factories.py:"),
    ],
)
def test_errors_say_what_to_write(factories: None, spec: str, words: str) -> None:
    with pytest.raises(TraceError) as caught:
        load_model(spec, batch=2, seq=8 if spec.startswith("hf") else None)
    assert words in str(caught.value)


def test_unknown_dtype() -> None:
    with pytest.raises(TraceError, match="bfloat16"):
        load_model("hf:gpt2", dtype="int64")
