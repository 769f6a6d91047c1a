"""Right training loops: `tpcheck compare` must pass each of them."""

from __future__ import annotations

from typing import Any

import torch

from tests.runs.loops import faults, huggingface
from tests.runs.loops import right_by_hand as by_hand
from tests.runs.loops.engines import DeepSpeed
from tests.runs.loops.hand_written import Training
from tests.runs.loops.huggingface import CausalTraining, DTensorTp, TransformersTp
from tests.runs.loops.llama_in_megatron import Llama, LlamaInMegatron
from tests.runs.loops.loop import Loop, Side, TrainingLike
from tests.runs.loops.megatron_models import Megatron
from tests.runs.loops.trainers import WithTrainer
from tpcheck import Topology

ALONE, TP2, TP4, TP8 = Topology(), Topology(tp=2), Topology(tp=4), Topology(tp=8)
DP2, TP2_DP2 = Topology(dp=2), Topology(tp=2, dp=2)


def right(
    name: str,
    training: type[TrainingLike],
    topology: Topology = TP2,
    *,
    expected: type[TrainingLike] | None = None,
    expected_topology: Topology = ALONE,
    expected_options: dict[str, Any] | None = None,
    replays: int = 2,
    replayed: str = "expected",
    agreement: float | None = 1e-12,
    xfail: str | None = None,
    names: tuple[str, ...] = (),
    **options: Any,
) -> Loop:
    """Return a row: the same training on one process is what is expected, unless something else is given.

    Replays are made in one of the two runs, the `expected` or the `actual`.
    """
    other = {**options, **(expected_options or {})}
    return Loop(
        name,
        Side(training, topology, tuple(options.items()), (("replays", replays * (replayed == "actual")),)),
        Side(
            expected or training,
            expected_topology,
            tuple(other.items()),
            (("replays", replays * (replayed == "expected")),),
        ),
        agreement=agreement,
        xfail=xfail,
        names=names,
    )


adamw: dict[str, Any] = {"optimizer": "AdamW", "optimizer_options": (("lr", 1e-2),)}
momentum: dict[str, Any] = {"optimizer_options": (("lr", 0.1), ("momentum", 0.9), ("weight_decay", 0.01))}

