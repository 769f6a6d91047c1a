"""The states that transformers' Trainer and accelerate save in the folder of a model, one file for each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tpcheck.backends.checkpoint_format import ReadOptions, TrainingStates
from tpcheck.checkpoints.formats import torch_files
from tpcheck.checkpoints.formats.deepspeed.rank_files import looks_like_training
from tpcheck.checkpoints.formats.deepspeed.training import open_training
from tpcheck.checkpoints.formats.file_checkpoint import FileCheckpoint, TensorInFiles
from tpcheck.checkpoints.formats.files import Files, is_folder, names_in, read_json
from tpcheck.checkpoints.formats.training_states import CLASSES, COUNT, StateTable, is_optimizer

TRAINER_STATE = "trainer_state.json"
_OPTIMIZER = re.compile(r"optimizer(_\d+)?\.(pt|bin)")
_OTHERS = {
    re.compile(r"scheduler(?:_(\d+))?\.(?:pt|bin)"): "scheduler",
    re.compile(r"scaler\.pt"): "scaler",
    re.compile(r"rng_state\.pth"): "generators",
    re.compile(r"rng_state_(\d+)\.pth|random_states_(\d+)\.pkl"): "generators",  # of a rank
}
_COUNTS = {"global_step": COUNT, "epoch": "epoch", "num_input_tokens_seen": "number of tokens"}


def folder_states(
    folder: Path, files: Files, options: ReadOptions, model: Mapping[str, TensorInFiles]
) -> TrainingStates | None:
    """Return the states in the files of a folder, or None where there are none; `model` is what it has beside them."""
    table = StateTable()
    names = names_in(folder) if is_folder(folder) else []
    shapes = {name: tensor.shape for name, tensor in model.items()}
    optimizers = [name for name in names if _OPTIMIZER.fullmatch(name)]
    for name in optimizers:
        state_dict = torch_files.load(folder / name, files, options, keep=CLASSES)
        if is_optimizer(state_dict):
            label = "" if len(optimizers) == 1 else f"{Path(name).stem} "
            table.add_optimizer(state_dict, files, shapes, label=label)
        else:
            table.unread[name] = "holds no optimizer of torch"
    for name in names:
        for pattern, prefix in _OTHERS.items():
            match = pattern.fullmatch(name)
            if match:
                number = next((group for group in match.groups() if group), None)
                saved = torch_files.load(folder / name, files, options, keep=CLASSES)
                table.add(prefix if number is None else f"{prefix}.{int(number)}", saved, files)
    if TRAINER_STATE in names:
        state = read_json(folder / TRAINER_STATE, files, strict=False)
        table.values |= {name: state[key] for key, name in _COUNTS.items() if isinstance(state.get(key), (int, float))}
    if names and looks_like_training(folder):  # the Trainer leaves the optimizer to DeepSpeed
        states = open_training(folder, files, options).training_states()
        if states is not None and isinstance(states.tensors, FileCheckpoint):
            table.tensors |= states.tensors.tensors
            table.unread |= states.tensors.unread
            table.values |= states.values
    return table.states(files)
