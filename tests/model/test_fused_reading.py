"""Whether fused blocks are read in another order than they are cut is seen by a run of the reference on that order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

import tpcheck
from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Shard
from tpcheck.core.topology import Topology
from tpcheck.model.fused_reading import find_blocks_read
from tpcheck.numerics.evidence import Evidence, Step, TensorKey
from tpcheck.numerics.tolerance import Tolerance

FUSED, READ = TensorKey("forward", "fused", 0, "output", "0"), TensorKey("forward", "down", 0, "input", "0")
TOKENS = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4).sin()
Code = Callable[[Tensor], Tensor]  # from the fused output to what the next layer is given


def gate_and_up(fused: Tensor) -> Tensor:
    gate, up = fused.chunk(2, -1)
    return silu(gate) * up


def pairs(fused: Tensor) -> Tensor:
    gate, up = fused.unflatten(-1, (-1, 2)).unbind(-1)
    return silu(gate) * up


def thirds(fused: Tensor) -> Tensor:
    query, key, value = fused.chunk(3, -1)
    return query * key + value


def fewer_keys(fused: Tensor) -> Tensor:
    width = fused.shape[-1] // 4
    query, *others = fused.split([2 * width, width, width], -1)
    key, value = (each.repeat_interleave(2, -1) for each in others)
    return query * key + value


def normed(fused: Tensor) -> Tensor:
    return nn.functional.layer_norm(gate_and_up(fused), (fused.shape[-1] // 2,))


def cut_off(fused: Tensor) -> Tensor:
    inner = gate_and_up(fused)
    return torch.relu(inner - inner.mean(-1, keepdim=True))


class Model(nn.Module):
    def __init__(self, features: int, code: Code) -> None:
        super().__init__()
        self.fused = nn.Linear(4, features)
        self.down = nn.Linear(code(torch.ones(features)).shape[-1], 4)
        self.code = code

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.down(self.code(self.fused(tokens)))
        return output.sum()


def found(code: Code, *, features: int = 8, blocks: int = 1, on_ranks: Code | None = None) -> object:
    """Return what is found where two ranks run `on_ranks` on their parts of the output, cut in so many blocks."""
    torch.manual_seed(0)
    model = Model(features, code).double()
    fused = model.fused(TOKENS).detach()
    layout = Layout.from_placement((features, 4), Shard(0, blocks=blocks), 2)
    whole = [block.chunk(2, -1) for block in fused.chunk(blocks, -1)]
    parts = [torch.cat([block[rank] for block in whole], -1) for rank in (0, 1)]
    ranks = tuple(Step({FUSED: each, READ: (on_ranks or code)(each)}, {}, {}, None, 0.0) for each in parts)
    evidence = Evidence(
        topology=Topology(tp=2),
        dp_rank=0,
        dtype="float64",
        initial={},
        initial_parts=({}, {}),
        layouts={"fused.weight": layout},
        reference=(Step({FUSED: fused, READ: code(fused)}, {}, {}, None, 0.0, sources={READ: (FUSED,)}),),
        candidate=(ranks,),
        buffers=(),
        facts=(),
        tolerance=Tolerance(2.0**-52, 1, {}),
    )
    answer = find_blocks_read(model, dict(model.state_dict()), evidence, {"tokens": TOKENS})
    if READ not in answer:
        return "unknown"
    read = answer[READ]
    return read and (read[0], read[1].number)


def test_a_whole_cut_of_what_is_read_in_blocks_is_found() -> None:
    assert found(gate_and_up) == ("fused", 2)
    assert found(thirds, features=12) == ("fused", 3)
    assert found(fewer_keys, features=16) == ("fused", 3)


def test_a_cut_by_blocks_of_what_is_read_in_one_piece_or_in_other_blocks_is_found() -> None:
    assert found(pairs, blocks=2) == ("fused", 2)
    assert found(thirds, features=12, blocks=2) == ("fused", 3)


@pytest.mark.parametrize("code", [normed, cut_off])
def test_another_mistake_behind_a_right_cut_is_told_apart(code: Code) -> None:
    assert found(code, blocks=2) is None


def test_nothing_is_found_where_nothing_is_wrong_or_the_mistake_is_behind_a_whole_projection() -> None:
    assert found(gate_and_up, blocks=2) == "unknown"
    assert found(pairs) == "unknown"
    assert found(torch.relu, on_ranks=lambda part: torch.relu(part) + 1) == "unknown"


class Fused(Model):
    def __init__(self) -> None:
        super().__init__(16, gate_and_up)


def test_verify_names_a_colwise_cut_of_gate_and_up() -> None:
    report = tpcheck.verify(
        Fused,
        {"tokens": TOKENS},
        topology=Topology(tp=2),
        backend="dtensor",
        config={"plan": {"fused": "colwise", "down": "rowwise"}},
    )
    first = report.findings[0]
    assert (first.cause, first.where["module"]) == ("fused_blocks_interleaved", "fused")
