"""transformers' Trainer on a tiny Llama under tensor parallelism, as a function that ranks run."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import tpcheck
from tpcheck import Finding, Rank
from tpcheck.lab.faults.datasets import Sentences
from tpcheck.lab.faults.pipelines import a_tokenizer

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
    watched: bool = True,
) -> tuple[list[Finding], int]:
    """Train with masked tokens; return what the callback found, and how many steps were taken."""
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
    model: Any = LlamaForCausalLM.from_pretrained(folder, **({} if deepspeed else natively(rank)))
    collator = DataCollatorForLanguageModeling(a_tokenizer(), mlm_probability=0.5)
    callbacks = [tpcheck.TpcheckCallback(timeout=30)] if watched else []
    trainer = Trainer(model, args, train_dataset=Sentences(), data_collator=collator, callbacks=callbacks)
    if seed_workers_by_dp_rank:
        reseed(trainer, rank)
    try:
        trainer.train(resume_from_checkpoint=f"{folder}/out/checkpoint-{save_steps}" if resume else None)
    except tpcheck.BatchMismatch as mismatch:
        return list(mismatch.report.findings), trainer.state.global_step
    return [], trainer.state.global_step


def natively(rank: Rank) -> dict[str, Any]:
    """Return how transformers shards a model by itself. Its Trainer refuses that on CPUs alone, though it works."""
    from accelerate import ParallelismConfig
    from transformers.distributed import DistributedConfig

    ParallelismConfig._validate_accelerator = lambda *_: None
    return {"distributed_config": DistributedConfig(tp_size=rank.topology.tp, tp_plan="auto")}


def reseed(trainer: Any, rank: Rank) -> None:
    """Follow the advice: workers seeded by dp_rank."""
    from transformers.trainer_utils import seed_worker

    build = trainer.get_train_dataloader

    def loader() -> Any:
        made = build()
        made.base_dataloader.worker_init_fn = partial(seed_worker, num_workers=made.num_workers, rank=rank.dp_rank)
        return made

    trainer.get_train_dataloader = loader
