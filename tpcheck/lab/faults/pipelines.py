"""Small data sets, as people write them. Samples 0 and 1 draw nothing: the first batch never shows the fault."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import distributed as dist
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    get_worker_info,
)

from tpcheck.backends.interface import RankLike

RandomNumber = Callable[[], float]


def by_torch() -> float:
    return float(torch.rand(()))


def by_numpy() -> float:
    return float(np.random.random())


DRAWS: dict[str, RandomNumber] = {"torch": by_torch, "numpy": by_numpy, "python": random.random}
LENGTH = 16
FIRST_RANDOM = 2  # sample


class Samples(Dataset[Any]):
    """A data set of `LENGTH` samples."""

    def __len__(self) -> int:
        return LENGTH


class Images(Samples):
    """Images with a random brightness."""

    def __init__(self, draw: RandomNumber | None = None) -> None:
        self.draw = draw

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


class Altered(Samples):
    """Samples of another data set, changed from the third batch on."""

    def __init__(self, inner: Dataset[Any], alter: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.inner, self.alter = inner, alter

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
    """A stream that is split over the replicas; one replica reads all of it."""

    def __init__(self, replicas: int = 1, replica: int = 0) -> None:
        self.replicas, self.replica = replicas, replica

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(LENGTH * 2).reshape(-1, 2)[self.replica :: self.replicas])


class Multimodal(Samples):
    """Nested samples: crops of an image, their boxes, and text."""

    def __init__(self, draw: RandomNumber | None = None) -> None:
        self.draw = draw

    def __getitem__(self, index: int) -> dict[str, Any]:
        left = 0.0 if self.draw is None or index < 2 * FIRST_RANDOM else self.draw()
        crops = [{"pixels": torch.full((3, 2, 2), float(index)), "box": torch.tensor([left, 0.0, 1.0, 1.0])}] * 2
        return {"images": crops, "text": f"picture {index}", "meta": {"source": None, "score": np.float32(index)}}


class Sentences(Samples):
    """Token ids, three for the first batch and then more."""

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [5 + (index + place) % 20 for place in range(3 if index < 2 * FIRST_RANDOM else 5)]}


Batches = Iterable[Any]


class PlacedRank(RankLike, Protocol):
    """A rank that knows its place on each axis."""

    @property
    def tp_rank(self) -> int: ...

    @property
    def dp_rank(self) -> int: ...


def by_replica(rank: PlacedRank, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """Return a loader that distributes samples over replicas, as it should."""
    sampler: DistributedSampler[Any] = DistributedSampler(
        dataset, num_replicas=rank.topology.dp, rank=rank.dp_rank, shuffle=False
    )
    return DataLoader(dataset, batch_size=2, sampler=sampler, **options)


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def augmented(rank: PlacedRank, kind: str, workers: int = 0, seeded: bool = False, **options: Any) -> Batches:
    if seeded and not workers:
        seed(rank.dp_rank)
    generator = torch.Generator().manual_seed(rank.dp_rank) if seeded else None
    return by_replica(rank, Images(DRAWS[kind]), num_workers=workers, generator=generator, **options)


def with_own_generator(rank: PlacedRank, seeded: bool) -> Batches:
    return by_replica(rank, OwnGenerator(rank.dp_rank if seeded else None))


def nested(rank: PlacedRank, seeded: bool) -> Batches:
    if seeded:
        seed(rank.dp_rank)
    return by_replica(rank, Multimodal(DRAWS["python"]), collate_fn=as_lists)


def as_lists(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


def masked_language(rank: PlacedRank, seeded: bool, workers: int = 0) -> Batches:
    from transformers import DataCollatorForLanguageModeling

    if seeded:
        seed(rank.dp_rank)
    generator = torch.Generator().manual_seed(rank.dp_rank) if seeded else None
    collate = DataCollatorForLanguageModeling(a_tokenizer(), mlm_probability=0.5)
    return by_replica(rank, Sentences(), collate_fn=collate, num_workers=workers, generator=generator)


def a_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2} | {f"w{number}": number for number in range(3, 30)}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]", padding_side="right"
    )


def padded(rank: PlacedRank, multiples: tuple[int, int], sides: tuple[str, str] = ("right", "right")) -> Batches:
    from transformers import DataCollatorWithPadding

    tokenizer = a_tokenizer()
    tokenizer.padding_side = sides[rank.tp_rank]
    return by_replica(
        rank, Sentences(), collate_fn=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiples[rank.tp_rank])
    )


def padded_images(rank: PlacedRank) -> Iterator[Any]:
    for step in range(4):
        images = np.random.default_rng([rank.dp_rank, step]).random((2, 3, 4, 4))
        yield {"pixel_values": np.pad(images, ((0, 0), (0, 0), (0, rank.tp_rank), (0, 2 * rank.tp_rank)))}


def reordered_images(rank: PlacedRank) -> Iterator[Any]:
    for step in range(4):
        images = np.random.default_rng([rank.dp_rank, step]).random((2, 3, 4, 4))
        yield {"pixel_values": images[::-1] if rank.tp_rank else images}


def shuffled(rank: PlacedRank, seeded: bool) -> Batches:
    generator = torch.Generator().manual_seed(rank.dp_rank) if seeded else None
    return DataLoader(Images(), batch_size=2, shuffle=True, generator=generator)


def shuffled_by_distributed_sampler(rank: PlacedRank, own_seed: bool) -> Batches:
    sampler: DistributedSampler[Any] = DistributedSampler(
        Images(),
        num_replicas=rank.topology.dp,
        rank=rank.dp_rank,
        seed=rank.tp_rank if own_seed else 0,
    )
    return DataLoader(Images(), batch_size=2, sampler=sampler)


def sharded_by_world_rank(rank: PlacedRank) -> Batches:
    sampler: DistributedSampler[Any] = DistributedSampler(Images(), shuffle=False)  # its defaults: the default group
    return DataLoader(Images(), batch_size=2, sampler=sampler)


def accelerated(rank: PlacedRank, dataset: Any, mesh: bool = True, shuffle: bool = True, **options: Any) -> Batches:
    """Return a loader that accelerate has prepared, with the device mesh of this topology or without one."""
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader
    from torch.distributed.device_mesh import init_device_mesh

    Accelerator(cpu=True)  # the state that the functions of accelerate look at
    sizes = (rank.topology.dp, rank.topology.tp)
    loader: Batches = prepare_data_loader(
        DataLoader(dataset, batch_size=2, shuffle=shuffle),
        device=torch.device("cpu"),
        put_on_device=True,
        rng_types=["generator"],
        torch_device_mesh=init_device_mesh("cpu", sizes, mesh_dim_names=("dp_shard", "tp")) if mesh else None,
        **options,
    )
    return loader


def accelerated_images(rank: PlacedRank, device_specific: bool | None = None, **options: Any) -> Batches:
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    Accelerator(cpu=True)
    if device_specific is not None:
        set_seed(3, device_specific=device_specific)
    return accelerated(rank, Images(), **options)


def accelerated_stream(rank: PlacedRank, sharded: bool = False) -> Batches:
    """Return a stream that accelerate has prepared; by default it dispatches the batches of every IterableDataset."""
    dataset = Numbers(rank.topology.dp, rank.dp_rank) if sharded else Numbers()
    return accelerated(rank, dataset, shuffle=False, dispatch_batches=False if sharded else None)


def stream(rank: PlacedRank, sharded: bool) -> Batches:
    return DataLoader(Numbers(rank.topology.dp, rank.dp_rank) if sharded else Numbers(), batch_size=2)


class NumbersOfWorkers(IterableDataset[Any]):
    """A stream of one replica, all of it from every worker, or split over them; shuffled by each worker or not."""

    def __init__(self, replicas: int, replica: int, *, split: bool, shuffled: bool) -> None:
        self.numbers = list(torch.arange(LENGTH * 2 * replicas).reshape(-1, 2)[replica::replicas])
        self.split, self.shuffled = split, shuffled

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        assert info is not None
        numbers = self.numbers[info.id :: info.num_workers] if self.split else self.numbers
        order = random.Random(info.id)
        return iter(order.sample(numbers, len(numbers)) if self.shuffled else numbers)


def stream_in_workers(rank: PlacedRank, split: bool, shuffled: bool = False) -> Batches:
    dataset = NumbersOfWorkers(rank.topology.dp, rank.dp_rank, split=split, shuffled=shuffled)
    return DataLoader(dataset, batch_size=2, num_workers=2)


class NumbersOfRank(IterableDataset[Any]):
    """A stream that is split by what torch.distributed says."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(LENGTH * 2).reshape(-1, 2)[dist.get_rank() :: dist.get_world_size()])


