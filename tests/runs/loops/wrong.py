"""Wrong training loops: `tpcheck compare` must catch each fault, at its place, with its cause where one is defined."""

from __future__ import annotations

from typing import Any

import torch

from tests.runs.loops import faults
from tests.runs.loops.engines import DeepSpeed
from tests.runs.loops.hand_written import Training
from tests.runs.loops.huggingface import CausalTraining, TransformersTp
from tests.runs.loops.llama_in_megatron import Llama, OneProjectionScaled
from tests.runs.loops.loop import Loop, Side, TrainingLike, Wrong
from tests.runs.loops.megatron_models import Megatron
from tests.runs.loops.right import ALONE, DP2, TP2, TP2_DP2, TP4, TP8, adamw
from tests.runs.loops.right_by_hand import ByDdp, ParameterGroups, SequentialModel, SumsBeforeTheStep, WithGradScaler
from tests.runs.loops.trainers import DecaysByDefault
from tpcheck import Topology

OUTPUTS, GRADIENTS, UPDATES = "outputs_match_reference", "gradients_match_reference", "updates_match_reference"
NORM, REPLICAS, WEIGHTS = "gradient_norm_matches_reference", "replicas_agree", "weights_match_reference"
STATES = "optimizer_state_matches_reference"


def wrong(
    name: str,
    training: type[TrainingLike],
    checks: str | tuple[str, ...],
    *names: str,
    cause: str | None = None,
    ranks: tuple[int, ...] | None = None,
    step: int | None = None,
    evidence: tuple[str, ...] = (),
    every_name: frozenset[str] = frozenset(),
    topology: Topology = TP2,
    expected: type[TrainingLike] = Training,
    expected_topology: Topology = ALONE,
    expected_options: dict[str, Any] | None = None,
    replays: int = 2,
    agreement: float | None = 1e-10,
    xfail: str | None = None,
    maps: tuple[str, ...] = (),
    **options: Any,
) -> Loop:
    """Return a row: `expected` is the loop without the fault, and has the same options unless others are given.

    Replays are made in the expected run: in the other, ranks that part would wait for each other.
    """
    other = {**options, **(expected_options or {})}
    return Loop(
        name,
        Side(training, topology, tuple(options.items())),
        Side(expected, expected_topology, tuple(other.items()), (("replays", replays),)),
        Wrong(
            (checks,) if isinstance(checks, str) else checks,
            names or ("*",),
            cause,
            ranks,
            step,
            evidence,
            every_name,
        ),
        agreement,
        xfail,
        maps,
    )


STEPS = (
    wrong("never steps", faults.NeverSteps, UPDATES, cause="stale_weight", ranks=(0, 1), step=0),
    wrong("omits its last step", faults.OmitsTheLastStep, UPDATES, cause="stale_weight", ranks=(0, 1), step=2, steps=3),
    wrong("one rank does not step", faults.OneRankDoesNotStep, UPDATES, cause="stale_weight", ranks=(1,), step=0),
    wrong(
        "a parameter missing from the optimizer",
        faults.ParameterMissingFromTheOptimizer,
        UPDATES,
        "blocks.1.up.weight",
        cause="stale_weight",
        step=0,
    ),
)

ACCUMULATION = (
    wrong(
        "loss not divided by the number of micro-batches",
        faults.NotDividedByMicroBatches,
        GRADIENTS,
        cause="gradient_scaled",
        step=0,
        accumulate=4,
    ),
    wrong(
        "loss not divided by the number of micro-batches, over replicas",
        faults.NotDividedByMicroBatches,
        GRADIENTS,
        cause="gradient_scaled",
        step=0,
        accumulate=2,
        topology=TP2_DP2,
    ),
    wrong("zero_grad forgotten", faults.ForgetsZeroGrad, GRADIENTS, step=1, accumulate=2),
    wrong(
        "gradients cleared before each micro-batch",
        faults.ClearsBeforeEachMicroBatch,
        GRADIENTS,
        cause="last_micro_batch_only",
        step=0,
        accumulate=2,
    ),
    wrong(
        "a micro-batch's gradient of norms not reduced",
        faults.LeavesMicroBatchUnreduced,
        GRADIENTS,
        "*norm*",
        "*down.bias",
        cause="micro_batch_unreduced",
        ranks=(0, 1),
        step=0,
        accumulate=2,
    ),
    wrong(
        "norms' accumulated gradients reduced at each micro-batch",
        faults.ReducesAfterAccumulation,
        GRADIENTS,
        "*norm*",
        "*down.bias",
        cause="reduced_after_accumulation",
        ranks=(0, 1),
        step=0,
        accumulate=2,
    ),
    wrong(
        "replicas' accumulated gradients reduced at each micro-batch",
        faults.ReducesReplicasAfterEachMicroBatch,
        GRADIENTS,
        cause="reduced_after_accumulation",
        step=0,
        accumulate=2,
        topology=DP2,
        expected_topology=ALONE,
    ),
    wrong(
        "no_sync around the last micro-batch",
        faults.LastBackwardWithoutSync,
        (GRADIENTS, REPLICAS),
        step=0,
        accumulate=2,
        topology=DP2,
        expected=ByDdp,
    ),
)

