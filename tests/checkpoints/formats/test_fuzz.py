"""Damaged files are read correctly or refused: structures by Hypothesis here, bytes by ci/fuzz."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from tests.checkpoints.malformed import view, write_safetensors, write_torch_zip
from tests.checkpoints.reading import open_source, read_all, read_tensor, same_tensors
from tests.checkpoints.small_states import model_states, optimizer_states
from tpcheck.core.errors import CheckpointError

STATE = {"a.weight": torch.arange(24.0).reshape(6, 4), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(7)}
SHARD = "shard-0000{}-model-00001-of-00001.safetensors"


def read_or_refused(source: Path) -> dict[str, torch.Tensor] | None:
    try:
        return read_all(source)
    except CheckpointError as error:
        message = str(error)
    assert message.endswith(".")
    assert "\n" not in message
    return None


# Each writes a small valid checkpoint.


def _safetensors(folder: Path) -> None:
    save_file(STATE, folder / "model.safetensors")


def _indexed(folder: Path) -> None:
    for number, (name, one) in enumerate(STATE.items()):
        save_file({name: one}, folder / f"model-{number}.safetensors")
    weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(STATE)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"hidden_size": 4}')


def _shards(folder: Path) -> None:
    for number, rows in enumerate((STATE["a.weight"][:2], STATE["a.weight"][2:])):
        places = {"a.weight": {"saved_offsets": [2 * number, 0]}}
        path = folder / SHARD.format(number + 1)
        save_file({"a.weight": rows.contiguous()}, path, metadata={"DCP_SHARDING_INFO": json.dumps(places)})


def _torch(folder: Path) -> None:
    torch.save({"model": STATE, "step": 3}, folder / "model.pt")


def _legacy(folder: Path) -> None:
    torch.save(STATE, folder / "model.pt", _use_new_zipfile_serialization=False)


def _adapter(folder: Path) -> None:
    save_file(STATE, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def _dcp(folder: Path) -> None:
    dcp.save(dict(STATE), checkpoint_id=folder, no_dist=True)


def _training(folder: Path) -> None:
    for rank in (0, 1):
        torch.save(model_states(rank), folder / f"mp_rank_0{rank}_model_states.pt")
        torch.save(optimizer_states(rank), folder / f"zero_pp_rank_0_mp_rank_0{rank}_optim_states.pt")


VALID: list[Callable[[Path], None]] = [_safetensors, _indexed, _shards, _torch, _legacy, _adapter, _dcp, _training]


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The bytes of valid checkpoints, by the function that wrote them."""
    found = {}
    for write in VALID:
        folder = tmp_path_factory.mktemp("valid")
        write(folder)
        found[write] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found


@pytest.mark.parametrize("write", VALID, ids=lambda write: write.__name__)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_bytes_is_read_or_refused(data, write, valid, tmp_path):
    name = data.draw(st.sampled_from(sorted(valid[write])))
    damaged = bytearray(valid[write][name])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(damaged)))
        change = data.draw(st.binary(max_size=9))
        damaged[position : position + data.draw(st.integers(0, 9))] = change
    damaged = damaged[: data.draw(st.just(len(damaged)) | st.integers(0, len(damaged)))]
    for file, content in valid[write].items():
        (tmp_path / file).write_bytes(damaged if file == name else content)
    read_or_refused(tmp_path)


@pytest.mark.parametrize("write", VALID, ids=lambda write: write.__name__)
def test_every_truncation_is_refused(write, valid, tmp_path):
    for name, content in valid[write].items():
        for file, whole in valid[write].items():
            (tmp_path / file).write_bytes(whole)
        for length in range(0, len(content), max(1, len(content) // 30)):
            (tmp_path / name).write_bytes(content[:length])
            assert read_or_refused(tmp_path) is None, (name, length)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=6,
)
sizes = st.integers(-2, 12) | st.sampled_from([1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "I64", "F8_E4M3", "F4", "F6_E2M3", "BOOL", "C64", "X"]),
        "shape": st.lists(sizes, max_size=3),
        "data_offsets": st.lists(st.integers(-1, 24) | sizes, min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=3), entries | json_values, max_size=4)
nearly_right = st.lists(st.tuples(st.sampled_from(["F32", "U8", "F4"]), st.integers(0, 4)), max_size=4)


@given(header=headers, nbytes=st.integers(0, 32))
def test_any_header_is_read_or_refused_as_by_the_library(header, nbytes, tmp_path_factory):
    _agree_with_the_library(header, bytes(range(nbytes)), tmp_path_factory.mktemp("header"))


