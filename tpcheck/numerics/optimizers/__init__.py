"""How each kind of optimizer holds what it steps: torch's own, DeepSpeed's, Megatron's."""