HEAD_NORMS = frozenset(f"model.layers.{layer}.self_attn.{kind}_norm.weight" for layer in (0, 1) for kind in "qk")

LIVE = (
    *(
        wrong(
            f"transformers' hooks at {accumulate} micro-batches",
            TransformersTp,
            GRADIENTS,
            "model.layers.*.self_attn.[qk]_norm.weight",
            cause="reduced_after_accumulation",
            ranks=(0, 1),
            step=0,
            every_name=HEAD_NORMS,
            expected=TransformersTp,
            family="qwen3",
            accumulate=accumulate,
        )
        for accumulate in (2, 4)
    ),
    wrong(
        "Megatron without the sum over one norm",
        faults.MegatronWithoutOneNorm,
        GRADIENTS,
        "decoder.layers.0.input_layernorm.weight",
        cause="partial_gradient_on_replica",
        ranks=(0, 1),
        step=0,
        every_name=frozenset({"decoder.layers.0.input_layernorm.weight"}),
        expected=Megatron,
        sequence=True,
        dtype=torch.float32,
        agreement=1e-5,
    ),
    *(
        wrong(
            f"DeepSpeed ZeRO {zero}: two backward passes, configured for one",
            faults.StepAfterAllBackwards,
            GRADIENTS,
            cause="last_micro_batch_only",
            step=0,
            topology=TP2_DP2,
            expected=DeepSpeed,
            dtype=torch.float32,
            agreement=1e-5,
            zero=zero,
            accumulate=2,
        )
        for zero in (1, 2)
    ),
    *(
        wrong(
            f"one output projection of 12 layers 8 % off, in bfloat16, against {text}, seed {seed}",
            faults.OneProjectionOff,
            OUTPUTS,
            "model.layers.9.self_attn.o_proj",
            step=0,
            expected=faults.NoProjectionOff,
            expected_topology=topology,
            kv_heads=kv_heads,
            model_seed=seed,
            agreement=None,
        )
        for seed in range(20)
        for text, topology, kv_heads in (("one rank", ALONE, 2), ("four shards", TP4, 4))
    ),
)

scaled: dict[str, Any] = {"loss_scale": 1024.0}

LOSS_SCALE = (
    wrong("unscaled twice", faults.UnscalesTwice, GRADIENTS, cause="gradient_scaled", step=0, **scaled),
    wrong(
        "not unscaled on one rank",
        faults.NotUnscaledOnOneRank,
        GRADIENTS,
        cause="gradient_scaled",
        ranks=(1,),
        step=0,
        **scaled,
    ),
    wrong(
        "hooks that halve gradients, dropped on one rank",
        faults.HooksDroppedOnOneRank,
        GRADIENTS,
        cause="gradient_scaled",
        ranks=(1,),
        step=0,
        every_name=frozenset({"blocks.1.norm.weight", "blocks.1.up.weight"}),
        expected=faults.HalvedByHooks,
    ),
    wrong(
        "gradient scalers that part",
        faults.ScalersPart,
        UPDATES,
        cause="stale_weight",
        ranks=(1,),
        step=1,
        expected=WithGradScaler,
        steps=3,
        dtype=torch.float32,
        agreement=1e-5,
    ),
    wrong("clipped before unscaling", faults.ClipsBeforeUnscaling, (GRADIENTS, NORM), step=0, clip=0.1, **scaled),
)

clipped: dict[str, Any] = {"clip": 0.1, "optimizer_options": (("lr", 1.0),)}
NORM_OR_GRADIENTS = (NORM, GRADIENTS)

