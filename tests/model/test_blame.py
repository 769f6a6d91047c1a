"""Whose error it is; sizes that a TP group does not divide; ranks that issue other collectives than the others."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import typing_extensions
from torch import nn

from tpcheck.core.errors import BackendError, InternalError, UsageError
from tpcheck.core.topology import Topology
from tpcheck.model.blame import (
    RankProgress,
    blame_backend,
    explain_parting,
    explain_tensors,
    first_unlike,
    indivisible_sizes,
    is_of_tpcheck,
    issued_by,
    naming_indivisible_sizes,
    progress_of,
)
from tpcheck.numerics.evidence import Collective, TensorKey
from tpcheck.numerics.precision import everything_in_float64
from tpcheck.numerics.recorder import CollectiveLog, ModuleRecorder

BACKEND: Any = SimpleNamespace(name="custom")


def broken(tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the model is wrong")


class Broken(nn.Module):
    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        return broken(tensor)


def raised(run: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run()
    return caught.value


def run_blamed(model: nn.Module, tensor: torch.Tensor) -> None:
    with blame_backend(BACKEND, "forward of step 0"), ModuleRecorder(model, lambda key, tensor: None):
        model(tensor)


@pytest.mark.filterwarnings("ignore:gone")
def test_a_line_behind_which_torch_warns_of_what_is_deprecated_is_the_callers() -> None:
    of_torch = nn.functional.softmax
    copy = FunctionType(of_torch.__code__, of_torch.__globals__, argdefs=of_torch.__defaults__)
    deprecated = typing_extensions.deprecated("gone")(copy)
    with pytest.raises(BackendError) as caught, blame_backend(BACKEND, "sharding the model"):
        deprecated(torch.ones(2), 3)
    assert str(caught.value).splitlines()[1].startswith(f"at {__file__}:")


def test_an_error_that_holds_a_tensor_is_told_without_its_numbers() -> None:
    for error in (KeyError(nn.Parameter(torch.ones(8, 4))), KeyError("weight", torch.ones(8, 4))):
        with pytest.raises(BackendError) as caught, blame_backend(BACKEND, "sharding the model"):
            raise error
        assert str(caught.value).splitlines()[0].endswith("a tensor of shape (8, 4), torch.float32")
        assert "1." not in str(caught.value).splitlines()[0]


def test_an_error_of_a_model_is_its_own_also_where_torch_raises_it() -> None:
    assert not is_of_tpcheck(raised(lambda: Broken()(torch.ones(1))))
    assert not is_of_tpcheck(raised(lambda: nn.Sequential(nn.Linear(2, 2))(torch.ones(3))))


def test_an_operation_that_fails_under_a_mode_of_tpcheck_is_the_models() -> None:
    with everything_in_float64():
        assert not is_of_tpcheck(raised(lambda: nn.Linear(2, 2)(torch.ones(3))))


def test_what_tpcheck_raises_on_purpose_and_lost_connections_are_no_bugs() -> None:
    assert not is_of_tpcheck(UsageError("tp", 0, "more"))
    assert not is_of_tpcheck(RuntimeError("Connection closed by peer"))
    assert not is_of_tpcheck(MemoryError())


def test_a_crash_of_the_backend_names_its_phase() -> None:
    error = raised(lambda: run_blamed(Broken(), torch.ones(1)))
    assert isinstance(error, BackendError)
    first, place = str(error).splitlines()
    assert first == "custom, forward of step 0: RuntimeError: the model is wrong"
    assert re.fullmatch(rf"at {re.escape(__file__)}:\d+, in broken", place)


def test_a_crash_of_the_backend_names_the_module_that_ran() -> None:
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"up": nn.Linear(2, 2)}))
    model.forward = lambda tensor: model[1]["up"](tensor)  # type: ignore[method-assign,index,operator]
    with pytest.raises(BackendError) as caught, blame_backend(BACKEND, "forward of step 0", model=model):
        model(torch.ones(3))
    assert "in 1.up (Linear), at " in str(caught.value)


@pytest.mark.parametrize("ended", [SystemExit(3), SystemExit()])
def test_code_that_ends_the_process_has_crashed(ended: SystemExit) -> None:
    with pytest.raises(BackendError, match="custom, step 0: SystemExit"), blame_backend(BACKEND, "step 0"):
        raise ended


def test_a_crash_of_a_hook_is_an_internal_error_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpcheck.numerics.recorder.named_tensors", None)
    model = nn.Sequential(nn.Linear(2, 2))
    error = raised(lambda: run_blamed(model, torch.ones(1, 2)))
    assert isinstance(error, InternalError)
    assert re.search(r"(?s)recorder\.py.*'NoneType' object is not callable", str(error))


@pytest.mark.parametrize(
    ("sizes", "tp", "text"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 64}, 4, "2 key-value heads over 4 ranks"),
        (
            {"num_attention_heads": 8, "num_local_experts": 4},
            3,
            "8 attention heads over 3 ranks, 4 experts over 3 ranks",
        ),
        ({"num_attention_heads": 8, "num_key_value_heads": None}, 2, ""),
    ],
)
def test_sizes_that_ranks_do_not_divide_are_named(sizes: dict[str, Any], tp: int, text: str) -> None:
    assert indivisible_sizes(SimpleNamespace(**sizes), tp) == text


def test_sizes_of_the_language_model_of_a_composite_are_taken() -> None:
    text = SimpleNamespace(num_key_value_heads=2)
    assert indivisible_sizes(SimpleNamespace(get_text_config=lambda: text), 4) == "2 key-value heads over 4 ranks"
    assert indivisible_sizes(None, 4) == ""


def test_a_crash_names_the_sizes_and_keeps_the_backends_message() -> None:
    config = SimpleNamespace(num_key_value_heads=2)
    with (
        pytest.raises(BackendError, match=r"shape '\[2, 16, -1, 8\]'.*\nNot divisible: 2 key-value heads over 4 ranks"),
        naming_indivisible_sizes(config, 4),
    ):
        raise BackendError("dtensor, forward of step 0: RuntimeError: shape '[2, 16, -1, 8]' is invalid")
    with pytest.raises(BackendError, match=r"^boom$"), naming_indivisible_sizes(config, 2):
        raise BackendError("boom")


UP, DOWN = Collective("up", "all_reduce", (0, 1)), Collective("down", "all_reduce", (0, 1))
LOSS = Collective("", "all_gather", (0, 1))


def unlike(*by_rank: tuple[Collective, ...]) -> str | None:
    topology = Topology(tp=len(by_rank))
    over_tp = tuple(range(len(by_rank)))
    return first_unlike(
        {
            rank: issued_by([replace(each, ranks=over_tp) for each in issued], topology, rank)
            for rank, issued in enumerate(by_rank)
        }
    )


def test_ranks_that_issue_the_same_are_alike() -> None:
    assert unlike((UP, DOWN), (UP, DOWN)) is None
    assert first_unlike({}) is None


def test_a_collective_that_a_rank_leaves_out_is_named_with_its_module_and_the_others() -> None:
    left_out = "rank 1 did not issue the all_reduce over tp in the forward of down that rank 0 issued"
    assert unlike((UP, DOWN, LOSS), (UP, LOSS)) == left_out
    assert unlike((UP, DOWN), (UP,)) == left_out


def test_a_rank_that_is_further_than_one_that_waits_has_left_something_out() -> None:
    assert unlike((UP, DOWN), (UP, replace(LOSS, position=5))) == (
        "rank 1 did not issue the all_reduce over tp in the forward of down that rank 0 issued, and went on to an "
        "all_gather over tp in the forward of the model"
    )


def test_it_is_the_same_on_the_first_rank() -> None:
    found = unlike((UP, replace(LOSS, position=5)), (UP, DOWN))
    assert found is not None
    assert found.startswith("rank 0 did not issue the all_reduce over tp in the forward of down that rank 1 issued")


def test_of_several_ranks_most_are_right() -> None:
    assert unlike((UP, LOSS), (UP, DOWN, LOSS), (UP, LOSS)) == (
        "rank 1 issued an all_reduce over tp in the forward of down, which ranks 0, 2 did not issue"
    )


def test_another_collective_in_the_place_of_one_is_named_beside_it() -> None:
    assert unlike((UP, DOWN), (UP, LOSS)) == (
        "rank 1 issued an all_gather over tp in the forward of the model where rank 0 issued an all_reduce over tp in "
        "the forward of down"
    )


def backward(module: str) -> TensorKey:
    return TensorKey("backward", module, 0, "input", "0")


def progress(*gradients: str, collectives: tuple[str, ...], is_in_pass: bool = False) -> RankProgress:
    """Return that of a rank which has issued a collective after the gradient of each of some modules' inputs."""
    log = CollectiveLog(gradients=tuple(map(backward, gradients)), is_in_pass=is_in_pass)
    log.issued += [replace(UP, phase="backward", module="", after=backward(module)) for module in collectives]
    return progress_of(log, Topology(tp=2), 0)


