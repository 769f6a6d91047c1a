"""Tensors of every kind, into which the faults of `tpcheck.lab.faults.checkpoint` are injected."""

from __future__ import annotations

import torch

from tpcheck.lab.faults.checkpoint import FAULTS as OF_MODELS
from tpcheck.lab.faults.checkpoint import CheckpointFault
from tpcheck.lab.faults.damage import Damage, plain

Tensors = dict[str, torch.Tensor]

# D 32 model, H 64 hidden, V 96 vocabulary; names as in a Llama with fused projections.
LAYERS = "model.layers"


def reference(tied: bool = False) -> Tensors:
    """Return tensors of every kind: vocabulary, column- and row-parallel, fused, 1-D, 3-D, integer."""
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "model.embed_tokens.weight": drawn(96, 32),
        f"{LAYERS}.0.self_attn.q_proj.weight": drawn(64, 32),
        f"{LAYERS}.1.self_attn.q_proj.weight": drawn(64, 32),
        f"{LAYERS}.0.self_attn.k_proj.weight": drawn(256, 32),
        f"{LAYERS}.0.self_attn.v_proj.weight": drawn(256, 32),
        f"{LAYERS}.0.mlp.gate_proj.weight": drawn(128, 32),
        f"{LAYERS}.0.mlp.up_proj.weight": drawn(128, 32),
        f"{LAYERS}.1.mlp.up_proj.weight": drawn(128, 32),
        f"{LAYERS}.0.mlp.experts.gate_up_proj": drawn(4, 32, 16),
        "model.norm.weight": drawn(32),
        f"{LAYERS}.0.mlp.down_proj.weight": drawn(32, 64),
        f"{LAYERS}.0.self_attn.qkv_proj.weight": drawn(96, 32),
        f"{LAYERS}.0.mlp.gate_up_proj.weight": drawn(128, 32),
        f"{LAYERS}.0.self_attn.q_proj.bias": drawn(64),
        f"{LAYERS}.0.self_attn.o_proj.weight": drawn(32, 32),
        f"{LAYERS}.0.mlp.experts.down_proj": drawn(4, 16, 32),
        f"{LAYERS}.0.count": torch.tensor(3),
    }
    return tensors | ({"lm_head.weight": tensors["model.embed_tokens.weight"]} if tied else {})


def earlier(tied: bool = False) -> Tensors:
    """Return the tensors of an earlier step."""
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in reference(tied).items()}


def is_tied(fault: CheckpointFault) -> bool:
    return bool(fault.settings.get("tie_word_embeddings"))


def drawn(fault: CheckpointFault, seed: int) -> Damage:
    return fault.drawn(reference(is_tied(fault)), earlier(is_tied(fault)), seed)


FAULTS = (
    *(fault for fault in OF_MODELS if fault.saved_as == "safetensors"),
    CheckpointFault(  # no language model of transformers saves an integer
        "bit_of_an_integer", "one bit of a counter", ("*.count",), plain(lambda count: count ^ 4, bit=2),
        ("bit_flipped",),
    ),
)  # fmt: skip
