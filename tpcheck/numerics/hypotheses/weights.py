"""Why a weight is not the reference's before the first step: what its bits tell, whole or rank by rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.families.special_cases import KEY_OR_VALUE_PROJECTION, QUERY_PROJECTION
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.exact.explain import explain_tensor_in_memory
from tpcheck.numerics.hypotheses.explanation import Test

_OF_SHARDS = (Cause.SHARD_ORDER_SWAPPED, Cause.SHARD_REPEATED)


def whole(suspect: Suspect) -> Explanation | None:
    """What the ranks' shards make up tells what happened to all of it."""
    if suspect.actual is None or suspect.expected is None:
        return None
    others = {name: tensors[0] for name, tensors in suspect.others.items()}
    story = explain_tensor_in_memory(_name(suspect), suspect.actual, suspect.expected, others)
    return None if story is None or not _is_about_ranks(story, suspect) else _explanation(story, suspect)


def each_rank(suspect: Suspect) -> Explanation | None:
    """What each wrong rank holds tells what happened to its shard, the same on all of them."""
    told: list[Explanation] = []
    for tp_rank, (part, expected) in enumerate(zip(suspect.parts, suspect.expected_parts, strict=False)):
        if torch.equal(part, expected):
            continue
        others = {name: tensors[tp_rank + 1] for name, tensors in suspect.others.items()}
        story = explain_tensor_in_memory(_name(suspect), part, expected, others)
        if story is None or story.cause not in _OF_ONE_RANK:
            return None
        told.append(story)
    if not told or len({story.cause for story in told}) != 1:
        return None
    return _explanation(told[0], suspect)


_OF_ONE_RANK = (
    *(
        Cause.TRANSPOSED,
        Cause.TENSOR_OF_ANOTHER_LAYER,
        Cause.DTYPE_ROUNDED,
        Cause.BIT_FLIPPED,
        Cause.NOT_FINITE,
        Cause.ALL_ZERO,
    ),
    Cause.DUPLICATE_REDUCE,
)


def _is_about_ranks(story: Explanation, suspect: Suspect) -> bool:
    """Return whether the pieces that have moved are the ranks' shards: heads or rows may move for other reasons."""
    if story.cause not in _OF_SHARDS:
        return True
    dim, tp = story.evidence["dim"], len(suspect.parts)
    sizes = [part.shape[dim] for part in suspect.parts]
    if "order" in story.evidence:
        assert suspect.expected is not None
        piece = suspect.expected.shape[dim] // int(story.evidence["tp"])
        return all(size % piece == 0 for size in sizes) and int(story.evidence["tp"]) <= tp
    return sorted(story.evidence["sizes"]) == sorted(sizes)


def _explanation(story: Explanation, suspect: Suspect) -> Explanation:
    details = {name: value for name, value in story.evidence.items() if name != "rows"}  # these differ by parameter
    return Explanation(_of_heads(story.cause, suspect), 0.0, {"story": details} if details else {})


def _of_heads(cause: Cause, suspect: Suspect) -> Cause:
    """Return the cause, or another one where keys and values have moved, and the queries beside them have not."""
    beside: Mapping[str, Any] = suspect.evidence.get("beside_it", {})
    wrong = [name for name in beside.get("wrong", ()) if KEY_OR_VALUE_PROJECTION.matches(_owner(name))]
    right = [name for name in beside.get("right", ()) if QUERY_PROJECTION.matches(_owner(name))]
    is_of_heads = cause in _OF_SHARDS and KEY_OR_VALUE_PROJECTION.matches(_owner(_name(suspect)))
    return Cause.HEAD_MAPPING_WRONG if is_of_heads and wrong and right else cause


def _name(suspect: Suspect) -> str:
    return str(suspect.where.get("parameter", ""))


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


TESTS: tuple[Test, ...] = (whole, each_rank)