NORMS = (
    wrong("each rank clips by its own norm", faults.LocalNorm, NORM_OR_GRADIENTS, cause="norm_is_local", **clipped),
    wrong(
        "norm counts replicas", faults.NormCountsReplicas, NORM_OR_GRADIENTS, cause="norm_counts_replicas", **clipped
    ),
    wrong(
        "norm leaves out shards",
        faults.NormLeavesOutShards,
        NORM_OR_GRADIENTS,
        cause="norm_leaves_out_shards",
        **clipped,
    ),
    wrong(
        "norm averaged over ranks", faults.NormAveraged, NORM_OR_GRADIENTS, cause="norm_averaged_over_ranks", **clipped
    ),
    wrong("norm summed over ranks", faults.NormSummed, NORM_OR_GRADIENTS, cause="norm_summed_over_ranks", **clipped),
)

OPTIMIZERS = (
    wrong(
        "one rank's scheduler ahead",
        faults.OneRankAhead,
        UPDATES,
        cause="options_differ",
        ranks=(1,),
        step=1,
        evidence=("lr",),
        is_scheduled=True,
    ),
    wrong(
        "scheduler off by one",
        faults.ScheduleOffByOne,
        UPDATES,
        cause="options_differ",
        step=0,
        evidence=("lr",),
        is_scheduled=True,
    ),
    wrong(
        "learning rate in a tensor, 1 % higher",
        Training,
        UPDATES,
        cause="options_differ",
        step=0,
        evidence=("lr_actual", "0.01009"),
        optimizer="AdamW",
        optimizer_options=(("lr", torch.tensor(0.0101)), ("foreach", False)),
        expected_options={"optimizer_options": (("lr", torch.tensor(0.01)), ("foreach", False))},
    ),
    wrong(
        "learning rate 1 % higher",
        Training,
        UPDATES,
        cause="options_differ",
        step=0,
        evidence=("lr", "0.101", "0.1"),
        optimizer_options=(("lr", 0.101),),
        expected_options={"optimizer_options": (("lr", 0.1),)},
    ),
    wrong(
        "other betas",
        Training,
        (UPDATES, STATES),
        evidence=("betas",),
        optimizer="AdamW",
        optimizer_options=(("lr", 1e-2), ("betas", (0.9, 0.95))),
        expected_options={"optimizer_options": (("lr", 1e-2), ("betas", (0.9, 0.999)))},
        steps=2,
    ),
    wrong(
        "other eps",
        Training,
        UPDATES,
        evidence=("eps",),
        optimizer="AdamW",
        optimizer_options=(("lr", 1e-2), ("eps", 1e-5)),
        expected_options={"optimizer_options": (("lr", 1e-2), ("eps", 1e-8))},
    ),
    wrong(
        "weight decay on norms",
        ParameterGroups,
        UPDATES,
        "*norm*",
        "*bias",
        evidence=("weight_decay",),
        step=0,
        expected=ParameterGroups,
        norm_decay=0.1,
        expected_options={"norm_decay": 0.0},
    ),
    wrong(
        "momentum on one side",
        Training,
        UPDATES,
        step=1,
        evidence=("momentum",),
        optimizer_options=(("lr", 0.1),),
        expected_options={"optimizer_options": (("lr", 0.1), ("momentum", 0.9))},
    ),
    wrong(
        "moments of another rank",
        faults.MomentsOfAnotherRank,
        (STATES, UPDATES),
        "*.up.*",
        "*.down.weight",
        cause="optimizer_state_of_another_rank",
        ranks=(1,),
        expected=faults.OwnMoments,
        **adamw,
    ),
    wrong(
        "moments of another rank in the middle",
        faults.MomentsTakenInTheMiddle,
        STATES,
        "*.up.*",
        "*.down.weight",
        cause="optimizer_state_of_another_rank",
        ranks=(1,),
        step=1,
        steps=3,
        expected=Training,
        **adamw,
    ),
    wrong(
        "moments of another rank between a backward pass and the step",
        faults.MomentsTakenBeforeTheStep,
        (STATES, UPDATES),
        "*.up.*",
        "*.down.weight",
        cause="optimizer_state_of_another_rank",
        ranks=(1,),
        step=1,
        steps=2,
        expected=Training,
        **adamw,
    ),
    wrong(
        "moments zeroed in the middle",
        faults.MomentsZeroedInTheMiddle,
        (STATES, UPDATES),
        cause="optimizer_state_lost",
        step=1,
        steps=2,
        expected=Training,
        **adamw,
    ),
    wrong(
        "moments lost",
        faults.MomentsLost,
        (STATES, UPDATES),
        cause="optimizer_state_lost",
        expected=faults.OwnMoments,
        **adamw,
    ),
    wrong("step count off by one", faults.StepCountOff, (STATES, UPDATES), expected=faults.OwnMoments, **adamw),
    wrong(
        "Muon on shards",
        faults.Muon,
        UPDATES,
        "*.up.weight",
        "*.down.weight",
        cause="optimizer_sees_one_shard",
        step=0,
        expected=faults.Muon,
        agreement=1e-3,
    ),
    wrong(
        "Adafactor on shards",
        faults.Adafactor,
        (UPDATES, STATES),
        "*.up.*",
        "*.down.weight",
        step=0,
        expected=faults.Adafactor,
    ),
    wrong(
        "stale masters",
        faults.StaleMasters,
        (WEIGHTS, UPDATES, STATES),
        cause="masters_stale",
        expected=faults.FreshMasters,
        zero=1,
        dtype=torch.bfloat16,
        agreement=1e-2,
    ),
)

