"""`family_tests`: one case for each cell, known bugs are strict xfails."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

MODULE = """
    from dataclasses import replace

    from tests.report.examples import ERROR, FAILED, PASSED
    from tpcheck.lab.matrix import Cell
    from tpcheck.core.errors import UsageError
    from tpcheck.lab import known
    from tpcheck.lab.known import KnownBug
    from tpcheck.report import Report
    from tpcheck.testing.family_tests import family_tests
    import sys

    VERDICTS = {"good": PASSED, "known": FAILED, "gone": PASSED, "other": ERROR, "new": FAILED}
    BUG = KnownBug("bug", ("known", "gone", "other"), "deepspeed", {}, "failed", "It is wrong.", "")

    def verify_family(family, **options):
        if family == "odd":
            raise UsageError("family", family, "settings that it can be built from")
        return Report(replace(VERDICTS[family], environment={}, subject=Cell(family).subject))

    home = sys.modules["tpcheck.testing.family_tests"]
    home.verify_family = verify_family
    home.register = known.register = lambda: (BUG,)
    test_families = family_tests(["good", "known", "gone", "other", "new", "odd"])
"""


def test_cases_pass_fail_xfail_and_skip(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_them=MODULE)
    result = pytester.runpytest_subprocess("-rA", "-q", "-p", "no:randomly")
    result.assert_outcomes(passed=1, xfailed=1, failed=3, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "PASSED *good-deepspeed-tp2*",
            "XFAIL *known-deepspeed-tp2* - bug: It is wrong.",
            "FAILED *gone-deepspeed-tp2*",
            "FAILED *other-deepspeed-tp2*",
            "FAILED *new-deepspeed-tp2*",
        ]
    )


def test_pytest_selects_cases_by_their_ids(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_them="""
            from tpcheck.testing.family_tests import family_tests

            options = {"config": {"gradient_clipping": 0.5}, "optimizer": "adamw", "lora": "4,attention"}
            test_families = family_tests(["llama", "bart/seq2seq"], tp=[2, 4], dtype=["float64", "bfloat16"], **options)
        """
    )
    collected, _ = pytester.inline_genitems()
    ids = [item.name.partition("[")[2].removesuffix("]") for item in collected]
    assert len(ids) == 8
    for chosen in (ids[0], ids[-1]):
        selected, _ = pytester.inline_genitems("-k", chosen)
        assert f"test_families[{chosen}]" in [item.name for item in selected]


def test_lists_make_a_matrix_with_names() -> None:
    from tpcheck.testing.family_tests import family_tests

    (mark,) = family_tests(["llama", "phi3"], tp=[2, 4], zero=1).pytestmark  # type: ignore[attr-defined]
    cases = mark.args[1]
    assert [case.id for case in cases][:2] == ["llama-deepspeed-tp2-zero1", "llama-deepspeed-tp4-zero1"]
    assert [bool(case.marks) for case in cases] == [False, False, True, True]  # phi3 is known to be refused
