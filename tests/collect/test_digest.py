"""A digest tells any two tensors apart that differ in one bit, in dtype or in shape."""

import torch

from tpcheck.collect.digest import digest


def test_equal_bits_have_equal_digests() -> None:
    tensor = torch.randn(4, 3)
    assert digest(tensor) == digest(tensor.clone())
    assert digest(tensor.t()) == digest(tensor.t().contiguous())
    nan = torch.tensor([float("nan")])
    assert digest(nan) == digest(nan.clone())


def test_anything_else_differs() -> None:
    tensor = torch.zeros(4)
    others = [torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2), -tensor, torch.zeros(5), torch.zeros(0)]
    flipped = tensor.clone()
    flipped.view(torch.int32)[2] ^= 1
    digests = [digest(other) for other in (tensor, flipped, *others)]
    assert len(set(digests)) == len(digests)


def test_dtypes_without_a_numpy_counterpart_have_digests() -> None:
    assert digest(torch.ones(2, dtype=torch.bfloat16)) != digest(torch.ones(2, dtype=torch.float16))
