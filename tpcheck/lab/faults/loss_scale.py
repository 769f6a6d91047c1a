"""Faults of the scale that keeps gradients in float16 from vanishing: multiply, divide, clip and skip by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from torch import Tensor

from tpcheck.core.clipping import TORCH_EPSILON
from tpcheck.lab.faults.fault import TP2, TP2_DP2, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import fault_of_the_backend, inject_always

_STATIC = {"fp16": {"loss_scale": 1024.0}}
_GROWS = {"loss_scale_window": 1, "initial_scale_power": 8}
_of_updates = fault_constructor(
    "loss scale", "updates_match_reference", dtype="float16", zero_stage=1, config=_STATIC, steps=1,
    topologies=(TP2, TP2_DP2),
)  # fmt: skip
_of_gradients = fault_constructor(
    "loss scale", "gradients_match_reference", dtype="float16", steps=1, topologies=(TP2, TP2_DP2)
)
Unscale = Callable[[Sequence[Tensor], float], None]


def _then_times(factor: Callable[[float], float]) -> Callable[[Live], None]:
    """Unscale and clip as ZeRO does, then multiply gradients by `factor(scale)`."""

    def inject(live: Live) -> None:
        zero = live.candidate.engine.optimizer
        unscale: Unscale = zero.unscale_and_clip_grads

        def unscale_and_multiply(gradients: Sequence[Tensor], norm: float) -> None:
            unscale(gradients, norm)
            for gradient in gradients:
                gradient.mul_(factor(zero.loss_scale))

        zero.unscale_and_clip_grads = unscale_and_multiply

    return inject


def _clipped_before(live: Live) -> None:
    """Clip scaled gradients by their own norm, then unscale."""
    zero = live.candidate.engine.optimizer

    def clip_and_unscale(gradients: Sequence[Tensor], scaled_norm: float) -> None:
        factor = min(1.0, zero.clip_grad / (float(scaled_norm) + TORCH_EPSILON))
        for gradient in gradients:
            gradient.mul_(factor / zero.loss_scale)

    zero.unscale_and_clip_grads = clip_and_unscale


def _skipped_on_one_rank(draw: Draw) -> Injection:
    """Let one rank see an overflow in the norm, and tell the others nothing of it."""
    wrong = draw.tp_rank()

    def inject(live: Live) -> None:
        zero = live.candidate.engine.optimizer
        norm = zero.scaled_global_norm

        def overflowing(*args: int) -> float:
            found: float = norm(*args)
            return inf if live.tp_rank == wrong else found

        zero.scaled_global_norm = overflowing

    return Injection(inject, Place())


def _scale_of_one_rank(draw: Draw) -> Injection:
    wrong = draw.tp_rank()

    def inject(live: Live) -> None:
        if live.tp_rank == wrong:
            live.candidate.engine.optimizer.loss_scale *= 2

    return Injection(inject, Place())


FAULTS = (
    _of_updates("gradients_not_unscaled", "the optimizer is given gradients times the loss scale",
                inject_always(_then_times(lambda scale: scale)), "gradient_scaled"),
    _of_updates("gradients_unscaled_twice", "gradients are divided by the loss scale twice",
                inject_always(_then_times(lambda scale: 1 / scale)), "gradient_scaled"),
    _of_updates("clipped_before_unscaling", "gradients are clipped before they are divided by the loss scale",
                inject_always(_clipped_before), "gradient_scaled", "norm_before_unscaling"),
    _of_updates("overflow_on_one_rank", "one TP rank sees an overflow and skips the step that the others take",
                _skipped_on_one_rank, "step_skipped", checks=("gradient_norm_matches_reference",)),
    _of_updates("unscaled_by_the_next_scale", "gradients are divided by the loss scale that has just grown",
                fault_of_the_backend(), "gradient_scaled", steps=2, config={"gradient_clipping": 0.0, "fp16": _GROWS}),
    _of_gradients("loss_scale_of_one_rank", "the loss scale of one TP rank is twice that of the others",
                  _scale_of_one_rank, "gradient_scaled", zero_stage=1, config=_STATIC),
    _of_gradients("loss_not_scaled", "without ZeRO losses are not multiplied by what gradients are divided by",
                  fault_of_the_backend(), "gradient_scaled",
                  link="https://github.com/deepspeedai/DeepSpeed/pull/8393"),
)  # fmt: skip
