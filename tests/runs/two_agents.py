"""What torchrun starts on each of two nodes: DeepSpeed shards a small Llama over both and trains it, recorded.

It trains twice: `run.trace` is right, in `wrong.trace` rank 1 has half the gradient of a replica at the second step.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import tpcheck


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch_of(step: int) -> torch.Tensor:
    return torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(step))


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def train(model: torch.nn.Module, path: str, *, is_wrong: bool) -> None:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "tensor_parallel": {"autotp_size": 2},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)[0]
    with tpcheck.record(engine, path):
        for step in range(2):
            engine.backward(loss_of(engine, batch_of(step)))
            if is_wrong and step == 1 and torch.distributed.get_rank() == 1:
                engine.module.model.norm.weight.grad *= 0.5
            engine.step()


if __name__ == "__main__":
    import deepspeed

    deepspeed.init_distributed("gloo")
    train(build(), "run.trace", is_wrong=False)
    train(build(), "wrong.trace", is_wrong=True)
    torch.distributed.destroy_process_group()
