"""Two tensors that differ in one bit, in dtype or in shape have different digests."""

import pytest
import torch

from tpcheck.core.digests import BlockDigest, _sums, digest, flat_bytes, splitmix, start_digests, start_row_digests


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


def on_device(tensor: torch.Tensor) -> list[int]:
    """Return what a GPU would compute; the sums are the same integers on every device."""
    return _sums(tensor).tolist()


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex64]
)
@pytest.mark.parametrize("number", [1, 3, 4, 1000])
def test_sums_on_a_device_differ_for_one_flipped_bit_and_for_an_exchange(dtype: torch.dtype, number: int) -> None:
    tensor = (torch.arange(number) % 2).to(dtype)
    seen = {tuple(on_device(tensor)), tuple(on_device(tensor.clone()))}
    assert len(seen) == 1
    for place in {0, number // 2, number - 1}:
        flipped = tensor.clone()
        flat_bytes(flipped.view(torch.uint8) if dtype is torch.bool else flipped)[place * tensor.element_size()] ^= 1
        seen.add(tuple(on_device(flipped)))
    assert len(seen) == 1 + len({0, number // 2, number - 1})
    if number > 2:
        swapped = tensor[[1, 0, *range(2, number)]]
        assert on_device(swapped) != on_device(tensor)


def test_sums_on_a_device_go_over_chunks_and_odd_starts() -> None:
    tensor = torch.arange((1 << 20) + 5, dtype=torch.int32)
    assert len(on_device(tensor)) == 4
    assert on_device(tensor.clone())[:2] == on_device(tensor[: 1 << 20])
    assert on_device(tensor.view(torch.uint8)[3:11]) == on_device(tensor.view(torch.uint8)[3:11].clone())
    assert on_device(torch.zeros(0)) == [0, 0]


def test_digests_of_several_tensors_are_those_of_each() -> None:
    tensors = [torch.ones(2), torch.zeros(3), torch.ones(2, device="meta")]
    assert start_digests(tensors)() == [start_digests([tensor])()[0] for tensor in tensors]


def test_the_digest_of_blocks_is_that_of_the_tensor_whatever_blocks_are_missing() -> None:
    tensor = torch.randn(6, 4)
    expected = start_digests([tensor])()[0]
    first, second = tensor[:2], tensor[2:]
    for blocks in ([], [tensor], [first, second], [first], [second], [second, first], [first, first], [first[:, :2]]):
        digest = BlockDigest(tensor)
        for block in blocks:
            digest.update(block)
        assert digest.digest() == expected
    turned = BlockDigest(tensor.t())
    turned.update(tensor)
    assert turned.digest() == start_digests([tensor.t()])()[0] != expected


def test_splitmix_has_the_high_bits_of_the_published_generator() -> None:
    first_outputs = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)  # of seed 0
    mixed = splitmix(torch.tensor([1, 2, 3])).tolist()
    assert [number >> 33 & 0x7FFFFFFF for number in mixed] == [output >> 33 for output in first_outputs]


@pytest.mark.parametrize("rows", [3, 300])
def test_digests_of_rows_are_those_of_their_bits(rows: int) -> None:
    """Few rows are digested in a loop, many are summed as on a device."""
    tensors = [
        torch.randn(rows, 5),
        torch.arange(rows),
        torch.rand(rows, 3).to(torch.bfloat16),
        torch.rand(5, rows).t(),
    ]
    order = torch.randperm(rows)
    for tensor, digests, permuted in zip(
        tensors,
        start_row_digests(tensors, rows)(),
        start_row_digests([tensor[order] for tensor in tensors], rows)(),
        strict=True,
    ):
        of_rows = [digests[start : start + 16] for start in range(0, len(digests), 16)]
        assert len(set(of_rows)) == len({tuple(row.flatten().tolist()) for row in tensor})
        assert [of_rows[place] for place in order.tolist()] == [permuted[16 * n : 16 * n + 16] for n in range(rows)]
