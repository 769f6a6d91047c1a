"""Tensor parallelism of transformers: `from_pretrained(..., distributed_config=DistributedConfig(tp_size=...))`."""

from tpcheck.backends.transformers.backend import TransformersBackend

__all__ = ["TransformersBackend"]
