"""What a batch holds, apart from order and padding."""

from __future__ import annotations

import torch

from tpcheck.collect.contents import contents

TOKENS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def unpadded(tensor: torch.Tensor) -> str | None:
    return contents({"ids": tensor}, {"ids": 3})["ids"].get("unpadded")


def test_padding_on_either_side_is_taken_off() -> None:
    padding = torch.zeros(2, 4, dtype=torch.int64)
    assert unpadded(TOKENS) == unpadded(torch.cat([TOKENS, padding], -1)) == unpadded(torch.cat([padding, TOKENS], -1))


def test_more_tokens_are_no_padding() -> None:
    assert unpadded(torch.cat([TOKENS, TOKENS], -1)) is None


def test_rows_are_told_without_their_order() -> None:
    one, other = (contents({"x": rows}, {})["x"]["rows"] for rows in (TOKENS, TOKENS.flip(0)))
    assert one == other
    assert one != contents({"x": TOKENS + 1}, {})["x"]["rows"]


def test_an_attention_mask_says_what_is_kept() -> None:
    def kept(ids: list[int], mask: list[int]) -> str:
        tensors = {"text.ids": torch.tensor([ids]), "text.attention_mask": torch.tensor([mask])}
        return contents(tensors, {})["text.ids"]["kept"]

    assert kept([5, 6, 0, 0], [1, 1, 0, 0]) == kept([9, 5, 6], [0, 1, 1])
    assert kept([5, 6, 0, 0], [1, 1, 0, 0]) != kept([5, 6, 0, 0], [1, 1, 1, 0])
