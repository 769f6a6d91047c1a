"""Hostile files, one function each, which writes the file and returns the path to open."""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save, save_file

from tests.checkpoints.malformed import Calls, StorageOf, view, write_safetensors, write_torch_zip

Builder = Callable[[Path], Path]
SLOW = ("header: 32 MB of brackets", "torch: too many containers", "torch: keys nested deeply", "torch: a zip bomb")
HOSTILE: dict[str, tuple[Builder, str]] = {}
"""The function that writes each file, and the message of the refusal."""


def hostile(name: str, message: str) -> Callable[[Builder], Builder]:
    def register(build: Builder) -> Builder:
        HOSTILE[name] = build, message
        return build

    return register


# --- safetensors: the header ---------------------------------------------------------------------------------------


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "header: not JSON": ("{nonsense", b"", "is not valid JSON"),
    "header: an array": ("[]", b"", "its header is not a JSON object"),
    "header: empty": ("", b"", "its header is not a JSON object"),
    "header: cut": ('{"a":{"dtype":"F32"', b"", "is not valid JSON"),
    "header: nested deeply": ('{"a":' * 200_000, b"", "nested too deeply|not valid JSON"),
    "header: lists nested deeply": ('{"a":' + "[" * 1_000_000, b"", "nested too deeply|not valid JSON"),
    "header: NaN": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}', bytes(8), "NaN is not a number"),
    "header: infinity": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}', bytes(8), "not a number"),
    "header: a number of 10,000 digits": ('{"a":{"shape":[' + "9" * 10_000 + "]}}", b"", "not valid JSON"),
    "header: a key twice": (
        '{"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2), bytes(8), "the key 'a' is duplicated",
    ),
    "header: a field twice": (
        '{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "'dtype' is duplicated",
    ),
    "header: a lone surrogate": ('{"\\ud800":' + json.dumps(entry()) + "}", bytes(8), "is not valid JSON"),
    "header: not UTF-8": (b'{"\xff":1}', b"", "is not valid JSON"),
    "header: a byte order mark": (b"\xef\xbb\xbf{}", b"", "its header is not a JSON object"),
    "header: no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "is not described by"),
    "header: a field more": ({"a": entry(more=1)}, bytes(8), "is not described by"),
    "header: no table": ({"a": 3}, bytes(8), "is not described by"),
    "header: offsets that are negative": ({"a": entry(data_offsets=[-8, 0])}, bytes(8), r"offsets \[-8, 0\]"),
    "header: offsets that are backwards": ({"a": entry(data_offsets=[8, 0])}, bytes(8), r"offsets \[8, 0\]"),
    "header: offsets that are huge": ({"a": entry(data_offsets=[0, 1 << 70])}, bytes(8), "has the offsets"),
    "header: offsets beyond the file": ({"a": entry(shape=[4], data_offsets=[0, 16])}, bytes(8), "beyond the 8 bytes"),
    "header: offsets that are fractions": ({"a": entry(data_offsets=[0, 8.0])}, bytes(8), "has the offsets"),
    "header: offsets that are true": ({"a": entry(shape=[], data_offsets=[False, True])}, bytes(1), "has the offsets"),
    "header: three offsets": ({"a": entry(data_offsets=[0, 8, 8])}, bytes(8), "has the offsets"),
    "header: a negative size": ({"a": entry(shape=[-2])}, bytes(8), r"the shape \[-2\]"),
    "header: sizes that overflow": ({"a": entry(shape=[1 << 40, 1 << 40])}, bytes(8), "has the shape"),
    "header: sizes that overflow to nothing": (
        {"a": entry(shape=[0, 1 << 61, 1 << 61], data_offsets=[0, 0])}, b"", "has the shape",
    ),
    "header: a shape of text": ({"a": entry(shape="2")}, bytes(8), "has the shape '2'"),
    "header: a thousand dimensions": ({"a": entry(shape=[1] * 1000 + [2])}, bytes(8), "has the shape"),
    "header: too few bytes for the shape": ({"a": entry(shape=[3])}, bytes(8), "has 8 bytes, not those of"),
    "header: an unknown type": ({"a": entry(dtype="F33")}, bytes(8), "unknown type 'F33'"),
    "header: a type that is a list": ({"a": entry(dtype=["F32"])}, bytes(8), "unknown type of type list"),
    "header: overlap": ({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12), "'b' overlaps the one before"),
    "header: the same bytes twice": ({"a": entry(), "b": entry()}, bytes(8), "'b' overlaps the one before"),
    "header: a gap": ({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20), "'b' leaves a gap before it"),
    "header: bytes that belong to none": ({"a": entry()}, bytes(9), "1 bytes after its last tensor"),
    "header: metadata that is no text": ({"__metadata__": {"a": 1}}, b"", "metadata that is not text"),
    "header: metadata that is a list": ({"__metadata__": []}, b"", "metadata that is not text"),
}  # fmt: skip

