"""Faults of a saved model: what can happen to a tensor when it is saved, gathered or converted."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

import torch

from tpcheck.lab.faults import damage
from tpcheck.lab.faults.damage import Damage, Harm, Target, Tensors

_CHECK = "checkpoint_matches_reference"

SavedAs = Literal["safetensors", "trainer", "dcp"]


@dataclass(frozen=True, slots=True)
class CheckpointFault:
    """A bug of what saves, gathers or converts a model.

    Attributes:
        name: Its slug.
        what: What is wrong, in one sentence.
        on: Patterns of names; one of the tensors that match is damaged.
        harm: Damages the tensor that was drawn.
        causes: The right causes; None for a fault without a named cause.
        family: The model type that is saved.
        settings: Settings of the model.
        link: An upstream issue that reports such a bug.
        kind, checks: `checkpoint` and its check.
        saved_as: What the tensors are saved as: the model alone as `safetensors`; with the moments of an optimizer,
            named `PARAMETER exp_avg`, as the Trainer's files or in DCP.
    """

    name: str
    what: str
    on: tuple[str, ...]
    harm: Harm
    causes: tuple[str | None, ...]
    family: str = "llama"
    settings: Mapping[str, Any] = field(default_factory=dict)
    link: str | None = None
    kind: str = "checkpoint"
    checks: tuple[str, ...] = (_CHECK,)
    saved_as: SavedAs = "safetensors"

    def drawn(self, tensors: Tensors, earlier: Tensors, seed: int) -> Damage:
        """Return the damage to one of the tensors; equal seeds draw equal damage."""
        generator = random.Random(f"{self.name}/{seed}")
        matching = [name for name in tensors if any(fnmatch(name, pattern) for pattern in self.on)]
        return self.harm(Target(generator.choice(matching), tensors, earlier, generator))


_ROWS = ("*.q_proj.weight", "*.up_proj.weight")
_COLUMNS = ("*.down_proj.weight",)
_SQUARE = ("*.o_proj.weight",)
_EMBEDDING = ("*.embed_tokens.weight",)
_QKV, _GATE_UP = ("*.qkv_proj.weight",), ("*.gate_up_proj.weight",)
_ROTATED = ("*.k_proj.weight",)
_BIAS, _EXPERTS = ("*.q_proj.bias",), ("*.experts.down_proj",)


def _fault(
    name: str, what: str, on: tuple[str, ...], harm: Harm, cause: str | None, link: str | None = None
) -> CheckpointFault:
    family, settings = _MODEL_OF.get(on, ("llama", {}))
    return CheckpointFault(f"saved_{name}", what, on, harm, (cause,), family, settings, link and _GITHUB + link)


_FUSED_MODEL = ("phi3", {"num_key_value_heads": 8})  # as many as heads, so that the fused blocks have one size
_MODEL_OF: Mapping[tuple[str, ...], tuple[str, Mapping[str, Any]]] = {
    _QKV: _FUSED_MODEL,
    _GATE_UP: _FUSED_MODEL,
    _BIAS: ("qwen2", {}),
    _EXPERTS: ("mixtral", {}),
    ("*.experts.gate_up_proj",): ("mixtral", {}),
}
_GITHUB = "https://github.com/"

FAULTS = (
    _fault("rows_of_one_rank", "one rank's rows are saved as the tensor", _ROWS,
           damage.one_shard(2), "shard_missing",
           "pytorch/pytorch/issues/156002"),
    _fault("rows_of_one_rank_of_four", "one of four ranks' rows are saved as the tensor", _ROWS,
           damage.one_shard(4), "shard_missing"),
    _fault("rows_of_one_rank_uneven", "one of three ranks' uneven rows are saved as the tensor", _ROWS,
           damage.one_shard(3), "shard_missing"),
    _fault("columns_of_one_rank", "one rank's columns of a row-parallel weight are saved", _COLUMNS,
           damage.one_shard(2, dim=1), "shard_missing"),
    _fault("bias_of_one_rank", "one rank's part of a bias is saved", _BIAS,
           damage.one_shard(2), "shard_missing"),
    _fault("experts_of_one_rank", "one rank's experts are saved", _EXPERTS,
           damage.one_shard(2), "shard_missing"),
    _fault("part_of_each_expert", "one rank's part of each expert is saved", _EXPERTS,
           damage.one_shard(2, dim=1), "shard_missing"),
    _fault("qkv_of_one_rank", "one rank's part of q, k and v is saved", _QKV,
           damage.one_shard_of_blocks(3), "shard_missing"),
    _fault("shards_swapped", "two ranks' rows are put together in the wrong order", _ROWS,
           damage.reordered(lambda _: [1, 0]), "shard_order_swapped"),
    _fault("two_of_four_shards_swapped", "two of four ranks' rows change places", _ROWS,
           damage.reordered(damage.two_of_four_swapped), "shard_order_swapped"),
    _fault("columns_swapped", "two ranks' columns are put together in the wrong order", _COLUMNS,
           damage.reordered(lambda _: [1, 0], dim=1), "shard_order_swapped"),
    _fault("uneven_shards_swapped", "a larger and a smaller shard change places", _ROWS,
           damage.plain(lambda rows: rows.roll(len(rows) * 25 // 64, 0)), "shard_order_swapped"),
    _fault("shard_everywhere", "one rank's rows are saved in every place", _ROWS,
           damage.reordered(damage.one_everywhere), "shard_repeated"),
    _fault("columns_everywhere", "one rank's columns are saved in every place", _COLUMNS,
           damage.reordered(damage.one_everywhere, dim=1), "shard_repeated"),
    _fault("shard_for_another", "one of four ranks' rows are also in the place of another's", _ROWS,
           damage.reordered(damage.one_for_another_of_four), "shard_repeated"),
    _fault("qkv_rank_by_rank", "q, k, v are put together rank by rank", _QKV,
           damage.blockwise(3, 2, parts=2), "fused_blocks_interleaved",
           "ndif-team/nnsight/pull/719"),
    _fault("gate_up_rank_by_rank", "gate and up are put together rank by rank", _GATE_UP,
           damage.blockwise(2, 2), "fused_blocks_interleaved",
           "ndif-team/nnsight/pull/719"),
    _fault("gate_up_of_four_ranks", "gate and up of four ranks are put together rank by rank", _GATE_UP,
           damage.blockwise(2, 4), "fused_blocks_interleaved"),
    _fault("heads_of_qkv", "heads of (q, k, v) are read as (q, k, v) of heads", _QKV,
           damage.plain(damage.heads_of_qkv), "fused_blocks_interleaved",
           "deepspeedai/DeepSpeed/pull/3844"),
    _fault("groups_of_queries", "groups of (queries, key, value) are read as blocks", _QKV,
           damage.groups_of_queries, "fused_blocks_interleaved"),
    _fault("gate_and_up_exchanged", "up is saved before the gate in a fused weight", _GATE_UP,
           damage.permuted(lambda size: [1, 0]), "gate_up_exchanged"),
    _fault("gate_and_up_exchanged_on_one_rank", "one of two ranks has up before the gate", _GATE_UP,
           damage.permuted(lambda size: [0, 3, 2, 1], tp_rank=1, tp=2), "gate_up_exchanged"),
    _fault("gate_and_up_of_experts_exchanged", "up is before the gate in the weights of all experts",
           ("*.experts.gate_up_proj",), damage.permuted(lambda size: [1, 0], dim=1), "gate_up_exchanged"),
    _fault("experts_of_two_ranks_swapped", "two ranks' experts, each with its gate and up, change places",
           ("*.experts.gate_up_proj",), damage.permuted(lambda size: [1, 0], dim=0), "shard_order_swapped"),
    _fault("names_of_gate_and_up_exchanged", "the gate is saved under the name of up, and up under the gate's",
           ("*.gate_proj.weight",), damage.exchanged("gate_proj", "up_proj"), "gate_up_exchanged"),
    _fault("gate_and_up_of_one_rank_exchanged", "one of two ranks saves its rows of gate and up as the other's",
           ("*.gate_proj.weight",), damage.exchanged("gate_proj", "up_proj", 2), "gate_up_exchanged"),
    _fault("keys_for_values", "keys and values of a fused weight are exchanged, or those of one rank", _QKV,
           damage.keys_for_values, "key_value_exchanged"),
    _fault("names_of_keys_and_values_exchanged", "keys are saved as values and values as keys",
           ("*.k_proj.weight",), damage.exchanged("k_proj", "v_proj"), "key_value_exchanged"),
    _fault("keys_and_values_of_one_rank_exchanged", "one of two ranks saves its keys as values, values as keys",
           ("*.k_proj.weight",), damage.exchanged("k_proj", "v_proj", 2), "key_value_exchanged"),
    _fault("rotary_rows_of_heads_of_8", "the rows of each head are in the other order of rotary embeddings", _ROTATED,
           damage.half_split(8), "rotary_layout"),
    CheckpointFault("saved_rotary_rows_of_heads_of_64", "the same for heads of 64 rows", _ROTATED,
                    damage.half_split(64), ("rotary_layout",), settings={"head_dim": 64}),
    CheckpointFault("saved_rotary_rows_of_heads_of_128", "the same for heads of 128 rows", _ROTATED,
                    damage.half_split(128), ("rotary_layout",), settings={"head_dim": 128}),
    CheckpointFault("saved_rotary_rows_in_part", "the same where half of each head is rotated", _ROTATED,
                    damage.half_split(64, rotated=32), ("rotary_layout",), settings={"head_dim": 64}),
    _fault("norm_minus_one", "a norm's weight is saved minus 1, as models that multiply by 1 + w have it",
           ("*norm.weight",), damage.plain(lambda weight: weight - 1, constant=-1.0), "offset_by_constant"),
    _fault("norm_plus_epsilon", "a norm's weight has a constant added to it", ("*norm.weight",),
           damage.plain(lambda weight: weight + 0.25), "offset_by_constant"),
    _fault("head_twice", "a head is saved on both sides of a boundary", _ROWS,
           damage.at_a_boundary(lambda rows, cut: torch.cat([rows[: cut + 8], rows[cut:]]), first_wrong=8),
           "wrong_shard_boundary"),
    _fault("head_twice_last_lost", "a boundary is off by a head, and the last head is lost", _ROWS,
           damage.at_a_boundary(lambda rows, cut: torch.cat([rows[:cut], rows[cut - 8 : -8]])),
           "wrong_shard_boundary"),
    _fault("head_lost", "a boundary is off by a head, and the end is filled with zeros", _ROWS,
           damage.at_a_boundary(lambda rows, cut: torch.cat([rows[:cut], rows[cut + 8 :], 0 * rows[:8]]),
                                first_wrong=0, holds=8), "wrong_shard_boundary"),
    _fault("padding_kept", "the padding of a projection is saved with it", _ROWS,
           damage.padded(1), "wrong_shard_boundary"),
    _fault("vocabulary_padding_kept", "the padding of the vocabulary is saved with it", _EMBEDDING,
           damage.padded(1), "vocab_offset_wrong"),
    _fault("vocabulary_padding_of_each_rank", "each rank's padding of the vocabulary is saved with it", _EMBEDDING,
           damage.padded(2), "vocab_offset_wrong"),
    _fault("tokens_shifted", "every token has the row of another token", _EMBEDDING,
           damage.shifted, "vocab_offset_wrong"),
    _fault("transposed", "a weight is saved as its transpose", _COLUMNS,
           damage.plain(lambda weight: weight.T.contiguous()), "transposed"),
    _fault("square_transposed", "a square weight is saved as its transpose", _SQUARE,
           damage.plain(lambda weight: weight.T.contiguous()), "transposed"),
    _fault("through_bfloat16", "a weight was rounded to bfloat16 when it was saved", _ROWS,
           damage.plain(lambda weight: weight.bfloat16().float(), dtype="bfloat16"), "dtype_rounded"),
    _fault("one_rank_through_float16", "one rank's rows were rounded to float16", _ROWS,
           damage.from_half_on(lambda rows: rows.half().float()), "dtype_rounded"),
    _fault("through_float8", "a weight was rounded to float8", _ROWS,
           damage.plain(lambda weight: weight.to(torch.float8_e4m3fn).float()), "dtype_rounded"),
    _fault("as_bfloat16", "a weight is saved as bfloat16", _ROWS,
           damage.plain(lambda weight: weight.bfloat16(), dtype="bfloat16"), "dtype_rounded"),
    _fault("one_rank_as_bfloat16", "one rank's rows are saved as bfloat16", _ROWS,
           damage.plain(lambda weight: weight.chunk(2)[0].bfloat16(), tp_rank=0), "shard_missing"),
    _fault("as_float64", "a weight is saved in a wider dtype", _ROWS,
           damage.plain(lambda weight: weight.double()), None),
    _fault("one_bit", "one bit differs from the reference", _ROWS, damage.one_bit, "bit_flipped"),
    _fault("row_of_nan", "a row is NaN", _ROWS, damage.one_row(float("nan")), "not_finite"),
    _fault("one_infinity", "one element is infinite", _ROWS, damage.one_element(float("inf")), "not_finite"),
    _fault("zeros", "a weight was never filled", _ROWS, damage.plain(torch.zeros_like), "all_zero"),
    _fault("zeros_of_one_rank", "one rank's rows were never filled", _ROWS,
           damage.from_half_on(torch.zeros_like), "all_zero"),
    _fault("layer_renumbered", "a layer has the weight of another", _ROWS,
           damage.of_another_layer, "tensor_of_another_layer"),
    _fault("copies_added", "copies of a bias were added up over the ranks", _BIAS,
           damage.plain(lambda bias: bias * 2, factor=2), "duplicate_reduce"),
    _fault("copies_gathered", "a weight that every rank holds whole was gathered", _ROWS,
           damage.plain(lambda weight: torch.cat([weight, weight]), copies=2), "not_sharded"),
    _fault("step_before", "a weight is that of the step before", _ROWS, damage.of_the_step_before, "stale_weight"),
    _fault("one_rank_of_the_step_before", "one rank's rows are those of the step before", _ROWS,
           damage.one_rank_of_the_step_before, "stale_weight"),
    _fault("dropped", "a tensor is not saved", _ROWS, damage.plain(lambda weight: None), "tensor_missing",
           "deepspeedai/DeepSpeed/pull/3205"),
    _fault("unknown_name", "a tensor is saved that the model does not have", _ROWS,
           damage.under_another_name("model.extra.weight"), "tensor_unexpected"),
    _fault("drawn_anew", "a weight was initialised again", _ROWS, damage.plain(torch.randn_like), None),
    _fault("drawn_anew_smaller", "a weight has other values and another shape", _ROWS,
           damage.plain(lambda weight: torch.randn(len(weight) - 4, weight.shape[1])), None),
    _fault("one_element", "one element has another value", _ROWS, damage.one_element(0.123), None),
    _fault("other_dims", "a weight has more dims", _ROWS,
           damage.plain(lambda weight: weight.reshape(2, -1, weight.shape[1])), None),
    _fault("every_tensor_of_one_rank", "every tensor is that of one rank", _ROWS,
           damage.every_tensor_of_one_rank, "shard_missing",
           "deepspeedai/DeepSpeed/issues/3607"),
    CheckpointFault("saved_optimizer_of_one_rank", "the optimizer's file is that of one rank, beside whole weights",
                    ("*.q_proj.weight exp_avg",), damage.moments_of_one_rank, ("optimizer_state_of_another_rank",),
                    saved_as="trainer"),
    CheckpointFault("saved_moments_of_one_rank_for_all", "a moment has one rank's shard in every place, the weight not",
                    ("*.q_proj.weight exp_avg",), damage.reordered(damage.one_everywhere),
                    ("optimizer_state_of_another_rank",), saved_as="dcp"),
    CheckpointFault("saved_moments_of_two_ranks_swapped", "two ranks' moments are exchanged, the weights not",
                    ("*.down_proj.weight exp_avg",), damage.reordered(lambda _: [1, 0], dim=1),
                    ("optimizer_state_of_another_rank",), saved_as="trainer"),
    CheckpointFault("saved_moment_never_filled", "a moment is zero after the step", ("*.up_proj.weight exp_avg",),
                    damage.plain(torch.zeros_like), ("all_zero",), saved_as="dcp"),
    CheckpointFault("saved_moment_dropped", "a moment is not saved", ("*.up_proj.weight exp_avg",),
                    damage.plain(lambda moment: None), ("tensor_missing",), saved_as="dcp"),
    CheckpointFault("saved_untied", "a tie is broken: both names are saved, with other values", _EMBEDDING,
                    damage.untied, ("tied_weight_untied",), settings={"tie_word_embeddings": True},
                    link=f"{_GITHUB}NVIDIA-NeMo/Automodel/issues/2571"),
    CheckpointFault("saved_without_its_tie", "neither name of a tied weight is saved", _EMBEDDING,
                    damage.dropped_with_its_tie, ("tied_weight_dropped",), settings={"tie_word_embeddings": True},
                    link=f"{_GITHUB}deepspeedai/DeepSpeed/issues/1896"),
)  # fmt: skip
