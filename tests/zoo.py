"""Small models of many kinds, and inputs for them: the models every test of the project is tried on.

    model = ZOO["llama"].build(layers=4)
    example = ZOO["llama"].inputs(model, batch=8)
    model(**example) if isinstance(example, dict) else model(*example)

Dropout stays on as each architecture's own default has it. `build(device="meta")` gives a model without memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.ir.cluster import Cluster, Link


@dataclass(frozen=True, slots=True)
class Entry:
    """`build(layers=2, device="cpu", **config_overrides) -> model`; `inputs(model, batch=4, sequence=16, device="cpu") -> dict | tuple`."""

    name: str
    build: Callable[..., nn.Module]
    inputs: Callable[..., Any]
    has_loss: bool = True


class MLP(nn.Module):
    """Plain layers, a list of repeats, an output and no loss."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.up = nn.Linear(16, width)
        self.blocks = nn.ModuleList(MLPBlock(width) for _ in range(layers))
        self.down = nn.Linear(width, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        for block in self.blocks:
            x = block(x)
        return self.down(x)


class MLPBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


class Encoder(nn.Module):
    """`nn.TransformerEncoder` between an embedding and a head, with the loss as output."""

    def __init__(self, width: int = 32, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.encoder(self.embed(tokens))).flatten(0, 1), target.flatten())