for _name, (_header, _data, _message) in HEADERS.items():
    HOSTILE[_name] = (
        lambda folder, header=_header, data=_data: write_safetensors(folder / "model.safetensors", header, data),
        _message,
    )


@hostile("header: longer than the file", "its header should have 1000000 bytes")
def _(folder: Path) -> Path:
    return write_safetensors(folder / "model.safetensors", {"a": entry()}, bytes(8), length=1_000_000)


@hostile("header: longer than a file can be", "its header should have 18446744073709551615 bytes")
def _(folder: Path) -> Path:
    return write_safetensors(folder / "model.safetensors", {"a": entry()}, bytes(8), length=(1 << 64) - 1)


@hostile("header: of gigabytes", "a header of 4000000000 bytes")
def _(folder: Path) -> Path:
    path = write_safetensors(folder / "model.safetensors", b"{", length=4_000_000_000)
    os.truncate(path, 5_000_000_000)
    return path


@hostile("header: 32 MB of brackets", "nested too deeply|not valid JSON")
def _(folder: Path) -> Path:
    return write_safetensors(folder / "model.safetensors", b'{"a":[' + b"{}," * (10 << 20))


@hostile("safetensors: seven bytes", "which is too short")
def _(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(bytes(7))
    return folder


@hostile("safetensors: nothing", "is empty")
def _(folder: Path) -> Path:
    (folder / "model.safetensors").touch()
    return folder


@hostile("safetensors: truncated", "beyond the")
def _(folder: Path) -> Path:
    save_file({"a": torch.ones(100), "b": torch.ones(100)}, folder / "model.safetensors")
    os.truncate(folder / "model.safetensors", 700)
    return folder


@hostile("safetensors: a pickle by another name", "truncated or not a safetensors file")
def _(folder: Path) -> Path:
    torch.save({"a": torch.ones(100)}, folder / "model.safetensors")
    return folder


@hostile("safetensors: a FIFO", "not a regular file")
def _(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder


@hostile("safetensors: an endless device", "not a regular file")
def _(folder: Path) -> Path:
    (folder / "model.safetensors").symlink_to("/dev/zero")
    return folder


@hostile("safetensors: a folder", "a folder, where a file should be")
def _(folder: Path) -> Path:
    (folder / "model.safetensors").mkdir()
    return folder


@hostile("safetensors: a link that leads nowhere", "no such file")
def _(folder: Path) -> Path:
    (folder / "model.safetensors").symlink_to("nowhere")
    return folder


@hostile("safetensors: a cycle of links", "too many levels")
def _(folder: Path) -> Path:
    (folder / "model.safetensors").symlink_to("model.safetensors")
    return folder


# --- config.json ---------------------------------------------------------------------------------------------------


CONFIGS: dict[str, tuple[bytes, str]] = {
    "config: not JSON": (b"{", "config.json is not valid JSON"),
    "config: a list": (b"[]", "config.json does not hold a JSON object"),
    "config: nested deeply": (b'{"a":' * 200_000, "config.json is nested too deeply|not valid"),
    "config: not text": (b"\xff\xfe", "config.json is not valid JSON"),
    "config: nothing": (b"", "config.json is empty"),
}

for _name, (_text, _message) in CONFIGS.items():

    def _configured(folder: Path, text: bytes = _text) -> Path:
        save_file({"a": torch.ones(2)}, folder / "model.safetensors")
        (folder / "config.json").write_bytes(text)
        return folder

    HOSTILE[_name] = _configured, _message


@hostile("config: of gigabytes", "more than a JSON file of a checkpoint needs")
def _(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").touch()
    os.truncate(folder / "config.json", 5_000_000_000)
    return folder


@hostile("config: a FIFO", "not a regular file")
def _(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    os.mkfifo(folder / "config.json")
    return folder


# --- an index ------------------------------------------------------------------------------------------------------


INDEXES: dict[str, tuple[Any, str]] = {
    "empty": ("", "is empty"),
    "cut": ('{"weight_map": {"a": "x.saf', "is not valid JSON"),
    "a list": ([], "does not hold a JSON object"),
    "no weight_map": ({"metadata": {}}, "has no weight_map"),
    "a weight_map that is a list": ({"weight_map": ["a"]}, "has no weight_map"),
    "an empty weight_map": ({"weight_map": {}}, "has no weight_map"),
    "nested deeply": ('{"a":' * 200_000, "nested too deeply|not valid JSON"),
    "a tensor twice": ('{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' is duplicated"),
    "a file that is a number": ({"weight_map": {"a": 3}}, "names a file 3"),
    "a file that is a list": ({"weight_map": {"a": ["x"]}}, "names a file of type list"),
    "an empty name": ({"weight_map": {"a": ""}}, "names a file ''"),
    "an absolute name": ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd', which is outside of it"),
    "a name above": ({"weight_map": {"a": "../secret/model.safetensors"}}, "which is outside of it"),
    "a name above, hidden": ({"weight_map": {"a": "b/../../secret"}}, "which is outside of it"),
    "a name with NUL": ({"weight_map": {"a": "x\0.safetensors"}}, "which is not a file name"),
    "a name that is too long": ({"weight_map": {"a": "x" * 5000}}, "which is not a file name"),
    "a name that is rather long": ({"weight_map": {"a": "x" * 500}}, "cannot be opened: file name too long"),
    "a name that is a surrogate": ('{"weight_map": {"a": "\\ud800"}}', "is not valid JSON"),
    "its own folder": ({"weight_map": {"a": "."}}, "which is not a file name"),
    "a folder": ({"weight_map": {"a": "folder"}}, "a folder, where a file should be"),
    "a FIFO": ({"weight_map": {"a": "fifo"}}, "not a regular file"),
    "a file through a link out": ({"weight_map": {"a": "out/passwd"}}, "whose folder is a link out of it"),
    "a link that leads nowhere": ({"weight_map": {"a": "nowhere"}}, "no such file"),
    "a cycle of links": ({"weight_map": {"a": "cycle"}}, "too many levels"),
    "a missing file": ({"weight_map": {"a": "missing"}}, "names 'missing', which is missing"),
    "a file of nothing": ({"weight_map": {"a": "nothing"}}, "is empty"),
    "itself": ({"weight_map": {"a": "INDEX"}}, "truncated or not a safetensors|neither a zip file nor a pickle"),
}


def _indexed(folder: Path, name: str, index: Any) -> Path:
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / name).write_text(text.replace("INDEX", name))
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "out").symlink_to("/etc")
    (folder / "nowhere").symlink_to("not-there")
    (folder / "cycle").symlink_to("cycle")
    (folder / "nothing").touch()
    return folder


for _index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
    for _name, (_index, _message) in INDEXES.items():
        HOSTILE[f"{_index_name}: {_name}"] = (
            lambda folder, name=_index_name, index=_index: _indexed(folder, name, index),
            _message,
        )


@hostile("index: of gigabytes", "more than a JSON file of a checkpoint needs")
def _(folder: Path) -> Path:
    (folder / "model.safetensors.index.json").touch()
    os.truncate(folder / "model.safetensors.index.json", 5_000_000_000)
    return folder


# --- torch files ---------------------------------------------------------------------------------------------------


def _torch_zip(structure: Any, **records: Any) -> Builder:
    return lambda folder: write_torch_zip(folder / "model.pt", structure, **records)


def _data(numel: int = 4) -> dict[str, bytes]:
    return {"data/0": bytes(4 * numel)}


def _state(*geometry: Any) -> dict[str, Any]:
    return {"a": view(*geometry)}


def _pickled(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


RUN = Calls(os.system, ("touch ran",))
GLOBAL_SYSTEM = b"cposix\nsystem\n"
FROM_TYPE = b"ctorch._tensor\n_rebuild_from_type_v2\n"

TORCH: dict[str, tuple[Builder, str]] = {
    "a call of os.system": (_torch_zip({"a": RUN}), "run posix.system; .*--allow-pickle"),
    "a call of eval": (_torch_zip({"a": Calls(eval, ("1",))}), r"run builtins.eval; .*--allow-pickle"),
    "a class of its own": (_torch_zip({"a": Path("x")}), r"run pathlib.*; .*--allow-pickle"),
    "a function that is only named": (_torch_zip(_pickled(GLOBAL_SYSTEM)), "run posix.system"),
    "a call of what is no function": (_torch_zip(_pickled(b"K\x01K\x01\x85R")), "an object of type int is called"),
    "a state set in a function": (_torch_zip(_pickled(b"ctorch._utils\n_rebuild_tensor\n}b")), "holds no state dict"),
    "an extension code": (_torch_zip(_pickled(b"\x82\x01")), "its pickle is damaged"),
    "an instance as in protocol 0": (_torch_zip(_pickled(b"(iposix\nsystem\n")), "its pickle is damaged"),
    "an import of a name with a dot": (_torch_zip(_pickled(b"ctorch\nos.system\n")), "run torch.os.system"),
    "a name that is no text": (_torch_zip(_pickled(b"c\xff\n\xff\n")), "its pickle is damaged"),
    "a name of a megabyte": (_torch_zip(_pickled(b"c" + b"x" * 1_000_000 + b"\nx\n")), "more than 1000 characters"),
    "a name with escape codes": (_torch_zip(_pickled(b"c\x1b[31m\nx\n")), r"run '\\x1b\[31m\.x'"),
    "an endless memo": (_torch_zip(_pickled(b"Nr\xff\xff\xff\xff")), "holds no state dict"),
    "bytes of terabytes": (_torch_zip(_pickled(b"\x8e" + (1 << 40).to_bytes(8, "little"))), "the pickle is truncated"),
    "a byte array of terabytes": (_torch_zip(_pickled(b"\x96" + (1 << 40).to_bytes(8, "little"))), "pickle is damaged"),
    "a frame of terabytes": (_torch_zip(_pickled(b"\x95" + (1 << 40).to_bytes(8, "little") + b"N")), "no state dict"),
    "a number of a gigabyte": (_torch_zip(_pickled(b"\x8b\xff\xff\xff\x3f")), "pickle is (truncated|damaged)"),
    "keys nested deeply": (_torch_zip(_pickled(b"})" + b"\x85" * 1_000_000 + b"K\x01s")), "a key is of type tuple"),
    "lists nested deeply": (_torch_zip(_pickled(b"]" * 300_000 + b"a" * 299_999)), "holds no state dict"),
    "calls nested deeply": (
        _torch_zip(_pickled(FROM_TYPE + b"q\x00" + b"h\x00N" * 10_000 + b")" + b"\x87" * 10_000 + b"R")),
        "damaged .RecursionError",
    ),
    "an opcode that torch does not write": (_torch_zip(_pickled(b"N0")), "pickle is damaged"),
    "too many containers": (_torch_zip(_pickled(b"]" * 5_000_000)), "too many steps"),
    "a list in itself": (_torch_zip(_pickled(b"]q\x00h\x00a")), "but a list"),
    "no end": (_torch_zip(b"\x80\x02}"), "the pickle is truncated"),
    "nothing on the stack": (_torch_zip(_pickled()), "its pickle is damaged"),
    "a key twice": (_torch_zip(_pickled(b"}(X\x01\0\0\0aNX\x01\0\0\0aNu")), "the key 'a' is set twice"),
    "an entry of a list": (_torch_zip(_pickled(b"]K\x01K\x02s")), "an entry is set in a list"),
    "an element of a dict": (_torch_zip(_pickled(b"}K\x01a")), "an element is appended to a dict"),
    "a missing storage": (_torch_zip(_state(4, 0, (4,), (1,))), "record 'data/0' is missing"),
    "a storage that is too short": (_torch_zip(_state(4, 0, (4,), (1,)), records=_data(3)), "has 12 bytes for 4"),
    "a storage of a negative length": (_torch_zip(_state(-4, 0, (4,), (1,)), records=_data()), "of -4 elements"),
    "a storage of a length of text": (_torch_zip(_state("4", 0, (4,), (1,)), records=_data()), "of '4' elements"),
    "a storage with a path for a key": (
        _torch_zip({"a": Calls(torch._utils._rebuild_tensor, (StorageOf(4, "../../x"), 0, (4,), (1,)))}),
        "record 'data/../../x' is missing",
    ),
    "a tensor beyond its storage": (_torch_zip(_state(4, 1, (4,), (1,)), records=_data()), "beyond its storage"),
    "a tensor before its storage": (_torch_zip(_state(4, -1, (4,), (1,)), records=_data()), "has the offset -1"),
    "a negative stride": (_torch_zip(_state(4, 3, (4,), (-1,)), records=_data()), "strides that are not"),
    "a negative size": (_torch_zip(_state(4, 0, (-4,), (1,)), records=_data()), "strides that are not"),
    "a size that is a fraction": (_torch_zip(_state(4, 0, (4.0,), (1,)), records=_data()), "strides that are not"),
    "a size that is huge": (_torch_zip(_state(4, 0, (1 << 70,), (1,)), records=_data()), "strides that are not"),
    "sizes that overflow": (_torch_zip(_state(4, 0, (1 << 40, 1 << 40), (0, 0)), records=_data()), "exceeds any"),
    "a petabyte by repetition": (_torch_zip(_state(4, 0, (1 << 50,), (0,)), records=_data()), "repeats 16 bytes"),
    "fewer strides than sizes": (_torch_zip(_state(4, 0, (2, 2), (1,)), records=_data()), "strides that are not"),
    "sizes that are no list": (_torch_zip(_state(4, 0, 4, 1), records=_data()), "a tensor has no sizes"),
    "a tensor without a storage": (
        _torch_zip({"a": Calls(torch._utils._rebuild_tensor_v2, (None, 0, (1,), (1,), False, None))}), "has no storage",
    ),
    "too few arguments": (_torch_zip({"a": Calls(torch._utils._rebuild_tensor_v2, (1,))}), "its pickle is damaged"),
    "another kind of reference": (_torch_zip(_pickled(b"X\x01\0\0\0aQ")), "something that is not a storage"),
    "another byte order": (_torch_zip({}, records={"byteorder": b"big"}), "byte order"),
    "compressed": (
        _torch_zip(_state(4, 0, (4,), (1,)), records=_data(), compression=zipfile.ZIP_DEFLATED), "is compressed",
    ),
    "TorchScript": (_torch_zip({}, records={"constants.pkl": b""}), "run TorchScript code; .*--allow-pickle"),
}  # fmt: skip

for _name, (_build, _message) in TORCH.items():
    HOSTILE[f"torch: {_name}"] = _build, _message


@hostile("torch: a call of os.system in a legacy file", "run posix.system; .*--allow-pickle")
def _(folder: Path) -> Path:
    torch.save({"a": RUN}, folder / "model.pt", _use_new_zipfile_serialization=False)
    return folder


@hostile("torch: a call of os.system as text", "run posix.system; .*--allow-pickle")
def _(folder: Path) -> Path:
    (folder / "model.bin").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    return folder


@hostile("torch: a plain pickle", "it is a pickle, but not one of torch.save")
def _(folder: Path) -> Path:
    (folder / "model.bin").write_bytes(pickle.dumps({"a": 1}))
    return folder


@hostile("torch: text", "neither a zip file nor a pickle of torch.save")
def _(folder: Path) -> Path:
    (folder / "model.bin").write_text("version https://git-lfs.github.com/spec/v1")
    return folder


@hostile("torch: another zip file", "a zip file, but not one of torch.save")
def _(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.pt", "w") as archive:
        archive.writestr("archive/readme", "hello")
    return folder


@hostile("torch: a zip bomb", "record 'data.pkl' is compressed")
def _(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(200_000_000))
    return folder


@hostile("torch: a record twice", "record 'data/0' is duplicated")
def _(folder: Path) -> Path:
    path = write_torch_zip(folder / "model.pt", _state(4, 0, (4,), (1,)), _data())
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("archive/data/0", bytes(16))
    return folder


@hostile("torch: two archives", "it holds several archives")
def _(folder: Path) -> Path:
    path = write_torch_zip(folder / "model.pt", _state(4, 0, (4,), (1,)), _data())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({}, protocol=2))
    return folder


@hostile("torch: a table of contents of gigabytes", "table of contents is (damaged|longer)")
def _(folder: Path) -> Path:
    path = write_torch_zip(folder / "model.pt", _state(4, 0, (4,), (1,)), _data())
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    tail = bytes(data[end:])
    with path.open("r+b") as file:
        file.truncate(3_000_000_000)
        file.seek(3_000_000_000)
        file.write(tail[:12] + (2_999_000_000).to_bytes(4, "little") + (0).to_bytes(4, "little") + tail[20:])
    return folder


@hostile("torch: a record that is not where the table says", "does not lie where the table of contents says")
def _(folder: Path) -> Path:
    path = write_torch_zip(folder / "model.pt", _state(4, 0, (4,), (1,)), _data())
    data = path.read_bytes()
    path.write_bytes(data.replace(b"PK\x03\x04", b"PK\x03\x05").replace(b"PK\x03\x05", b"PK\x03\x04", 1))
    return folder


@hostile("torch: truncated", "zip table of contents is damaged or missing")
def _(folder: Path) -> Path:
    torch.save({"a": torch.ones(1000)}, folder / "model.pt")
    os.truncate(folder / "model.pt", 3000)
    return folder


@hostile("torch: truncated legacy storages", "storage is truncated|bytes, so 8 from")
def _(folder: Path) -> Path:
    torch.save({"a": torch.ones(1000)}, folder / "model.pt", _use_new_zipfile_serialization=False)
    os.truncate(folder / "model.pt", 3000)
    return folder


@hostile("torch: a legacy storage of another length", "not as long as its tensors say")
def _(folder: Path) -> Path:
    path = folder / "model.pt"
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    path.write_bytes(data.replace((1000).to_bytes(8, "little"), (999).to_bytes(8, "little")))
    return folder


@hostile("torch: a safetensors file by another name", "neither a zip file nor a pickle")
def _(folder: Path) -> Path:
    (folder / "model.pt").write_bytes(save({"a": torch.ones(2)}))
    return folder
