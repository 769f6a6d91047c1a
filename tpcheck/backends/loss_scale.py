"""The scale by which losses are multiplied so that gradients in float16 do not vanish, and how it changes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LossScale:
    """A scale that is halved where gradients overflow, and doubled after as many steps without, unless it is static.

    The rules are those of DeepSpeed 0.19.8 (DynamicLossScaler in runtime/fp16/loss_scaler.py).

    Attributes:
        scale: The current one.
        window: Steps without overflow until it is doubled; 0 for a static scale.
        least: It is never halved below.
        hysteresis: It is halved from this overflow on.
        refills: Whether each step without overflow starts that count anew; else only doubling does.

    Example:
        >>> scale = LossScale(1024.0, window=2)
        >>> for overflows in (True, False, False, False): scale.update(overflows)
        >>> scale.scale
        1024.0
    """

    scale: float
    window: int = 0
    least: float = 1.0
    hysteresis: int = 1
    refills: bool = False
    _left: int = 0
    _steps: int = 0
    _last_overflow: int = -1

    def __post_init__(self) -> None:
        self._left = self.hysteresis

    def update(self, overflows: bool) -> None:
        """Take note of a step."""
        step, self._steps = self._steps, self._steps + 1
        if not self.window:
            return
        if overflows:
            self._last_overflow = step
            if self._left > 1:
                self._left -= 1
            else:
                self.scale = max(self.scale / 2, self.least)
            return
        since = step - self._last_overflow - 1
        doubles = since > 0 and since % self.window == 0
        if self.refills or doubles:
            self._left = self.hysteresis
        if doubles:
            self.scale *= 2
