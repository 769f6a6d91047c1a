"""Traces on disk: what is written is read, whenever the writer was killed, and nothing that is read is trusted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.core.topology import Topology
from tpcheck.numerics.optimizer_view import ParameterGroup
from tpcheck.numerics.sketch import GlobalIndex, distance, sketch
from tpcheck.runs.comparing.alignment import Run
from tpcheck.runs.trace.files import LONGEST_LINE, TraceWriter, new_run_id, numbers_of, read_trace, require_writable
from tpcheck.runs.trace.records import Leaf, PassRecord, RankTrace, Reading, StepRecord, TensorRecord

RUN = "a" * 32
ALONE = Topology()


def record(
    name: str = "layers.0.weight", dtype: torch.dtype = torch.float64, seed: int = 0, full: int = 0
) -> TensorRecord:
    tensor = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    whole = Reading("whole", (6, 4), GlobalIndex.whole((6, 4)).piece(), sketch(tensor), deviation=1e-15)
    cut = Reading("dim -1", (-1, 8), "piece", sketch(tensor, scale=2.0), is_term=True)
    dtype_name = str(dtype).removeprefix("torch.")
    kept = tuple(tensor + number for number in range(full))
    return TensorRecord("output", name, "0", 1, dtype_name, (6, 4), "d" * 32, (whole, cut), kept)


def step(number: int, *, full: int = 0, dtype: torch.dtype = torch.float64) -> StepRecord:
    leaf = Leaf("input_ids", "int64", (2, 8), "e" * 32)
    passed = PassRecord((leaf,), ("s0", "s1"), 0.1 + number, True, generators={"torch": "f"})
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "nesterov": False, "fused": None, "mode": "max", "eps": math.inf}
    group = ParameterGroup("AdamW", options, ("layers.0.weight",))
    tensors = (record(seed=number, full=full, dtype=dtype), record("layers.1", torch.bfloat16, seed=number))
    return StepRecord(number, True, (passed,), tensors, (group,), 0.5, None, loss_scale=65536.0)


def header(rank: int = 0, topology: Topology = ALONE, **facts) -> RankTrace:
    return RankTrace(
        rank=rank,
        topology=topology,
        tp_group=topology.peers(rank, "tp"),
        dp_group=topology.peers(rank, "dp"),
        dtype="float64",
        versions={"torch": "2.13.0"},
        replays=2,
        source="Module",
        initial=(record(),),
        steps=(),
        num_steps=0,
        **facts,
    )


def write(path: Path, *, ranks=(0,), topology: Topology = ALONE, steps: int = 2, end: bool = True, run: str = RUN):
    for rank in ranks:
        writer = TraceWriter(path, header(rank, topology), run_id=run)
        for number in range(steps):
            writer.write_step(step(number))
        if end:
            writer.close(num_steps=steps, not_recorded={"states": "the optimizer has none"})
    return path


def assert_equal(actual: object, expected: object) -> None:
    """Compare records; tensors to the bit, those of low precision to float32."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected) or torch.equal(actual, expected.float().to(actual.dtype))
    elif dataclasses.is_dataclass(expected):
        assert type(actual) is type(expected)
        for field in dataclasses.fields(expected):
            assert_equal(getattr(actual, field.name), getattr(expected, field.name))
    elif isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for pair in zip(actual, expected, strict=True):
            assert_equal(*pair)
    else:
        assert actual == expected
        assert type(actual) is type(expected)


# ---- what is written is read


def test_a_trace_is_read_as_it_was_written(tmp_path):
    (trace,) = read_trace(write(tmp_path / "made" / "too" / "run.trace"))
    expected = dataclasses.replace(
        header(),
        steps=(step(0), step(1)),
        num_steps=2,
        not_recorded={"states": "the optimizer has none"},
    )
    assert_equal(dataclasses.replace(trace, steps=tuple(trace.steps)), expected)
    assert trace.is_complete


def test_full_tensors_of_every_dtype_come_back(tmp_path):
    writer = TraceWriter(tmp_path, header(), run_id=RUN)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.complex128]
    writer.write_step(dataclasses.replace(step(0), tensors=tuple(record(dtype=dtype, full=2) for dtype in dtypes)))
    for tensor, dtype in zip(read_trace(tmp_path)[0].steps[0].tensors, dtypes, strict=True):
        expected = record(dtype=dtype, full=2).full
        assert len(tensor.full) == 2
        assert all(torch.equal(*pair) for pair in zip(tensor.full, expected, strict=True))
        assert tensor.full[0].dtype == expected[0].dtype
        assert torch.equal(tensor.full[1:][0], expected[1])


