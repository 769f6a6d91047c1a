"""Walks through the pickle that `.metadata` is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpcheck.adapters import ReadOptions
from tpcheck.checkpoints.files import Files, OpenFile
from tpcheck.checkpoints.inert import Inert
from tpcheck.checkpoints.unpickler import InertUnpickler, Stream
from tpcheck.errors import CheckpointError

LARGEST_METADATA = 256 << 20
"""Bytes, some 300 for each chunk."""

MORE_STEPS = 24
"""Millions of steps beyond those of a torch file: 250,000 chunks, or half a gigabyte while they are looked at."""

CLASSES = (
    "torch.distributed.checkpoint.*",
    "torch.distributed._shard.*",  # where torch 1.13 and 2.0 had them
    "megatron.core.dist_checkpointing.*",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib._local.PosixPath",
)
"""What torch and Megatron write."""


def metadata_record(path: Path, files: Files, options: ReadOptions) -> Inert:
    """Return what the file holds, with `Inert` for each object.

    Raises:
        CheckpointError: It is damaged, or names classes that no metadata has.
    """
    file = files.open(path)
    if file.size > LARGEST_METADATA:
        raise CheckpointError(f"{path} has {file.size} bytes, which is more than a table of tensors needs.")
    classes = ("*",) if options.allow_pickle else CLASSES  # nothing is made of them either way
    unpickler = _MetadataUnpickler(_LongStream(file), inert=classes, persistent_load=_no_persistent)
    try:
        metadata = unpickler.load()
    except Exception as error:  # a damaged pickle raises anything
        _require_none_refused(path, unpickler)
        reason = str(error).removesuffix(".") if isinstance(error, CheckpointError) else type(error).__name__
        raise CheckpointError(f"{path} is no metadata of torch.distributed.checkpoint: {reason}.") from error
    _require_none_refused(path, unpickler)
    if not isinstance(metadata, Inert):
        raise CheckpointError(f"{path} is no metadata of torch.distributed.checkpoint: it holds other data.")
    return metadata


class _MetadataUnpickler(InertUnpickler):
    """Also keeps mappings whose keys are objects: `storage_data` is one."""

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if isinstance(key, Inert) and isinstance(target, dict):
                target[key] = value
            else:
                super()._set([key, value])


class _LongStream(Stream):
    """Reads on for more steps."""

    def __init__(self, file: OpenFile) -> None:
        super().__init__(file, 0, file.size)
        self._left = MORE_STEPS

    def read(self, nbytes: int) -> bytes:
        if self._reads >= 1_000_000 and self._left:
            self._reads, self._left = 0, self._left - 1
        return super().read(nbytes)


def _require_none_refused(path: Path, unpickler: InertUnpickler) -> None:
    if unpickler.refused:
        names = ", ".join(name if name.isprintable() else repr(name) for name in list(unpickler.refused)[:8])
        raise CheckpointError(
            f"{path} is refused, because it names {names[:400]}, which no metadata of torch.distributed.checkpoint "
            "does: --allow-pickle reads past them."
        )


def _no_persistent(_: Any) -> Any:
    raise CheckpointError("it refers to storages")
