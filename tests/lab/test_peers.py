"""The bench of other tools: its table is that of the committed runs, and its adapters read what those tools print."""

from __future__ import annotations

import json
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGE, DATA = ROOT / "docs" / "how" / "related.md", ROOT / "docs" / "how" / "peers.json"


@pytest.fixture(scope="module")
def peers() -> Any:
    loader = SourceFileLoader("bench_of_peers", str(ROOT / "ci" / "bench" / "peers"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module  # where dataclasses look for the types of their fields
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes
    return module


def test_the_page_shows_the_table_of_the_committed_runs(peers: Any) -> None:
    page = PAGE.read_text()
    assert page == peers.page_with(page, peers.table(json.loads(DATA.read_text())))


def test_the_committed_runs_are_of_the_peers_and_cases_that_there_are(peers: Any) -> None:
    document = json.loads(DATA.read_text())
    assert [row["name"] for row in document["peers"]] == [peer.name for peer in peers.PEERS]
    assert {row["peer"] for row in document["outcomes"]} <= {peer.name for peer in peers.PEERS}
    assert {row["case"] for row in document["outcomes"]} <= {draft.name for draft in peers.all_drafts()}


def test_every_beginning_of_the_order_has_of_each_kind_its_share(peers: Any) -> None:
    drafts = [
        peers.Draft(f"{kind} {number}", kind, lambda seed: None)
        for kind, amount in (("layout", 30), ("norm", 10))
        for number in range(amount)
    ]
    ordered = peers.stratified(drafts, seed=3)
    assert sorted(draft.name for draft in ordered) == sorted(draft.name for draft in drafts)
    for number in (8, 20):
        assert abs(sum(draft.kind == "norm" for draft in ordered[:number]) - number / 4) <= 1
    assert ordered != peers.stratified(drafts, seed=4)


def test_a_module_has_the_hash_of_its_last_operator_in_each_call(peers: Any) -> None:
    from torch.utils._debug_mode import DebugMode

    inner = torch.nn.Linear(2, 3)
    model = torch.nn.Sequential(inner, torch.nn.ReLU())
    inputs = torch.ones(1, 2)
    mode = DebugMode(record_nn_module=True)
    with mode, DebugMode.log_tensor_hashes():
        outputs = [model(inputs), model(2 * inputs)]
    hashes = peers.last_hashes(mode.logs, lambda name: name.partition(".")[2])
    for call, factor in enumerate((1, 2)):
        assert hashes["0", call][1] == pytest.approx(float(inner(factor * inputs).abs().sum()))
        assert hashes["1", call][1] == pytest.approx(float(outputs[call].sum()))


def test_values_and_shapes_must_be_close(peers: Any) -> None:
    expected = torch.ones(3)
    assert peers._close(expected + 1e-6, expected, 1e-5)
    assert not peers._close(expected + 1e-4, expected, 1e-5)
    assert not peers._close(torch.ones(4), expected, 1e-5)


def test_a_row_counts_what_a_peer_caught_and_where(peers: Any) -> None:
    row = {"name": "a tool", "names": "modules"}
    outcomes = [
        peers.Outcome("a tool", "one", "layout", "flagged", 3, "x", True, True, 1.0, 2.0, 300),
        peers.Outcome("a tool", "two", "layout", "flagged", 1, "y", False, False, 1.0, 2.0, 300),
        peers.Outcome("a tool", "three", "layout", "error", message="it broke"),
        peers.Outcome("a tool", "clean", peers.CONTROL, "flagged", 1, "z"),
    ]
    line = peers._line(row, outcomes)
    assert line.startswith("| a tool | 2 of 3 | 1 / 1 of 2 (2 named) | 1 of 1 | 1 of 4 |")
    assert "it broke" in peers._message({"missing": ""}, outcomes)
    assert "not run" in peers._line(row, [])


def test_a_peer_that_is_not_installed_says_so(peers: Any) -> None:
    assert peers.missing(SimpleNamespace(requires="no-such-distribution")) == "no-such-distribution is not installed"
    assert peers.missing(SimpleNamespace(requires=None)) == ""
