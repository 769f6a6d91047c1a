"""Muon at ZeRO 2 in bfloat16 with gradients in float32: what Adam steps beside it gets no gradient, and stays as it is.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_muon_drops_gradients.py
Seen with deepspeed 0.19.8, torch 2.13.0. `average_tensor` of stage_1_and_2.py merges the slice of a matrix of Muon's,
which has no `grad_partition_output`, with the one before it, and so drops that of a norm. bfloat16 gradients are right.
"""
# ruff: noqa: T201

import deepspeed
import torch
from torch import nn

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.compiler.set_stance("force_eager")


def unmoved(gradient_dtype: str) -> list[str]:
    """Return the names of the parameters that one step leaves as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(8, 8, bias=False), nn.LayerNorm(8))))
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": gradient_dtype},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "Muon", "params": {"lr": 0.02, "torch_adam": True}},
    }
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)[0]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine.backward(engine(torch.randn(2, 8, dtype=torch.bfloat16)).float().pow(3).sum())
    engine.step()
    return [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]


for dtype in ("bf16", "fp32"):
    names = unmoved(dtype)
    if torch.distributed.get_rank() == 0:
        print(f"gradients in {dtype}: a step leaves as they are", ", ".join(names) or "none")