@given(parts=nearly_right, damage=st.sampled_from(["none", "shift", "trail", "grow"]), data=st.data())
def test_nearly_valid_headers_are_read_or_refused_as_by_the_library(parts, damage, data, tmp_path_factory):
    header, end = {}, 0
    for number, (dtype, count) in enumerate(parts):
        nbytes = {"F32": 4, "U8": 1, "F4": 1}[dtype] * count
        shape = [count * 2 if dtype == "F4" else count]
        header[str(number)] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    if header and damage in ("shift", "grow"):
        one = header[data.draw(st.sampled_from(sorted(header)))]
        one["data_offsets"][1] += 1
        one["data_offsets"][0] += damage == "shift"
    _agree_with_the_library(header, bytes(end + (damage == "trail")), tmp_path_factory.mktemp("header"))


def _agree_with_the_library(header, content, folder):
    path = write_safetensors(folder / "model.safetensors", json.dumps(header).encode(), content)
    read = read_or_refused(path)
    try:
        with safe_open(path, framework="pt") as library:
            names = {*library.keys()}
    except (SafetensorError, UnicodeError):
        assert read is None
        return
    if read is not None:
        checkpoint = open_source(path)
        assert {*read} | {*checkpoint.unread} == names
        assert same_tensors({name: read[name] for name in read}, _of_library(path, read))
        checkpoint.close()


def _of_library(path, names):
    try:
        return {name: one for name, one in load_file(path).items() if name in names}
    except KeyError:  # F4 is opened by the library, and not loaded
        return {name: read_all(path)[name] for name in names}


@given(
    weight_map=json_values | st.dictionaries(st.sampled_from([*STATE, "x"]), json_values | st.just("one"), max_size=4)
)
def test_any_index_is_read_or_refused(weight_map, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    save_file(STATE, folder / "one")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    read = read_or_refused(folder)
    if read is not None:
        assert same_tensors(read, {name: STATE[name] for name in weight_map})


geometry = st.integers(-1, 9) | st.sampled_from([None, "1", 1.5, 1 << 62, 1 << 64])


@given(
    numel=geometry,
    start=geometry,
    shape=st.lists(geometry, max_size=3).map(tuple) | geometry,
    stride=st.lists(geometry, max_size=3).map(tuple) | geometry,
    held=st.integers(0, 9),
)
def test_any_view_of_a_storage_is_read_as_by_torch_or_refused(numel, start, shape, stride, held, tmp_path_factory):
    path = tmp_path_factory.mktemp("view") / "model.pt"
    elements = torch.arange(float(held))
    structure = {"a": view(numel, start, shape, stride), "pad": 0}
    write_torch_zip(path, structure, {"data/0": elements.numpy().tobytes()})
    try:
        checkpoint = open_source(path)
    except CheckpointError:
        return
    if checkpoint.shape("a") and max(checkpoint.shape("a")) < 1000:
        assert torch.equal(read_tensor(checkpoint, "a"), elements.as_strided(shape, stride, start))
    checkpoint.close()


@given(opcodes=st.lists(st.sampled_from([bytes([one]) for one in range(256)]) | st.binary(max_size=6), max_size=40))
def test_any_pickle_is_read_or_refused(opcodes, tmp_path_factory):
    path = tmp_path_factory.mktemp("pickle") / "model.pt"
    write_torch_zip(path, b"\x80\x02" + b"".join(opcodes) + b".")
    read_or_refused(path)


@given(data=st.data())
def test_a_zip_file_with_any_records_is_read_or_refused(data, valid, tmp_path_factory):
    path = tmp_path_factory.mktemp("zip") / "model.pt"
    path.write_bytes(valid[_torch]["model.pt"])
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    changed = data.draw(st.sampled_from(sorted(records)))
    records[changed] = data.draw(st.binary(max_size=40))
    with zipfile.ZipFile(path, "w", data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for name in data.draw(st.permutations(sorted(records)))[: data.draw(st.integers(0, len(records)))]:
            archive.writestr(name, records[name])
    read = read_or_refused(path)
    if read is not None and "/data/" not in changed and "data.pkl" not in changed:
        assert same_tensors(read, STATE)


@given(changed=st.sampled_from(["saved_offsets", "order", "drop"]), offsets=st.lists(sizes, max_size=3))
def test_any_offsets_of_shards_are_read_or_refused(changed, offsets, valid, tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    for name, content in valid[_shards].items():
        (folder / name).write_bytes(content)
    if changed == "saved_offsets":
        places = json.dumps({"a.weight": {"saved_offsets": offsets}})
        save_file({"a.weight": torch.ones(4, 4)}, folder / SHARD.format(2), metadata={"DCP_SHARDING_INFO": places})
    elif changed == "order":
        shutil.move(folder / SHARD.format(1), folder / SHARD.format(3))
    else:
        (folder / SHARD.format(1)).unlink()
    read = read_or_refused(folder)
    assert read is None or read["a.weight"].shape in {(6, 4), (4, 4)}
