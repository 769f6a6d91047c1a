"""The tokens that a small model is trained on: how many, and how they lie in memory. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from tpcheck.core.errors import UsageError

_FORM = "ROWSxLENGTH, with ,padded or ,strided behind it"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What synthetic batches look like.

    Attributes:
        rows: Samples that each DP rank sees in a step.
        length: Tokens of a sample.
        padded: Some samples are shorter: an attention mask says which tokens count, and labels leave the others out.
        strided: Tokens and labels are views that are not contiguous, as after `tensor.t()` or a slice of columns.

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
        """Return what a text such as `3x7,padded,strided` says.

        Raises:
            UsageError: It is none.
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
