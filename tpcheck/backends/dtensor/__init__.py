"""torch's DTensor: `parallelize_module` plans, and FSDP2 over them."""

from tpcheck.backends.dtensor.backend import DTensorBackend

__all__ = ["DTensorBackend"]