def test_numbers_that_are_not_finite_come_back(tmp_path):
    writer = TraceWriter(tmp_path, header(), run_id=RUN)
    writer.write_step(
        dataclasses.replace(step(0), gradient_norm=math.nan, reported_norm=-math.inf, loss_scale=math.inf)
    )
    found = read_trace(tmp_path)[0].steps[0]
    assert math.isnan(found.gradient_norm)
    assert (found.reported_norm, found.loss_scale) == (-math.inf, math.inf)


def test_names_and_reasons_are_written_so_that_a_terminal_can_show_them(tmp_path):
    writer = TraceWriter(tmp_path, header(), run_id=RUN)
    writer.close(num_steps=0, not_recorded={"states": "two\nlines \x1b[31m" + "x" * 5000, "Gewicht ü": "\ud800"})
    found = read_trace(tmp_path)[0].not_recorded
    assert found["states"].startswith("two lines  [31mxxx")
    assert len(found["states"]) == 4096
    assert found["Gewicht ü"] == " "


def test_a_sketch_takes_at_most_eight_kilobytes(tmp_path):
    writer = TraceWriter(tmp_path, header(), run_id=RUN)
    writer.write_step(dataclasses.replace(step(0), tensors=(record(),) * 50))
    writer.write_step(dataclasses.replace(step(1), tensors=(record(dtype=torch.bfloat16),) * 50))
    wide, low = (tmp_path / f"rank_00000.step_0000000{number}.safetensors" for number in range(2))
    assert wide.stat().st_size <= 50 * 2 * 8192 + 200  # two readings each
    assert low.stat().st_size <= 50 * 2 * 4096 + 200
    assert (tmp_path / "rank_00000.jsonl").stat().st_size < 120 * 500


def test_other_programs_can_read_the_tensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    write(tmp_path)
    tensors = safetensors.load_file(tmp_path / "rank_00000.step_00000001.safetensors")
    assert torch.equal(tensors["tiles_float64"][0], step(1).tensors[0].readings[0].sketch.tiles)
    assert tensors["tiles_float32"].shape == (2, 4, 16, 16)


def test_steps_are_read_one_by_one(tmp_path):
    write(tmp_path, steps=9)
    steps = read_trace(tmp_path)[0].steps
    (tmp_path / "rank_00000.step_00000003.safetensors").unlink()
    assert [len(steps), steps[-1].number, steps[8] is steps[8]] == [9, 8, True]
    assert [found.number for found in steps[4:8:2]] == [4, 6]
    with pytest.raises(TpcheckError, match=r"step_00000003\.safetensors cannot be read: No such file"):
        steps[3]
    with pytest.raises(IndexError):
        steps[9]


def write_steps(path: Path, steps: list[StepRecord]) -> RankTrace:
    writer = TraceWriter(path, header(), run_id=RUN)
    for each in steps:
        writer.write_step(each)
    writer.close(num_steps=len(steps))
    return read_trace(path)[0]


def test_a_step_that_is_there_twice_is_refused_in_a_sentence(tmp_path):
    skipped = dataclasses.replace(step(1), has_update=False)  # then the optimizer's step of that number
    assert numbers_of(write_steps(tmp_path / "right", [step(0), skipped, step(1)]).steps) == (0, 1, 1)
    for name, numbers, line in (("twice", [0, 1, 1], 4), ("back", [1, 0], 3)):
        trace = write_steps(tmp_path / name, [step(number) for number in numbers])
        with pytest.raises(TpcheckError, match=rf"line {line}: it is step .* a rank takes each step once"):
            numbers_of(trace.steps)