BY_HAND = (
    right("SGD", Training),
    right("momentum and weight decay", Training, steps=3, **momentum),
    right("four micro-batches against one", Training, accumulate=4, expected_options={"accumulate": 1}),
    right("four micro-batches on both sides", Training, accumulate=4),
    right("AdamW for 15 steps", Training, steps=15, agreement=1e-9, **adamw),
    right(
        "SGD with a rate of 0.5 for 40 steps",
        Training,
        steps=40,
        blocks=1,
        optimizer_options=(("lr", 0.5),),
        agreement=1e-9,
    ),
    right("AdamW in float32", Training, steps=3, dtype=torch.float32, agreement=1e-3, **adamw),
    right("parameter groups", by_hand.ParameterGroups, steps=3, agreement=1e-9),
    right("several optimizers with schedules", by_hand.SeveralOptimizers, steps=3, agreement=1e-9),
    right("Adagrad with a schedule", Training, steps=3, optimizer="Adagrad", is_scheduled=True, agreement=1e-9),
    right("clipping", Training, clip=0.01, accumulate=2, steps=3),
    right("clipping with AdamW over replicas", Training, TP2_DP2, clip=0.01, accumulate=2, agreement=1e-9, **adamw),
    right("GradScaler", by_hand.WithGradScaler, steps=3, dtype=torch.float32, agreement=1e-5, clip=0.01),
    right("GradScaler against none", by_hand.WithGradScaler, expected=Training, dtype=torch.float32, agreement=1e-5),
    right("GradScaler that skips a step", by_hand.WithGradScalerAndOverflow, dtype=torch.float32, agreement=1e-5),
    right("loss scale", Training, loss_scale=1024.0),
    right("loss scale against none", Training, loss_scale=1024.0, expected_options={"loss_scale": 1.0}),
    right("autocast to bfloat16", by_hand.Autocast, steps=3, agreement=None),
    right(
        "autocast to bfloat16 against float32",
        by_hand.Autocast,
        expected=Training,
        replayed="actual",
        dtype=torch.float32,
        agreement=None,
    ),
    right("bfloat16", Training, dtype=torch.bfloat16, steps=3, agreement=None),
    right("evaluation and generation in between", by_hand.Evaluated, accumulate=2),
    right("evaluation on one side", by_hand.Evaluated, expected=Training, accumulate=2, steps=3),
    right("steps left out", by_hand.SkipsSteps),
    right("frozen and unused parameters", by_hand.FrozenAndUnused, **momentum),
    right("pairs of calls with one loss", by_hand.Pairs, accumulate=2),
    right("shared submodules", Training, passes=2, accumulate=2),
    right("reentrant checkpointing", Training, checkpointing="reentrant"),
    right("checkpointing that is not reentrant", Training, checkpointing="non_reentrant"),
    right(
        "checkpointing against none", Training, checkpointing="non_reentrant", expected_options={"checkpointing": ""}
    ),
    right("compiled layers", Training, compiled=True),
    right("compiled layers against eager ones", Training, compiled=True, expected_options={"compiled": False}),
    right("dropout by the same generators", Training, dropout=0.2, steps=3),
    right("column-parallel layers in a ModuleDict", by_hand.InModuleDict),
    right("vocabulary-parallel loss", Training, vocabulary_parallel=True, masked=True, reduction="sum"),
    right("labels that are ignored, over micro-batches", Training, masked=True, reduction="sum", accumulate=4),
    right("labels that are ignored, over replicas", Training, TP2_DP2, masked=True, reduction="sum", accumulate=2),
    right("sequence parallelism, three steps of AdamW", Training, sequence=True, steps=3, agreement=1e-9, **adamw),
    right("sequence parallelism, accumulation", Training, TP2, sequence=True, accumulate=4, clip=0.01),
    right("sequence parallelism, gradients summed after one micro-batch", by_hand.HooksAfterAccumulation),
    right("sequence parallelism, gradients summed before the step", by_hand.SumsBeforeTheStep, accumulate=2),
    right("sequence parallelism over replicas", Training, TP2_DP2, sequence=True, accumulate=2, **momentum),
    right("tensor and data parallelism", Training, TP2_DP2, accumulate=2),
    right("DistributedDataParallel", by_hand.ByDdp, DP2, **momentum),
    right("DistributedDataParallel, no_sync", by_hand.ByDdp, DP2, accumulate=4, **momentum),
    right("DistributedDataParallel over tensor parallelism", by_hand.ByDdp, TP2_DP2, accumulate=2),
    right("two replicas against one", Training, DP2, expected_options={"accumulate": 2}),
    right("other order of samples", by_hand.OtherOrderOfSamples, expected=Training),
    right("recording that begins later", by_hand.FirstStepsUnrecorded, steps=3, agreement=1e-9, **adamw),
    right("four shards", Training, TP4, accumulate=2),
    right("two shards against four", Training, TP2, expected_topology=TP4),
    right("four shards against two, sequence parallelism", Training, TP4, expected_topology=TP2, sequence=True),
    right("eight shards, AdamW", Training, TP8, agreement=1e-9, **adamw),
    right("eight shards against two, sequence parallelism", Training, TP8, expected_topology=TP2, sequence=True),
    right(
        "two shards against the same two", Training, TP2, expected_topology=TP2, replays=0, agreement=0.0, **momentum
    ),
    right("replicas of shards against shards", Training, TP2_DP2, expected_topology=TP2, accumulate=2),
    right("losses and counters in attributes of modules", by_hand.LossesInAttributes, steps=3, accumulate=2),
    right("optimizers that step in the backward pass", by_hand.StepsInBackward, steps=3),
    right(
        "Adafactor over replicas", Training, DP2, steps=3, optimizer="Adafactor", dtype=torch.float32, agreement=1e-4
    ),
    right("nn.Sequential without ranks", by_hand.SequentialModel, ALONE, replays=0, agreement=0.0),
)

