"""DeepSpeed gives weights that do not affect the loss a gradient of zeros, so they decay; torch does not.

DS_ACCELERATOR=cpu LOCAL_SIZE=2 torchrun --nproc-per-node 2 docs/upstream/deepspeed_unused_weights_decay.py
Seen with deepspeed 0.19.8, torch 2.13.0.
"""
# ruff: noqa: T201

import copy

import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo all-reduces instead
torch.manual_seed(0)
model = torch.nn.ModuleDict({"used": torch.nn.Linear(4, 4), "unused": torch.nn.Linear(4, 4)})
model.forward = lambda x: model["used"](x).sum()
x = torch.randn(2, 4)
reference = copy.deepcopy(model)
reference["used"](x).sum().backward()
torch.optim.SGD(reference.parameters(), lr=0.1, weight_decay=0.1).step()
before = model["unused"].weight.clone()
sgd = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
settings = {"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True}
engine = deepspeed.initialize(model=model, optimizer=sgd, config=settings)[0]
engine.backward(engine(x))
engine.step()
if torch.distributed.get_rank() == 0:
    print("torch changes the unused weight:", not torch.equal(reference["unused"].weight, before))
    print("DeepSpeed changes it:", not torch.equal(engine.module["unused"].weight.float(), before))
