"""Rows: images, images beside text, and sound."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.inputs import SEQUENCE, floats, images, numbers
from zoo.language import _BOTH
from zoo.row import Row, hf

CLASS, SEGMENT, MATCH, SPEECH = "class of an image", "class of every pixel", "which text to which image", "speech to text"
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
_PATCHES = _SIZES | {"image_size": 32, "patch_size": 8}


def _pixel_classes(model: nn.Module, batch: int) -> dict[str, Any]:
    return {"pixel_values": floats(batch, 3, 32, 32), "labels": numbers(0, 5, batch, 32, 32)}


def _pairs(model: nn.Module, batch: int) -> dict[str, Any]:
    return {"input_ids": numbers(3, 96, batch, SEQUENCE), "pixel_values": floats(batch, 3, 32, 32), "return_loss": True}


def _sound(model: nn.Module, batch: int) -> dict[str, Any]:
    """`input_features`: `(batch, mel bins, frames)`; `decoder_input_ids`, `labels`: `(batch, 8)`."""
    return {
        "input_features": floats(batch, 16, 32),
        "decoder_input_ids": numbers(3, 96, batch, 8),
        "labels": numbers(3, 96, batch, 8, seed=2),
    }


VISION = (
    Row("vit", CLASS, hf("ViTForImageClassification", "ViTConfig", **_PATCHES, num_labels=10), images),
    Row(
        "swin",
        CLASS,
        hf(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=10,
        ),
        images,
        note="every second block shifts its windows; stochastic depth",
    ),
    Row(
        "convnext",
        CLASS,
        hf(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            depths=[2, 2],
            hidden_sizes=[16, 32],
            num_stages=2,
            num_labels=10,
            drop_path_rate=0.1,
        ),
        images,
    ),
    Row(
        "resnet",
        CLASS,
        hf(
            "ResNetForImageClassification",
            "ResNetConfig",
            depths=[2, 2],
            embedding_size=16,
            hidden_sizes=[16, 32],
            layer_type="basic",
            num_labels=10,
        ),
        images,
        microbatches=1,
    ),
    Row(
        "efficientnet",
        CLASS,
        hf(
            "EfficientNetForImageClassification",
            "EfficientNetConfig",
            image_size=32,
            width_coefficient=1.0,
            depth_coefficient=1.0,
            hidden_dim=1280,
            in_channels=[32, 8, 16],
            out_channels=[8, 16, 24],
            kernel_sizes=[3, 3, 5],
            strides=[1, 2, 2],
            num_block_repeats=[1, 2, 2],
            expand_ratios=[1, 6, 6],
            depthwise_padding=[],
            num_labels=10,
        ),
        images,
        microbatches=1,
    ),
    Row(
        "segformer",
        SEGMENT,
        hf(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[2, 2],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[2, 4],
            mlp_ratios=[2, 2],
            decoder_hidden_size=32,
            num_labels=5,
        ),
        _pixel_classes,
        microbatches=1,
    ),
    Row(
        "clip",
        MATCH,
        hf(
            "CLIPModel",
            "CLIPConfig",
            text_config=_SIZES
            | {"vocab_size": 96, "max_position_embeddings": 32, "projection_dim": 32, "eos_token_id": 2, "bos_token_id": 1},
            vision_config=_PATCHES | {"projection_dim": 32},
            projection_dim=32,
        ),
        _pairs,
        note="the loss compares every row of the batch with every other",
        microbatches=1,
    ),
    Row(
        "siglip",
        MATCH,
        hf(
            "SiglipModel",
            "SiglipConfig",
            text_config=_SIZES | {"vocab_size": 96, "max_position_embeddings": 32, "projection_size": 32},
            vision_config=_PATCHES,
        ),
        _pairs,
        note="the loss compares every row of the batch with every other",
        microbatches=1,
    ),
    Row(
        "whisper",
        SPEECH,
        hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **_BOTH,
            vocab_size=96,
            num_mel_bins=16,
            max_source_positions=16,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        _sound,
    ),
)