TRANSFORMERS = (
    right("transformers' TP: llama, SGD", TransformersTp),
    right(
        "transformers' TP: llama, momentum, clipping, accumulation", TransformersTp, accumulate=2, clip=0.1, **momentum
    ),
    right("transformers' TP: llama with tied embeddings", TransformersTp, tied=True),
    right("transformers' TP: llama in float32, AdamW", TransformersTp, dtype=torch.float32, agreement=1e-3, **adamw),
    right("transformers' TP: qwen3, SGD", TransformersTp, family="qwen3"),
    right(
        "transformers' TP: qwen3 in float32, AdamW",
        TransformersTp,
        family="qwen3",
        dtype=torch.float32,
        agreement=1e-3,
        **adamw,
    ),
    right(
        "transformers' TP: qwen3, gradients reduced at once, two micro-batches",
        huggingface.HeadNormsReducedAtOnce,
        accumulate=2,
    ),
    right("transformers' TP: generation in between", huggingface.Generating, accumulate=2),
    right("transformers' TP: compiled layers", TransformersTp, compiled=True),
    right(
        "transformers' TP: sdpa against eager",
        TransformersTp,
        dtype=torch.float32,
        agreement=1e-5,
        attention="sdpa",
        expected_options={"attention": "eager"},
    ),
    right("transformers' TP: autocast", huggingface.TransformersTpAutocast, dtype=torch.float32, agreement=None),
    right("transformers' TP: bfloat16", TransformersTp, dtype=torch.bfloat16, agreement=None),
    right(
        "transformers' TP: four shards against two",
        TransformersTp,
        TP4,
        expected_topology=TP2,
        family="qwen3",
        kv_heads=4,
    ),
    *(
        right(
            f"transformers' TP: 12 layers in bfloat16, seed {seed}",
            faults.NoProjectionOff,
            model_seed=seed,
            seed=seed,
            agreement=None,
        )
        for seed in range(20)
    ),
    right("transformers' TP over FSDP2", TransformersTp, TP2_DP2, accumulate=2),
    right("PEFT adapters over transformers' TP", huggingface.Adapters, **momentum),
    right("PEFT adapters on one process against itself", huggingface.Adapters, ALONE, replays=0, agreement=0.0),
)

TORCH = (
    right("DTensor plan: llama", DTensorTp),
    right("DTensor plan: sequence parallelism", huggingface.DTensorSequence, accumulate=2),
    right("FSDP2", DTensorTp, DP2, accumulate=2, **momentum),
    right("FSDP2 that reduces with the last micro-batch", huggingface.SyncsAtTheLast, DP2, accumulate=2, **momentum),
    right("FSDP2 over a DTensor plan, each replica its half", DTensorTp, TP2_DP2, accumulate=2, **momentum),
    right("FSDP2 over a DTensor plan, each replica the whole batch", huggingface.WholeBatchOnEachReplica, TP2_DP2),
    right("accelerate over replicas", huggingface.WithAccelerate, DP2, accumulate=2, clip=0.1),
)


