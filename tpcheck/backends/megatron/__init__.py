"""Megatron-core: models made of its tensor-parallel layers, `GPTModel` among them."""

from tpcheck.backends.megatron.backend import MegatronBackend
from tpcheck.backends.megatron.token_loss import TokenLoss

__all__ = ["MegatronBackend", "TokenLoss"]
