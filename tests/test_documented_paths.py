"""Import paths that the documentation gives keep working, wherever the code lies."""

from __future__ import annotations

from importlib import import_module

import pytest

PATHS = {
    "tpcheck.adapters": "Backend Candidate Checkpoint CheckpointFormat Extent Layout NamedOtherwiseWhenSaved "
    "ReadOptions ReadsLayouts RenamedWhenSaved SavesCheckpoints TellsLayouts TrainingOptions backend_names "
    "checkpoint_formats layouts_of "
    "load_backend",
    "tpcheck.backends.custom": "CustomBackend",
    "tpcheck.backends.megatron": "MegatronBackend TokenLoss",
    "tpcheck.families": "KNOWN known",
    "tpcheck.faults": "CHECKPOINT_FAULTS DATA_FAULTS FAULTS MODEL_FAULTS CheckpointFault DataFault Draw Fault Live "
    "ModelFault Place PlantedBackend Planting",
    "tpcheck.placement": "Partial Placement Replicate Shard",
    "tpcheck.testing": "backend_conformance family_tests require_conformance",
    "tpcheck.topology": "Topology",
    "tpcheck.trainer.callback": "TpcheckCallback",
    "tpcheck.trainer.lightning": "LightningCallback",
    "tpcheck.trainer.model": "watch_model",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_documented_path_holds_its_names(path: str) -> None:
    if path.endswith("lightning"):
        pytest.importorskip("lightning.pytorch")
    module = import_module(path)
    assert [name for name in PATHS[path].split() if not hasattr(module, name)] == []
