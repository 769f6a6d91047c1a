"""DeepSpeed training checkpoints: TP shards merged by their layout, ZeRO's partitions joined to float32 weights."""

from tpcheck.checkpoints.deepspeed_training.checkpoint import TrainingFormat

__all__ = ["TrainingFormat"]
