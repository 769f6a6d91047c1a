"""Small data sets, as people write them. Samples 0 and 1 draw nothing: the first batch never shows the fault."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

RandomNumber = Callable[[], float]


def by_torch() -> float:
    return float(torch.rand(()))


def by_numpy() -> float:
    return float(np.random.random())


DRAWS: dict[str, RandomNumber] = {"torch": by_torch, "numpy": by_numpy, "python": random.random}
LENGTH = 16
FIRST_RANDOM = 2  # sample


class Images(Dataset[Any]):
    """Images with a random brightness."""

    def __init__(self, draw: RandomNumber | None = None) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image_CHW = torch.arange(12, dtype=torch.float32).reshape(3, 2, 2) + index
        if self.draw is not None and index >= FIRST_RANDOM * 2:  # two replicas: neither draws for its first batch
            image_CHW = image_CHW * (1 + self.draw())
        return {"pixel_values": image_CHW, "labels": torch.tensor(index)}


class OwnGenerator(Images):
    """Images whose brightness comes from the data set's own generator."""

    def __init__(self, seed: int | None) -> None:
        self.rng = np.random.default_rng(seed)
        super().__init__(lambda: float(self.rng.random()))


class Altered(Dataset[Any]):
    """Samples of another data set, changed from the third batch on."""

    def __init__(self, inner: Dataset[Any], alter: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.inner, self.alter = inner, alter

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        sample = self.inner[index]
        return self.alter(sample) if index >= 2 * FIRST_RANDOM else sample


class Named(Dataset[Any]):
    """One sample for each file name, in the order of the list."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"ids": torch.tensor([ord(letter) for letter in self.names[index]]), "index": index}


class Numbers(IterableDataset[Any]):
    """A stream that every rank reads from its beginning."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(LENGTH * 2).reshape(-1, 2))


class Sharded(IterableDataset[Any]):
    """A stream that is split over the replicas."""

    def __init__(self, replicas: int, replica: int) -> None:
        self.replicas, self.replica = replicas, replica

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(LENGTH * 2).reshape(-1, 2)[self.replica :: self.replicas])


class Multimodal(Dataset[Any]):
    """Nested samples: crops of an image, their boxes, and text."""

    def __init__(self, draw: RandomNumber | None = None) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        left = 0.0 if self.draw is None or index < 2 * FIRST_RANDOM else self.draw()
        crops = [{"pixels": torch.full((3, 2, 2), float(index)), "box": torch.tensor([left, 0.0, 1.0, 1.0])}] * 2
        return {"images": crops, "text": f"picture {index}", "meta": {"source": None, "score": np.float32(index)}}


class Sentences(Dataset[Any]):
    """Token ids, three for the first batch and then more."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [5 + (index + place) % 20 for place in range(3 if index < 2 * FIRST_RANDOM else 5)]}
