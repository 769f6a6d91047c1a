"""The files of a trace: written step by step while a run goes on, and read without trusting them.

A folder holds for each rank `rank_00000.jsonl`: a header, one line for each recorded step, one that says that the
recording has ended. The tensors of the n-th recorded step are in `rank_00000.step_0000000n.safetensors`, those of the
start in `rank_00000.initial.safetensors`. A line is written after its tensors, so a run that is killed leaves a trace
that reads up to its last whole step. Ranks do not wait for each other: each has its own files.
"""

from __future__ import annotations

import os
import re
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, overload

from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.runs.trace.json_records import Malformed, as_line, decoder_of, parse_line, to_plain, to_plain_fields
from tpcheck.runs.trace.records import RankTrace, StepRecord
from tpcheck.runs.trace.tensors import NO_TENSORS, StoredTensors, TensorsToWrite, open_regular, read_exactly, reading

FORMAT = 3  # 1 was a pickle for each rank; 2 kept sketches of float32 tensors in float64
LONGEST_LINE = 32 << 20
"""70,000 tensors of a step; the objects that Python makes of it stay below 1 GB whatever it holds."""
MOST_RANKS = 1 << 16
KEPT_STEPS = 2  # of each rank, read last: neighbours are compared with each other

_NAME = re.compile(r"rank_(\d{5,8})\.(jsonl|initial\.safetensors|step_\d{8}\.safetensors)(\.tmp)?", re.ASCII)
# A second number in the same line is refused.
_HEAD = re.compile(rb'\{"step":\{"number":(\d{1,18}),"has_update":(true|false),')
_AT_THE_END = ("steps", "num_steps", "not_recorded", "is_complete")


class TraceWriter:
    """Write what one rank records into a folder that all ranks share, or that each node has.

    Nothing of a step is kept after it is written.

    Args:
        path: The folder; it is made, or an older trace in it is replaced.
        header: What is known before the first step; its `steps` are empty.
        run_id: Made by rank 0 with `new_run_id` and shared with all ranks; keeps two runs apart.

    Raises:
        UsageError: The path is a file, or a folder with other files than those of a trace.
        TpcheckError: The file system refuses to write.
    """

    def __init__(self, path: str | Path, header: RankTrace, *, run_id: str) -> None:
        require_writable(path)
        self._folder = Path(path)
        self._rank = header.rank
        self._num_written = 0
        self._file: BinaryIO | None = None
        with self._reporting_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_older(header.num_ranks)
            tensors = TensorsToWrite()
            plain = to_plain_fields(header, tensors, omitted=_AT_THE_END)
            tensors.write(_initial_path(self._folder, self._rank))
            self._file = _lines_path(self._folder, self._rank).open("xb", buffering=0)
            self._append({"format": FORMAT, "run": run_id, "trace": plain})

    def write_step(self, step: StepRecord) -> None:
        """Append a step; once this has returned, it will be read even if the process is killed.

        Raises:
            TpcheckError: The file system refuses to write, or the recording has ended.
        """
        with self._reporting_errors():
            tensors = TensorsToWrite()
            plain = to_plain(step, tensors)
            tensors.write(_step_path(self._folder, self._rank, self._num_written))
            self._append({"step": plain})
        self._num_written += 1

    def close(self, *, num_steps: int, not_recorded: Mapping[str, str] | None = None) -> None:
        """Write that the recording has ended, after this many steps of the optimizer.

        Raises:
            TpcheckError: The file system refuses to write, or the recording has ended.
        """
        with self._reporting_errors():
            self._append({"end": to_plain_fields(_End(num_steps, not_recorded or {}), TensorsToWrite())})
        self._close_file()

    def _append(self, plain: Mapping[str, Any]) -> None:
        line = as_line(plain)
        if self._file is None:
            raise TpcheckError(f"{self._folder} cannot be written to: its recording has ended")
        if len(line) > LONGEST_LINE:
            raise TpcheckError(
                f"{self._folder} cannot hold a step with so many tensors: names and shapes take {len(line)} bytes, "
                f'and at most {LONGEST_LINE} are read; record fewer modules, as with modules="model.layers.0.*"'
            )
        view = memoryview(line)
        while view:  # an unbuffered file may write a part
            view = view[self._file.write(view) :]

    def _remove_older(self, world_size: int) -> None:
        """Remove this rank's files of an older trace; on rank 0 those of ranks that are no more, too."""
        for name in os.listdir(self._folder):  # noqa: PTH208  # names alone
            match = _NAME.fullmatch(name)
            if match and (int(match[1]) == self._rank or (self._rank == 0 and int(match[1]) >= world_size)):
                (self._folder / name).unlink(missing_ok=True)

    @contextmanager
    def _reporting_errors(self) -> Iterator[None]:
        """After a failed write nothing more is written: a line behind half a line could not be read."""
        try:
            yield
        except OSError as error:
            self._close_file()
            raise TpcheckError(f"{self._folder} cannot be written to: {error.strerror or error}") from error
        except TpcheckError:
            self._close_file()
            raise

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def new_run_id() -> str:
    """Return a random name for a run."""
    return secrets.token_hex(16)


