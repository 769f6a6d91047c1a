"""Damaged and hostile folders of torch.distributed.checkpoint end in one sentence, and nothing of them is run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoints.malformed import RemovesFile, assert_refused
from tests.checkpoints.reading import open_source

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def saved_with_dcp(folder: Path) -> Path:
    dcp.save({"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(2)}, checkpoint_id=str(folder), no_dist=True)
    return folder


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    return saved_with_dcp(tmp_path / "dcp")


def edit_metadata(folder: Path, edit: Callable[[Any], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def place(metadata: Any, name: str = "a") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def chunks(metadata: Any, *rectangles: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Let `a` consist of these chunks, all at the place of its only chunk."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    info = place(metadata)
    metadata.state_dict_metadata["a"].chunks = [
        ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in rectangles
    ]
    metadata.storage_data |= {MetadataIndex("a", at): info for at, _ in rectangles}


BAD_METADATA: dict[str, tuple[Callable[[Any], object], str]] = {
    "a path out of the folder": (lambda m: setattr(place(m), "relative_path", "../x"), "is outside of it"),
    "an absolute path": (lambda m: setattr(place(m), "relative_path", "/etc/passwd"), "is outside of it"),
    "a path that is none": (lambda m: setattr(place(m), "relative_path", 3), "is not a file name"),
    "a missing file": (lambda m: setattr(place(m), "relative_path", "__9_9.distcp"), "__9_9.distcp cannot be opened"),
    "an offset beyond the file": (lambda m: setattr(place(m), "offset", 1 << 40), "bytes, but its chunk of 'a' ends"),
    "a length beyond the file": (lambda m: setattr(place(m), "length", 1 << 40), "bytes, but its chunk of 'a' ends"),
    "a negative offset": (lambda m: setattr(place(m), "offset", -1), "has an invalid byte range for"),
    "another tensor's chunk": (
        lambda m: vars(place(m)).update(vars(place(m, "b"))),
        r"is \[2\] of torch.float32, but the metadata states \[4, 3\]",
    ),
    "half a chunk": (lambda m: setattr(place(m), "length", 500), "is not a tensor that torch saved, or it is damaged"),
    "a larger tensor": (
        lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size([5, 3])),
        r"that make up the shape \[4, 3\] in place of \[5, 3\]",
    ),
    "a smaller tensor": (
        lambda m: setattr(m.state_dict_metadata["a"], "size", torch.Size([3, 3])),
        "that reaches beyond the tensor",
    ),
    "a tensor of text": (
        lambda m: setattr(m.state_dict_metadata["a"], "size", "xy"),
        "has a shape of 'a' that is not made of sizes",
    ),
    "another dtype": (
        lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", torch.int64),
        "of torch.float32, but the metadata states .* of torch.int64",
    ),
    "no dtype": (
        lambda m: setattr(m.state_dict_metadata["a"].properties, "dtype", "float32"),
        "does not state the dtype of 'a'",
    ),
    "no chunks": (lambda m: m.state_dict_metadata["a"].chunks.clear(), "holds no chunk of 'a'"),
    "overlapping chunks": (lambda m: chunks(m, ((0, 0), (3, 3)), ((2, 0), (2, 3))), "has chunks that overlap"),
    "a gap": (lambda m: chunks(m, ((0, 0), (1, 3)), ((2, 0), (2, 3))), "leave out 3 of its 12 elements"),
    "chunks of other dims": (lambda m: chunks(m, ((0,), (12,))), "with another number of dims"),
    "chunks without a place": (lambda m: m.storage_data.clear(), "does not state the file of the chunk of 'a'"),
    "an entry of another kind": (lambda m: m.state_dict_metadata.update(a=3), "of an unknown kind"),
    "a name that is none": (lambda m: m.state_dict_metadata.update({3: 4}), "with a name that is not text: 3"),
    "no table": (lambda m: setattr(m, "state_dict_metadata", None), "a mapping is missing"),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_contradictory_metadata_is_refused(distributed: Path, case: str) -> None:
    edit, message = BAD_METADATA[case]
    edit_metadata(distributed, edit)
    assert_refused(distributed, message)


def test_compressed_chunks_are_listed(distributed: Path) -> None:
    edit_metadata(distributed, lambda m: setattr(place(m), "transform_descriptors", ["zstd"]))
    assert open_source(distributed).unread == {"a": "is compressed by an extension of torch.distributed.checkpoint"}


def test_no_code_of_the_metadata_is_run(distributed: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    edit_metadata(distributed, lambda m: setattr(m, "planner_data", RemovesFile(victim)))
    assert_refused(distributed, r"is refused, because it names (posix|os)\.remove, which the metadata of torch")
    assert open_source(distributed, allow_pickle=True).names() == ("a", "b")
    assert victim.exists()


def test_no_code_of_a_chunk_is_run(distributed: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.touch()
    torch.save(RemovesFile(victim), distributed / "__0_0.distcp")
    length = (distributed / "__0_0.distcp").stat().st_size
    edit_metadata(
        distributed, lambda m: [vars(info).update(offset=0, length=length) for info in m.storage_data.values()]
    )
    assert_refused(distributed, "is not a tensor that torch saved, or it is damaged")
    assert victim.exists()


FILES = {"__0_0.distcp": "distcp", ".metadata": "metadata"}


@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_refused(distributed: Path, file: str) -> None:
    path = distributed / file
    os.truncate(path, path.stat().st_size // 2)
    assert_refused(distributed, file)
    os.truncate(path, 0)
    assert_refused(distributed, f"{file} is empty")
    path.unlink()
    path.mkdir()
    assert_refused(distributed, f"{file} is a folder, where a file should be")


NO_METADATA = {
    "text": b"not a pickle",
    "a list": b"\x80\x04]\x94.",
    "marks": b"\x80\x04" + b"(" * 100_000 + b".",
    "a memo of gigabytes": b"\x80\x04N\x94r\xff\xff\xff\xff0.",
    "bytes of exabytes": b"\x80\x04\x8e" + b"\xff" * 8,
}


@pytest.mark.parametrize("data", NO_METADATA.values(), ids=NO_METADATA)
def test_anything_but_metadata_is_refused(distributed: Path, data: bytes) -> None:
    (distributed / ".metadata").write_bytes(data)
    assert_refused(distributed, "is not the metadata of torch.distributed.checkpoint")
