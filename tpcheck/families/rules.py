"""Rules by attribute name that make the defaults of a model type a small configuration, and exceptions. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Small enough that a world of ranks trains it in milliseconds, and cut evenly by tp 2 and tp 4.
HIDDEN = 64
HEADS = 8
KV_HEADS = 4
HEAD_DIM = 8
INTERMEDIATE = 128
LAYERS = 2
EXPERTS = 8
VOCABULARY = 128
POSITIONS = 64
WINDOW = 8  # shorter than the sequences, so that a sliding window has an effect

# A role, its small size, and the attributes with that role. `families/build.py` draws sizes by role; attributes
# without one follow from others, or belong to one kind of layer.
_ROLES: tuple[tuple[str, int, str], ...] = (
    ("hidden", HIDDEN, "hidden_size hidden_size_global d_model n_embd emb_dim dim_model embedding_size"),
    ("hidden", HIDDEN, "word_embed_proj_dim"),
    ("width", HIDDEN, "attention_hidden_size input_embedding_size output_embedding_size lru_width embedding_dim"),
    ("width", HIDDEN, "audio_embed_dim pronunciation_embed_dim shape_embed_dim backbone_hidden_size"),
    ("width", HIDDEN, "cross_attention_hidden_size"),
    ("heads", HEADS, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    ("heads", HEADS, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    ("", HEADS, "linear_num_heads swa_num_attention_heads linear_num_value_heads mamba_n_heads mamba_num_heads"),
    ("", HEADS, "index_n_heads"),
    ("kv_heads", KV_HEADS, "num_key_value_heads num_kv_heads n_kv_heads kv_n_heads num_global_key_value_heads"),
    ("kv_heads", KV_HEADS, "num_query_groups"),
    ("", KV_HEADS, "swa_num_key_value_heads linear_num_key_heads"),
    ("head_dim", HEAD_DIM, "head_dim d_head dim_head kv_channels global_head_dim d_kv attention_head_size"),
    ("dim", HEAD_DIM, "swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim v_head_dim"),
    ("dim", HEAD_DIM, "qk_nope_head_dim qk_rope_head_dim index_head_dim rotary_dim swa_v_head_dim d_rel"),
    ("", 2 * HEAD_DIM, "qk_head_dim"),
    ("intermediate", INTERMEDIATE, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff"),
    ("intermediate", INTERMEDIATE, "dim_ff d_inner feed_forward_size intermediate_size_mlp d_ff"),
    ("intermediate", INTERMEDIATE, "dense_intermediate_size moe_intermediate_size shared_expert_intermediate_size"),
    ("intermediate", INTERMEDIATE, "shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    ("intermediate", INTERMEDIATE, "expert_ffn_hidden_size"),
    ("", INTERMEDIATE, "mamba_d_ssm"),
    ("layers", LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    ("layers", LAYERS, "num_encoder_layers num_decoder_layers num_blocks"),
    ("experts", EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    ("", 2, "num_experts_per_tok num_experts_per_token moe_topk moe_k n_group num_expert_group n_groups"),
    ("", 2, "mamba_n_groups"),
    ("", 1, "topk_group num_shared_experts n_shared_experts moe_num_shared_experts"),
    ("", 32, "kv_lora_rank q_lora_rank o_lora_rank"),
    ("vocabulary", VOCABULARY, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    ("", VOCABULARY, "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab"),
    ("", POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_target_positions"),
    ("", POSITIONS, "context_length max_source_positions model_max_length max_sequence_length"),
    ("", POSITIONS // 2, "original_max_position_embeddings"),
    ("", WINDOW, "sliding_window sliding_window_size attention_window_size window_size local_attention index_topk"),
    ("", WINDOW, "attention_chunk_size chunk_size mamba_chunk_size"),
    ("", 16, "mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim mamba_headdim"),
    ("", 16, "hidden_size_per_layer_input block_size query_pre_attn_scalar"),
    ("", 4, "time_step_rank mamba_dt_rank laurel_rank num_mem_blocks index_kpool"),
    ("", HIDDEN, "out_hidden_size text_hidden_size"),  # of an encoder of images or audio, for the text
)
SIZES: dict[str, int] = {name: size for _, size, names in _ROLES for name in names.split()}
ROLES: dict[str, str] = {name: role for role, _, names in _ROLES for name in names.split() if role}

# Sizes that some types need and leave unset.
_UNSET = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS}
# Attributes that count the first, dense layers; one such layer is enough.
LEADING_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
SPECIAL_TOKENS = (
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "decoder_start_token_id",
)
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")


def small_settings(
    defaults: Mapping[str, Any], *, layers: int | None = None, is_decoder: bool = True
) -> dict[str, Any]:
    """Return the attributes to change in a configuration, with their small values.

    Args:
        defaults: Every attribute of the type's default configuration; nested configurations are skipped.
        layers: Number of layers; by default one of every kind, and at least two.
        is_decoder: Whether to build an encoder as a decoder, which makes it a causal language model.
    """
    small: dict[str, Any] = {name: size for name, size in SIZES.items() if is_size(defaults.get(name))}
    dropouts = [name for name in defaults if "drop" in name or "jitter" in name]
    small |= {name: 0.0 for name in dropouts if isinstance(defaults[name], float)}
    small |= {name: size for name, size in _UNSET.items() if name in defaults and defaults[name] is None}
    small |= {name: min(1, defaults[name]) for name in LEADING_LAYERS if is_size(defaults.get(name))}
    small |= _tokens(defaults)
    small |= _layers(defaults, layers)
    if small.get("kv_lora_rank"):  # MLA projects keys and values for every head
        small |= {name: HEADS for name in small if name == "num_key_value_heads"}
    if is_decoder and defaults.get("is_decoder") is False:
        small["is_decoder"] = True  # makes an encoder a causal language model
    if "use_cache" in defaults:
        small["use_cache"] = False  # caches of hybrid models need arguments that a training step does not pass
    return small


def rotary_sections(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return three sections of the pairs of features that rotary embeddings turn, for heads of a small size.

    Multimodal types turn a section each by time, height and width. The defaults of the sections fit real heads.

    Args:
        config: The attributes of the small configuration.
        rope: Its parameters of rotary embeddings.

    Example:
        >>> rotary_sections({"hidden_size": 64, "num_attention_heads": 8}, {"rope_type": "default"})
        {'mrope_section': [1, 1, 2]}
        >>> rotary_sections({"head_dim": 8}, {"partial_rotary_factor": 0.5})  # fewer pairs than sections
        {}
    """
    head_dim = config.get("head_dim") or config.get("hidden_size", 0) // (config.get("num_attention_heads") or 1)
    pairs = int(head_dim * (rope.get("partial_rotary_factor") or 1.0)) // 2
    return {"mrope_section": [pairs // 3, pairs // 3, pairs - 2 * (pairs // 3)]} if pairs >= 3 else {}


def layers_to_keep(per_layer: Mapping[str, Sequence[Any]], wanted: int | None = None) -> list[int]:
    """Return the indices of the default layers that a small model keeps: the first of each kind, in order.

    A kind is a combination of the entries of all per-layer lists. With `wanted` layers are repeated or cut off.

    Example:
        >>> layers_to_keep({"layer_types": ["sliding", "sliding", "full", "sliding"]})
        [0, 2]
        >>> layers_to_keep({"layer_types": ["full", "full", "full"]})
        [0, 0]
        >>> layers_to_keep({"layer_types": ["sliding", "sliding", "full"]}, wanted=3)
        [0, 2, 0]
    """
    kinds = [repr(kind) for kind in zip(*per_layer.values(), strict=True)]
    firsts = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values()) or [0]
    count = wanted if wanted is not None else max(LAYERS, len(firsts))
    return [firsts[layer % len(firsts)] for layer in range(count)]


def layer_count_name(defaults: Mapping[str, Any]) -> str | None:
    """Return the attribute that counts the layers of a configuration, if it has one."""
    return next((name for name in _LAYER_COUNTS if is_size(defaults.get(name))), None)


def _layers(defaults: Mapping[str, Any], wanted: int | None) -> dict[str, Any]:
    name = layer_count_name(defaults)
    if name is None:
        return {}
    per_layer = {
        key: value
        for key, value in defaults.items()
        if isinstance(value, (list, tuple))
        and len(value) == defaults[name] > 1
        and list(value) != list(range(len(value)))  # indices of layers (`moe_layers`), which the type derives again
    }
    kept = layers_to_keep(per_layer, wanted)
    return {name: len(kept)} | {
        key: [SIZES.get(key, values[index]) for index in kept] for key, values in per_layer.items()
    }


def _tokens(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return special tokens inside the small vocabulary; tokens of images and audio stay outside of it."""
    return {
        name: place
        for place, name in enumerate(SPECIAL_TOKENS)
        if isinstance(defaults.get(name), int) and defaults[name] >= VOCABULARY
    } | {
        name: [place]
        for place, name in enumerate(SPECIAL_TOKENS)
        if isinstance(defaults.get(name), list) and max(defaults[name], default=0) >= VOCABULARY
    }


def is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


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

# Exceptions to the rules: one row for each model type, with its reason.
OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},  # Mamba layers alone by default
    "big_bird": {"attention_type": "original_full"},  # sparse attention looks at random blocks
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},  # read by the model, absent from its defaults
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},  # no number of experts by default
    "deepseek_ocr2": {  # unset by default
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
    },
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
    "glm4v_moe": {"text_config": {"head_dim": 16}},  # half of it is rotated, in three sections
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
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},  # that of the whole, unset by default
    "paddleocr_vl": {"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}},  # no type says that it has any
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
    "step3p7": {"text_config": {"sliding_window": 8}},  # unset by default
    "unlimited_ocr": {"text_config": {"num_key_value_heads": 8}},  # attention does not repeat keys and values
    "xmod": {"default_language": "en_XX"},
    "zamba": {  # attention is twice as wide as the model; two hybrid layers share their weights
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},  # the only number that it supports
}