class ConvNet(nn.Module):
    """Convolutions, batch norm and pooling; returns `{"loss", "scores"}`."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(layers))
        )
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        scores = self.head(self.blocks(self.stem(image)).mean((2, 3)))
        return {"loss": F.cross_entropy(scores, label), "scores": scores}


class UNet(nn.Module):
    """Down and up again, each level handed across to the way up; a class for every pixel. `norm`: `"none"`, `"group"` or `"batch"`."""

    def __init__(self, width: int = 8, layers: int = 2, norm: str = "none", classes: int = 5) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(layers + 1)]
        pairs = list(pairwise(widths))
        self.stem = UNetBlock(3, width, norm)
        self.down = nn.ModuleList(UNetBlock(narrow, wide, norm) for narrow, wide in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in reversed(pairs))
        self.join = nn.ModuleList(UNetBlock(2 * narrow, narrow, norm) for narrow, _ in reversed(pairs))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.stem(image)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(F.max_pool2d(x, 2))
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        scores = self.head(x)
        return {"loss": F.cross_entropy(scores, mask), "scores": scores}


class UNetBlock(nn.Sequential):
    def __init__(self, inside: int, outside: int, norm: str) -> None:
        norms = {"none": nn.Identity, "group": lambda: nn.GroupNorm(2, outside), "batch": lambda: nn.BatchNorm2d(outside)}
        super().__init__(nn.Conv2d(inside, outside, 3, padding=1), norms[norm](), nn.SiLU())


def _hf(model_class: str, config_class: str, layers_name: str, **defaults: Any) -> Callable[..., nn.Module]:
    def build(layers: int = 2, device: str = "cpu", seed: int = 0, **overrides: Any) -> nn.Module:
        import transformers

        sized = {layers_name: layers} if layers_name != "depths" else {"depths": [layers, layers]}
        config = getattr(transformers, config_class)(**(defaults | sized | overrides))
        torch.manual_seed(seed)
        with torch.device(device):
            model: nn.Module = getattr(transformers, model_class)(config)
        return model.train()

    return build


def _plain(model_class: type[nn.Module], **defaults: Any) -> Callable[..., nn.Module]:
    def build(layers: int = 2, device: str = "cpu", seed: int = 0, **overrides: Any) -> nn.Module:
        torch.manual_seed(seed)
        with torch.device(device):
            return model_class(layers=layers, **(defaults | overrides)).train()

    return build


def _statistics_kept(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`build` with its batch norms in evaluation mode, as when a trained model is tuned: rows of the batch do not depend on each other."""

    def frozen(**options: Any) -> nn.Module:
        model = build(**options)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return model

    return frozen


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _tokens(model: nn.Module, batch: int = 4, sequence: int = 16, device: str = "cpu", seed: int = 1) -> dict[str, Tensor]:
    """`input_ids` and `labels`: `(batch, sequence)` int64; some labels are ignored (-100), unevenly over the rows."""
    generator = _generator(seed)
    vocabulary = model.config.vocab_size
    ids = torch.randint(1, vocabulary, (batch, sequence), generator=generator)
    labels = torch.randint(1, vocabulary, (batch, sequence), generator=generator)
    labels[0, : sequence // 2] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def _images(model: nn.Module, batch: int = 4, sequence: int = 16, device: str = "cpu", seed: int = 1) -> dict[str, Tensor]:
    """`pixel_values`: `(batch, 3, 32, 32)` in the model's dtype; `labels`: `(batch,)` int64."""
    generator = _generator(seed)
    dtype = next(model.parameters()).dtype
    pixels = torch.randn(batch, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    return {"pixel_values": pixels.to(device), "labels": torch.randint(0, 10, (batch,), generator=generator).to(device)}


def _rows(model: nn.Module, batch: int = 4, sequence: int = 16, device: str = "cpu", seed: int = 1) -> tuple[Tensor, ...]:
    dtype = next(model.parameters()).dtype
    return (torch.randn(batch, 16, generator=_generator(seed), dtype=torch.float64).to(dtype).to(device),)


def _token_pair(model: nn.Module, batch: int = 4, sequence: int = 16, device: str = "cpu", seed: int = 1) -> tuple[Tensor, ...]:
    generator = _generator(seed)
    return tuple(torch.randint(0, 64, (batch, sequence), generator=generator).to(device) for _ in range(2))


def _image_and_label(model: nn.Module, batch: int = 4, sequence: int = 16, device: str = "cpu", seed: int = 1) -> dict[str, Tensor]:
    named = _images(model, batch, sequence, device, seed)
    return {"image": named["pixel_values"][:, :, ::2, ::2].contiguous(), "label": named["labels"]}


def _image_and_mask(model: nn.Module, batch: int = 4, sequence: int = 16, device: str = "cpu", seed: int = 1) -> dict[str, Tensor]:
    """`image`: `(batch, 3, 16, 16)`; `mask`: `(batch, 16, 16)` classes, some ignored (-100), unevenly over the rows."""
    image = _images(model, batch, sequence, device, seed)["pixel_values"][:, :, ::2, ::2].contiguous()
    mask = torch.randint(0, 5, (batch, 16, 16), generator=_generator(seed))
    mask[0, :5] = -100
    return {"image": image, "mask": mask.to(device)}


_ATTENTION = {"num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}

_RESNET = _hf(
    "ResNetForImageClassification",
    "ResNetConfig",
    "depths",
    embedding_size=16,
    hidden_sizes=[16, 32],
    layer_type="basic",
    num_labels=10,
)

_ENTRIES = (
    Entry(
        "gpt2",
        _hf(
            "GPT2LMHeadModel", "GPT2Config", "n_layer", n_embd=64, n_head=4, vocab_size=257, n_positions=64, bos_token_id=0, eos_token_id=0
        ),
        _tokens,
    ),
    Entry(
        "llama",
        _hf("LlamaForCausalLM", "LlamaConfig", "num_hidden_layers", **_ATTENTION, num_key_value_heads=2, vocab_size=256),
        _tokens,
    ),
    Entry(
        "qwen3",
        _hf("Qwen3ForCausalLM", "Qwen3Config", "num_hidden_layers", **_ATTENTION, num_key_value_heads=2, head_dim=16, vocab_size=256),
        _tokens,
    ),
    Entry("bert", _hf("BertForMaskedLM", "BertConfig", "num_hidden_layers", **_ATTENTION, vocab_size=256), _tokens),
    Entry(
        "t5",
        _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            "num_layers",
            d_model=64,
            d_ff=128,
            num_heads=4,
            d_kv=16,
            vocab_size=256,
            decoder_start_token_id=0,
        ),
        _tokens,
    ),
    Entry(
        "bart",
        _hf(
            "BartForConditionalGeneration",
            "BartConfig",
            "encoder_layers",
            decoder_layers=2,
            d_model=32,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            vocab_size=256,
            max_position_embeddings=32,
            forced_eos_token_id=2,
        ),
        _tokens,
    ),
    Entry(
        "vit",
        _hf("ViTForImageClassification", "ViTConfig", "num_hidden_layers", **_ATTENTION, image_size=32, patch_size=8, num_labels=10),
        _images,
    ),
    Entry("resnet", _RESNET, _images),
    Entry("resnet-tuned", _statistics_kept(_RESNET), _images),
    Entry("unet", _plain(UNet), _image_and_mask),
    Entry("unet-groups", _plain(UNet, norm="group"), _image_and_mask),
    Entry("unet-batch", _plain(UNet, norm="batch"), _image_and_mask),
    Entry("mlp", _plain(MLP), _rows, has_loss=False),
    Entry("encoder", _plain(Encoder), _token_pair),
    Entry("convnet", _plain(ConvNet), _image_and_label),
)

ZOO: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def talkative(ranks: int) -> Cluster:
    """Local processes that talk for nothing: a searched plan splits even a tiny model, where prices of real links leave it whole."""
    free = Link("free", latency_s=0.0, bytes_per_s=1e15)
    return replace(Cluster.from_name(f"cpu:{ranks}"), name=f"talkative:{ranks}", intra=free, inter=free)
