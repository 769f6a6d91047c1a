"""DeepSpeed's training checkpoints and its universal ones.

`training.py` opens a training checkpoint: `rank_files.py` finds the files of each rank, `rank_state.py` reads them and
joins the partitions of the data-parallel ranks into one TP rank's shards, `autotp_layouts.py` reads how AutoTP cut each
parameter, and `merge_tp_shards.py` merges the shards of the TP ranks. `universal.py` opens the result of
`ds_to_universal`.
"""
