"""transformers' Trainer with tpcheck's callback, which runs alone, and under a launcher with TP or without.

trainer_any_launch.py FOLDER [TP]
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import tpcheck
from tests.trainer.training import native_sharding
from tpcheck import Topology

folder, tp = sys.argv[1], int(sys.argv[2])
args = TrainingArguments(
    f"{folder}/out", max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
    logging_strategy="no", save_strategy="no",
)  # fmt: skip
torch.manual_seed(0)
sharding: Any = native_sharding(SimpleNamespace(topology=Topology(tp=tp))) if tp > 1 else {}  # type: ignore[arg-type]
model = LlamaForCausalLM.from_pretrained(f"{folder}/model", **sharding)
rows = [torch.arange(start, start + 8) % 32 for start in range(32)]
data: Any = [{"input_ids": row, "labels": row} for row in rows]
callback = tpcheck.TpcheckCallback(guard=2, record={"path": f"{folder}/run.trace", "replays": 0})
Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
