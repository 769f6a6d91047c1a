"""The step at which DeepSpeed's dynamic loss scale grows divides gradients by the new scale: it is half as long.

DS_ACCELERATOR=cpu LOCAL_SIZE=1 torchrun --nproc-per-node 1 docs/upstream/deepspeed_fp16_growing_scale.py
Seen with deepspeed 0.19.8, torch 2.13.0, at ZeRO 1, 2 and 3: `step` updates the scale before it unscales.
"""
# ruff: noqa: T201

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
deepspeed.get_accelerator().is_fp16_supported = lambda: True  # torch has float16 on every CPU


def lengths(stage: int) -> list[str]:
    """Return how far each of five steps of SGD moves a weight, whose gradient is always the same."""
    torch.manual_seed(0)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    model = torch.nn.Linear(4, 4, bias=False)
    sgd = torch.optim.SGD(model.parameters(), lr=0.125)
    engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
    moved = []
    for _ in range(5):
        before, scale = safe_get_full_fp32_param(model.weight).clone(), engine.optimizer.loss_scale
        engine.backward(engine(torch.ones(2, 4, dtype=torch.float16)).float().mean())
        engine.step()
        distance = float((safe_get_full_fp32_param(model.weight) - before).norm())
        moved.append(f"{distance:.3f} (scale {scale:.0f} -> {engine.optimizer.loss_scale:.0f})")
    return moved


for stage in (1, 2, 3):
    print(f"ZeRO {stage}: five steps move the weight by", ", ".join(lengths(stage)))
