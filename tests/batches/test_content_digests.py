"""Digests of the samples in a tensor, whatever their order and padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tpcheck.batches.leaves import as_tensor, leaf_contents
from tpcheck.batches.samples import content_digests

TOKENS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def unpadded(tensor: torch.Tensor) -> str | None:
    return content_digests({"ids": tensor}, {"ids": (2, 3)})["ids"].unpadded


def test_padding_on_either_side_is_cut_off() -> None:
    padding = torch.zeros(2, 4, dtype=torch.int64)
    assert unpadded(TOKENS) == unpadded(torch.cat([TOKENS, padding], -1)) == unpadded(torch.cat([padding, TOKENS], -1))


def test_more_tokens_are_not_padding() -> None:
    assert unpadded(torch.cat([TOKENS, TOKENS], -1)) is None


def test_the_order_of_rows_makes_no_difference() -> None:
    one, other = (content_digests({"x": rows}, {})["x"].rows for rows in (TOKENS, TOKENS.flip(0)))
    assert one == other
    assert one != content_digests({"x": TOKENS + 1}, {})["x"].rows


def test_padding_of_any_kind_is_left_out_by_the_attention_mask() -> None:
    def unmasked(ids: list[int], mask: list[int]) -> str:
        tensors = {"text.ids": torch.tensor([ids]), "text.attention_mask": torch.tensor([mask])}
        return content_digests(tensors, {})["text.ids"].unmasked

    assert unmasked([5, 6, 0, 0], [1, 1, 0, 0]) == unmasked([9, 5, 6], [0, 1, 1])
    assert unmasked([5, 6, 0, 0], [1, 1, 0, 0]) != unmasked([5, 6, 0, 0], [1, 1, 1, 0])


def test_an_attention_mask_applies_to_vectors_too() -> None:
    def unmasked(vectors: torch.Tensor, mask: list[int]) -> str:
        tensors = {"embeddings": vectors[None], "attention_mask": torch.tensor([mask])}
        return content_digests(tensors, {})["embeddings"].unmasked

    one, other = torch.randn(2, 8), torch.randn(1, 8)
    assert unmasked(torch.cat([one, other]), [1, 1, 0]) == unmasked(torch.cat([other, other, one]), [0, 0, 1, 1])
    assert unmasked(torch.cat([one, other]), [1, 1, 0]) != unmasked(torch.cat([one, other]), [1, 1, 1])


def test_images_are_cut_in_every_dim_but_the_first() -> None:
    image = torch.randn(2, 3, 4, 5)
    wide = torch.nn.functional.pad(image, (0, 3, 2, 0))
    smallest = {"pixels": (2, 3, 4, 5)}
    digests = [content_digests({"pixels": each}, smallest)["pixels"].unpadded for each in (image, wide)]
    assert digests[0] == digests[1]
    assert content_digests({"pixels": torch.randn(2, 3, 4, 6)}, smallest)["pixels"].unpadded is None
    assert content_digests({"pixels": image}, {"pixels": ()})["pixels"].unpadded is None


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "float16"])
def test_an_array_becomes_a_tensor_of_its_dtype(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    (entry,) = leaf_contents(array)
    tensor = as_tensor(entry)
    assert tensor is not None
    assert tensor.tolist() == array.tolist()


@pytest.mark.parametrize("array", [np.array(["a", "b"]), np.array([1], dtype="datetime64[s]")])
def test_an_array_of_a_dtype_that_torch_lacks_is_left_out(array: Any) -> None:
    (entry,) = leaf_contents(array)
    assert as_tensor(entry) is None
