"""The matrix of families as parametrised tests, for other repositories."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from tpcheck.core.errors import BackendError, Mismatch, UsageError
from tpcheck.core.findings import Verdict
from tpcheck.lab.known import judge, register
from tpcheck.lab.matrix.cells import Cell, Common, arguments, cells, subject, versions
from tpcheck.lab.matrix.report import configuration, unexpected_message
from tpcheck.model.verify import verify_family


def family_tests(
    families: Sequence[str] | None = None,
    *,
    backend: str | Sequence[str] = "deepspeed",
    tp: int | Sequence[int] = 2,
    dp: int | Sequence[int] = 1,
    zero: int | Sequence[int] = 0,
    dtype: str | Sequence[str] = "float64",
    settings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    checks: Sequence[str] | None = None,
    ignore_plan: bool = False,
    seed: int = 0,
    timeout: float = 600.0,
) -> Callable[[Cell], None]:
    """Return a test with one case for each family and configuration.

    A known upstream bug is a strict xfail: the test fails if the bug is gone, or if another failure takes its place. A
    model that cannot be built, or a combination that a backend refuses, is skipped with the reason.

    Args:
        families: Model types of transformers; None for every causal language model type.

    The other arguments are those of `verify_family`; lists make a matrix.

    Example:
        >>> test_families = family_tests(["llama", "opt"], tp=[2, 4])
        >>> [mark.name for mark in test_families.pytestmark]
        ['parametrize']
    """
    common = Common(
        seed=seed,
        settings=settings or {},
        config=config,
        checks=checks,
        ignore_plan=ignore_plan,
        timeout=timeout,
    )
    made = cells(
        _all_families() if families is None else families,
        backends=_listed(backend),
        tp=_listed(tp),
        dp=_listed(dp),
        zero=_listed(zero),
        dtypes=_listed(dtype),
    )

    @pytest.mark.parametrize("cell", [_case(cell, common) for cell in made])
    def test_families(cell: Cell) -> None:
        try:
            report = verify_family(cell.family, **arguments(cell, common))
        except UsageError as error:
            pytest.skip(str(error))
        row = judge(report.verdict)
        if row.standing == "new" and row.bug is not None:  # not the bug of the xfail
            pytest.fail(f"{unexpected_message(row)}\n{report.to_text()}", pytrace=False)
        report.raise_if_failed()

    return test_families


def _case(cell: Cell, common: Common) -> Any:
    of_cell = subject(cell, common)
    name = f"{cell.family}-{configuration(of_cell).replace(', ', '-')}"
    wanted = Verdict("skipped", of_cell, versions(cell.backend))
    bug = next((bug for bug in register() if bug.concerns(wanted)), None)
    if bug is None:
        return pytest.param(cell, id=name)
    reason = f"{bug.name}: {bug.what}"
    return pytest.param(
        cell, id=name, marks=pytest.mark.xfail(reason=reason, raises=(Mismatch, BackendError), strict=True)
    )


def _all_families() -> tuple[str, ...]:
    from tpcheck.families.build import causal_types

    return causal_types()


def _listed(values: Any) -> list[Any]:
    return [values] if isinstance(values, (str, int)) else list(values)
