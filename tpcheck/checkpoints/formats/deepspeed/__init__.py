"""DeepSpeed's training checkpoints (TP shards merged, ZeRO's partitions joined) and its universal ones."""