def test_ranks_whose_backward_passes_part_are_explained_by_the_gradient_that_one_of_them_lacks() -> None:
    right = progress("down", "up", "norm", collectives=("up", "norm"), is_in_pass=True)
    wrong = progress("norm", collectives=("norm",))
    found = explain_parting({0: right, 1: wrong}, [(0, 1)])
    assert found == (
        "rank 1 did not issue the all_reduce over tp in the backward pass after the gradient of input 0 of up that "
        "rank 0 issued. No gradient comes back to input 0 of down on rank 1"
    )
    assert explain_tensors({0: right, 1: wrong}, [(0, 1)]) is None


def test_a_rank_that_still_waits_lacks_no_gradient_and_one_that_ended_has_nothing_to_compare() -> None:
    waits = progress("down", "up", collectives=("down", "up"), is_in_pass=True)
    found = explain_parting({0: waits, 1: progress("down", "up", "norm", collectives=("down",))}, [(0, 1)])
    assert found == (
        "rank 1 did not issue the all_reduce over tp in the backward pass after the gradient of input 0 of up that "
        "rank 0 issued"
    )
    assert explain_parting({0: waits}, [(0, 1)]) is None
    assert explain_parting({}, [(0, 1)]) is None


def test_ranks_that_issue_the_same_with_other_tensors_are_told_where() -> None:
    ranks = dict.fromkeys((0, 1), progress("down", collectives=("down",), is_in_pass=True))
    assert explain_parting(ranks, [(0, 1)]) is None
    assert explain_tensors(ranks, [(0, 1)]) == (
        "ranks 0, 1 issued the all_reduce over tp in the backward pass after the gradient of input 0 of down with "
        "tensors that do not fit each other"
    )
    ended = dict.fromkeys((0, 1), progress("down", collectives=("down",)))
    assert explain_tensors(ended, [(0, 1)]) is None


def test_collectives_of_the_backward_pass_have_no_module_and_groups_their_axis() -> None:
    topology = Topology(tp=2, dp=2)
    over_dp = Collective("", "all_reduce", (1, 3), phase="backward")
    other = Collective("x", "all_reduce", (0, 3))
    assert [str(each) for each in issued_by([over_dp, other], topology, 1)] == [
        "all_reduce over dp in the backward pass",
        "all_reduce over ranks [0, 3] in the forward of x",
    ]
