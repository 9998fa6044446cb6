"""Rows: language models, decoders, encoders and both; and models with a state instead of attention."""

from __future__ import annotations

from zoo.inputs import tokens, tokens_to_tokens
from zoo.row import Row, hf

NEXT, MASKED, PAIR = "next token", "masked token", "sequence to sequence"
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96}
_SMALL = _SIZES | {"max_position_embeddings": 64}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_MODEL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_BOTH = _MODEL | {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


DECODERS = (
    Row("gpt2", NEXT, hf("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_head=4, n_layer=2, vocab_size=97, n_positions=64, **_ENDS), tokens),
    Row("gpt_neox", NEXT, hf("GPTNeoXForCausalLM", "GPTNeoXConfig", **_SMALL, **_ENDS), tokens),
    Row(
        "opt",
        NEXT,
        hf(
            "OPTForCausalLM",
            "OPTConfig",
            hidden_size=32,
            ffn_dim=64,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=96,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **_ENDS,
        ),
        tokens,
    ),
    Row("bloom", NEXT, hf("BloomForCausalLM", "BloomConfig", hidden_size=32, n_head=4, n_layer=2, vocab_size=96, **_ENDS), tokens),
    Row(
        "falcon",
        NEXT,
        hf("FalconForCausalLM", "FalconConfig", hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=96, **_ENDS),
        tokens,
        note="one key and value head for all query heads",
    ),
    Row("llama", NEXT, hf("LlamaForCausalLM", "LlamaConfig", **_GROUPED, **_ENDS), tokens),
    Row("mistral", NEXT, hf("MistralForCausalLM", "MistralConfig", **_GROUPED, sliding_window=8, **_ENDS), tokens),
    Row("qwen2", NEXT, hf("Qwen2ForCausalLM", "Qwen2Config", **_GROUPED, **_ENDS), tokens),
    Row("qwen3", NEXT, hf("Qwen3ForCausalLM", "Qwen3Config", **_GROUPED, head_dim=8, **_ENDS), tokens),
    Row(
        "gemma2",
        NEXT,
        hf("Gemma2ForCausalLM", "Gemma2Config", **(_GROUPED | {"num_hidden_layers": 4}), head_dim=8, sliding_window=8, **_ENDS),
        tokens,
    ),
    Row(
        "gemma3",
        NEXT,
        hf("Gemma3ForCausalLM", "Gemma3TextConfig", **(_GROUPED | {"num_hidden_layers": 6}), head_dim=8, sliding_window=8, **_ENDS),
        tokens,
    ),
    Row("phi3", NEXT, hf("Phi3ForCausalLM", "Phi3Config", **_GROUPED, **_ENDS), tokens),
    Row("olmo2", NEXT, hf("Olmo2ForCausalLM", "Olmo2Config", **_GROUPED, **_ENDS), tokens),
    Row("cohere", NEXT, hf("CohereForCausalLM", "CohereConfig", **_GROUPED, **_ENDS), tokens),
    Row("starcoder2", NEXT, hf("Starcoder2ForCausalLM", "Starcoder2Config", **_GROUPED, **_ENDS), tokens),
)

ENCODERS = (
    Row("bert", MASKED, hf("BertForMaskedLM", "BertConfig", **_SMALL), tokens),
    Row("roberta", MASKED, hf("RobertaForMaskedLM", "RobertaConfig", **_SMALL), tokens),
    Row("electra", MASKED, hf("ElectraForMaskedLM", "ElectraConfig", **_SMALL, embedding_size=16), tokens),
    Row("albert", MASKED, hf("AlbertForMaskedLM", "AlbertConfig", **_SMALL, embedding_size=16), tokens),
    Row(
        "distilbert",
        MASKED,
        hf("DistilBertForMaskedLM", "DistilBertConfig", dim=32, hidden_dim=64, n_heads=4, n_layers=2, vocab_size=96),
        tokens,
    ),
    Row(
        "deberta_v2",
        MASKED,
        hf(
            "DebertaV2ForMaskedLM",
            "DebertaV2Config",
            **_SMALL,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        tokens,
    ),
)

ENCODER_DECODERS = (
    Row(
        "t5",
        PAIR,
        hf(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            d_ff=64,
            d_kv=8,
            num_heads=4,
            num_layers=3,
            vocab_size=96,
            decoder_start_token_id=0,
        ),
        tokens_to_tokens,
    ),
    Row(
        "bart",
        PAIR,
        hf(
            "BartForConditionalGeneration",
            "BartConfig",
            **_BOTH,
            vocab_size=96,
            max_position_embeddings=64,
        ),
        tokens_to_tokens,
    ),
)

STATE_SPACE = (
    Row(
        "mamba",
        NEXT,
        hf("MambaForCausalLM", "MambaConfig", hidden_size=32, state_size=8, num_hidden_layers=2, vocab_size=96, time_step_rank=4),
        tokens,
    ),
    Row(
        "mamba2",
        NEXT,
        hf(
            "Mamba2ForCausalLM",
            "Mamba2Config",
            hidden_size=32,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=2,
            chunk_size=8,
            num_hidden_layers=2,
            vocab_size=96,
        ),
        tokens,
    ),
    Row(
        "rwkv",
        NEXT,
        hf(
            "RwkvForCausalLM",
            "RwkvConfig",
            hidden_size=32,
            attention_hidden_size=32,
            num_hidden_layers=2,
            vocab_size=96,
            context_length=64,
            rescale_every=0,
        ),
        tokens,
    ),
)
