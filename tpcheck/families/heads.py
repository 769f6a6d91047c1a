"""What a model type is built as: a causal language model, or another kind that trains on tokens. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tpcheck.errors import TpcheckError, UsageError
from tpcheck.families.settings import unknown


@dataclass(frozen=True, slots=True)
class Head:
    """A kind of model.

    Attributes:
        name: What follows the slash in `bart/seq2seq`.
        auto_class: The class of transformers that builds it.
        mapping: The table of transformers that names its types.
    """

    name: str
    auto_class: str
    mapping: str


# A type that has several is built as the first of them, unless its name says otherwise.
HEADS = (
    Head("causal", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    Head("seq2seq", "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    Head("masked", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    Head("multimodal", "AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
)
CAUSAL, SEQ2SEQ = HEADS[:2]


def types_of(head: Head) -> tuple[str, ...]:
    """Return every model type of the installed transformers that has this head.

    Raises:
        TpcheckError: transformers is not installed.
    """
    try:
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise TpcheckError("families need transformers: pip install 'tpcheck[transformers]'") from error
    names: Mapping[str, object] = getattr(modeling_auto, head.mapping, {})
    return tuple(sorted(names))


def type_and_head(family: str) -> tuple[str, Head]:
    """Return the model type that a family's name means, and what it is built as: `t5`, `bart/seq2seq`.

    Raises:
        UsageError: transformers has no such type, or it has no such head.
    """
    name, slash, wanted = family.partition("/")
    of_type = [head for head in HEADS if name in types_of(head)]
    if not of_type:
        known = {known for head in HEADS for known in types_of(head)}
        raise UsageError("family", family, unknown("a language model type of transformers", name, known))
    if not slash:
        return name, of_type[0]
    for head in of_type:
        if head.name == wanted:
            return name, head
    raise UsageError("family", family, [f"{name}/{head.name}" for head in of_type])
