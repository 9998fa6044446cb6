"""Rows: architectures that were not on the list, tried as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.inputs import SEQUENCE, floats, images, numbers, tokens, tokens_to_tokens
from zoo.language import _BOTH, _ENDS, _GROUPED, _SIZES, _SMALL, MASKED, NEXT, PAIR
from zoo.row import Row, hf
from zoo.vision import _PATCHES, CLASS

SOUND, SERIES = "speech", "time series"
_POSITIONS = {"n_positions": 64, "n_ctx": 64}
_OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}


def _masked_pair(model: nn.Module, batch: int) -> dict[str, Any]:
    return tokens_to_tokens(model, batch) | {"attention_mask": numbers(1, 2, batch, SEQUENCE)}


def _wave(model: nn.Module, batch: int) -> dict[str, Any]:
    """`input_values`: `(batch, samples)`; `labels`: `(batch,)`."""
    return {"input_values": floats(batch, 800), "labels": numbers(0, 4, batch)}


def _video(model: nn.Module, batch: int) -> dict[str, Any]:
    return {"pixel_values": floats(batch, 4, 3, 32, 32), "labels": numbers(0, 10, batch)}


def _boxes(model: nn.Module, batch: int) -> dict[str, Any]:
    return tokens(model, batch) | {"bbox": numbers(0, 50, batch, SEQUENCE, 1).repeat(1, 1, 4)}


def _past(model: nn.Module, batch: int) -> dict[str, Any]:
    return {"past_values": floats(batch, 32, 3), "future_values": floats(batch, 8, 3, seed=2)}


def _image_and_text(model: nn.Module, batch: int) -> dict[str, Any]:
    ids = numbers(3, 96, batch, SEQUENCE)
    return {"input_ids": ids, "pixel_values": floats(batch, 3, 32, 32), "return_loss": True}


_CONV = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8}
_SPEECH = (
    _SIZES
    | _CONV
    | {"num_conv_pos_embedding_groups": 4, "num_labels": 4, "classifier_proj_size": 16, "mask_time_prob": 0.0, "layerdrop": 0.0}
)

BESIDES_ROWS = (
    Row("granite", NEXT, hf("GraniteForCausalLM", "GraniteConfig", **_GROUPED, **_ENDS), tokens),
    Row("glm", NEXT, hf("GlmForCausalLM", "GlmConfig", **_GROUPED, head_dim=8, **_ENDS), tokens),
    Row("nemotron", NEXT, hf("NemotronForCausalLM", "NemotronConfig", **_GROUPED, head_dim=8, **_ENDS), tokens),
    Row("stablelm", NEXT, hf("StableLmForCausalLM", "StableLmConfig", **_GROUPED, **_ENDS), tokens),
    Row("phi", NEXT, hf("PhiForCausalLM", "PhiConfig", **_SMALL, **_ENDS), tokens),
    Row("olmo3", NEXT, hf("Olmo3ForCausalLM", "Olmo3Config", **(_GROUPED | {"num_hidden_layers": 4}), sliding_window=8, **_ENDS), tokens),
    Row("mpt", NEXT, hf("MptForCausalLM", "MptConfig", d_model=32, n_heads=4, n_layers=2, vocab_size=96, max_seq_len=64), tokens),
    Row("gptj", NEXT, hf("GPTJForCausalLM", "GPTJConfig", **_OLD, rotary_dim=4, n_positions=64, **_ENDS), tokens),
    Row("codegen", NEXT, hf("CodeGenForCausalLM", "CodeGenConfig", **_OLD, rotary_dim=4, n_positions=64, n_ctx=64, **_ENDS), tokens),
    Row(
        "xglm",
        NEXT,
        hf(
            "XGLMForCausalLM",
            "XGLMConfig",
            d_model=32,
            ffn_dim=64,
            num_layers=2,
            attention_heads=4,
            vocab_size=96,
            max_position_embeddings=64,
        ),
        tokens,
    ),
    Row(
        "modernbert",
        MASKED,
        hf("ModernBertForMaskedLM", "ModernBertConfig", **(_SMALL | {"num_hidden_layers": 4}), local_attention=8, **_ENDS),
        tokens,
    ),
    Row("longformer", MASKED, hf("LongformerForMaskedLM", "LongformerConfig", **_SMALL, attention_window=8), tokens),
    Row("bigbird", MASKED, hf("BigBirdForMaskedLM", "BigBirdConfig", **_SMALL, attention_type="original_full"), tokens),
    Row(
        "funnel",
        MASKED,
        hf(
            "FunnelForMaskedLM",
            "FunnelConfig",
            vocab_size=96,
            block_sizes=[1, 1],
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=64,
            num_decoder_layers=1,
        ),
        tokens,
    ),
    Row(
        "fnet",
        MASKED,
        hf(
            "FNetForMaskedLM",
            "FNetConfig",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            vocab_size=96,
            max_position_embeddings=64,
        ),
        tokens,
    ),
    Row(
        "mobilebert", MASKED, hf("MobileBertForMaskedLM", "MobileBertConfig", **_SMALL, embedding_size=16, intra_bottleneck_size=16), tokens
    ),
    Row("layoutlm", MASKED, hf("LayoutLMForMaskedLM", "LayoutLMConfig", **_SMALL, max_2d_position_embeddings=64), _boxes),
    Row(
        "marian",
        PAIR,
        hf("MarianMTModel", "MarianConfig", **_BOTH, vocab_size=96, max_position_embeddings=64, decoder_start_token_id=0, pad_token_id=0),
        tokens_to_tokens,
    ),
    Row(
        "pegasus",
        PAIR,
        hf("PegasusForConditionalGeneration", "PegasusConfig", **_BOTH, vocab_size=96, max_position_embeddings=64),
        tokens_to_tokens,
    ),
    Row(
        "mobilevit",
        CLASS,
        hf(
            "MobileViTForImageClassification",
            "MobileViTConfig",
            image_size=64,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64],
            num_labels=10,
            num_attention_heads=4,
        ),
        lambda model, batch: images(model, batch, 64),
        microbatches=1,
    ),
    Row(
        "levit",
        CLASS,
        hf(
            "LevitForImageClassification",
            "LevitConfig",
            image_size=64,
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            num_labels=10,
        ),
        lambda model, batch: images(model, batch, 64),
        note="batch norm over two rows and one place is all rounding: 8 rows",
        batch=8,
        microbatches=1,
    ),
    Row(
        "dinov2",
        CLASS,
        hf(
            "Dinov2ForImageClassification",
            "Dinov2Config",
            hidden_size=32,
            num_attention_heads=4,
            num_hidden_layers=2,
            image_size=32,
            patch_size=8,
            num_labels=10,
        ),
        images,
    ),
    Row("beit", CLASS, hf("BeitForImageClassification", "BeitConfig", **_PATCHES, num_labels=10), images),
    Row(
        "poolformer",
        CLASS,
        hf(
            "PoolFormerForImageClassification",
            "PoolFormerConfig",
            depths=[2, 2],
            hidden_sizes=[16, 32],
            num_encoder_blocks=2,
            patch_sizes=[7, 3],
            strides=[4, 2],
            padding=[2, 1],
            num_labels=10,
        ),
        images,
    ),
    Row(
        "focalnet",
        CLASS,
        hf(
            "FocalNetForImageClassification",
            "FocalNetConfig",
            image_size=32,
            embed_dim=16,
            depths=[2, 2],
            hidden_sizes=[16, 32],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
            num_labels=10,
        ),
        images,
    ),
    Row(
        "regnet",
        CLASS,
        hf(
            "RegNetForImageClassification",
            "RegNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[2, 2],
            groups_width=8,
            num_labels=10,
        ),
        images,
        microbatches=1,
    ),
    Row(
        "timesformer",
        CLASS,
        hf("TimesformerForVideoClassification", "TimesformerConfig", **_PATCHES, num_frames=4, num_labels=10),
        _video,
        note="takes the first frame of a flattened batch: needs the whole batch",
        microbatches=1,
    ),
    Row(
        "videomae",
        CLASS,
        hf("VideoMAEForVideoClassification", "VideoMAEConfig", **_PATCHES, num_frames=4, tubelet_size=2, num_labels=10),
        _video,
    ),
    Row("wav2vec2", SOUND, hf("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **_SPEECH), _wave),
    Row("hubert", SOUND, hf("HubertForSequenceClassification", "HubertConfig", **_SPEECH), _wave),
    Row(
        "patchtst",
        SERIES,
        hf(
            "PatchTSTForPrediction",
            "PatchTSTConfig",
            num_input_channels=3,
            context_length=32,
            prediction_length=8,
            patch_length=8,
            patch_stride=8,
            d_model=16,
            num_attention_heads=4,
            num_hidden_layers=2,
            ffn_dim=32,
            loss="mse",
        ),
        _past,
        microbatches=1,
    ),
    Row(
        "falcon_mamba",
        NEXT,
        hf(
            "FalconMambaForCausalLM",
            "FalconMambaConfig",
            hidden_size=32,
            state_size=8,
            num_hidden_layers=2,
            vocab_size=96,
            time_step_rank=4,
        ),
        tokens,
    ),
    Row(
        "jamba",
        NEXT,
        hf(
            "JambaForCausalLM",
            "JambaConfig",
            **(_GROUPED | {"num_hidden_layers": 4}),
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
            **_ENDS,
        ),
        tokens,
    ),
    Row(
        "bamba",
        NEXT,
        hf(
            "BambaForCausalLM",
            "BambaConfig",
            **_GROUPED,
            attn_layer_indices=[1],
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_chunk_size=8,
            mamba_n_groups=1,
            **_ENDS,
        ),
        tokens,
    ),
    Row(
        "recurrent_gemma",
        NEXT,
        hf(
            "RecurrentGemmaForCausalLM",
            "RecurrentGemmaConfig",
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_hidden_layers=3,
            vocab_size=96,
            lru_width=32,
            attention_window_size=8,
            **_ENDS,
        ),
        tokens,
        microbatches=1,
        leaf_modules=("*.rg_lru",),
    ),
    Row(
        "granitemoe",
        NEXT,
        hf("GraniteMoeForCausalLM", "GraniteMoeConfig", **_GROUPED, num_local_experts=4, num_experts_per_tok=2, **_ENDS),
        tokens,
    ),
    Row(
        "phimoe",
        NEXT,
        hf("PhimoeForCausalLM", "PhimoeConfig", **_GROUPED, num_local_experts=4, num_experts_per_tok=2, **_ENDS),
        tokens,
        microbatches=1,
        leaf_modules=("*.router",),
    ),
    Row(
        "jetmoe",
        NEXT,
        hf(
            "JetMoeForCausalLM",
            "JetMoeConfig",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            vocab_size=96,
            num_key_value_heads=2,
            kv_channels=8,
            num_local_experts=4,
            num_experts_per_tok=2,
            **_ENDS,
        ),
        tokens,
        microbatches=1,
        leaf_modules=("*.self_attention", "*.mlp"),
    ),
    Row(
        "dbrx",
        NEXT,
        hf(
            "DbrxForCausalLM",
            "DbrxConfig",
            d_model=32,
            n_heads=4,
            n_layers=2,
            vocab_size=96,
            max_seq_len=64,
            attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
            **_ENDS,
        ),
        tokens,
        microbatches=1,
        leaf_modules=("*.ffn.experts",),
    ),
    Row(
        "switch_transformers",
        PAIR,
        hf(
            "SwitchTransformersForConditionalGeneration",
            "SwitchTransformersConfig",
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            router_jitter_noise=0.0,
            num_experts=4,
            vocab_size=96,
            decoder_start_token_id=0,
        ),
        _masked_pair,
        microbatches=1,
        leaf_modules=("*.mlp",),
    ),
    Row(
        "blip",
        "which text to which image",
        hf(
            "BlipModel",
            "BlipConfig",
            text_config=_SIZES | {"vocab_size": 96, "max_position_embeddings": 32, "projection_dim": 32},
            vision_config=_PATCHES | {"projection_dim": 32},
            projection_dim=32,
        ),
        _image_and_text,
        microbatches=1,
    ),
)
