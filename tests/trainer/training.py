"""transformers' Trainer on a tiny Llama under tensor parallelism, as a function that ranks run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tpcheck
from tpcheck import Finding, Rank
from tpcheck.lab.faults.pipelines import Sentences, a_tokenizer

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 2,
    "tensor_parallel": {"autotp_size": 2},
    "zero_optimization": {"stage": 0},
}


def save_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)


def train(
    rank: Rank,
    folder: str,
    *,
    deepspeed: bool,
    workers: int = 0,
    seed_workers_by_dp_rank: bool = False,
    steps: int = 4,
    save_steps: int | None = None,
    resume: bool = False,
    callback_options: Mapping[str, Any] | None = None,
) -> tuple[list[Finding], int]:
    """Train with masked tokens; return the callback's findings, and how many steps were taken."""
    import torch
    from transformers import DataCollatorForLanguageModeling, LlamaForCausalLM, Trainer, TrainingArguments

    os.environ["LOCAL_RANK"] = str(rank.rank)
    args = TrainingArguments(
        f"{folder}/out",
        max_steps=steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        dataloader_num_workers=workers,
        dataloader_pin_memory=False,
        deepspeed=DEEPSPEED if deepspeed else None,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM.from_pretrained(folder, **({} if deepspeed else native_sharding(rank)))
    collator = DataCollatorForLanguageModeling(a_tokenizer(), mlm_probability=0.5)
    callback = tpcheck.TpcheckCallback(timeout=30, **(callback_options or {}))
    trainer = Trainer(model, args, train_dataset=Sentences(), data_collator=collator, callbacks=[callback])
    if seed_workers_by_dp_rank:
        seed_workers(trainer, rank)
    try:
        trainer.train(resume_from_checkpoint=f"{folder}/out/checkpoint-{save_steps}" if resume else None)
    except tpcheck.BatchMismatch as mismatch:
        return list(mismatch.report.findings), trainer.state.global_step
    return [], trainer.state.global_step


def native_sharding(rank: Rank) -> dict[str, Any]:
    """Return the arguments with which transformers shards a model. Its Trainer refuses CPUs, where they work."""
    from accelerate import ParallelismConfig
    from transformers.distributed import DistributedConfig

    ParallelismConfig._validate_accelerator = lambda *_: None
    return {"distributed_config": DistributedConfig(tp_size=rank.topology.tp, tp_plan="auto")}


def seed_workers(trainer: Any, rank: Rank) -> None:
    """Follow the advice: seed workers by dp_rank."""
    from transformers.trainer_utils import seed_worker

    build = trainer.get_train_dataloader

    def seeded_loader() -> Any:
        loader = build()
        loader.base_dataloader.worker_init_fn = partial(seed_worker, num_workers=loader.num_workers, rank=rank.dp_rank)
        return loader

    trainer.get_train_dataloader = seeded_loader
