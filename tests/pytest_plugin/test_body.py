"""The body of a marked test runs on every rank, as it would run in an ordinary session."""

from __future__ import annotations

import pytest

from tests.pytest_plugin.conftest import Run


def test_the_body_runs_on_every_rank_of_the_topology(run: Run) -> None:
    source = """
        @pytest.mark.tpcheck(tp=2, dp=2)
        def test_ranks(tp_rank, tmp_path):
            import torch
            number = torch.tensor(tp_rank.rank)
            torch.distributed.all_reduce(number, group=tp_rank.group("tp"))
            assert int(number) == (1 if tp_rank.dp_rank == 0 else 5)
            (tmp_path / str(tp_rank.rank)).touch()
            tp_rank.gather(None)
            assert len(list(tmp_path.iterdir())) == 4

        @pytest.mark.tpcheck(tp=2)
        def test_without_the_fixture():
            import torch.distributed
            assert torch.distributed.get_world_size() == 2
    """
    run(source).assert_outcomes(passed=2)


def test_parameters_and_fixtures_are_sent_to_ranks(run: Run) -> None:
    source = """
        import threading
        from dataclasses import dataclass

        @dataclass
        class Box:
            content: object

        shared = []

        @pytest.fixture
        def box():
            return Box(shared)

        @pytest.fixture
        def same_box(box):
            return box

        @pytest.fixture
        def autouse_may_hold_a_lock():
            return threading.Lock()

        @pytest.mark.usefixtures("autouse_may_hold_a_lock")
        @pytest.mark.tpcheck(tp=2)
        @pytest.mark.parametrize("bias", [True, False])
        @pytest.mark.parametrize("function", [len, lambda value: 3, Box])
        def test_all(tp_rank, bias, function, box, same_box):
            assert isinstance(bias, bool)
            assert function([1, 2, 3]) in (3, Box([1, 2, 3]))
            assert box is same_box
            assert tp_rank.gather(box) == (Box([]), Box([]))
    """
    run(source).assert_outcomes(passed=6)


def test_methods_have_their_class_and_the_attributes_of_setup_method(run: Run) -> None:
    source = """
        class Base:
            def test_inherited(self, tp_rank):
                assert self.number == self.expected

        @pytest.mark.tpcheck(tp=2)
        class TestMethods(Base):
            expected = 5

            def setup_method(self):
                self.number = 5

            @pytest.fixture(autouse=True)
            def more(self, tmp_path):
                self.path = tmp_path

            def test_method(self, tp_rank):
                assert type(self) is TestMethods
                assert tp_rank.gather(self.path)[0] == self.path
                self.number += tp_rank.rank
                assert tp_rank.gather(self.number) == (5, 6)

            @staticmethod
            def test_static(tp_rank):
                assert tp_rank.world_size == 2

            @classmethod
            def test_class(cls, tp_rank):
                assert cls is TestMethods

        class TestOuter:
            @pytest.mark.tpcheck(tp=2)
            class TestInner:
                def test_deeper(self, tp_rank):
                    assert type(self).__qualname__ == "TestOuter.TestInner"
    """
    run(source).assert_outcomes(passed=5)


def test_a_function_without_a_name_in_its_module_is_sent_by_value(run: Run) -> None:
    source = """
        def create_test(expected):
            @pytest.mark.tpcheck(tp=2)
            def test(tp_rank):
                assert tp_rank.world_size == expected, module_level()
            return test

        def module_level():
            return "from the module"

        test_two, test_three = create_test(2), create_test(3)
        test_two.__name__ = "elsewhere"
        del create_test
    """
    result = run(source)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["E *AssertionError: from the module", "E *assert 2 == 3"])


def test_classes_of_the_test_module_unpickle_on_ranks_and_in_their_child_processes(run: Run) -> None:
    source = """
        import io

        class Numbers:
            def __len__(self):
                return 4

            def __getitem__(self, index):
                return index

        @pytest.mark.tpcheck(tp=2)
        def test_saved_and_loaded_by_workers(tp_rank):
            import torch
            from torch.utils.data import DataLoader
            file = io.BytesIO()
            torch.save(Numbers(), file)
            file.seek(0)
            assert isinstance(torch.load(file, weights_only=False), Numbers)
            loader = DataLoader(Numbers(), num_workers=1, multiprocessing_context="spawn")
            assert [int(number) for number in loader] == [0, 1, 2, 3]
    """
    run(source).assert_outcomes(passed=1)