SECOND_DOWN = "blocks.1.down"

COLLECTIVES = (
    wrong(
        "row-parallel layer not reduced",
        faults.UnreducedSecondRow,
        OUTPUTS,
        SECOND_DOWN,
        cause="missing_reduce",
        step=0,
    ),
    wrong(
        "row-parallel layer reduced twice",
        faults.TwiceReducedSecondRow,
        OUTPUTS,
        SECOND_DOWN,
        cause="duplicate_reduce",
        step=0,
    ),
    wrong(
        "row-parallel layer averaged",
        faults.AveragedSecondRow,
        OUTPUTS,
        SECOND_DOWN,
        cause="mean_instead_of_sum",
        step=0,
    ),
    wrong(
        "bias added by each rank",
        faults.BiasOnEachRankOfSecondRow,
        OUTPUTS,
        SECOND_DOWN,
        cause="bias_added_per_rank",
        step=0,
    ),
    *(
        wrong(
            f"bias added by each of eight ranks, against {text}",
            faults.BiasOnEachRankOfSecondRow,
            OUTPUTS,
            SECOND_DOWN,
            cause="bias_added_per_rank",
            step=0,
            topology=TP8,
            expected_topology=topology,
        )
        for text, topology in (("one", ALONE), ("two", TP2))
    ),
    wrong(
        "gradient hook missing on one norm of eight ranks, against two",
        faults.HookMissing,
        GRADIENTS,
        "blocks.1.norm.weight",
        cause="partial_gradient_on_replica",
        step=0,
        sequence=True,
        topology=TP8,
        expected_topology=TP2,
    ),
    wrong(
        "row-parallel layer summed over the world", faults.WorldReducedSecondRow, OUTPUTS, SECOND_DOWN, topology=TP2_DP2
    ),
    wrong(
        "column-parallel layer without its backward sum",
        faults.ColumnWithoutBackwardSum,
        GRADIENTS,
        "blocks.1.*",
        step=0,
    ),
    wrong(
        "loss without backward through all_reduce",
        faults.TrainsLossWithoutBackward,
        GRADIENTS,
        "head*",
        cause="collective_without_backward",
        step=0,
        vocabulary_parallel=True,
    ),
    wrong(
        "loss of the mean over ranks", faults.TrainsLossOverMean, OUTPUTS, "loss", "", step=0, vocabulary_parallel=True
    ),
    wrong(
        "loss over a wrong group",
        faults.TrainsLossOverWorld,
        (OUTPUTS, GRADIENTS),
        "loss",
        "",
        "head",
        step=0,
        topology=TP2_DP2,
        vocabulary_parallel=True,
    ),
    wrong(
        "loss whose gradient is summed over ranks",
        faults.TrainsLossGradientSummed,
        GRADIENTS,
        "head*",
        step=0,
        vocabulary_parallel=True,
    ),
    wrong(
        "mean of the replicas' means over unequal numbers of labels",
        faults.MeanOfLocalMeans,
        (OUTPUTS, GRADIENTS),
        cause="mean_of_local_means",
        step=0,
        topology=TP2_DP2,
        masked=True,
    ),
)

