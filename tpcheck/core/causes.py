"""The catalogue of causes: one row each, with its name, what its test has shown, where the test is, what to change.

A cause is named only where its own numerical test holds. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from tpcheck.core.guides import GUIDE_OF_CHECK, Guide
from tpcheck.core.name_maps import without_numbers
from tpcheck.core.topology import Topology

Advice = str | Callable[[Mapping[str, Any], Topology], str]

_OF_FILES = ("checkpoints", "numerics.exact")  # a cause that is tested there has advice on what is saved or converted

_SEED_FUNCTIONS = {
    "python": "random.seed",
    "numpy": "np.random.seed",
    "torch": "torch.manual_seed",
    "cuda": "torch.cuda.manual_seed",
}


def _seed_generator(kind: str) -> Callable[[Mapping[str, Any], Topology], str]:
    def advice(evidence: Mapping[str, Any], topology: Topology) -> str:
        attribute = next((name.partition(":")[2] for name in evidence["generators"][:1] if ":" in name), None)
        if attribute is not None:
            return f"Seed {attribute} from seed + dp_rank, which all ranks of a TP group share."
        if evidence["where"] == "workers":
            return (
                "Seed workers by dp_rank, not by rank: pass `generator=torch.Generator().manual_seed(seed + dp_rank)` "
                "to the loader, from which torch seeds each worker. A worker_init_fn that seeds calls "
                f"`{_SEED_FUNCTIONS[kind]}(seed + 1000 * dp_rank + worker_id)`."
            )
        if kind == "torch":
            return (
                "Draw from a separate generator, `torch.Generator().manual_seed(seed + dp_rank)`: dropout advances the "
                "global one differently on each rank."
            )
        call = f"{_SEED_FUNCTIONS[kind]}(seed + dp_rank)"
        return f"Call `{call}` on every rank before iterating the loader, or draw from a generator with that seed."

    return advice


def _assign_by_dp_rank(evidence: Mapping[str, Any], topology: Topology) -> str:
    if evidence.get("dispatch_batches") is True:
        return (
            "Currently every replica gets the same batch: pass dispatch_batches=False and give each replica its "
            "samples by dp_rank."
        )
    if evidence.get("iterable") is True:
        return f"Shard the IterableDataset: sample i belongs to replica i % {topology.dp} == dp_rank."
    return f"Build the sampler with num_replicas={topology.dp}, rank=dp_rank, and one seed on all replicas."


def _shuffle_equally(evidence: Mapping[str, Any], topology: Topology) -> str:
    if "epoch" in evidence and not {"sampler_seed", "generator_seed", "drawn_from"} & evidence.keys():
        return "Call the sampler's `set_epoch` with the same number on all ranks: their seeds are equal."
    return (
        "Give the sampler one seed on all ranks: `RandomSampler(dataset, "
        "generator=torch.Generator().manual_seed(seed))`, and the same `set_epoch` on all."
    )


def _shard_by_dp_rank(evidence: Mapping[str, Any], topology: Topology) -> str:
    if evidence.get("iterable") is True:
        return (
            f"Give every rank of a TP group the same samples of the IterableDataset: sample i belongs to replica "
            f"i % {topology.dp} == dp_rank."
        )
    return (
        f"Build the sampler with num_replicas={topology.dp} and rank=dp_rank; with accelerate, prepare the loader "
        "after the engine's device mesh exists (`prepare`, not `prepare_data_loader` before it)."
    )


def _give_once(evidence: Mapping[str, Any], topology: Topology) -> str:
    if evidence.get("workers"):
        return (
            "Split the stream over the workers: in `__iter__` of the IterableDataset, let "
            "`info = torch.utils.data.get_worker_info()`, and yield sample i where `i % info.num_workers == info.id`."
        )
    return (
        "Look where the loader goes back: a state that is restored twice or from before the last batches, a buffer "
        'that is not emptied. Where the samples are to come again, pass over_steps="ignore".'
    )


def _assign_by_name(evidence: Mapping[str, Any], topology: Topology) -> str:
    name, other = (without_numbers(str(evidence.get(key, ""))) for key in ("parameter", "equals"))
    if name == other or not evidence.get("parameter"):
        return "Renumber the layers or experts: a pipeline stage, a rank or a name map counts them from another start."
    return "Correct the name map: it gives this parameter the tensor of another one."


def _gather_each_shard_once(evidence: Mapping[str, Any], topology: Topology) -> str:
    if evidence.get("copies"):
        return "Several ranks hold each shard, as of fewer key-value heads than ranks: gather it from one of them."
    return "One rank's shard is used for all: gather over the TP group and index by tp_rank."


def _save_or_rename(evidence: Mapping[str, Any], topology: Topology) -> str:
    if evidence.get("fitting_map"):
        return f"More names have a counterpart under a ready map: pass --map {evidence['fitting_map']}."
    if evidence.get("stands_as"):
        return "Rename it when saving or loading; to compare all the same, pass --map 'REGEX=REPLACEMENT'."
    return "Save it: persistent buffers and frozen parameters belong to the model, too."


def _sort_listings(evidence: Mapping[str, Any], topology: Topology) -> str:
    if evidence.get("hash_differs"):
        return "Sort a set before iterating over it, or set PYTHONHASHSEED to one value on all ranks."
    return "Sort file names and other listings before they are indexed: `sorted(os.listdir(...))`."


class Cause(Enum):
    """A named explanation of a finding.

    Attributes:
        slug: Its stable name, as `Finding.cause` and JSON have it.
        sentence: What its test has shown. `cause_text` replaces `{residual}` by " to 3.9e-16" (the relative error that
            remained), " to the bit" (0) or nothing (unknown): "equals the expected one to 3.9e-16".
        diagnosed_in: The modules and packages of `tpcheck` with the numerical tests that name it.
        guide: Where to read on; None where the guide of the check that failed is the right one (`guide_of`).

    The fourth column is what to change, a sentence or a function of the evidence and the topology: see `advise`.
    """

    def __init__(
        self, slug: str, sentence: str, diagnosed_in: str, advice: Advice = "", guide: Guide | None = None
    ) -> None:
        self.slug = slug
        self.sentence = sentence
        self.diagnosed_in = tuple(diagnosed_in.split())
        self._advice = advice
        self.guide = guide

    def advise(self, evidence: Mapping[str, Any] | None = None, topology: Topology | None = None) -> str | None:
        """Return what to change, for this evidence on this topology; None where that depends on the code at fault."""
        advice = self._advice if isinstance(self._advice, str) else self._advice(evidence or {}, topology or Topology())
        return advice or None

    def advise_training(self, evidence: Mapping[str, Any] | None = None) -> str | None:
        """Return what to change in a training; None also where the advice is on tensors in files."""
        is_of_files = any(place.startswith(_OF_FILES) for place in self.diagnosed_in)
        return None if is_of_files else self.advise(evidence)

    # ---- layout
    WRONG_GROUP = (
        "wrong_group",
        "the group that is used is not the declared one",
        "numerics.hypotheses.layout numerics.hypotheses.reductions",
        "",
        Guide.WHICH_RANKS,
    )
    NOT_SHARDED = (
        "not_sharded",
        "the parameters have their full shape on every rank",
        "numerics.hypotheses.layout numerics.exact",
        "Gather only what the plan shards: every rank holds the full parameter, and its copies were concatenated.",
        Guide.WHICH_MODELS,
    )
    # How DeepSpeed gathers is that of 0.17 to 0.19: facts of its engine.py.
    SHARD_MISSING = (
        "shard_missing",
        "one rank's shard is missing",
        "numerics.hypotheses.layout numerics.exact",
        "DeepSpeed: gather each module's parameters by deepspeed.module_inject.layers.GatherReplacedLayerParams on all "
        "ranks, and save what rank 0 has; save_16bit_model writes only TP rank 0's shards below ZeRO 3. transformers: "
        "use save_pretrained.",
        Guide.SAVED_MODEL,
    )
    SHARD_REPEATED = (
        "shard_repeated",
        "one rank's shard is in every rank's place{residual}",
        "numerics.hypotheses.layout numerics.hypotheses.optimizer numerics.exact runs.comparing.sketch_causes "
        "numerics.checks.resume numerics.checks.initialisation",
        _gather_each_shard_once,
    )
    SHARD_ORDER_SWAPPED = (
        "shard_order_swapped",
        "the shards in another order of ranks equal the expected tensor{residual}",
        "numerics.hypotheses.layout numerics.hypotheses.optimizer numerics.exact runs.comparing.sketch_causes",
        "Concatenate the shards in the order of tp_rank, not of world rank or of file names.",
    )
    FUSED_BLOCKS_INTERLEAVED = (
        "fused_blocks_interleaved",
        "fused blocks (QKV, gate and up) are cut in one order and read in another",
        "numerics.hypotheses.layout numerics.exact runs.comparing.full_causes",
        "Cut and gather block by block (Q, K, V; gate, up): each rank holds a part of each block, as `packed_colwise` "
        "cuts; to gather, split each rank's part into blocks first.",
    )
    WRONG_SHARD_BOUNDARY = (
        "wrong_shard_boundary",
        "the shards were cut at another boundary{residual}",
        "numerics.hypotheses.layout numerics.exact",
        "Cut and gather at the same boundaries: ceil-sized chunks on one side and heads on the other do not match.",
    )
    HEAD_MAPPING_WRONG = (
        "head_mapping_wrong",
        "using another rank's heads reproduces the expected tensor{residual}",
        "numerics.hypotheses.layout numerics.hypotheses.weights",
    )
    VOCAB_OFFSET_WRONG = (
        "vocab_offset_wrong",
        "token ids shifted by another rank's vocabulary offset give the actual tensor{residual}",
        "numerics.hypotheses.vocabulary numerics.exact",
        "Remove the padding of the vocabulary from each rank's shard before concatenating them.",
    )
    TENSOR_OF_ANOTHER_LAYER = (
        "tensor_of_another_layer",
        "the actual tensor equals the expected one of another layer{residual}",
        "numerics.hypotheses.gradients numerics.exact numerics.checks.resume",
        _assign_by_name,
    )
    GATE_UP_EXCHANGED = (
        "gate_up_exchanged",
        "the gate's rows are in the place of up's, and up's in the place of the gate's",
        "numerics.exact",
        "Keep the order of gate and up: gate (w1) first, then up (w3), each under its own name, in the converter, the "
        "name map and where fused weights are cut.",
    )
    KEY_VALUE_EXCHANGED = (
        "key_value_exchanged",
        "the rows of the keys are in the place of the values', and the other way round",
        "numerics.exact",
        "Keep the order of Q, K, V, each under its own name, in the converter, the name map and where fused weights "
        "are cut.",
    )
    ROTARY_LAYOUT = (
        "rotary_layout",
        "within each head, the rows are in the other order of rotary embeddings (pairs next to each other, or half a "
        "head apart)",
        "numerics.exact",
        "Reorder the rows of queries and keys head by head when converting, as `permute` in transformers' "
        "convert_llama_weights_to_hf.py does, or set the model's rotary embedding to the checkpoint's convention.",
    )

    # ---- reductions
    MISSING_REDUCE = (
        "missing_reduce",
        "leaving out the reduction over the ranks gives the actual tensor{residual}",
        "numerics.hypotheses.accumulation numerics.hypotheses.reductions numerics.hypotheses.vocabulary "
        "runs.comparing.sketch_causes",
    )
    DUPLICATE_REDUCE = (
        "duplicate_reduce",
        "reducing over the ranks once more gives the actual tensor{residual}",
        "numerics.hypotheses.parts_of_sums numerics.hypotheses.reductions numerics.hypotheses.vocabulary "
        "numerics.exact runs.comparing.sketch_causes",
        "Do not sum replicas: gather shards, take replicas from one rank.",
    )
    MEAN_INSTEAD_OF_SUM = (
        "mean_instead_of_sum",
        "a mean over the ranks in place of the sum gives the actual tensor{residual}",
        "numerics.hypotheses.reductions runs.comparing.sketch_causes",
    )
    SUM_INSTEAD_OF_MEAN = (
        "sum_instead_of_mean",
        "a sum over the DP ranks in place of the mean gives the actual tensor{residual}",
        "numerics.hypotheses.reductions runs.comparing.sketch_causes",
    )
    BIAS_ADDED_PER_RANK = (
        "bias_added_per_rank",
        "adding the bias more than once reproduces the actual tensor{residual}",
        "numerics.hypotheses.reductions runs.comparing.sketch_causes",
    )

    REDUCED_AFTER_ACCUMULATION = (
        "reduced_after_accumulation",
        "reducing the accumulated gradient again at each micro-batch gives the actual one{residual}",
        "numerics.hypotheses.accumulation runs.comparing.sketch_causes",
        "Reduce each micro-batch's own gradient (a hook on the incoming gradient), or the accumulated one once, before "
        "the optimizer's step: a post-accumulate-grad hook sees what was reduced before.",
    )
    LAST_MICRO_BATCH_ONLY = (
        "last_micro_batch_only",
        "the gradient is that of the last micro-batch alone{residual}",
        "numerics.hypotheses.accumulation runs.comparing.sketch_causes",
        "Accumulate before the step: with DeepSpeed set gradient_accumulation_steps to the number of backward calls.",
    )
    MICRO_BATCH_UNREDUCED = (
        "micro_batch_unreduced",
        "the gradients of some micro-batches were not reduced over the ranks, those of others were{residual}",
        "numerics.hypotheses.accumulation runs.comparing.sketch_causes",
        "Reduce once after the last backward pass; a no_sync context must not enclose that pass.",
    )
    MEAN_OF_LOCAL_MEANS = (
        "mean_of_local_means",
        "micro-batches or replicas with different numbers of tokens were given equal weights",
        "numerics.hypotheses.accumulation runs.comparing.sketch_causes",
        "Divide the sum of the losses by the number of labels of the whole step (num_items_in_batch), not each by its "
        "own.",
    )

    TOKEN_MEAN_INSTEAD_OF_MEAN = (
        "token_mean_instead_of_mean",
        "the loss is divided by the number of labels of the whole step, the reference's by that of each micro-batch",
        "numerics.hypotheses.accumulation",
        'Verify with loss="token_mean" if the mean over all labels of the step is what you mean.',
    )

    # ---- gradients, norms, replicas
    PARTIAL_GRADIENT_ON_REPLICA = (
        "partial_gradient_on_replica",
        "the sum of the ranks' gradients equals the expected one{residual}",
        "numerics.hypotheses.reductions runs.comparing.sketch_causes",
    )
    GRADIENT_MISSING = (
        "gradient_missing",
        "no gradient comes back on these ranks, or to a part of the tensor, where the reference has one",
        "numerics.hypotheses.gradients runs.comparing.sketch_causes runs.comparing.step_checks",
        "Look for what cuts it off: a detach(), .data or torch.no_grad() in the forward pass, a tensor that is built "
        "anew from numbers, requires_grad=False, or a hook that returns zeros.",
    )
    COLLECTIVE_WITHOUT_BACKWARD = (
        "collective_without_backward",
        "the gradient lacks what should come back through a sum over the ranks in the forward pass: a rank has its own "
        "term alone, or none{residual}",
        "numerics.hypotheses.gradients numerics.hypotheses.parts_of_sums runs.comparing.sketch_causes "
        "runs.comparing.backward_sums runs.comparing.full_causes",
        "torch.distributed.all_reduce is no autograd operation: put it into a torch.autograd.Function, whose backward "
        "returns the gradient as it is where every rank has all of it, and sums it where each has a term. Give it the "
        "tensor itself, not a detached one.",
    )
    USE_OF_MODULE_LOST = (
        "use_of_module_lost",
        "the gradient without that of some uses of a module that is used several times is the actual one{residual}",
        "numerics.hypotheses.parts_of_sums",
        "Add the gradients of all uses before one is reduced or written: a hook on accumulation, or a backward that "
        "writes to .grad or main_grad, must add to what is there.",
    )
    GRADIENT_SCALED = (
        "gradient_scaled",
        "the actual gradient equals the expected one times a constant{residual}",
        "numerics.hypotheses.gradients numerics.hypotheses.optimizer runs.comparing.sketch_causes "
        "runs.comparing.step_checks",
    )
    NORM_IS_LOCAL = (
        "norm_is_local",
        "the norm is that of one rank's own gradients{residual}",
        "numerics.norms",
        "Sum the squares of all shards over the TP group, and count replicated parameters once.",
    )
    NORM_COUNTS_REPLICAS = (
        "norm_counts_replicas",
        "counting replicated parameters once for each rank gives the actual norm{residual}",
        "numerics.norms",
        "Sum the squares of shards over the TP group, not over all ranks, and add those of replicated parameters once.",
    )
    NORM_LEAVES_OUT_SHARDS = (
        "norm_leaves_out_shards",
        "the norm of some ranks' or parameters' gradients alone is the actual one{residual}",
        "numerics.norms",
        "Sum the squares of all shards over the TP group, and count replicated parameters once.",
    )
    NORM_AVERAGED_OVER_RANKS = (
        "norm_averaged_over_ranks",
        "averaging the ranks' norms gives the actual norm{residual}",
        "numerics.norms",
        "Sum the squares of the norms over the ranks, then take the root.",
    )
    NORM_SUMMED_OVER_RANKS = (
        "norm_summed_over_ranks",
        "adding up the ranks' norms gives the actual norm{residual}",
        "numerics.norms",
        "Sum the squares of the norms over the ranks, then take the root.",
    )
    STATISTIC_OVER_ONE_SHARD = (
        "statistic_over_one_shard",
        "each rank's part alone gives the actual tensor{residual}: a mean, maximum or top-k is taken over one shard",
        "numerics.hypotheses.parts_of_sums",
        "Reduce the statistic over the TP group (the sum of squares and the count, the maximum and the sum of "
        "exponentials), or gather the features before it.",
    )
    NORM_OF_WRONG_ORDER = (
        "norm_of_wrong_order",
        "a norm of another order than 2 is the actual one{residual}",
        "numerics.norms",
        "Clip by the 2-norm: the root of the sum of the squares of all elements, or of the parameters' 2-norms.",
    )
    NORM_WITHOUT_ROOT = (
        "norm_without_root",
        "the square of the expected norm is the actual one{residual}",
        "numerics.norms",
        "Take the root of the sum of squares, once, after it was summed over the TP group.",
    )
    NORM_BEFORE_UNSCALING = (
        "norm_before_unscaling",
        "the norm is that of gradients that were not yet divided by a factor{residual}",
        "numerics.norms",
        "Take the norm after gradients were divided by the loss scale, the micro-batches and the replicas, and before "
        "they are clipped.",
    )
    NORM_AFTER_CLIPPING = (
        "norm_after_clipping",
        "the norm is that of the gradients after they were clipped{residual}",
        "numerics.norms",
        "Report the norm that clipping returns; one taken from the gradients after it is the largest norm allowed.",
    )
    REPORTED_NORM_WRONG = (
        "reported_norm_wrong",
        "the step was clipped by the right norm, only what is reported is wrong",
        "numerics.hypotheses.optimizer",
        "Report the norm that the gradients were clipped by.",
    )
    CLIPPED_PER_GROUP = (
        "clipped_per_group",
        "groups of parameters were clipped each by the norm of its own gradients{residual}",
        "numerics.hypotheses.optimizer",
        "Clip all parameters in one call, by the norm of all gradients.",
    )
    CLIP_EPSILON_DIFFERS = (
        "clip_epsilon_differs",
        "the right norm and another epsilon, added to it before the division, give this step{residual}",
        "numerics.hypotheses.optimizer",
        "Add no more than 1e-6 to the norm, as torch.nn.utils.clip_grad_norm_ does: more changes the step.",
    )
    REPLICA_DRIFT = (
        "replica_drift",
        "the replicas were equal and have drifted apart",
        "numerics.hypotheses.optimizer checkpoints runs.comparing.exact_checks runs.guarding.findings "
        "runs.comparing.update_checks",
        "Find out why the replicas drift apart with `tpcheck verify`: every rank updates its copy by itself.",
    )

    # ---- optimizers
    OPTIONS_DIFFER = (
        "options_differ",
        "the optimizers were given other options",
        "runs.comparing.exact_checks runs.comparing.update_checks checkpoints numerics.checks.resume",
        "Give both runs the same learning rate, schedule and options, or compare runs that have them.",
    )
    OPTIMIZER_SEES_ONE_SHARD = (
        "optimizer_sees_one_shard",
        "the gradients agree, and an optimizer whose step depends on the whole matrix was given each rank's shard",
        "numerics.hypotheses.optimizer runs.comparing.sketch_causes",
        "Gather the matrix before the step, as distributed versions of this optimizer do.",
    )
    OPTIMIZER_STATE_OF_ANOTHER_RANK = (
        "optimizer_state_of_another_rank",
        "ranks with different shards held the same optimizer state",
        "numerics.hypotheses.optimizer runs.comparing.state_causes checkpoints numerics.checks.resume",
        "Keep the optimizer's state with its shard: by rank where a loop exchanges or gathers it, and in a file for "
        "each TP rank, not one for all, where it is saved.",
        Guide.RESUME,
    )
    OPTIMIZER_STATE_LOST = (
        "optimizer_state_lost",
        "a moment was zero before this step, and not in the expected run",
        "runs.comparing.state_causes",
        "Load the optimizer's state together with the weights, and build no new optimizer in the middle of a training.",
        Guide.RESUME,
    )
    MASTERS_STALE = (
        "masters_stale",
        "the weights are not the optimizer's master weights, rounded",
        "runs.comparing.state_causes numerics.checks.resume numerics.hypotheses.optimizer",
        "Change masters rather than weights, which the next step overwrites. After loading weights refresh the masters "
        "(DeepSpeed: refresh_fp32_params; load both, or neither).",
        Guide.RESUME,
    )

    NOT_LOADED = (
        "not_loaded",
        "the tensor is what the new process held before it loaded",
        "numerics.checks.resume",
        "Look at what the call that loads returns: some return nothing, and raise nothing, where they find no file.",
        Guide.RESUME,
    )

    # ---- models made from scratch
    INIT_DEPENDS_ON_TP = (
        "init_depends_on_tp",
        "all draws of models made from scratch lie on one side of all draws of the unsharded model",
        "numerics.checks.initialisation",
        "Count fans on the whole tensor: initialise it before it is cut, or by the standard deviation of the unsharded "
        "layer (DTensors know their whole shape; their local tensors, and plain shards, do not).",
    )
    REPLICAS_DRAWN_APART = (
        "replicas_drawn_apart",
        "ranks that should hold the same parameter have drawn one each, from generators in different states",
        "numerics.checks.initialisation",
        "Seed the generator that draws replicated parameters alike on all ranks, another one for shards by tp_rank, or "
        "broadcast the replicas from one rank once the model is made.",
    )

    # ---- runs
    DRAWN_SEPARATELY = (
        "drawn_separately",
        "as large as the expected weight and uncorrelated with it: each run has drawn its own, as where layers are "
        "initialised shard by shard or from other seeds",
        "runs.comparing.initial_weights",
        "Start both runs from the same weights: load one checkpoint, or draw each whole tensor before it is cut.",
        Guide.LOSS_DIFFERS,
    )
    NONDETERMINISM = (
        "nondeterminism",
        "two runs with the same versions, topology, weights, inputs and generators part here: a computation of this "
        "module is not deterministic, or its code or settings are not the same. It is no question of sharding",
        "runs.comparing.compare",
        "Run again with torch.use_deterministic_algorithms(True), or look at what changed in this module.",
        Guide.NOISE,
    )

    # ---- values
    OFFSET_BY_CONSTANT = (
        "offset_by_constant",
        "every element is the expected one plus a constant",
        "numerics.exact",
        "Convert the convention of the norm: some models multiply by w, others (Gemma, Megatron with "
        "layernorm_zero_centered_gamma) by 1 + w. Add or subtract the constant when converting, once.",
    )
    NOT_FINITE = (
        "not_finite",
        "some elements are infinite or not a number",
        "numerics.hypotheses.values numerics.exact runs.guarding.findings runs.comparing.sketch_causes "
        "numerics.checks.resume numerics.checks.initialisation",
    )
    ALL_ZERO = (
        "all_zero",
        "every wrong element is zero",
        "numerics.hypotheses.values numerics.exact runs.comparing.sketch_causes numerics.checks.resume "
        "numerics.checks.initialisation",
    )
    BIT_FLIPPED = (
        "bit_flipped",
        "one bit of one element differs",
        "numerics.exact",
        "Copy the file again and compare checksums: storage or memory is damaged.",
    )
    DTYPE_ROUNDED = (
        "dtype_rounded",
        "the expected tensor, rounded to a smaller dtype, equals the actual one{residual}",
        "numerics.hypotheses.values numerics.exact checkpoints numerics.checks.resume",
        "Save the fp32 master weights, not the 16-bit copies; pass --dtype if the cast was intended.",
    )
    TRANSPOSED = (
        "transposed",
        "the transposed tensor equals the expected one{residual}",
        "numerics.exact",
        "Transpose it when saving or loading: nn.Linear has (out, in), Conv1D (in, out).",
    )
    STEP_SKIPPED = (
        "step_skipped",
        "the step was skipped, as if gradients overflowed, and the reference takes it",
        "numerics.hypotheses.optimizer",
        "Reduce the flag of an overflow with MAX over the TP and the DP group before any rank steps or skips.",
    )
    STALE_WEIGHT = (
        "stale_weight",
        "the actual tensor equals the expected one of an earlier step{residual}",
        "numerics.hypotheses.optimizer numerics.exact runs.comparing.exact_checks runs.comparing.run_findings "
        "runs.comparing.compare runs.comparing.state_causes",
        "Save after the optimizer's step has reached the model: ZeRO gathers the weights last.",
        Guide.SAVED_MODEL,
    )

    # ---- names and ties
    TENSOR_MISSING = (
        "tensor_missing",
        "the tensor is absent",
        "checkpoints numerics.hypotheses.layout numerics.checks.resume",
        _save_or_rename,
    )
    TENSOR_UNEXPECTED = (
        "tensor_unexpected",
        "the reference has no such tensor",
        "checkpoints numerics.checks.resume",
    )
    TIED_WEIGHT_DROPPED = (
        "tied_weight_dropped",
        "one of two tied weights is absent",
        "checkpoints",
        "Save one of the tied names, and keep tie_word_embeddings true in config.json.",
    )
    TIED_WEIGHT_UNTIED = (
        "tied_weight_untied",
        "two weights that the reference ties are separate",
        "numerics.hypotheses.gradients checkpoints",
        "Tie the weights before training (model.tie_weights()): two copies were trained separately.",
    )

    # ---- batches
    RNG_DIFFERS_TORCH = (
        "rng_differs_torch",
        "the batch is drawn from a torch generator whose state is not the same on these ranks",
        "batches",
        _seed_generator("torch"),
    )
    RNG_DIFFERS_NUMPY = (
        "rng_differs_numpy",
        "the batch is drawn from a numpy generator whose state is not the same on these ranks",
        "batches",
        _seed_generator("numpy"),
    )
    RNG_DIFFERS_PYTHON = (
        "rng_differs_python",
        "the batch is drawn from a Python generator whose state is not the same on these ranks",
        "batches",
        _seed_generator("python"),
    )
    RNG_DIFFERS_CUDA = (
        "rng_differs_cuda",
        "the batch is drawn from a CUDA generator whose state is not the same on these ranks",
        "batches",
        _seed_generator("cuda"),
    )
    SAMPLER_SHARDED_BY_WORLD_RANK = (
        "sampler_sharded_by_world_rank",
        "the sampler assigns samples to world ranks, not to data-parallel ranks",
        "batches",
        _shard_by_dp_rank,
    )
    SAME_ORDER_DIFFERENT_SEED = (
        "same_order_different_seed",
        "each rank shuffled with a different seed or epoch",
        "batches",
        _shuffle_equally,
    )
    PADDING_DIFFERS = (
        "padding_differs",
        "the ranks have the same tokens but different padding",
        "batches",
        "Pad to the same length on all ranks of the TP group (padding='max_length' or one pad_to_multiple_of), on the "
        "same side and with the same token.",
    )
    ORDER_DIFFERS = (
        "order_differs",
        "the ranks have the same samples in a different order",
        "batches",
        _sort_listings,
    )
    UNEVEN_LENGTH = (
        "uneven_length",
        "some ranks have more batches than others",
        "batches",
        "Give every rank of a TP group the same samples, and drop the last incomplete batch on all.",
    )
    SLICE_OF_ANOTHER_SAMPLE = (
        "slice_of_another_sample",
        "the ranks of a CP group hold slices of different samples",
        "runs.comparing.slice_orders",
        "Give all ranks of a CP group the same samples, by dp_rank, and let each cut its slice out of them.",
    )
    SLICE_TAKEN_FOR_FIRST = (
        "slice_taken_for_first",
        "what depends on where a rank's slice of the sequence lies is right for the first slice alone",
        "runs.comparing.slice_causes",
        "Let positions, and the rows and columns of the causal mask, be those of the slices, and let queries see the "
        "keys of all earlier slices.",
    )
    POSITIONS_OF_ANOTHER_ORDER = (
        "positions_of_another_order",
        "the positions that the model is called with are those of slices in another order",
        "runs.comparing.slice_causes",
        "Cut position_ids exactly as the tokens are cut: contiguously, or zigzag as load balancing does.",
    )
    DUPLICATE_DP_BATCH = (
        "duplicate_dp_batch",
        "data-parallel replicas train on the same samples",
        "batches",
        _assign_by_dp_rank,
    )
    SAMPLES_REPEATED = (
        "samples_repeated",
        "the rank was given samples again that it had in this epoch",
        "batches numerics.checks.resume",
        _give_once,
        Guide.RESUME,
    )
    SAMPLES_SKIPPED = (
        "samples_skipped",
        "whole batches of an order that is not shuffled were left out",
        "batches numerics.checks.resume",
        "Where a run resumes, skip what was trained on once: with the loader's or the sampler's state, or with "
        "skip_first_batches, not both.",
        Guide.RESUME,
    )


@dataclass(frozen=True, slots=True)
class Explanation:
    """A cause whose test held.

    Attributes:
        cause: What it is.
        residual: Relative error that remains once the cause is taken into account; 0 where the test is exact.
        evidence: What more the test has shown, by name, JSON-able: which rank, which dim, which permutation.
    """

    cause: Cause
    residual: float = 0.0
    evidence: Mapping[str, Any] = field(default_factory=dict)


Facts = TypeVar("Facts")


def first_explanation(facts: Facts, tests: Iterable[Callable[[Facts], Explanation | None]]) -> Explanation | None:
    """Return the explanation of the first test that holds of these facts, or None where none does."""
    return next((found for test in tests if (found := test(facts)) is not None), None)


def cause_named(slug: str | None) -> Cause | None:
    """Return the cause of this slug, or None: checks of third parties may have other causes."""
    return _BY_SLUG.get(slug or "")


_BY_SLUG: Mapping[str, Cause] = {cause.slug: cause for cause in Cause}


def guide_of(check: str, slug: str | None) -> Guide | None:
    """Return where to read on about a finding of this check with this cause."""
    cause = cause_named(slug)
    return (cause and cause.guide) or GUIDE_OF_CHECK.get(check)


def cause_text(slug: str, residual: float | None) -> str:
    """Return the slug and its sentence, with the residual that the cause's test left; None where it is unknown."""
    text = "" if residual is None else f" to {residual:.1e}" if residual else " to the bit"
    cause = cause_named(slug)
    return f"{slug}: {cause.sentence.format(residual=text)}" if cause else slug
