"""Rows: language models whose tokens choose among experts."""

from __future__ import annotations

from zoo.inputs import tokens
from zoo.language import _ENDS, _GROUPED, NEXT
from zoo.row import Row, hf

_FOUR = {"num_experts_per_tok": 2}

EXPERTS = (
    Row("mixtral", NEXT, hf("MixtralForCausalLM", "MixtralConfig", **_GROUPED, num_local_experts=4, **_FOUR, **_ENDS), tokens),
    Row(
        "qwen2_moe",
        NEXT,
        hf(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **_GROUPED,
            num_experts=4,
            **_FOUR,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            **_ENDS,
        ),
        tokens,
    ),
    Row(
        "qwen3_moe",
        NEXT,
        hf("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_GROUPED, num_experts=4, **_FOUR, moe_intermediate_size=32, head_dim=8, **_ENDS),
        tokens,
    ),
    Row("olmoe", NEXT, hf("OlmoeForCausalLM", "OlmoeConfig", **_GROUPED, num_experts=4, **_FOUR, **_ENDS), tokens),
    Row(
        "deepseek_v3",
        NEXT,
        hf(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            **(_GROUPED | {"num_key_value_heads": 4, "num_hidden_layers": 3}),
            moe_intermediate_size=32,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            **_FOUR,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            **_ENDS,
        ),
        tokens,
        note="the first layer is dense",
    ),
    Row(
        "gpt_oss",
        NEXT,
        hf("GptOssForCausalLM", "GptOssConfig", **_GROUPED, num_local_experts=4, **_FOUR, head_dim=8, sliding_window=8, **_ENDS),
        tokens,
    ),
)
