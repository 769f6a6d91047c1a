"""Files of torch.save are read without creating what they name, and tensors are read in place."""

from __future__ import annotations

import os
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.checkpoints.malformed import Calls
from tests.checkpoints.reading import bits_of
from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats import torch_files
from tpcheck.checkpoints.formats.files import Files
from tpcheck.checkpoints.formats.storage_view import StorageView
from tpcheck.checkpoints.formats.unpickler import PickledObject
from tpcheck.core.errors import CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.fixture(params=["zip", "legacy"])
def save(request, tmp_path):
    def save(structure):
        path = tmp_path / "model.pt"
        torch.save(structure, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    return save


def whole(stored: StorageView, files: Files) -> torch.Tensor:
    return stored.read(files, range(stored.shape[0] if stored.shape else 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_to_the_bit(save, files, dtype):
    expected = (
        torch.randint(0, 2, (3, 4, 16), dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.eye(3) > 0
    )
    stored = torch_files.load(save({"a": expected}), files, ReadOptions())["a"]
    assert (stored.shape, stored.dtype) == (tuple(expected.shape), dtype)
    assert torch.equal(bits_of(whole(stored, files)), bits_of(expected))


def test_views_are_read_as_they_are_strided(save, files):
    base = torch.arange(60.0).reshape(3, 4, 5)
    views = {
        "scalar": base[1, 2, 3], "row": base[1], "column": base[:, 2], "step": base[:, ::2, 1::3], "turned": base.mT,
        "permuted": base.permute(2, 0, 1), "expanded": base[0, :1].expand(6, 5), "empty": base[:, 4:], "whole": base,
    }  # fmt: skip
    stored = torch_files.load(save(views), files, ReadOptions())
    for name, view in views.items():
        assert torch.equal(whole(stored[name], files), view), name
        assert (stored[name].extent() is not None) == view.is_contiguous(), name
        if view.ndim and len(view) > 2:
            assert torch.equal(stored[name].read(files, range(1, 3)), view[1:3]), name


def test_an_extent_holds_the_elements(save, files):
    expected = torch.randn(7, 3)
    stored = torch_files.load(save({"a": torch.randn(5), "b": expected[2:]}), files, ReadOptions())["b"]
    extent = stored.extent()
    assert extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes] == bytes(
        bits_of(expected[2:]).tolist()
    )


def test_a_transposed_tensor_is_read_in_bounded_spans(save, files, monkeypatch):
    monkeypatch.setattr("tpcheck.checkpoints.formats.storage_view.MAX_SPAN", 256)
    expected = torch.randn(50, 40)
    stored = torch_files.load(save({"a": expected.t()}), files, ReadOptions())["a"]
    assert torch.equal(stored.read(files, range(10, 13)), expected.t()[10:13])


@given(data=st.data())
def test_any_strided_view_is_read(data, tmp_path_factory):
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    base = torch.randn(*shape, 1)[..., 0] if shape else torch.randn(())
    view = base.permute(data.draw(st.permutations(range(len(shape)))))
    for dim in range(view.ndim):
        view = view.narrow(dim, *_part(data, view.shape[dim]))
    path = tmp_path_factory.mktemp("view") / "a.pt"
    torch.save(view, path)
    files = Files()
    try:
        assert torch.equal(whole(torch_files.load(path, files, ReadOptions()), files), view)
    finally:
        files.close()


def _part(data, size):
    start = data.draw(st.integers(0, size))
    return start, data.draw(st.integers(0, size - start))


def test_containers_numbers_and_parameters_are_read(save, files):
    saved = {
        "model": OrderedDict(w=nn.Parameter(torch.ones(2)), b=nn.Buffer(torch.zeros(1))),
        "step": 3, "lr": 0.5, "name": "n", "raw": b"\x00\xff", "shape": torch.Size([1, 2]), "dtype": torch.bfloat16,
        "list": [1, (2, None, True)], "set": {1, 2},
    }  # fmt: skip
    loaded = torch_files.load(save(saved), files, ReadOptions())
    assert loaded["model"]["w"].shape == (2,)
    assert loaded["model"]["b"].shape == (1,)
    assert {key: loaded[key] for key in saved if key != "model"} == {key: saved[key] for key in saved if key != "model"}


def test_equal_views_of_one_storage_are_equal(save, files):
    weight = nn.Parameter(torch.randn(4, 4))
    loaded = torch_files.load(
        save({"a": weight, "b": weight, "t": weight.t(), "c": weight.detach().clone()}), files, ReadOptions()
    )
    assert loaded["a"] == loaded["b"]
    assert loaded["a"] not in (loaded["t"], loaded["c"])


def test_tensors_without_plain_elements_are_pickled_objects(save, files):
    loaded = torch_files.load(
        save(
            {
                "a": torch.eye(2).to_sparse(),
                "q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
                "b": torch.ones(1, dtype=torch.complex64).conj(),
            }
        ),
        files,
        ReadOptions(),
    )
    assert isinstance(loaded["a"], PickledObject)
    assert isinstance(loaded["b"], PickledObject)


def test_classes_that_torch_does_not_allow_are_refused_by_name_and_not_run(save, files, tmp_path):
    structure = {"a": torch.ones(2), "b": SimpleNamespace(x=1), "c": Calls(os.system, (f"touch {tmp_path}/ran",))}
    with pytest.raises(CheckpointError, match=r"run types.SimpleNamespace, posix.system; .*--allow-pickle") as caught:
        torch_files.load(save(structure), files, ReadOptions())
    assert str(caught.value).count("\n") == 0
    assert not (tmp_path / "ran").exists()


def test_classes_to_keep_are_pickled_objects(save, files):
    structure = {"a": torch.ones(2), "b": SimpleNamespace(x=1)}
    loaded = torch_files.load(save(structure), files, ReadOptions(), keep=["types.*"])
    assert loaded["b"].name == "types.SimpleNamespace"
    assert loaded["b"].state == {"x": 1}


@pytest.mark.parametrize("save", ["zip"], indirect=True)
def test_allowed_pickles_are_unpickled_in_a_separate_process(save, files, tmp_path):
    shared = torch.randn(3)
    structure = {
        "model": nn.Linear(2, 2), "b": SimpleNamespace(x=shared), "c": shared,
        "pid": Calls(os.getpid, ()), "ran": Calls(os.system, (f"touch {tmp_path}/ran",)),
    }  # fmt: skip
    loaded = torch_files.load(save(structure), files, ReadOptions(allow_pickle=True))
    assert torch.equal(whole(loaded["model"]["weight"], files), structure["model"].weight)
    assert loaded["b"]["x"] == loaded["c"]
    assert loaded["pid"] != os.getpid()
    assert (tmp_path / "ran").exists()
    scratch = loaded["c"].storage.path.parent
    files.close()
    assert not scratch.exists()


@pytest.mark.parametrize("save", ["zip"], indirect=True)
def test_a_pickle_that_fails_when_it_is_allowed_is_one_sentence(save, files):
    with pytest.raises(CheckpointError, match=r"could not be unpickled: .*ZeroDivisionError") as caught:
        torch_files.load(save(Calls(eval, ("1/0",))), files, ReadOptions(allow_pickle=True))
    assert "\n" not in str(caught.value)


def test_a_file_that_needs_no_classes_starts_no_process_though_it_may(save, files, monkeypatch):
    monkeypatch.delattr("subprocess.run")
    torch_files.load(save({"a": torch.ones(2)}), files, ReadOptions(allow_pickle=True))
