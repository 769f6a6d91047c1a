"""Names of the tensors that a training step makes, and the order in which they appeared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["forward", "backward"]
Role = Literal["input", "output"]


@dataclass(frozen=True, slots=True, order=True)
class TensorKey:
    """One tensor that went into or came out of a module.

    Attributes:
        phase: `forward` for activations, `backward` for their gradients.
        module: Name as in `named_modules`; empty for the model itself.
        call: How many calls of this module came before, in this step.
        role: Whether the tensor went into the module or came out of it.
        path: Place in the module's arguments or outputs, such as `0` or `logits`.
    """

    phase: Phase
    module: str
    call: int
    role: Role
    path: str

    def __str__(self) -> str:
        call = f" call {self.call}" if self.call else ""
        what = "gradient of " if self.phase == "backward" else ""
        return f"{self.module or 'model'}{call}: {what}{self.role} {self.path}"
