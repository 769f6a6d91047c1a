"""The shape and memory layout of synthetic batches of tokens. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tpcheck.core.errors import UsageError

_FORM = "ROWSxLENGTH, optionally followed by ,padded or ,strided"


@dataclass(frozen=True, slots=True)
class Tokens:
    """The form of synthetic batches.

    Attributes:
        rows: Samples that each DP rank sees in a step.
        length: Tokens of a sample.
        padded: Whether some samples are shorter: an attention mask and the labels exclude the padding.
        strided: Whether tokens and labels are views that are not contiguous, as after `tensor.t()`.

    Example:
        >>> Tokens.parse("3x7,padded")
        Tokens(rows=3, length=7, padded=True, strided=False)
        >>> str(Tokens(2, 16, strided=True))
        '2x16,strided'
    """

    rows: int = 2
    length: int = 16
    padded: bool = False
    strided: bool = False

    @classmethod
    def parse(cls, text: str) -> Tokens:
        """Return the form that a text such as `3x7,padded,strided` describes.

        Raises:
            UsageError: The text has another form.
        """
        sizes, *flags = (part.strip() for part in text.split(","))
        rows, _, length = sizes.partition("x")
        known = set(flags) <= {"padded", "strided"} and len(set(flags)) == len(flags)
        if not (known and rows.isdecimal() and length.isdecimal() and int(rows) and int(length)):
            raise UsageError("batch", text, _FORM)
        return cls(int(rows), int(length), padded="padded" in flags, strided="strided" in flags)

    def __str__(self) -> str:
        flags = [name for name in ("padded", "strided") if getattr(self, name)]
        return ",".join([f"{self.rows}x{self.length}", *flags])