def test_numbers_of_steps_are_known_without_reading_them(tmp_path):
    write(tmp_path, steps=3)
    steps = read_trace(tmp_path)[0].steps
    for path in tmp_path.glob("*.step_*"):
        path.unlink()
    assert numbers_of(steps) == (0, 1, 2)
    assert numbers_of(steps[::-2]) == (2, 0)
    assert numbers_of((step(7),)) == (7,)
    lines = lines_of(tmp_path)
    lines[1]["step"] = dict(reversed(lines[1]["step"].items()))
    rewrite(tmp_path, lines)
    with pytest.raises(TpcheckError, match="step_00000000"):
        numbers_of(read_trace(tmp_path)[0].steps)


def test_ranks_come_from_the_folders_of_all_nodes(tmp_path):
    topology = Topology(tp=2, dp=2)
    for node in range(2):
        write(tmp_path / str(node), ranks=(2 * node, 2 * node + 1), topology=topology)
    ranks = read_trace([tmp_path / "1", tmp_path / "0"])
    assert [trace.rank for trace in ranks] == [0, 1, 2, 3]
    assert ranks[3].tp_group == (2, 3)
    assert [trace.rank for trace in read_trace(tmp_path / "1")] == [2, 3]
    with pytest.raises(TpcheckError, match="both hold rank 0"):
        read_trace([tmp_path / "0", tmp_path / "0"])


# ---- runs that end early


def test_a_run_without_an_end_reads_as_incomplete(tmp_path):
    (trace,) = read_trace(write(tmp_path, end=False))
    assert not trace.is_complete
    assert (len(trace.steps), trace.num_steps) == (2, 2)