REPLICATED = (
    wrong("a norm drifts", faults.NormDrifts, UPDATES, "blocks.1.norm.weight", cause="replica_drift", steps=3),
    wrong(
        "gradient hook missing on one norm",
        faults.HookMissing,
        GRADIENTS,
        "blocks.1.norm.weight",
        cause="partial_gradient_on_replica",
        ranks=(0, 1),
        step=0,
        every_name=frozenset({"blocks.1.norm.weight"}),
        sequence=True,
    ),
    wrong(
        "gradient hook missing on one norm, over replicas",
        faults.HookMissing,
        GRADIENTS,
        "blocks.1.norm.weight",
        cause="partial_gradient_on_replica",
        step=0,
        sequence=True,
        accumulate=2,
        topology=TP2_DP2,
    ),
    wrong("broadcast missing at the start", faults.NotBroadcast, (WEIGHTS, REPLICAS), "norm.weight"),
    wrong(
        "replicas' gradients summed",
        faults.ReplicasSummed,
        GRADIENTS,
        cause="sum_instead_of_mean",
        step=0,
        topology=DP2,
    ),
    wrong("replicas' gradients not reduced", faults.ReplicasUnreduced, (GRADIENTS, REPLICAS), step=0, topology=TP2_DP2),
    wrong(
        "one parameter's gradient not reduced over replicas",
        faults.OneParameterUnreduced,
        (GRADIENTS, REPLICAS),
        "blocks.1.down.weight",
        step=0,
        topology=TP2_DP2,
    ),
    wrong(
        "sequence parallelism without any sum",
        faults.SumsNothing,
        GRADIENTS,
        "*norm*",
        "*down.bias",
        cause="partial_gradient_on_replica",
        ranks=(0, 1),
        step=0,
        expected=SumsBeforeTheStep,
        sequence=True,
    ),
)

OTHERS = (
    wrong(
        "a module that is not deterministic",
        faults.NondeterministicModule,
        OUTPUTS,
        "blocks.1.up",
        cause="nondeterminism",
        topology=TP2,
        expected=faults.Deterministic,
        expected_topology=TP2,
        replays=0,
        agreement=None,
    ),
    wrong(
        "nn.Sequential with another learning rate",
        SequentialModel,
        UPDATES,
        step=0,
        evidence=("0.011", "0.01"),
        topology=ALONE,
        expected=SequentialModel,
        optimizer_options=(("lr", 1.1e-2),),
        expected_options={"optimizer_options": (("lr", 1e-2),)},
    ),
    wrong(
        "weights of another seed",
        Training,
        (WEIGHTS, UPDATES),
        cause="drawn_separately",
        expected_options={"model_seed": 0},
        model_seed=1,
    ),
)

LIBRARIES = (
    wrong(
        "a Trainer whose rate falls by default",
        DecaysByDefault,
        UPDATES,
        cause="options_differ",
        step=1,
        evidence=("lr_actual", "0.05"),
        topology=ALONE,
        expected=CausalTraining,
        dtype=torch.float32,
        agreement=1e-5,
    ),
    wrong(
        "one projection of Llama in Megatron 8 % off, against transformers' Llama",
        OneProjectionScaled,
        OUTPUTS,
        "model.layers.1.self_attn.o_proj",
        step=0,
        expected=Llama,
        agreement=None,
        maps=("hf-megatron",),
    ),
)

LOOPS = (*STEPS, *ACCUMULATION, *LIVE, *LOSS_SCALE, *NORMS, *OPTIMIZERS, *COLLECTIVES, *REPLICATED, *OTHERS, *LIBRARIES)

# Variants of other rows, which `ci/loops` runs, and the suite does not.
SELDOM = frozenset(
    {
        "loss not divided by the number of micro-batches, over replicas",
        "transformers' hooks at 4 micro-batches",
        "DeepSpeed ZeRO 2: two backward passes, configured for one",
        *(
            f"one output projection of 12 layers 8 % off, in bfloat16, against {text}, seed {seed}"
            for seed in range(1, 20)
            for text in ("one rank", "four shards")
        ),
        "Adafactor on shards",
        "other eps",
        "momentum on one side",
        "gradient hook missing on one norm, over replicas",
        "replicas' gradients not reduced",
        "bias added by each rank",
        "bias added by each of eight ranks, against one",
        "bias added by each of eight ranks, against two",
        "gradient hook missing on one norm of eight ranks, against two",
        "moments of another rank in the middle",
        "moments zeroed in the middle",
        "step count off by one",
        "one rank's scheduler ahead",
        "learning rate in a tensor, 1 % higher",
        "loss whose gradient is summed over ranks",
    }
)
