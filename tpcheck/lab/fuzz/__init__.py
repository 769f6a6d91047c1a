"""Searches for configurations in which a sharded model or layer differs from the unsharded one."""
