"""Which faults and clean controls a table has, and runs that never end it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tpcheck.core.environment import package_versions
from tpcheck.core.errors import UsageError
from tpcheck.lab.faults.results import CONTROL, Caught
from tpcheck.lab.faults.runs import (
    run_checkpoint_fault,
    run_control,
    run_data_control,
    run_data_fault,
    run_model_fault,
    run_saved_control,
)
from tpcheck.model.options import DEFAULTS, DTYPES

if TYPE_CHECKING:
    from tpcheck.lab.faults.corpus import Control, Fault

BACKEND = DEFAULTS.backend


def versions() -> Mapping[str, str]:
    """Return the versions of what faults are planted in."""
    from tpcheck.backends.registry import load_backend

    return package_versions() | dict(load_backend(BACKEND).versions())


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the table before it is run."""

    name: str
    kind: str
    what: str
    seed: int
    of: Callable[[], Caught]

    def run(self) -> Caught:
        """Return the row; a run that raises is a row, too."""
        start = time.monotonic()
        try:
            return self.of()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            seconds = time.monotonic() - start
            return Caught(self.name, self.kind, self.what, "error", seed=self.seed, seconds=seconds, message=message)


def fault_tasks(
    names: Sequence[str] = (), kinds: Sequence[str] = (), *, dtype: str = "float64", seeds: Iterable[int] = (0,)
) -> Iterator[Task]:
    """Yield the runs of the faults of these names and kinds; of all where none are given.

    Raises:
        UsageError: No such fault, kind or dtype.
    """
    faults = _chosen(names, kinds)
    if dtype not in DTYPES:
        raise UsageError("dtype", dtype, DTYPES)
    return (_task(fault, dtype, seed) for seed in seeds for fault in faults)


def control_tasks(*, dtype: str = "float64", seeds: Iterable[int] = (0,)) -> Iterator[Task]:
    """Yield a quick choice of clean runs: every family, layout and mended pipeline, and saved models."""
    from tpcheck.lab.faults.corpus import CHECKPOINT_FAULTS, DATA_FAULTS, quick

    saved = {(fault.family, *fault.settings.items()): fault for fault in CHECKPOINT_FAULTS}
    for seed in seeds:
        yield from (model_control(control, dtype, seed) for control in quick())
        for fault in DATA_FAULTS:
            if fault.mended is not None:
                yield _control(fault.name, seed, partial(run_data_control, fault, seed=seed))
        for one in saved.values():
            yield _control(one.family, seed, partial(run_saved_control, one.family, one.settings, seed=seed))


def model_control(control: Control, dtype: str, seed: int) -> Task:
    run = partial(run_control, control.family, control.topology, zero_stage=control.zero_stage, dtype=dtype, seed=seed)
    return _control(control.family, seed, run)


def _control(name: str, seed: int, run: Callable[[], Caught]) -> Task:
    return Task(name, CONTROL, "nothing is planted", seed, run)


def _task(fault: Fault, dtype: str, seed: int) -> Task:
    from tpcheck.lab.faults.data import DataFault
    from tpcheck.lab.faults.fault import ModelFault

    if isinstance(fault, ModelFault):
        run = partial(run_model_fault, fault, dtype=dtype, seed=seed)
    elif isinstance(fault, DataFault):
        run = partial(run_data_fault, fault, seed=seed)
    else:
        run = partial(run_checkpoint_fault, fault, seed=seed)
    return Task(fault.name, fault.kind, fault.what, seed, run)


def _chosen(names: Sequence[str], kinds: Sequence[str]) -> list[Fault]:
    from tpcheck.families.settings import unknown
    from tpcheck.lab.faults.corpus import FAULTS

    known_names, known_kinds = [fault.name for fault in FAULTS], list(dict.fromkeys(fault.kind for fault in FAULTS))
    for name in names:
        if name not in known_names:
            raise UsageError("name", name, unknown("a fault that `tpcheck faults --list` shows", name, known_names))
    for kind in kinds:
        if kind not in known_kinds:
            raise UsageError("kind", kind, known_kinds)
    return [fault for fault in FAULTS if (not names or fault.name in names) and (not kinds or fault.kind in kinds)]