def deepspeed(
    name: str, topology: Topology, dtype: torch.dtype = torch.float64, clip: float = 1.0, **options: Any
) -> Loop:
    """Return a row of an engine: in float32 against a plain loop, else against an engine of one process.

    In float64 ZeRO keeps float32 masters, and every engine clips by a float32 factor: a plain loop differs by 1e-8. No
    replays are possible at ZeRO 3.
    """
    record, replayed = (("replays", 0),), (("replays", 2),)
    common = {**options, **adamw, "dtype": dtype, "clip": clip}
    plain = {key: value for key, value in common.items() if key != "zero"}
    engine = {**plain, "zero": min(options.get("zero", 0), 1)}
    expected = Side(DeepSpeed, ALONE, tuple(engine.items()), replayed)
    if dtype is torch.float32:
        expected = Side(CausalTraining, ALONE, tuple(plain.items()), replayed)
    is_double = not (options.get("zero") or clip)
    agreement = {torch.float64: 1e-9 if is_double else 1e-6, torch.float32: 1e-3}.get(dtype)
    return Loop(
        f"DeepSpeed: {name}",
        Side(DeepSpeed, topology, tuple(common.items()), record),
        expected,
        agreement=agreement,
    )


def deepspeed_against_plain(name: str, topology: Topology, **options: Any) -> Loop:
    """Return a row of an engine in float64 against a plain loop in float32, or of one in the lower precision.

    Inside the engine gradients, masters and the norm are float32: the plain loop is recorded in that.
    """
    common = {**options, **adamw}
    plain = {key: value for key, value in common.items() if key != "zero"} | {"dtype": torch.float32}
    return Loop(
        f"DeepSpeed against a plain loop: {name}",
        Side(DeepSpeed, topology, tuple(common.items()), (("replays", 0),)),
        Side(CausalTraining, ALONE, tuple(plain.items()), (("replays", 2),)),
        agreement=1e-3,
    )


DEEPSPEED = (
    deepspeed_against_plain("float64, ZeRO 1, clipping", TP2, zero=1, clip=0.1),
    deepspeed_against_plain("float64, ZeRO 0, clipping, two micro-batches", TP2, clip=0.1, accumulate=2),
    deepspeed("float64, ZeRO 0, clipping", TP2, clip=0.1),
    deepspeed("float32, ZeRO 0, clipping, over replicas", TP2_DP2, torch.float32, clip=0.1),
    deepspeed("float64", TP2, clip=0.0),
    deepspeed("float64, two micro-batches", TP2, clip=0.0, accumulate=2),
    deepspeed("float64 over replicas", TP2_DP2, clip=0.0),
    deepspeed("float64, ZeRO 1, two micro-batches, over replicas", TP2_DP2, zero=1, accumulate=2),
    deepspeed("float64, ZeRO 2, four micro-batches, over replicas", TP2_DP2, zero=2, accumulate=4),
    deepspeed("float64, ZeRO 3, two micro-batches, over replicas", TP2_DP2, zero=3, accumulate=2),
    deepspeed("float64, ZeRO 3", TP2, zero=3),
    deepspeed("float32, ZeRO 1", TP2, torch.float32, zero=1),
    deepspeed("float32, ZeRO 3 over replicas", TP2_DP2, torch.float32, zero=3, accumulate=2),
    deepspeed("bfloat16, ZeRO 1", TP2, torch.bfloat16, zero=1),
    deepspeed("bfloat16, ZeRO 2, two micro-batches, over replicas", TP2_DP2, torch.bfloat16, zero=2, accumulate=2),
    deepspeed("bfloat16, ZeRO 3 over replicas", TP2_DP2, torch.bfloat16, zero=3),
    deepspeed("float16, ZeRO 1", TP2, torch.float16, zero=1),
    deepspeed("float16, ZeRO 1, a first step that overflows", TP2, torch.float16, zero=1, scale_power=19, steps=3),
)

MEGATRON = (
    right("Megatron", Megatron, dtype=torch.float32, agreement=1e-5, **momentum),
    right(
        "Megatron, sequence parallelism",
        Megatron,
        dtype=torch.float32,
        agreement=1e-5,
        sequence=True,
    ),
    right(
        "Megatron, sequence parallelism over replicas, accumulation, AdamW",
        Megatron,
        TP2_DP2,
        sequence=True,
        accumulate=2,
        dtype=torch.float32,
        agreement=1e-3,
        **adamw,
    ),
)

