"""`tpcheck fuzz`: options reach the search, what it finds reaches people and files, its status says how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.lab.fuzz.fuzz_examples import ERROR, FAILED, INTERRUPTED, LAYER, NOT_TRIED, PASSED, REFUSED
from tests.schema import document
from tpcheck.core.errors import TpcheckError
from tpcheck.lab.fuzz import family, layers
from tpcheck.lab.fuzz.layers import LayerCommon
from tpcheck.lab.fuzz.results import Outcome, SearchResult
from tpcheck.lab.fuzz.search import Bounds, Limits
from tpcheck.model.options import RunOptions

Run = Callable[..., Any]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that replaces searches by what is given, and returns what is asked of the API."""

    def replaced(*searched: SearchResult) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        def fuzz_family(
            family: str, bounds: Bounds, common: RunOptions, limits: Limits, on_outcome: Any, *, known: bool
        ) -> SearchResult:
            asked.update(family=family, bounds=bounds, common=common, limits=limits, known=known)
            on_outcome(Outcome("passed", command="tpcheck verify llama --tp 2"), shrinking=False)
            return searched[0]

        def fuzz_layers(names: Any, common: LayerCommon, limits: Limits, on_outcome: Any) -> Iterator[SearchResult]:
            asked.update(names=names, common=common, limits=limits)
            yield from searched

        monkeypatch.setattr(family, "fuzz_family", fuzz_family)
        monkeypatch.setattr(layers, "fuzz_layers", fuzz_layers)
        return asked

    return replaced


def test_every_option_reaches_the_search(run: Run, search: Any) -> None:
    asked = search(PASSED)
    result = run(
        *"fuzz llama --backend deepspeed-tp-model-init --examples 7 --seed 3 --tp 2 --dp 1,2 --zero 0,3".split(),
        *"--dtype float64 --steps 1".split(),
        *"--set head_dim=8 --ignore-plan --no-known --shrink-seconds 5 --timeout 9".split(),
        *["--config", '{"gradient_clipping": 1.0}'],
    )
    assert result.exit_code == 0
    assert asked == {
        "family": "llama",
        "bounds": Bounds((2,), (1, 2), (0, 3), ("float64",)),
        "common": RunOptions(
            backend="deepspeed-tp-model-init",
            steps=1,
            settings={"head_dim": 8},
            config={"gradient_clipping": 1.0},
            ignore_plan=True,
            timeout=9,
        ),
        "limits": Limits(7, 3, 5),
        "known": False,
    }
    assert result.stderr == "passed   tpcheck verify llama --tp 2\n"


def test_options_of_layers_reach_their_search(run: Run, search: Any) -> None:
    asked = search(LAYER)
    run(*"fuzz --layers --backend transformers --layer colwise --known --tp 2 --dtype float32 --timeout 9".split())
    assert (asked["names"], asked["common"]) == (
        ["colwise"],
        LayerCommon("transformers", (2,), ("float32",), known=True, timeout=9),
    )


@pytest.mark.parametrize(("found", "status"), [(PASSED, 0), (FAILED, 1), (REFUSED, 2), (ERROR, 3), (INTERRUPTED, 130)])
def test_the_exit_status_follows_from_the_verdict(run: Run, search: Any, found: SearchResult, status: int) -> None:
    search(found)
    assert run("fuzz", "llama").exit_code == status


def test_of_several_layers_findings_count_before_crashes(run: Run, search: Any) -> None:
    search(NOT_TRIED, replace(ERROR, subject=LAYER.subject), LAYER)
    assert run("fuzz", "--layers").exit_code == 1


def test_findings_are_written_as_json(run: Run, search: Any, tmp_path: Path) -> None:
    search(FAILED)
    run("fuzz", "llama", "--json", str(tmp_path / "f"))
    data = document(tmp_path / "f", "fuzz")
    assert (data["schema"], data["verdict"]) == (1, "failed")
    assert data["findings"][0]["again"].startswith("tpcheck verify ")
    assert data["coverage"]["refusals"] == {"N heads do not fit": 2}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["llama", "--examples", "0"], "examples=0: expected a positive integer"),
        (["llama", "--layers"], "family='llama': expected either a model type of transformers or --layers"),
        (["--examples", "5"], "family='': expected either a model type of transformers or --layers"),
        (["llama", "--layer", "x"], "layer=['x']: expected --layers, which this option needs"),
        (["llama", "--zero", "4"], "zero=4: expected one of 0, 1, 2, 3"),
        (["llama", "--tp", "x"], "tp='x': expected an integer, or several with commas between them"),
        (["--layers", "--trial", "{}"], "trial='layer': expected one of layer, tp"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(run: Run, arguments: list[str], sentence: str) -> None:
    result = run("fuzz", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"tpcheck: {sentence}")


def test_without_hypothesis_one_sentence_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "hypothesis", None)
    result = run("fuzz", "llama")
    assert (result.exit_code, result.stderr) == (2, "tpcheck: fuzz needs hypothesis: pip install 'tpcheck[fuzz]'\n")


def test_under_a_launcher_it_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("fuzz", "llama").exit_code == 2


def test_an_error_of_tpcheck_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, known: bool) -> SearchResult:
        raise TpcheckError("no worlds today")

    monkeypatch.setattr(family, "fuzz_family", broken)
    assert run("fuzz", "llama").stderr == "tpcheck: no worlds today\n"
