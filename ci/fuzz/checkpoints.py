#!/usr/bin/env python3
"""Fuzz the bytes of checkpoints: `pip install atheris`, then `ci/fuzz/checkpoints.py -max_total_time=300`.

Whatever the bytes are, the checkpoint is read or refused with a CheckpointError. The options are those of libFuzzer.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tpcheck.checkpoints", "zipfile", "pickle", "json"]):
    from tpcheck.backends.checkpoint_format import ReadOptions
    from tpcheck.checkpoints.formats.peft import PeftFormat
    from tpcheck.checkpoints.formats.pytorch_files import PytorchFormat
    from tpcheck.checkpoints.formats.safetensors_files import SafetensorsFormat, TransformersShardsFormat
    from tpcheck.core.errors import CheckpointError

import torch
from safetensors.torch import save, save_file

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
SHARD = "shard-00002-model-00001-of-00001.safetensors"
TARGETS = {
    "model.safetensors": SafetensorsFormat(),
    "model.safetensors.index.json": SafetensorsFormat(),
    "model.pt": PytorchFormat(),
    "pytorch_model.bin.index.json": PytorchFormat(),
    "adapter_config.json": PeftFormat(),
    SHARD: TransformersShardsFormat(),
}
"""The file that is fuzzed, and the format that opens its folder. The first byte of an input selects one."""


def write_folders(folder: Path) -> None:
    """Create a folder for each target, with valid files beside the one that is fuzzed."""
    for number, name in enumerate(TARGETS):
        (folder / str(number)).mkdir()
        if name.endswith("index.json"):
            save_file(TENSORS, folder / str(number) / "whole")
            torch.save(TENSORS, folder / str(number) / "whole.bin")
        elif name == "adapter_config.json":
            save_file(TENSORS, folder / str(number) / "adapter_model.safetensors")
        elif name == SHARD:
            first = folder / str(number) / SHARD.replace("shard-00002", "shard-00001")
            save_file({"a": TENSORS["a"]}, first, metadata=_sharding_info([0, 0]))


def write_seeds(folder: Path) -> None:
    """Write a valid input of each kind, from which the fuzzer starts."""
    torch.save(TENSORS, folder / "zip")
    torch.save(TENSORS, folder / "legacy", _use_new_zipfile_serialization=False)
    index = {"weight_map": {"a": "whole", "b": "whole"}}
    shard = save({"a": TENSORS["a"]}, metadata=_sharding_info([2, 0]))
    inputs = [(0, save(TENSORS)), (1, json.dumps(index).encode()), (4, b'{"peft_type": "LORA"}'), (5, shard)]
    inputs += [(2, (folder / name).read_bytes()) for name in ("zip", "legacy")]
    inputs += [(3, json.dumps(index).replace("whole", "whole.bin").encode())]
    for number, (target, content) in enumerate(inputs):
        (folder / str(number)).write_bytes(bytes([target]) + content)


def _sharding_info(offsets: list[int]) -> dict[str, str]:
    return {"DCP_SHARDING_INFO": json.dumps({"a": {"saved_offsets": offsets}})}


def main() -> None:
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as corpus:
        write_folders(Path(work))
        write_seeds(Path(corpus))

        def read(content: bytes) -> None:
            number = content[0] % len(TARGETS) if content else 0
            name, checkpoint_format = list(TARGETS.items())[number]
            folder = Path(work) / str(number)
            (folder / name).write_bytes(content[1:])
            try:
                checkpoint = checkpoint_format.open(folder, ReadOptions())
            except CheckpointError:
                return
            try:
                for tensor in checkpoint.names():
                    shape = checkpoint.shape(tensor)
                    checkpoint.read(tensor, range(min(shape[0], 4)) if shape else range(1))
            except CheckpointError:
                pass
            finally:
                checkpoint.close()

        atheris.Setup([*sys.argv, corpus], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