LIBRARIES_COMPARED = (
    right(
        "Llama in Megatron against transformers' Llama",
        LlamaInMegatron,
        expected=Llama,
        agreement=None,
        names=("hf-megatron",),
        **momentum,
    ),
)

TRAINERS = (
    right(
        "transformers' Trainer against a plain loop",
        WithTrainer,
        ALONE,
        expected=CausalTraining,
        dtype=torch.float32,
        agreement=1e-6,
    ),
)

FLOAT16 = (
    right(
        "autocast to float16 with GradScaler",
        by_hand.AutocastFloat16,
        steps=3,
        agreement=None,
    ),
    right("a compiled model under transformers' TP", huggingface.CompiledModel, accumulate=2),
)

LOOPS = (*BY_HAND, *TRANSFORMERS, *TORCH, *DEEPSPEED, *MEGATRON, *LIBRARIES_COMPARED, *TRAINERS, *FLOAT16)

# Variants of other rows, which `ci/loops` runs, and the suite does not.
SELDOM = frozenset(
    {
        "four micro-batches on both sides",
        "a compiled model under transformers' TP",
        "SGD with a rate of 0.5 for 40 steps",
        "parameter groups",
        "Adagrad with a schedule",
        "GradScaler that skips a step",
        "loss scale against none",
        "shared submodules",
        "column-parallel layers in a ModuleDict",
        "sequence parallelism over replicas",
        "tensor and data parallelism",
        "two replicas against one",
        "transformers' TP: llama, momentum, clipping, accumulation",
        "transformers' TP: llama in float32, AdamW",
        "DeepSpeed: float64, two micro-batches",
        "DeepSpeed: float32, ZeRO 0, clipping, over replicas",
        "DeepSpeed: float32, ZeRO 3 over replicas",
        "DeepSpeed: float16, ZeRO 1",
        "DeepSpeed against a plain loop: float64, ZeRO 1, clipping",
        "autocast to float16 with GradScaler",
        "transformers' TP: compiled layers",
        "DeepSpeed: float64, ZeRO 1, two micro-batches, over replicas",
        "Megatron",
        "GradScaler",
        "loss scale",
        "autocast to bfloat16 against float32",
        "evaluation on one side",
        "checkpointing against none",
        "compiled layers against eager ones",
        "labels that are ignored, over micro-batches",
        "sequence parallelism, three steps of AdamW",
        "sequence parallelism, gradients summed after one micro-batch",
        "DistributedDataParallel, no_sync",
        "DistributedDataParallel over tensor parallelism",
        "four shards",
        "four shards against two, sequence parallelism",
        "eight shards, AdamW",
        "eight shards against two, sequence parallelism",
        "replicas of shards against shards",
        "transformers' TP: llama with tied embeddings",
        "transformers' TP: qwen3 in float32, AdamW",
        "transformers' TP: generation in between",
        "transformers' TP: sdpa against eager",
        "transformers' TP: autocast",
        "transformers' TP: bfloat16",
        "transformers' TP: four shards against two",
        *(f"transformers' TP: 12 layers in bfloat16, seed {seed}" for seed in range(1, 20)),
        "PEFT adapters on one process against itself",
        "FSDP2",
        "FSDP2 that reduces with the last micro-batch",
        "FSDP2 over a DTensor plan, each replica the whole batch",
        "DeepSpeed: float64 over replicas",
        "DeepSpeed: float64, ZeRO 2, four micro-batches, over replicas",
        "DeepSpeed: float64, ZeRO 3",
        "DeepSpeed: float32, ZeRO 1",
        "DeepSpeed: bfloat16, ZeRO 1",
        "DeepSpeed: bfloat16, ZeRO 3 over replicas",
        "Megatron, sequence parallelism over replicas, accumulation, AdamW",
    }
)
