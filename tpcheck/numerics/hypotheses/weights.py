"""Causes of a weight that differs before the first step: what the bits of the full weight, or of each shard, show."""

from __future__ import annotations

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.families.special_cases import KEY_OR_VALUE_PROJECTION, QUERY_PROJECTION
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.exact.explain import explain_tensor_in_memory

_OF_SHARDS = (Cause.SHARD_ORDER_SWAPPED, Cause.SHARD_REPEATED)
_OF_ONE_RANK = (
    Cause.TRANSPOSED,
    Cause.TENSOR_OF_ANOTHER_LAYER,
    Cause.DTYPE_ROUNDED,
    Cause.BIT_FLIPPED,
    Cause.NOT_FINITE,
    Cause.ALL_ZERO,
    Cause.DUPLICATE_REDUCE,
)


def full_weight(suspect: Suspect) -> Explanation | None:
    """The bits of the full weight, put together from the shards, show the cause."""
    if suspect.actual is None or suspect.expected is None:
        return None
    others = {name: full for name, (full, *_) in suspect.others.items()}
    found = explain_tensor_in_memory(suspect.parameter or "", suspect.actual, suspect.expected, others)
    return None if found is None or not _is_about_ranks(found, suspect) else _of_parameter(found, suspect)


def each_rank(suspect: Suspect) -> Explanation | None:
    """The bits of each wrong rank's shard show one cause, the same on all of them."""
    explanations: list[Explanation] = []
    for tp_rank, (part, expected) in enumerate(zip(suspect.actual_parts, suspect.expected_parts, strict=False)):
        if torch.equal(part, expected):
            continue
        others = {name: parts[tp_rank] for name, (_, *parts) in suspect.others.items()}
        found = explain_tensor_in_memory(suspect.parameter or "", part, expected, others)
        if found is None or found.cause not in _OF_ONE_RANK:
            return None
        explanations.append(found)
    if len({explanation.cause for explanation in explanations}) != 1:
        return None
    return _of_parameter(explanations[0], suspect)


def _is_about_ranks(found: Explanation, suspect: Suspect) -> bool:
    """Return whether the pieces that have moved are the ranks' shards: heads or rows may move for other reasons."""
    if found.cause not in _OF_SHARDS:
        return True
    dim, tp = found.evidence["dim"], len(suspect.actual_parts)
    sizes = [part.shape[dim] for part in suspect.actual_parts]
    if "order" in found.evidence:
        num_pieces = int(found.evidence["tp"])
        piece = suspect.expected.shape[dim] // num_pieces
        return all(size % piece == 0 for size in sizes) and num_pieces <= tp
    return sorted(found.evidence["sizes"]) == sorted(sizes)


def _of_parameter(found: Explanation, suspect: Suspect) -> Explanation:
    details = {name: value for name, value in found.evidence.items() if name != "rows"}  # these differ by parameter
    cause = Cause.HEAD_MAPPING_WRONG if _is_of_heads(found.cause, suspect) else found.cause
    return Explanation(cause, evidence={"story": details} if details else {})


def _is_of_heads(cause: Cause, suspect: Suspect) -> bool:
    """Return whether keys and values have moved, and the queries beside them have not."""
    siblings = suspect.siblings
    if siblings is None or cause not in _OF_SHARDS:
        return False
    wrong = [name for name in siblings.wrong if KEY_OR_VALUE_PROJECTION.matches(_module(name))]
    right = [name for name in siblings.right if QUERY_PROJECTION.matches(_module(name))]
    return KEY_OR_VALUE_PROJECTION.matches(_module(suspect.parameter or "")) and bool(wrong) and bool(right)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]
