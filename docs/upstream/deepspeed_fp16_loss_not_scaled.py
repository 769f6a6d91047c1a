"""In float16 without ZeRO, gradients are divided by a loss scale that the loss was never multiplied by.

DS_ACCELERATOR=cpu LOCAL_SIZE=1 torchrun --nproc-per-node 1 docs/upstream/deepspeed_fp16_loss_not_scaled.py
Seen with deepspeed 0.19.8, torch 2.13.0. ZeRO 1 to 3 multiply: `engine.backward` asks for their class alone.
"""
# ruff: noqa: T201

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
deepspeed.get_accelerator().is_fp16_supported = lambda: True  # torch has float16 on every CPU


def step(stage: int) -> float:
    """Return how far one step of SGD moves a weight."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "fp16": {"enabled": True, "loss_scale": 256.0},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
    before = engine.module.weight.detach().float()
    engine.backward(engine(torch.ones(2, 4, dtype=torch.float16)).float().square().mean())
    engine.step()
    return float((engine.module.weight.detach().float() - before).norm())


print(f"one step moves the weight by {step(0):.4f} without ZeRO, {step(1):.4f} under ZeRO 1: should be the same")
