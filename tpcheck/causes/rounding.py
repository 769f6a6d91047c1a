"""Was a tensor rounded to a dtype of lower precision than the run's?"""

from __future__ import annotations

import torch

from tpcheck.causes.explanation import Explanation, actual_distance, remaining, same_shapes
from tpcheck.records import Suspect

_LOWER = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_ELEMENTS = 8  # a number of 53 bits ends in as many zeros as bfloat16 asks for once in 2**45; eight never do
_ROUNDINGS = 4.0  # in units of the lower dtype's epsilon: what went in was rounded, then the result


def dtype_rounded(suspect: Suspect) -> Explanation | None:
    """The wrong ranks' elements are numbers of a lower dtype, to the last bit, as near to the expected as it allows.

    The expected ones are not: values that are exact in any dtype (zeros, ones) prove nothing.
    """
    if not suspect.parts or not same_shapes(suspect.parts, suspect.expected_parts):
        return None
    limit = max(suspect.allowed_error, 1e-3 * remaining(suspect))
    pairs = zip(suspect.parts, suspect.expected_parts, strict=True)
    wrong = [(part, expected) for part, expected in pairs if _norm(part.double() - expected.double()) > limit]
    if not wrong or any(part.numel() < _LEAST_ELEMENTS or not part.is_floating_point() for part, _ in wrong):
        return None
    own = torch.finfo(wrong[0][0].dtype).eps
    for dtype in sorted(_LOWER, key=lambda one: torch.finfo(one).eps, reverse=True):
        eps = torch.finfo(dtype).eps
        if eps > own and all(_is_of(part, dtype) and not _is_of(expected, dtype) for part, expected in wrong):
            size = max(_norm(expected.double()) for _, expected in wrong)
            if actual_distance(suspect) > _ROUNDINGS * eps * size * max(1, len(suspect.parts)):
                return None
            error = max(_norm(part.double() - expected.to(dtype).double()) for part, expected in wrong)
            return Explanation("dtype_rounded", error / size, {"rounded_to": str(dtype).removeprefix("torch.")})
    return None


def _is_of(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