def require_writable(path: str | Path) -> None:
    """Check that a trace can be written to this folder; change nothing.

    Raises:
        UsageError: The path is a file, or a folder with other files than those of a trace.
    """
    accepted = "a new path, or a folder with nothing but an older trace to replace"
    if not isinstance(path, (str, os.PathLike)) or "\0" in os.fsdecode(path):
        raise UsageError("path", path, accepted)
    folder = Path(path)
    try:
        with os.scandir(folder) as entries:
            is_trace = all(_NAME.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False) for entry in entries)
    except FileNotFoundError:
        existing = next((parent for parent in folder.absolute().parents if parent.exists()), None)
        if existing is None or not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UsageError("path", str(path), "a path in a folder that can be written to") from None
        if folder.is_symlink() and not folder.exists():  # a link to nowhere; another rank may make the folder meanwhile
            raise UsageError("path", str(path), accepted) from None
        return
    except OSError:
        raise UsageError("path", str(path), accepted) from None
    if not is_trace:
        raise UsageError("path", str(path), accepted)


def _lines_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05}.jsonl"


def _initial_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05}.initial.safetensors"


def _step_path(folder: Path, rank: int, number: int) -> Path:
    return folder / f"rank_{rank:05}.step_{number:08}.safetensors"


# ---- reading


def read_trace(path: str | Path | Sequence[str | Path], name: str = "path") -> tuple[RankTrace, ...]:
    """Return what each rank recorded that is there, by rank; each step is read, and checked, when it is asked for.

    Ranks may be missing: those of nodes whose folders are not given, and those that ended before they began.

    Args:
        path: The folder, or those of several nodes without a shared disk.
        name: Of the argument, for error messages.

    Raises:
        UsageError: There is no trace.
        TpcheckError: The trace is damaged, hostile or of another version; so do its steps raise.
    """
    paths = list(path) if isinstance(path, Sequence) and not isinstance(path, (str, bytes)) else [path]
    if not paths or not all(isinstance(each, (str, os.PathLike)) for each in paths):
        raise UsageError(name, path, "the folder of a trace, or those of several nodes")
    folders = [Path(folder) for folder in paths]
    headers: dict[int, _Header] = {}
    for folder in folders:
        for rank in _ranks_in(folder, name):
            if rank in headers:
                raise TpcheckError(f"{folder} and {headers[rank].folder} both hold rank {rank}")
            header = _read_header(folder, rank)
            if header is not None:
                headers[rank] = header
    if not headers:
        raise TpcheckError(f"{' and '.join(map(str, folders))}: every rank ended before it recorded anything")
    first = headers[min(headers)]
    for header in headers.values():
        if header.run != first.run or header.facts["topology"] != first.facts["topology"]:
            raise TpcheckError(
                f"{_lines_path(header.folder, header.facts['rank'])} and "
                f"{_lines_path(first.folder, first.facts['rank'])} are of two runs: record again, to a new path"
            )
    return tuple(_read_rank(headers[rank]) for rank in sorted(headers))


def numbers_of(steps: Sequence[StepRecord]) -> tuple[int, ...]:
    """Return the number of each step; of a trace that was read, without reading the steps."""
    numbers = getattr(steps, "numbers", None)
    return tuple(numbers()) if numbers is not None else tuple(step.number for step in steps)


