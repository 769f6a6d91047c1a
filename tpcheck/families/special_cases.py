"""What the comparisons have to know of particular models: one row each, with its reason and its source. No torch.

The comparisons work on placements and numbers and ask for no model type. The few exceptions are here: names by which a
parameter's role is recognised, and models that arrange a tensor in a way that no general rule reads. A row without
`names` documents code that applies to every model; that code refers to the row by its constant. It is a row all the
same, so that everything that is known of particular models, with its source, can be read and tested in one table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SpecialCase:
    """One thing that is known of particular models.

    Attributes:
        models: The models that it is about.
        reason: What they do, and why the comparison has to know it.
        source: The lines or the issue that show it.
        names: Matches the names of the parameters or modules in question.
    """

    models: str
    reason: str
    source: str
    names: re.Pattern[str] | None = None

    def matches(self, name: str) -> bool:
        """Return whether a dotted name is one of `names`."""
        return self.names is not None and self.names.search(name) is not None


_MODELS = "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models"

VOCABULARY_PARAMETER = SpecialCase(
    models="llama (embed_tokens, lm_head), gpt2 (wte), bloom and falcon (word_embeddings), "
    "Meta's Llama (tok_embeddings), gpt_neox (embed_in, embed_out), t5 (shared)",
    reason="Rows of these parameters are tokens: a wrong cut of them is a wrong offset of the vocabulary. Used where "
    "the checkpoint has no config.json with a vocab_size.",
    source=f"{_MODELS}/llama/modeling_llama.py, {_MODELS}/gpt2/modeling_gpt2.py, {_MODELS}/bloom/modeling_bloom.py, "
    f"{_MODELS}/gpt_neox/modeling_gpt_neox.py, {_MODELS}/t5/modeling_t5.py; "
    "https://github.com/meta-llama/llama/blob/main/llama/model.py",
    names=re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embed_out|lm_head|shared)\."),
)
FUSED_PARAMETER = SpecialCase(
    models="bloom, falcon, gpt_neox and persimmon (query_key_value), gpt2 (c_attn), phi3 (qkv_proj, gate_up_proj), "
    "deepseek (kv_a_proj_with_mqa), modernbert (Wqkv), torch.nn.MultiheadAttention (in_proj), Megatron (linear_fc1)",
    reason="Several matrices lie in one parameter: slices that interleave are a wrong cut of its blocks. In any other "
    "parameter they are shards in a wrong order.",
    source=f"{_MODELS}/bloom/modeling_bloom.py, {_MODELS}/gpt2/modeling_gpt2.py, {_MODELS}/phi3/modeling_phi3.py, "
    f"{_MODELS}/deepseek_v3/modeling_deepseek_v3.py, {_MODELS}/modernbert/modeling_modernbert.py; "
    "https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/transformer/mlp.py",
    names=re.compile(r"qkv|query_key_value|c_attn|kv_proj|kv_a|gate_up|gate_and_up|in_proj|wi\b|w13|linear_fc1|Wqkv"),
)
FUSED_GATE_AND_UP = SpecialCase(
    models="phi3, glm4 and mixtral's experts (gate_up_proj), vLLM (w13)",
    reason="The parameter is the gate's rows, then those of up: halves in another order are gate and up exchanged. "
    "Names that ungated models share (Megatron's linear_fc1, t5's wi) are left out: there, halves are shards.",
    source=f"{_MODELS}/phi3/modeling_phi3.py, {_MODELS}/mixtral/modeling_mixtral.py",
    names=re.compile(r"gate_up|up_gate|gate_and_up|(^|[._])w13([._]|$)"),
)
FUSED_KEY_AND_VALUE = SpecialCase(
    models="phi3 (qkv_proj), bloom, falcon and gpt_neox (query_key_value), gpt2 (c_attn), modernbert (Wqkv), Megatron "
    "(linear_qkv), torch.nn.MultiheadAttention (in_proj_weight)",
    reason="The parameter ends with the rows of keys, then values, as a whole or in each group of heads.",
    source=f"{_MODELS}/phi3/modeling_phi3.py, {_MODELS}/gpt_neox/modeling_gpt_neox.py",
    names=re.compile(r"qkv|query_key_value|c_attn|in_proj_(weight|bias)|(^|[._])kv_proj", re.IGNORECASE),
)
ROTATED_PARAMETER = SpecialCase(
    models="llama (q_proj, k_proj), qwen3 (q_norm, k_norm), bert-like models (query, key), Meta's Llama (wq, wk), "
    "fused ones",
    reason="Rotary embeddings turn pairs of features: (0, 1), (2, 3), ... in one convention, (0, n/2), "
    "(1, n/2 + 1), ... in the other. Converters reorder the rows of each head; an order like that in any other "
    "parameter has another reason.",
    source="permute in https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/models/llama/"
    "convert_llama_weights_to_hf.py",
    names=re.compile(
        r"(^|[._])(q|k|v|query|key|value|wq|wk|wv)([._]|$)|qkv|query_key_value|c_attn|in_proj_|kv_a|q_a|q_b",
        re.IGNORECASE,
    ),
)
KEY_OR_VALUE_PROJECTION = SpecialCase(
    models="llama (k_proj, v_proj), bert (key, value), distilbert (k_lin, v_lin), t5 (k, v)",
    reason="With fewer key-value heads than query heads, keys and values may go to wrong ranks while the queries are "
    "right: the mapping of heads is wrong, not the order of shards.",
    source=f"{_MODELS}/llama/modeling_llama.py, {_MODELS}/bert/modeling_bert.py, {_MODELS}/distilbert/"
    f"modeling_distilbert.py, {_MODELS}/t5/modeling_t5.py",
    names=re.compile(r"(^|\.)(k|v|key|value)(_proj|_lin|)$"),
)
QUERY_PROJECTION = SpecialCase(
    models="llama (q_proj), bert (query), distilbert (q_lin), t5 (q)",
    reason="The queries beside the keys and values of KEY_OR_VALUE_PROJECTION.",
    source=KEY_OR_VALUE_PROJECTION.source,
    names=re.compile(r"(^|\.)(q|query)(_proj|_lin|)$"),
)
ALIBI_HEADS_WITHIN_SAMPLES = SpecialCase(
    models="bloom, falcon with alibi",
    reason="The ALiBi tensor has shape (batch * heads, 1, length): the heads of one rank are a part of every sample, "
    "not one range of the first dim.",
    source=f"{_MODELS}/bloom/modeling_bloom.py: build_alibi_tensor returns alibi.reshape(batch_size * num_heads, ...)",
)
MLA_SHARED_ROTARY_KEY = SpecialCase(
    models="deepseek_v2, deepseek_v3, longcat_flash, minicpm3 and other models with multi-head latent attention",
    reason="The output of kv_a_proj_with_mqa is split: a sharded projection reads the latent part and reduces its "
    "gradient, while the attention of each rank's heads reads the rotary part. Only the rotary features of the "
    "gradient are terms of a sum.",
    source="https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/distributed/tensor_parallel.py: "
    "MlaKvAProjParallel",
)
MEGATRON_LABEL_SMOOTHING = SpecialCase(
    models="models under Megatron's vocab_parallel_cross_entropy with label_smoothing above 0",
    reason="Each rank takes the mean over its own part of the vocabulary, and scales the smoothing by the number of "
    "tokens of that part.",
    source="https://github.com/NVIDIA/Megatron-LM/issues/737",
)
EXPERTS_CALLED_ONCE_EACH = SpecialCase(
    models="mixtral and other mixtures of experts with expert parallelism",
    reason="Every expert calls the same module, the activation for one, and a rank calls it for its own experts only: "
    "which call corresponds to which is unknown.",
    source=f"{_MODELS}/mixtral/modeling_mixtral.py",
)
