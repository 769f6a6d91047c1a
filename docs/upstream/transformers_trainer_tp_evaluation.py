"""With tensor parallelism the Trainer's evaluation loss counts the samples of a last, incomplete batch too little.

torchrun --nproc-per-node 2 docs/upstream/transformers_trainer_tp_evaluation.py
Seen with transformers 5.23.0, accelerate 1.15.0: every TP rank's copy of a batch's loss is gathered, but the last batch
is cut to as many losses as it has samples (`gather_for_metrics`), as if there were no copies.
"""
# ruff: noqa: T201

import tempfile

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

ParallelismConfig._validate_accelerator = lambda *_: None  # it asks for GPUs; nothing below needs them
dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 8}
folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
reference = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100, initializer_range=1.0))
reference.save_pretrained(folder[0])  # the first rank writes
dist.barrier()
model = LlamaForCausalLM.from_pretrained(folder[0], distributed_config=DistributedConfig(tp_size=2))
tokens = torch.randint(100, (5, 16))  # batches of 4 and 1
with torch.no_grad():
    losses = [float(model(rows, labels=rows).loss) for rows in tokens.split(4)]
settings = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "per_device_eval_batch_size": 4}
arguments = TrainingArguments(folder[0], log_level="error", **settings)
data = [{"input_ids": row, "labels": row} for row in tokens]
evaluated = Trainer(model, arguments, eval_dataset=data).evaluate()["eval_loss"]
if dist.get_rank() == 0:
    right, wrong = (4 * losses[0] + losses[1]) / 5, (8 * losses[0] + losses[1]) / 9
    print(f"eval_loss {evaluated:.5f}, should be {right:.5f}; with the first batch counted twice: {wrong:.5f}")
dist.destroy_process_group()
