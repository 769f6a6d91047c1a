"""torch's DTensor: `parallelize_module` plans, FSDP2 over them, and models that somebody else has made of DTensors."""
