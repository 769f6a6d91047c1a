"""Every leaf of a batch is found, and digests differ where batches do and nowhere else."""

from __future__ import annotations

from collections import UserDict, deque, namedtuple
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import pytest
import torch

from tpcheck.batches.leaves import DigestedBatch

Point = namedtuple("Point", "x y")


@dataclass
class Sample:
    image: Any
    label: int


class Custom:
    def __init__(self) -> None:
        self.inner = torch.ones(2)


class Slotted:
    __slots__ = ("__kept", "label", "unset")

    def __init__(self, label: int, kept: int = 0) -> None:
        self.label, self.__kept = label, kept


class Transform(Enum):
    FLIP = iter("f")
    CROP = iter("c")


def quantized(scale: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(2), scale, 0, torch.qint8)


class Wrapper(torch.Tensor):
    """A tensor of its own whose operations fail, as those of some wrappers do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("reshape", "contiguous", "view"):
            raise TypeError(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def same(a: Any, b: Any) -> bool:
    return DigestedBatch(a).fingerprint == DigestedBatch(b).fingerprint


def test_leaves_are_in_the_order_of_the_structure() -> None:
    batch = {"b": [torch.zeros(2), Sample(torch.ones(1), 3)], "a": UserDict({1: Point(1, "x")}), "c": Custom()}
    assert [leaf.path for leaf in DigestedBatch(batch).leaves] == (
        ["", "b", "b.0", "b.1", "b.1.image", "b.1.label", "a", "a.[1]", "a.[1].x", "a.[1].y", "c", "c.inner"]
    )


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([True]), torch.tensor([False])),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.ones(1, dtype=torch.complex64), torch.full((1,), 1j)),
        (torch.full((1,), 1j), torch.full((1,), 1j).conj()),
        (torch.eye(2).to_sparse(), torch.eye(2)),
        (torch.eye(2).to_sparse(), 2 * torch.eye(2).to_sparse()),
        (torch.eye(2).to_sparse_csr(), torch.eye(2).to_sparse()),
        (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), torch.ones(1, 2)),
        (np.zeros(2), np.zeros(2, dtype=np.float32)),
        (np.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (np.array(["a"]), np.array(["b"])),
        (np.array(["a", None], dtype=object), np.array(["a", 1], dtype=object)),
        (np.ma.array([1, 2], mask=[0, 1]), np.ma.array([1, 2], mask=[1, 0])),
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ("a", b"a"),
        ({"a": 1}, UserDict({"a": 1})),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}),
        (torch.zeros(2), torch.zeros(2, device="meta")),
        ([[torch.ones(1)], torch.ones(1)], [[torch.ones(1), torch.ones(1)]]),
        ({1: torch.ones(2)}, {1: torch.zeros(2)}),
        ([torch.ones(2), torch.zeros(2)], [torch.zeros(2), torch.ones(2)]),
        (None, 0),
        ([1, 2], (1, 2)),
        ([], {}),
        ([[1], 2], [1, [2]]),
        ({"a": 1}, {"b": 1}),
        ({1: 2}, {"1": 2}),
        ({1, 2}, {1, 3}),
        (Sample(1, 2), Sample(2, 1)),
        (Slotted(1), Slotted(2)),
        (Slotted(1), Slotted(1, kept=1)),
        (deque([1, 2]), deque([1, 3])),
        (Transform.FLIP, Transform.CROP),
        (quantized(0.1), quantized(0.2)),
    ],
)
def test_batches_that_differ_have_different_fingerprints(a: Any, b: Any) -> None:
    assert same(a, a)
    assert not same(a, b)


def test_equal_batches_have_equal_fingerprints() -> None:
    assert same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert same(torch.arange(6).reshape(2, 3).t(), torch.arange(6).reshape(2, 3).t().contiguous())
    assert same(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert same(float("nan"), float("nan"))
    assert same({"b", "a"}, {"a", "b"})
    assert same(torch.zeros(0, 3), torch.zeros(0, 3))
    assert same(torch.zeros(3, requires_grad=True), torch.zeros(3))
    frozen = np.arange(3)
    frozen.flags.writeable = False
    assert same(frozen, np.arange(3))


def test_a_nan_with_other_bits_differs() -> None:
    a, b = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32).split(1)  # type: ignore[no-untyped-call]
    assert not same(a, b)


def test_the_batches_of_transformers_have_leaves() -> None:
    transformers = pytest.importorskip("transformers")
    for kind in (transformers.BatchEncoding, transformers.BatchFeature):
        paths = [leaf.path for leaf in DigestedBatch(kind({"input_ids": torch.zeros(1, 2)})).leaves]
        assert paths == ["", "input_ids"]


def test_an_object_without_parts_is_identified_by_its_type() -> None:
    (leaf,) = DigestedBatch(lambda: None).leaves
    assert (leaf.kind, leaf.dtype) == ("opaque", "function")


def test_an_enumeration_is_identified_by_its_name_as_addresses_differ_between_processes() -> None:
    (leaf,) = DigestedBatch(Transform.FLIP).contents
    assert leaf.text == b"FLIP"


def test_what_cannot_be_read_is_named_and_ends_no_training() -> None:
    batch = DigestedBatch({"x": torch.ones(2), "odd": torch.ones(2).as_subclass(Wrapper), "iterator": iter([1])})
    assert batch.unread == {"odd": "Wrapper", "iterator": "list_iterator"}


def test_what_has_no_row_for_each_sample_is_beside_them_in_any_order() -> None:
    images = torch.ones(2, 3)
    batches = [
        DigestedBatch({"images": images, "text": text, "n": n}) for text, n in ((["a", "b"], 1), (["b", "a"], 2))
    ]
    assert batches[0].beside_rows == batches[1].beside_rows != DigestedBatch({"images": images}).beside_rows
    assert batches[0].beside_rows != DigestedBatch({"images": images, "text": ["a", "c"]}).beside_rows


def test_a_batch_that_contains_itself_ends() -> None:
    batch: dict[str, Any] = {}
    batch["self"] = batch
    assert len(DigestedBatch(batch).leaves) == 33


def test_keys_that_are_removed_later_stay_in_the_digested_batch() -> None:
    batch = {"a": torch.ones(2), "labels": torch.ones(2)}
    digested = DigestedBatch(batch)
    del batch["labels"]  # as trainers do
    assert [leaf.path for leaf in digested.contents] == ["", "a", "labels"]
    assert [leaf.path for leaf in digested.leaves] == ["", "a", "labels"]