class ChangedSteps(Sequence[StepRecord]):
    """The steps of one rank, each of which is changed when it is asked for.

    Args:
        change: Returns a step changed, by its position and what it was.
    """

    def __init__(
        self,
        steps: Sequence[StepRecord],
        change: Callable[[int, StepRecord], StepRecord],
        positions: range | None = None,
    ) -> None:
        self._steps = steps
        self._change = change
        self._positions = range(len(steps)) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...

    @overload
    def __getitem__(self, index: slice) -> ChangedSteps: ...

    def __getitem__(self, index: int | slice) -> StepRecord | ChangedSteps:
        if isinstance(index, slice):
            return ChangedSteps(self._steps, self._change, self._positions[index])
        position = self._positions[index]
        return self._change(position, self._steps[position])

    def numbers(self) -> tuple[int, ...]:
        """Return the number of each step, without reading it."""
        numbers = numbers_of(self._steps)
        return tuple(numbers[position] for position in self._positions)


@dataclass(frozen=True, slots=True)
class _Header:
    """The start of one rank's lines.

    Attributes:
        folder: That holds them.
        run: Its identifier.
        facts: Fields of the `RankTrace`.
        starts: Where each line starts in the file; one more than there are whole lines.
    """

    folder: Path
    run: str
    facts: Mapping[str, Any]
    starts: array[int]


def _ranks_in(folder: Path, name: str) -> list[int]:
    try:
        names = os.listdir(folder)  # noqa: PTH208  # names alone
    except (OSError, ValueError):
        raise UsageError(name, str(folder), "a folder that tpcheck.record has written") from None
    matches = [match for match in map(_NAME.fullmatch, names) if match and match[2] == "jsonl" and not match[3]]
    if not matches and any(re.fullmatch(r"rank_\d+\.pt", file) for file in names):
        raise TpcheckError(f"{folder} is a trace of an older version of tpcheck: record again with this version")
    if not matches:
        raise UsageError(name, str(folder), "a folder that tpcheck.record has written")
    ranks = [int(match[1]) for match in matches if match[0] == _lines_path(folder, int(match[1])).name]
    if not ranks or max(ranks) >= MOST_RANKS:
        raise TpcheckError(f"{folder} has files of ranks that no run has")
    return sorted(ranks)


def _read_header(folder: Path, rank: int) -> _Header | None:
    path = _lines_path(folder, rank)
    starts = _line_starts(path)
    if len(starts) < 2:
        return None
    with reading(path, 1):
        line = _read_line(path, starts, 0)
        if line.get("format") != FORMAT:
            raise Malformed(
                f"is of format {str(line.get('format'))[:20]!r}, not {FORMAT}: record again with this version"
            )
        _require_keys(line, {"format", "run", "trace"})
        run = line["run"]
        if not isinstance(run, str) or not run.isalnum() or len(run) > 64:
            raise Malformed("has no identifier of the run")
        tensors = StoredTensors(_initial_path(folder, rank))
        facts = decoder_of(RankTrace, _AT_THE_END)(line["trace"], tensors)
        tensors.require_all_used()
        _require_consistent(facts, rank)
        return _Header(folder, run, facts, starts)


def _require_consistent(facts: Mapping[str, Any], rank: int) -> None:
    """Check that the groups are those of ranks of the world."""
    if facts["rank"] != rank:
        raise Malformed(f"is of rank {facts['rank']}, which has another file")
    topology = facts["topology"]
    num_ranks = max(facts.get("world_size", 0), topology.world_size)
    if num_ranks > MOST_RANKS or not rank < num_ranks:
        raise Malformed("is of a topology that does not have its rank")
    for axis in ("tp", "dp"):
        group = facts[f"{axis}_group"]
        size = topology.sizes[axis]
        if len(group) != size or len({*group}) != size or rank not in group:
            raise Malformed(f"has a {axis} group that is not one of {size} ranks with its own")
        if not all(0 <= member < num_ranks for member in group):
            raise Malformed(f"has a {axis} group of ranks that are not in the world")


def _read_rank(header: _Header) -> RankTrace:
    rank = header.facts["rank"]
    path = _lines_path(header.folder, rank)
    num_lines = len(header.starts) - 1
    end = None
    if num_lines > 1:
        with reading(path, num_lines):
            line = _read_line(path, header.starts, num_lines - 1)
            if "end" in line:
                _require_keys(line, {"end"})
                end = decoder_of(_End)(line["end"], NO_TENSORS)
    steps = StoredSteps(header.folder, rank, header.starts[1 : num_lines + (end is None)])
    if end is None:
        last = steps[-1] if steps else None
        end = _End(0 if last is None else last.number + last.has_update)
        return RankTrace(**header.facts, steps=steps, num_steps=end.num_steps, is_complete=False)
    return RankTrace(**header.facts, steps=steps, num_steps=end.num_steps, not_recorded=end.not_recorded)


