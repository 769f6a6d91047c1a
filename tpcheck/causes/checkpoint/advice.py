"""What to do about each cause of a wrong checkpoint, in one sentence."""

from __future__ import annotations

# How DeepSpeed gathers is that of 0.17 to 0.19: facts of its engine.py.
ADVICE = {
    "shard_missing": "TP shards were not gathered: with DeepSpeed, save engine._consolidated_16bit_state_dict(), "
    "called on all ranks (save_16bit_model writes TP rank 0's shards below ZeRO 3); transformers: save_pretrained.",
    "not_sharded": "The parameter was whole on every rank: TP did not reach it, and gathering put its copies together; "
    "gather only what the plan shards.",
    "shard_repeated": "One rank's shard was taken for all of them: gather over the TP group, and index by tp_rank.",
    "shard_order_swapped": "Put the shards together in the order of tp_rank, not of world rank or of file names.",
    "fused_blocks_interleaved": "Gather block by block (Q, K, V; gate, up): cut each rank's part into blocks first.",
    "wrong_shard_boundary": "Cut and gather at the same places: ceil-sized chunks on one side and heads on the "
    "other do not fit.",
    "vocab_offset_wrong": "Take the padding of the vocabulary off each rank's shard before they are put together.",
    "transposed": "Transpose it when it is saved or read: nn.Linear holds (out, in), Conv1D (in, out).",
    "dtype_rounded": "Save the weights in the dtype that is meant: the fp32 master weights, not the 16-bit copies; or "
    "say --dtype if the cast was meant.",
    "stale_weight": "Save after the optimizer's step reached the model: with ZeRO, the weights are gathered last.",
    "tensor_of_another_layer": "Renumber the layers: pipeline stages and name maps count them from another start.",
    "tied_weight_untied": "Tie the weights before training (model.tie_weights()): two copies were trained apart.",
    "tied_weight_dropped": "Save one of the tied names, and keep tie_word_embeddings true in config.json.",
    "tensor_missing": "Save it: buffers that are persistent and frozen parameters belong to the model, too.",
    "duplicate_reduce": "Do not add up what every rank holds whole: gather shards, take replicas from one rank.",
    "replica_drift": "Find out why the replicas drift apart (tpcheck verify): every rank updates its own copy.",
    "bit_flipped": "Copy the file again and compare checksums: storage or memory is damaged.",
}
