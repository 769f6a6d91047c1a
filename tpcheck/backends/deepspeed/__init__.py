"""DeepSpeed AutoTP: `tensor_parallel.autotp_size` of `deepspeed.initialize`, and `tp_model_init`."""

from tpcheck.backends.deepspeed.backend import DeepSpeedBackend, TpModelInitBackend

__all__ = ["DeepSpeedBackend", "TpModelInitBackend"]
