"""Searches for configurations under which a sharded model, or layer, is not the unsharded one."""
