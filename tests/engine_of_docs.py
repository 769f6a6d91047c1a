"""What the snippets of the documentation speak of: an engine of DeepSpeed's AutoTP, batches, a loop that trains."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},  # weights stay
    "tensor_parallel": {"autotp_size": 2},
}


def build() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    return model


def stand_ins() -> dict[str, Any]:
    """Return the names that snippets may use."""
    deepspeed.init_distributed()
    model = build()
    reference = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine, optimizer, *_ = deepspeed.initialize(model=model, config=DS_CONFIG)
    tokens = [torch.arange(start, start + 8) for start in range(4)]
    loader = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=2)

    def train() -> None:
        for batch in loader:
            engine.backward(engine(**batch).loss)
            engine.step()

    return {
        "batches": list(loader),
        "build": build,
        "deepspeed": deepspeed,
        "engine": engine,
        "loader": loader,
        "model": engine,
        "optimizer": optimizer,
        "reference": reference,
        "torch": torch,
        "train": train,
    }