@dataclass(frozen=True, slots=True)
class _End:
    """The last line."""

    num_steps: int
    not_recorded: Mapping[str, str] = field(default_factory=dict)


class StoredSteps(Sequence[StepRecord]):
    """The recorded steps of one rank: each is read from its line whenever it is asked for; the last few are kept."""

    def __init__(self, folder: Path, rank: int, starts: array[int], numbers: range | None = None) -> None:
        self._folder = folder
        self._rank = rank
        self._starts = starts
        self._numbers = range(len(starts) - 1) if numbers is None else numbers
        self._kept: OrderedDict[int, StepRecord] = OrderedDict()

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> StepRecord: ...

    @overload
    def __getitem__(self, index: slice) -> StoredSteps: ...

    def __getitem__(self, index: int | slice) -> StepRecord | StoredSteps:
        if isinstance(index, slice):
            return StoredSteps(self._folder, self._rank, self._starts, self._numbers[index])
        number = self._numbers[index]
        if number not in self._kept:
            while len(self._kept) >= KEPT_STEPS:
                self._kept.popitem(last=False)
            self._kept[number] = self._read(number)
        self._kept.move_to_end(number)
        return self._kept[number]

    def numbers(self) -> tuple[int, ...]:
        """Return the number of each step, from the start of its line.

        Raises:
            TpcheckError: Two steps have one number, though the first of them ended with an update.
        """
        path = _lines_path(self._folder, self._rank)
        with open_regular(path) as file:
            heads = {number: self._head_at(file, number) for number in self._numbers}
        before = -1, False
        for number in sorted(heads):
            step, is_over = before
            if heads[number][0] < step + is_over:
                raise TpcheckError(
                    f"{path}, line {_line_of(number)}: it is step {heads[number][0]}, and a line before it is of step "
                    f"{step}: a rank takes each step once; record again, to a new path"
                )
            before = heads[number]
        return tuple(step for step, _ in heads.values())

    def _head_at(self, file: BinaryIO, number: int) -> tuple[int, bool]:
        """Return the number of a step, and whether an update ended it."""
        file.seek(self._starts[number])
        match = _HEAD.match(file.read(64))
        if match:
            return int(match[1]), match[2] == b"true"
        step = self[self._numbers.index(number)]
        return step.number, step.has_update

    def _read(self, number: int) -> StepRecord:
        path = _lines_path(self._folder, self._rank)
        with reading(path, _line_of(number)):
            line = _read_line(path, self._starts, number)
            _require_keys(line, {"step"})
            tensors = StoredTensors(_step_path(self._folder, self._rank, number))
            step: StepRecord = decoder_of(StepRecord)(line["step"], tensors)
            tensors.require_all_used()
            return step


def _line_of(step: int) -> int:
    """Return the line of the n-th recorded step: steps come behind the header, and lines are counted from 1."""
    return step + 2


def _line_starts(path: Path) -> array[int]:
    """Return where each whole line of a file starts, and where the last one ends; what is behind it is ignored."""
    starts = array("q", [0])
    with open_regular(path) as file:
        position = 0
        while chunk := file.read(1 << 20):
            offset = chunk.find(b"\n")
            while offset >= 0:
                starts.append(position + offset + 1)
                offset = chunk.find(b"\n", offset + 1)
            position += len(chunk)
            if position - starts[-1] > LONGEST_LINE:
                raise TpcheckError(f"{path}, line {len(starts)}: it is longer than {LONGEST_LINE} bytes")
    return starts


def _read_line(path: Path, starts: array[int], number: int) -> dict[str, Any]:
    if starts[number + 1] - starts[number] > LONGEST_LINE + (1 << 20):  # the scan sees a megabyte at once
        raise Malformed("is too long")
    with open_regular(path) as file:
        return parse_line(bytes(read_exactly(file, starts[number], starts[number + 1] - starts[number])))


def _require_keys(line: Mapping[str, Any], keys: set[str]) -> None:
    if line.keys() != keys:
        raise Malformed(f"is not an object of {', '.join(sorted(keys))}")