@pytest.mark.parametrize("mode", ["prepend", "append", "importlib"])
def test_every_import_mode_works(pytester: pytest.Pytester, mode: str) -> None:
    body = """
        import pytest
        from dataclasses import dataclass

        @dataclass
        class Record:
            name: str = __name__

        @pytest.mark.tpcheck(tp=2)
        def test_record(tp_rank, of_conftest):
            assert type(of_conftest).__name__ == "OfConftest"
            assert tp_rank.gather(Record()) == (Record(), Record())
    """
    conftest = """
        import pytest

        class OfConftest:
            pass

        @pytest.fixture
        def of_conftest():
            return OfConftest()
    """
    for folder in ("first", "second"):
        files = {"test_same": body, "conftest": conftest, **({} if mode == "importlib" else {"__init__": ""})}
        pytester.makepyfile(**{f"{folder}/{name}": text for name, text in files.items()})
    pytester.runpytest_inprocess(f"--import-mode={mode}").assert_outcomes(passed=2)


def test_packages_with_relative_imports_work(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        **{
            "inner/__init__": "",
            "inner/helpers": "class Helper: pass",
            "inner/test_relative": """
                import pytest
                from .helpers import Helper

                @pytest.fixture
                def helper():
                    return Helper()

                @pytest.mark.tpcheck(tp=2)
                def test_relative(tp_rank, helper):
                    assert type(helper) is Helper
            """,
        }
    )
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_ranks_are_seeded_differently_unless_the_marker_seeds_them(run: Run) -> None:
    source = """
        import random

        @pytest.mark.tpcheck(tp=2)
        def test_different(tp_rank):
            import torch
            assert len(set(tp_rank.gather(random.random()))) == 2
            assert len(set(tp_rank.gather(float(torch.rand(()))))) == 2

        @pytest.mark.tpcheck(tp=2, seed=3)
        def test_same(tp_rank):
            import torch
            assert len(set(tp_rank.gather(random.random()))) == 1
            assert len(set(tp_rank.gather(float(torch.rand(()))))) == 1
    """
    run(source).assert_outcomes(passed=2)


def test_ranks_have_the_environment_and_folder_that_fixtures_set(run: Run) -> None:
    source = """
        import os

        @pytest.fixture(autouse=True)
        def environment(monkeypatch, tmp_path):
            monkeypatch.setenv("OF_THE_TEST", "yes")
            monkeypatch.chdir(tmp_path)

        @pytest.mark.tpcheck(tp=2)
        def test_environment(tp_rank, tmp_path):
            assert os.environ["OF_THE_TEST"] == "yes"
            assert os.getcwd() == str(tmp_path)
    """
    run(source).assert_outcomes(passed=1)


def test_warnings_of_ranks_are_filtered_and_shown(run: Run) -> None:
    source = """
        import warnings

        @pytest.mark.tpcheck(tp=2)
        def test_warns(tp_rank):
            warnings.warn("same on every rank")
            warnings.warn(f"of rank {tp_rank.rank}", DeprecationWarning)

        @pytest.mark.filterwarnings("error:bad")
        @pytest.mark.tpcheck(tp=2)
        def test_an_error(tp_rank):
            warnings.warn("bad")

        @pytest.mark.filterwarnings("ignore:known")
        @pytest.mark.tpcheck(tp=2)
        def test_ignored(tp_rank):
            warnings.warn("known")

        @pytest.mark.tpcheck(tp=2)
        def test_returns(tp_rank):
            return 1
    """
    result = run(source)
    result.assert_outcomes(passed=3, failed=1, warnings=4)
    result.stdout.fnmatch_lines(
        [
            "E       UserWarning: bad",
            "*test_it.py:8: UserWarning: same on every rank",
            "*DeprecationWarning: of rank 0",
            "*.py:*: PytestReturnNotNoneWarning: Test functions should return None, but *test_returns returned*int*",
        ]
    )
    result.stdout.no_fnmatch_line("*known")


def test_other_options_of_pytest_work(run: Run) -> None:
    source = """
        @pytest.mark.tpcheck(tp=2)
        def test_marked(tp_rank):
            pass

        def test_plain():
            pass
    """
    run(source, "--collect-only").stdout.fnmatch_lines(["*2 tests collected*"])
    run(source, "--setup-show").stdout.fnmatch_lines(["*SETUP    S tp_rank*", "*test_marked (fixtures used: tp_rank)*"])
    run(source, "--markers").stdout.fnmatch_lines(["@pytest.mark.tpcheck(tp=*"])
    run(source, "-v", "--tpcheck-timeout=0").stdout.fnmatch_lines(["tpcheck: no timeout, device auto, backend auto"])
