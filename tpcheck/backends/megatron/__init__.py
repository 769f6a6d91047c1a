"""Megatron-core: models made of its tensor-parallel layers, `GPTModel` among them."""

from tpcheck.backends.megatron.backend import MegatronBackend, TokenLoss

__all__ = ["MegatronBackend", "TokenLoss"]