def stream_by_world_rank(rank: PlacedRank, reads_rank: bool) -> Batches:
    return DataLoader(NumbersOfRank() if reads_rank else Numbers(rank.topology.world_size, rank.rank), batch_size=2)


def stream_by_variables(rank: PlacedRank) -> Batches:
    world_size, world_rank = rank.topology.world_size, rank.rank

    class NumbersOfScript(IterableDataset[Any]):
        """A stream that is split by variables of the script around it."""

        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(torch.arange(LENGTH * 2).reshape(-1, 2)[world_rank::world_size])

    return DataLoader(NumbersOfScript(), batch_size=2)


def going_back(rank: PlacedRank, at: int = 3, back: int = 2) -> Batches:
    """Return batches of which the last `back` before number `at` come twice; all of them twice where it is the last."""
    batches = list(by_replica(rank, Images()))
    at = min(at, len(batches))
    return iter(batches[:at] + batches[max(0, at - back) :])


class Indices(Sampler[int]):
    """A sampler in an order of one's own."""

    def __init__(self, indices: Iterable[int]) -> None:
        self.indices = tuple(indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def in_order(rank: PlacedRank, parts: tuple[range, ...]) -> Batches:
    """Return augmented images in the order of these indices."""
    by_rank = torch.Generator().manual_seed(rank.dp_rank)
    images = Images(lambda: float(torch.rand((), generator=by_rank)))
    return DataLoader(images, batch_size=2, sampler=Indices(index for part in parts for index in part))


def with_replacement(rank: PlacedRank) -> Batches:
    generator = torch.Generator().manual_seed(rank.dp_rank)
    sampler = RandomSampler(Images(), replacement=True, num_samples=4 * LENGTH, generator=generator)
    return DataLoader(Images(), batch_size=2, sampler=sampler)


def same_for_all(rank: PlacedRank) -> Batches:
    return DataLoader(Images(), batch_size=2)


def listed(rank: PlacedRank, ordered: bool) -> Batches:
    """Return samples in the order of `os.listdir`, which depends on the file system of each host."""
    names = [f"{number:02d}.png" for number in range(LENGTH)]
    late = names[2 * FIRST_RANDOM :]
    random.Random(rank.tp_rank).shuffle(late)
    return by_replica(rank, Named(names if ordered else names[: 2 * FIRST_RANDOM] + late))


def uneven(rank: PlacedRank) -> Batches:
    samples = [{"ids": torch.tensor([index])} for index in range(rank.dp_rank * 100, rank.dp_rank * 100 + LENGTH)]
    return DataLoader(samples[: LENGTH - 4 * rank.tp_rank], batch_size=2)  # type: ignore[arg-type]


def altered(rank: PlacedRank, change: str) -> Batches:
    """Return samples of which rank 1 of each TP group changes one value."""

    def alter(sample: dict[str, Any]) -> dict[str, Any]:
        return CHANGES[change](sample) if rank.tp_rank == 1 else sample

    return by_replica(rank, Altered(Images(), alter))


def _flip_one_bit(sample: dict[str, Any]) -> dict[str, Any]:
    pixels = sample["pixel_values"].clone()
    pixels.view(torch.int32).view(-1)[5] ^= 1
    return sample | {"pixel_values": pixels}


CHANGES = {
    "labels": lambda sample: sample | {"labels": sample["labels"] + 1},
    "dtype": lambda sample: sample | {"labels": sample["labels"].int()},
    "one_bit": _flip_one_bit,
}
