"""Models of megatron-core as its users build them, and faults to inject into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tpcheck.lab.faults.fault import Live

VOCABULARY = 64


def gpt(**settings: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        gated_linear_unit=True,
        activation_func=functional.silu,
        **settings,
    )
    return GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, 16, position_embedding_type="rope")


def build() -> nn.Module:
    from tpcheck.backends.megatron import TokenLoss

    return TokenLoss(gpt())


class Layers(nn.Module):
    """Megatron's tensor-parallel layers with a `ModelParallelConfig`, and torch's loss."""

    def __init__(self) -> None:
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

        super().__init__()
        options: dict[str, Any] = {"config": ModelParallelConfig(), "init_method": nn.init.xavier_normal_}
        self.embedding = VocabParallelEmbedding(VOCABULARY, 16, **options)
        self.up = ColumnParallelLinear(16, 32, **options)
        self.down = RowParallelLinear(32, 16, input_is_parallel=True, bias=True, skip_bias_add=False, **options)
        self.head = ColumnParallelLinear(16, VOCABULARY, bias=False, gather_output=True, **options)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden_BLD = self.embedding(input_ids)
        hidden_BLD = hidden_BLD + self.down(functional.gelu(self.up(hidden_BLD)[0]))[0]
        return functional.cross_entropy(self.head(hidden_BLD)[0].flatten(0, 1), input_ids.flatten())


class SmoothedLoss(nn.Module):
    """A GPT with Megatron's vocabulary-parallel cross entropy and label smoothing."""

    def __init__(self) -> None:
        super().__init__()
        self.model = gpt()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        logits_BLV = self.model(input_ids, positions, None)
        loss: torch.Tensor = vocab_parallel_cross_entropy(logits_BLV, input_ids, label_smoothing=0.1).mean()
        return loss


def tokens(coordinate: Any, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + coordinate["dp"])
    return {"input_ids": torch.randint(0, VOCABULARY, (2, 8), generator=generator)}


def labelled(coordinate: Any, step: int) -> dict[str, torch.Tensor]:
    """Return tokens with other numbers of labels in each micro-batch of each replica: 2 to 14."""
    batch = tokens(coordinate, step + 7 * coordinate["micro_batch"])
    labels = batch["input_ids"].clone()
    labels[:, 1 + 3 * coordinate["dp"] + 3 * coordinate["micro_batch"] :] = -100
    return {**batch, "labels": labels}


def last_micro_batch_counted(live: Live) -> None:
    """Let `finalize_model_grads` divide by the tokens of the last micro-batch alone."""
    forward = live.candidate.forward

    def counted_anew(batch: Any) -> Any:
        live.candidate.num_tokens = 0
        return forward(batch)

    live.candidate.forward = counted_anew


def bucket_not_gathered(live: Live) -> None:
    """Leave out the all-gather of the weights that each DP rank has stepped."""
    live.candidate._ddp.start_param_sync = lambda *args, **kwargs: None


def moments_of_another_rank(live: Live) -> None:
    """Exchange the second moments of the two TP ranks after each step."""
    import torch.distributed as dist

    step = live.candidate.step

    def exchanging() -> None:
        step()
        for member in live.candidate.optimizers:
            for state in member.optimizer.state.values():
                parts = [torch.empty_like(state["exp_avg_sq"]) for _ in range(live.tp)]
                dist.all_gather(parts, state["exp_avg_sq"], group=live.rank.group("tp"))
                state["exp_avg_sq"].copy_(parts[1 - live.tp_rank])

    live.candidate.step = exchanging


FIRST, LAST = "model.decoder.layers.0", "model.decoder.layers.1"


def norm_not_marked(live: Live) -> None:
    """Remove the mark that makes `finalize_model_grads` sum a gradient under sequence parallelism."""
    live.parameter(f"{FIRST}.input_layernorm.weight").sequence_parallel = False


def reduce_skipped(live: Live) -> None:
    """Skip the all-reduce, as layers of experts do, which reduce later."""
    live.module(f"{LAST}.mlp.linear_fc2").explicit_expert_comm = True


def stride_ignored(live: Live) -> None:
    """Shard gate and up as one block."""
    import torch.distributed as dist

    name = f"{FIRST}.mlp.linear_fc1.weight"
    weight = live.parameter(name).data
    shards = [torch.empty_like(weight) for _ in range(live.tp)]
    dist.all_gather(shards, weight, group=live.rank.group("tp"))
    weight.copy_(live.candidate.layouts()[name].assemble(shards).chunk(live.tp)[live.tp_rank])