def test_every_torn_file_reads_up_to_its_last_whole_step(tmp_path):
    write(tmp_path)
    lines = tmp_path / "rank_00000.jsonl"
    data = lines.read_bytes()
    ends = [offset + 1 for offset, byte in enumerate(data) if byte == ord("\n")]
    for length in sorted({*range(ends[0], len(data), 97), *ends, *(end - 1 for end in ends[1:])}):
        lines.write_bytes(data[:length])
        (trace,) = read_trace(tmp_path)
        whole = sum(end <= length for end in ends) - 1
        assert (len(trace.steps), trace.is_complete) == (min(whole, 2), whole == 3)
        assert [found.number for found in trace.steps] == list(range(min(whole, 2)))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_a_trace(tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_trace_files import *
        writer = TraceWriter({str(tmp_path / "run")!r}, header(), run_id=RUN)
        for number in range(10**6):
            writer.write_step(step(number))
            print(number, flush=True)
    """
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        while process.stdout.readline() != "20\n":
            assert process.poll() is None
        process.kill()
    (trace,) = read_trace(tmp_path / "run")
    assert not trace.is_complete
    assert len(trace.steps) >= 21
    assert trace.num_steps == len(trace.steps)
    for number, found in enumerate(trace.steps):
        assert distance(found.tensors[0].readings[0].sketch, step(number).tensors[0].readings[0].sketch) == 0


def test_a_full_disk_is_one_sentence_and_the_trace_still_reads(tmp_path, monkeypatch):
    writer = TraceWriter(tmp_path, header(), run_id=RUN)
    writer.write_step(step(0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(TpcheckError, match="cannot be written to: No space left on device"):
            writer.write_step(step(1))
    with pytest.raises(TpcheckError, match="has ended"):
        writer.close(num_steps=1)
    assert len(read_trace(tmp_path)[0].steps) == 1


# ---- where a trace may be written


def test_an_older_trace_is_replaced_and_its_ranks_that_are_no_more_are_removed(tmp_path):
    write(tmp_path, ranks=range(4), topology=Topology(tp=4), steps=5)
    (tmp_path / "rank_00000.step_00000009.safetensors.tmp").touch()
    write(tmp_path, ranks=(1, 0), topology=Topology(tp=2), steps=1, run="b" * 32)
    assert len(read_trace(tmp_path)) == 2
    assert len([*tmp_path.iterdir()]) == 6


def test_ranks_of_two_runs_are_refused(tmp_path):
    write(tmp_path, ranks=(0, 1), topology=Topology(tp=2))
    write(tmp_path, ranks=(0,), topology=Topology(tp=2), run="b" * 32)
    with pytest.raises(TpcheckError, match="are of two runs: record again"):
        read_trace(tmp_path)
    assert new_run_id() != new_run_id()


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "rank_00000.pt", "rank_0.jsonl", "model.safetensors", "rank_00000.jsonl/"]
)
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path, foreign):
    path = tmp_path / foreign
    path.mkdir() if foreign.endswith("/") else path.touch()
    for attempt in (require_writable, lambda folder: write(folder)):
        with pytest.raises(UsageError, match="expected a new path"):
            attempt(tmp_path)
    assert [*tmp_path.iterdir()] == [path]


def test_a_file_is_no_place_for_a_trace(tmp_path):
    (tmp_path / "file").touch()
    for path in ("file", "file/run.trace"):
        with pytest.raises(UsageError, match="expected a"):
            require_writable(tmp_path / path)
    require_writable(tmp_path / "new" / "run.trace")
    assert not (tmp_path / "new").exists()


# ---- strangers


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "rank_00000.jsonl").read_bytes().splitlines()]


def rewrite(path: Path, lines: list[object]) -> None:
    text = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (path / "rank_00000.jsonl").write_bytes(b"".join(line + b"\n" for line in text))


def read_all(path: Path) -> None:
    for trace in read_trace(path):
        for found in trace.steps:
            for tensor in found.tensors:
                for full in tensor.full:
                    full.sum()


def assert_read_or_refused(path: Path) -> None:
    message = ""
    try:
        read_all(path)
    except TpcheckError as error:
        message = str(error)
    assert message.isprintable()


def tampered(*path: object, value: object):
    def tamper(lines: list) -> None:
        place = lines
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value

    return tamper


TENSOR = (1, "step", "tensors", 0)
TAMPERED = {
    "format": (tampered(0, "format", value=1), "line 1: it is of format '1', not 3: record again with this version"),
    "no format": (tampered(0, value={"run": "x"}), "line 1: it is of format"),
    "run": (tampered(0, "run", value="../x"), "line 1: it has no identifier"),
    "rank": (tampered(0, "trace", "rank", value=3), "line 1: it is of rank 3"),
    "rank of a path": (tampered(0, "trace", "rank", value="../../etc"), 'line 1: rank is "../../etc", not a number'),
    "topology": (tampered(0, "trace", "topology", "tp", value=0), "line 1: topology is impossible: tp=0"),
    "huge topology": (tampered(0, "trace", "topology", "tp", value=1 << 40), "line 1: it is of a topology"),
    "group": (tampered(0, "trace", "tp_group", value=[0, 1]), "line 1: it has a tp group"),
    "group of strangers": (tampered(0, "trace", "dp_group", value=[7]), "line 1: it has a dp group"),
    "field": (tampered(0, "trace", "path", value="/etc"), "line 1: it has 'path'"),
    "version": (tampered(0, "trace", "versions", "torch", value="\x1b[31m"), "line 1: versions.torch is text that"),
    "two ends": (tampered(1, value={"end": {"num_steps": 1}}), "line 2: it is not an object of step"),
    "a list": (tampered(1, value=[]), "line 2: it is a list, not an object"),
    "more keys": (tampered(1, "again", value=1), "line 2: it is not an object of step"),
    "lacks": (tampered(*TENSOR, value={}), "line 2: tensors[0] lacks call"),
    "kind": (tampered(*TENSOR, "kind", value="outputs"), 'line 2: tensors[0].kind is "outputs", not one of'),
    "name": (tampered(*TENSOR, "name", value=["a"]), "line 2: tensors[0].name is a list, not text"),
    "long name": (tampered(*TENSOR, "name", value="a" * 5000), "line 2: tensors[0].name is text that is too long"),
    "surrogate": (tampered(*TENSOR, "name", value="\ud800"), "line 2: tensors[0].name is text that"),
    "shape": (tampered(*TENSOR, "shape", value=[-2]), "line 2: tensors[0].shape[0] is -2"),
    "float shape": (tampered(*TENSOR, "shape", value=[1.5]), "line 2: tensors[0].shape[0] is 1.5"),
    "bool shape": (tampered(*TENSOR, "shape", value=[True]), "line 2: tensors[0].shape[0] is true"),
    "huge shape": (tampered(*TENSOR, "shape", value=[1 << 70]), "is a number that is too large"),
    "full": (tampered(*TENSOR, "full", value=1), "line 2: tensors[0].full has no tensor"),
    "huge full": (tampered(*TENSOR, "full", value=1 << 60), "line 2: tensors[0].full has no tensor"),
    "fewer readings": (tampered(*TENSOR, "readings", value=[]), "has fewer tensors than rank_00000.step_00000000"),
    "sketch": (
        tampered(*TENSOR, "readings", 0, "sketch", value={}),
        "line 2: tensors[0].readings[0].sketch is an object",
    ),
    "dtype": (tampered(*TENSOR, "dtype", value="bfloat16"), "line 2: tensors"),
    "deviation": (
        tampered(*TENSOR, "readings", 0, "deviation", value="1"),
        'readings[0].deviation is "1", not a number',
    ),
    "loss": (
        tampered(1, "step", "passes", 0, "loss", value=10**400),
        "line 2: passes[0].loss is a number that is too large",
    ),
    "number": (tampered(2, "step", "number", value=-1), "line 3: number is -1"),
    "deep option": (
        tampered(1, "step", "groups", 0, "options", "lr", value=[[[[[[[[[[1]]]]]]]]]]),
        "line 2: groups[0]",
    ),
    "option": (
        tampered(1, "step", "groups", 0, "options", "lr", value={"a": 1}),
        "line 2: groups[0].options.lr is an object",
    ),
    "end": (tampered(3, "end", "num_steps", value=None), "line 4: num_steps is null"),
    "not JSON": (tampered(1, value=b"{"), "line 2: it is not JSON"),
    "not text": (tampered(1, value=b"\xff"), "line 2: it is not JSON"),
    "NaN": (tampered(1, value=b'{"step": NaN}'), "line 2: it is not JSON: NaN is not a number of JSON"),
    "twice": (tampered(1, value=b'{"step": 1, "step": 2}'), "line 2: it is not JSON: a key is there twice"),
    "deep": (tampered(1, value=b'{"step":' + b"[" * 100000), "line 2: it is"),
    "digits": (tampered(1, value=b'{"step":' + b"1" * 5000 + b"}"), "line 2: it is not JSON"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_line_is_refused_in_one_sentence(tmp_path, case):
    tamper, expected = TAMPERED[case]
    lines: list = lines_of(write(tmp_path))
    tamper(lines)
    rewrite(tmp_path, lines)
    with pytest.raises(TpcheckError) as caught:
        read_all(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "rank_00000"))
    assert expected in message
    assert message.isprintable()
    assert len(message) < 400 + len(str(tmp_path))


def test_a_line_without_end_is_refused(tmp_path):
    write(tmp_path)
    with (tmp_path / "rank_00000.jsonl").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: no space on disk
    with pytest.raises(TpcheckError, match=f"line 5: it is longer than {LONGEST_LINE} bytes"):
        read_trace(tmp_path)


def test_links_pipes_and_folders_are_not_read(tmp_path):
    trace = write(tmp_path / "run")
    for name in ("rank_00000.step_00000000.safetensors", "rank_00000.initial.safetensors", "rank_00000.jsonl"):
        (trace / name).rename(tmp_path / name)
        (trace / name).symlink_to(tmp_path / name)
        with pytest.raises(TpcheckError, match="it is a link, and a trace has none"):
            read_all(trace)
        (trace / name).unlink()
        (trace / name).mkdir()
        with pytest.raises(TpcheckError, match="cannot be read"):
            read_all(trace)
        (trace / name).rmdir()
        os.mkfifo(trace / name)
        with pytest.raises(TpcheckError, match="it is not a regular file"):
            read_all(trace)
        (trace / name).unlink()
        (tmp_path / name).rename(trace / name)
    read_all(trace)


@pytest.mark.parametrize("path", ["missing", "empty", "file", "\0"])
def test_what_is_no_trace_is_named(tmp_path, path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"^actual=.*a folder that tpcheck\.record has written"):
        read_trace(tmp_path / path, "actual")


def test_a_trace_of_an_older_version_is_to_be_recorded_again(tmp_path):
    (tmp_path / "rank_00000.pt").touch()
    with pytest.raises(TpcheckError, match="older version of tpcheck: record again with this version"):
        read_trace(tmp_path)


def test_a_rank_that_wrote_nothing_is_left_out(tmp_path):
    (tmp_path / "rank_00001.jsonl").touch()
    with pytest.raises(TpcheckError, match="every rank ended before it recorded anything"):
        read_trace(tmp_path)
    write(tmp_path, topology=Topology(tp=2))
    assert [trace.rank for trace in read_trace(tmp_path)] == [0]


def test_files_of_impossible_ranks_are_refused(tmp_path):
    (tmp_path / "rank_99999999.jsonl").touch()
    with pytest.raises(TpcheckError, match="ranks that no run has"):
        read_trace(tmp_path)


@pytest.fixture(scope="module")
def clean_trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean") / "run"
    writer = TraceWriter(folder, header(), run_id=RUN)
    writer.write_step(step(0, full=2))
    writer.close(num_steps=1)
    return folder


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_are_read_or_refused_in_a_sentence(clean_trace, tmp_path, data):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(clean_trace, folder)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, min(len(content), 3000)))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    if kind == "cut":
        del content[start:]
    elif kind == "insert":
        content[start:start] = data.draw(st.binary(min_size=1, max_size=40))
    elif kind == "remove":
        del content[start : start + data.draw(st.integers(1, 40))]
    else:
        patch = data.draw(st.binary(min_size=1, max_size=12))
        content[start : start + len(patch)] = patch
    path.write_bytes(content)
    assert_read_or_refused(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 2),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["step", "end", "number", "x"]), inner)
        ),
        max_leaves=8,
    ),
    st.data(),
)
def test_any_json_in_any_place_is_read_or_refused_in_a_sentence(clean_trace, tmp_path, number, value, data):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(clean_trace, folder)
    lines: list = lines_of(folder)
    place, key = lines, number
    while data.draw(st.booleans()) and isinstance(place[key], (dict, list)) and place[key]:
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
    place[key] = value
    rewrite(folder, lines)
    assert_read_or_refused(folder)


def test_a_header_that_lies_about_its_tensors_is_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "rank_00000.step_00000000.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    lies = [
        {"tiles_float64": {**entries["tiles_float64"], "shape": [2, 4, 16, 1 << 40]}},
        {"tiles_float64": {**entries["tiles_float64"], "data_offsets": [0, 1 << 60]}},
        {"tiles_float64": {**entries["tiles_float64"], "dtype": "F32"}},
        {"tiles_float64": {**entries["tiles_float64"], "dtype": ["F64"]}},
        {"tiles_float64": [1]},
        {"full.0": {"dtype": "F64", "shape": [0, 1 << 47], "data_offsets": [0, 0]}},
        {},
    ]
    for lie in lies:
        text = json.dumps(lie).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(TpcheckError, match=r"step_00000000\.safetensors: it"):
            read_all(tmp_path)
    path.write_bytes((1 << 63).to_bytes(8, "little") + data[8:])
    with pytest.raises(TpcheckError, match="has a header of 9223372036854775808 bytes"):
        read_all(tmp_path)


def test_tiles_that_are_not_numbers_are_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "rank_00000.step_00000000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-8] + struct.pack("<d", math.nan))
    with pytest.raises(TpcheckError, match="elements that are not numbers"):
        read_all(tmp_path)


@pytest.mark.parametrize("path", [None, [], [None], 3])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(UsageError, match="the folder of a trace, or those of several nodes"):
        read_trace(path)


@pytest.mark.parametrize(
    ("topology", "world_size", "message"),
    [
        (Topology(tp=2), 4, "record again with topology="),
        (Topology(tp=2, cp=2), 4, "tpcheck recorded none when this trace was made; record again"),
        (Topology(tp=2), 4, r"this one has 4 ranks in Topology\(tp=2, dp=1\)"),
    ],
)
def test_ranks_beyond_the_topology_are_recorded_and_not_compared(
    tmp_path: Path, topology: Topology, world_size: int, message: str
) -> None:
    for rank in (3, 2, 1, 0):
        first = rank - rank % 2
        facts = dataclasses.replace(
            header(0, topology, world_size=world_size), rank=rank, tp_group=(first, first + 1), dp_group=(rank,)
        )
        TraceWriter(tmp_path / "run.trace", facts, run_id=RUN).close(num_steps=0)
    traces = read_trace(tmp_path / "run.trace")
    assert [(trace.rank, trace.topology, trace.num_ranks) for trace in traces] == [(r, topology, 4) for r in range(4)]
    with pytest.raises(UsageError, match=message):
        Run.of("run.trace", traces)
