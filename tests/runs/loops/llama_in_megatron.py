"""One Llama under transformers and in Megatron's GPTModel: the same weights, batches and loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.runs.loops.huggingface import SIZES, CausalTraining
from tests.runs.loops.megatron_models import Megatron

HEADS, GROUPS = 4, 2
VOCABULARY = 64  # Megatron's table of the vocabulary
EPSILON = 1e-6


class Llama(CausalTraining):
    """transformers' model on one process."""

    dtype = torch.float32

    def config_and_class(self) -> tuple[Any, Any]:
        from transformers import LlamaConfig, LlamaForCausalLM

        options: dict[str, Any] = {
            **SIZES,
            "vocab_size": VOCABULARY,
            "num_hidden_layers": self.layers,
            "rms_norm_eps": EPSILON,
        }
        options["pad_token_id"] = None  # an embedding of transformers has no gradient of that token
        config = LlamaConfig(**options, num_key_value_heads=GROUPS, attn_implementation="eager")
        return config, LlamaForCausalLM


class LlamaInMegatron(Megatron):
    """Megatron's model, filled with the weights of transformers'."""

    dtype = torch.float32
    layers = 2

    def build_gpt(self) -> nn.Module:
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.transformer import TransformerConfig

        config = TransformerConfig(
            num_layers=self.layers,
            hidden_size=SIZES["hidden_size"],
            ffn_hidden_size=SIZES["intermediate_size"],
            num_attention_heads=HEADS,
            num_query_groups=GROUPS,
            gated_linear_unit=True,
            activation_func=functional.silu,
            add_bias_linear=False,
            normalization="RMSNorm",
            layernorm_epsilon=EPSILON,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bias_activation_fusion=False,
        )
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        return GPTModel(config, spec, VOCABULARY, 32, position_embedding_type="rope")  # type: ignore[no-any-return]

    def build(self) -> nn.Module:
        source = Llama(self.run, layers=self.layers, model_seed=self.model_seed)
        fill(self.unsharded, source.unsharded())
        return super().build()

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        losses_BL = self.wrapped(tokens, positions, None, labels=tokens.roll(-1, 1))
        return losses_BL[:, :-1].mean()  # type: ignore[no-any-return]


def fill(gpt: Any, llama: Any) -> None:
    """Copy the weights of transformers' model into Megatron's."""
    with torch.no_grad():
        gpt.embedding.word_embeddings.weight.copy_(llama.model.embed_tokens.weight)
        gpt.decoder.final_layernorm.weight.copy_(llama.model.norm.weight)
        gpt.output_layer.weight.copy_(llama.lm_head.weight)
        for layer, source in zip(gpt.decoder.layers, llama.model.layers, strict=True):
            attention = source.self_attn
            q, k, v = (each.weight.chunk(GROUPS) for each in (attention.q_proj, attention.k_proj, attention.v_proj))
            by_group = [each for group in zip(q, k, v, strict=True) for each in group]
            layer.self_attention.linear_qkv.weight.copy_(torch.cat(by_group))
            layer.self_attention.linear_proj.weight.copy_(attention.o_proj.weight)
            layer.mlp.linear_fc1.weight.copy_(torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight]))
            layer.mlp.linear_fc2.weight.copy_(source.mlp.down_proj.weight)
            layer.input_layernorm.weight.copy_(source.input_layernorm.weight)
            layer.pre_mlp_layernorm.weight.copy_(source.post_attention_layernorm.weight)


class OneProjectionScaled(LlamaInMegatron):
    """The output projection of the second layer is 8 % too large in the forward pass."""

    def start(self) -> None:
        if self.run.tp > 1:
            projection = self.model.decoder.layers[1].self_attention.linear_proj
            projection.register_forward_hook(lambda module, args, output: (output[0] * 1.08, *output[1:]))
