"""Exceptions to the rules for small configurations: one row for each model type, with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GEMMA4 = {"global_head_dim": 16}  # heads of full attention are wider, by a setting that is no attribute
_DOTS3_NOTE = {  # layers with a sliding window have heads of their own, by settings that are no attributes
    "head_dim": 16,
    "num_key_value_heads": 8,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 8,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_QWEN4_EXP = {  # the indexer and the n-gram tables are unset by default
    "indexer_n_heads": 8,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 16,
    "ngram_vocab_size_base": 128,
    "split_ngram_parts": 4,
}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},  # Mamba layers alone by default
    "big_bird": {"attention_type": "original_full"},  # sparse attention looks at random blocks
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},  # read by the model, absent from its defaults
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},  # no number of experts by default
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": _DOTS3_NOTE,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3_NOTE,
    "falcon_h1": {"mamba_d_ssm": 128},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {  # the last layers read the keys and values of earlier ones of the same kind
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "git": {"num_image_with_embedding": 0},  # else logits are cut by the tokens of an image that a text has not
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},  # the per-layer list is derived from it
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},  # Mamba layers alone by default
    "jamba": {  # layers follow from periods: Mamba, Mamba with experts, attention, Mamba with experts
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},  # attention alone by default
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},  # no layer types by default
    "mamba2": {"head_dim": 16},  # heads make up the expanded width
    "longcat_flash": {"zero_expert_num": 4},
    "qwen4_exp": {"text_config": _QWEN4_EXP},
    "qwen4_exp_text": _QWEN4_EXP,
    "recurrent_gemma": {"num_hidden_layers": 3},  # recurrent, recurrent, attention
    "reformer": {  # as a decoder; positions over two axes would fix the length of the sequence
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,  # else each call hashes by another draw
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {  # attention is twice as wide as the model; two hybrid layers share their weights
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},  # the only number that it supports
}
