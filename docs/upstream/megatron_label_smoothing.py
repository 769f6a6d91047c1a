"""megatron-core's vocab_parallel_cross_entropy smooths labels over one rank's part of the vocabulary.

torchrun --nproc-per-node 2 docs/upstream/megatron_label_smoothing.py
The mean of the log probabilities, and the number of labels, are not those of all ranks. Seen with megatron-core 0.16.1.
"""
# ruff: noqa: T201

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

dist.init_process_group("gloo")
rank = dist.get_rank()
parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
torch.manual_seed(0)
logits, labels = torch.randn(3, 1, 8), torch.randint(0, 8, (3, 1))
for smoothing in (0.0, 0.1):
    over_all = smoothing * 8 / 7  # Megatron spreads it over the seven other labels, torch over all eight
    expected = torch.nn.functional.cross_entropy(logits[:, 0], labels[:, 0], reduction="none", label_smoothing=over_all)
    local = logits.chunk(2, dim=-1)[rank].clone()
    losses = vocab_parallel_cross_entropy(local, labels, smoothing)[:, 0]
    off = float((losses - expected).norm() / expected.norm())
    print(f"label_smoothing={smoothing}, rank {rank}: losses off by {off:.0%}")
dist.destroy_process_group()
