"""The matrix of families as parametrised tests, for other repositories."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from tpcheck.core.errors import BackendError, Mismatch, UsageError
from tpcheck.core.findings import Verdict
from tpcheck.families.build import causal_types
from tpcheck.lab.known import judge, register
from tpcheck.lab.matrix import Cell, cells, combinations, configuration, unexpected_message, versions
from tpcheck.model.options import DEFAULTS, FamilyKeywords, RunOptions, expand_options
from tpcheck.model.verify import verify_family

if TYPE_CHECKING:
    from typing_extensions import Unpack


@expand_options(FamilyKeywords)
def family_tests(
    families: Sequence[str] | None = None,
    *,
    backend: str | Sequence[str] = str(DEFAULTS.backend),
    tp: int | Sequence[int] = DEFAULTS.topology.tp,
    dp: int | Sequence[int] = DEFAULTS.topology.dp,
    zero: int | Sequence[int] = DEFAULTS.zero_stage,
    dtype: str | Sequence[str] = DEFAULTS.dtype,
    **options: Unpack[FamilyKeywords],
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
    combined = combinations(
        RunOptions.of(**options),
        backend=_as_list(backend),
        tp=_as_list(tp),
        dp=_as_list(dp),
        zero=_as_list(zero),
        dtype=_as_list(dtype),
    )
    matrix_cells = cells(causal_types() if families is None else families, combined)

    @pytest.mark.parametrize("cell", [_case(cell) for cell in matrix_cells])
    def test_families(cell: Cell) -> None:
        try:
            report = verify_family(cell.family, **cell.options.keywords())
        except UsageError as error:
            pytest.skip(str(error))
        row = judge(report.verdict)
        if row.standing == "new" and row.bug is not None:  # not the bug of the xfail
            pytest.fail(f"{unexpected_message(row)}\n{report.to_text()}", pytrace=False)
        report.raise_if_failed()

    return test_families


def _case(cell: Cell) -> Any:
    subject = cell.subject
    name = _case_id(cell.family, configuration(subject))
    expected_verdict = Verdict("skipped", subject, versions(cell.options.backend_name))
    bug = next((bug for bug in register() if bug.concerns(expected_verdict)), None)
    if bug is None:
        return pytest.param(cell, id=name)
    reason = f"{bug.name}: {bug.what}"
    return pytest.param(
        cell, id=name, marks=pytest.mark.xfail(reason=reason, raises=(Mismatch, BackendError), strict=True)
    )


def _case_id(family: str, options: str) -> str:
    """Return an id that `pytest -k` can take, which refuses equals signs and brackets.

    Example:
        >>> _case_id("llama", "deepspeed, tp=2, zero=1")
        'llama-deepspeed-tp2-zero1'
    """
    return re.sub(r"[^\w./:+-]", "", f"{family}-{options.replace(', ', '-')}")


def _as_list(values: Any) -> list[Any]:
    return [values] if isinstance(values, (str, int)) else list(values)
