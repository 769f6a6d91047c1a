"""Rules by attribute name that turn the defaults of a model type into a small configuration. No torch."""

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

# A role, its small size, and the attributes with that role. `families/dimensions.py` draws sizes by role; attributes
# without one follow from others, or belong to one kind of layer.
_ROLES: tuple[tuple[str, int, str], ...] = (
    ("hidden", HIDDEN, "hidden_size hidden_size_global d_model n_embd emb_dim dim_model embedding_size"),
    ("hidden", HIDDEN, "word_embed_proj_dim"),
    ("", HIDDEN, "attention_hidden_size input_embedding_size output_embedding_size lru_width embedding_dim"),
    ("", HIDDEN, "audio_embed_dim pronunciation_embed_dim shape_embed_dim backbone_hidden_size"),
    ("", HIDDEN, "cross_attention_hidden_size"),
    ("heads", HEADS, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
    ("heads", HEADS, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads"),
    ("", HEADS, "linear_num_heads swa_num_attention_heads linear_num_value_heads mamba_n_heads mamba_num_heads"),
    ("", HEADS, "index_n_heads"),
    ("kv_heads", KV_HEADS, "num_key_value_heads num_kv_heads n_kv_heads kv_n_heads num_global_key_value_heads"),
    ("kv_heads", KV_HEADS, "num_query_groups"),
    ("", KV_HEADS, "swa_num_key_value_heads linear_num_key_heads"),
    ("head_dim", HEAD_DIM, "head_dim d_head dim_head kv_channels global_head_dim d_kv attention_head_size"),
    ("", HEAD_DIM, "swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim v_head_dim"),
    ("", HEAD_DIM, "qk_nope_head_dim qk_rope_head_dim index_head_dim rotary_dim swa_v_head_dim d_rel"),
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
    ("", 4, "time_step_rank mamba_dt_rank laurel_rank num_mem_blocks"),
)
SIZES: dict[str, int] = {name: size for _, size, names in _ROLES for name in names.split()}
ROLES: dict[str, str] = {name: role for role, _, names in _ROLES for name in names.split() if role}

# Sizes that some types need and leave unset.
_UNSET = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS}
# Attributes that count the first, dense layers; one such layer is enough.
_LEADING_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_SPECIAL_TOKENS = (
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
    small: dict[str, Any] = {name: size for name, size in SIZES.items() if _is_size(defaults.get(name))}
    small |= {name: 0.0 for name, value in defaults.items() if _is_dropout(name) and isinstance(value, float)}
    small |= {name: size for name, size in _UNSET.items() if name in defaults and defaults[name] is None}
    small |= {name: min(1, defaults[name]) for name in _LEADING_LAYERS if _is_size(defaults.get(name))}
    small |= _tokens(defaults)
    small |= _layers(defaults, layers)
    if small.get("kv_lora_rank"):  # MLA projects keys and values for every head
        small |= {name: HEADS for name in small if name == "num_key_value_heads"}
    if is_decoder and defaults.get("is_decoder") is False:
        small["is_decoder"] = True  # makes an encoder a causal language model
    if "use_cache" in defaults:
        small["use_cache"] = False  # caches of hybrid models need arguments that a training step does not pass
    return small


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
    return next((name for name in _LAYER_COUNTS if _is_size(defaults.get(name))), None)


def _layers(defaults: Mapping[str, Any], wanted: int | None) -> dict[str, Any]:
    name = layer_count_name(defaults)
    if name is None:
        return {}
    per_layer = {
        key: value
        for key, value in defaults.items()
        if isinstance(value, (list, tuple)) and len(value) == defaults[name] > 1 and not _are_indices(value)
    }
    kept = layers_to_keep(per_layer, wanted)
    return {name: len(kept)} | {
        key: [SIZES.get(key, values[index]) for index in kept] for key, values in per_layer.items()
    }


def _tokens(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return special tokens inside the small vocabulary; tokens of images and audio stay outside of it."""
    return {
        name: place
        for place, name in enumerate(_SPECIAL_TOKENS)
        if isinstance(defaults.get(name), int) and defaults[name] >= VOCABULARY
    } | {
        name: [place]
        for place, name in enumerate(_SPECIAL_TOKENS)
        if isinstance(defaults.get(name), list) and max(defaults[name], default=0) >= VOCABULARY
    }


def _are_indices(values: Sequence[object]) -> bool:
    """Return whether a list contains indices of layers (`moe_layers`), which the type derives again."""
    return list(values) == list(range(len(values)))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_dropout(name: str) -> bool:
    return any(part in name for part in ("dropout", "drop", "pdrop", "jitter"))
