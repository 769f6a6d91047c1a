"""Faults of what a saved training is resumed with: weights, moments, rates, counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from tpcheck.backends.interface import WayToResume
from tpcheck.lab.faults.fault import TP2, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import inject_always

_KIND = "resume"
_CHECK = "resume_matches_uninterrupted"
_OPTIONS = {"optimizer": "adamw", "checks": (_CHECK,)}
_OF_TRAINER = {**_OPTIONS, "loop": "trainer"}
_row = fault_constructor(_KIND, _CHECK, options=_OPTIONS, steps=2, topology=TP2, topologies=(TP2,))

Load = Callable[[Path], None]


def _replace_loading(change: Callable[[Live, Load], Load]) -> Callable[[Live], None]:
    """Return what replaces `load` of each way to resume by `change(live, load)`."""

    def inject(live: Live) -> None:
        ways_to_resume = live.candidate.ways_to_resume

        def changed() -> dict[str, WayToResume]:
            return {name: replace(way, load=change(live, way.load)) for name, way in ways_to_resume().items()}

        live.candidate.ways_to_resume = changed

    return inject


def _after_loading(action: Callable[[Live], None]) -> Callable[[Live], None]:
    def change(live: Live, load: Load) -> Load:
        def load_and_act(folder: Path) -> None:
            load(folder)
            action(live)

        return load_and_act

    return _replace_loading(change)


def _without(**what: bool) -> Callable[[Live], None]:
    """Return what calls `load_checkpoint` with arguments of its own."""
    return _replace_loading(
        lambda live, load: lambda folder: live.candidate.engine.load_checkpoint(str(folder), **what) and None
    )


def _nothing_loaded(live: Live, load: Load) -> Load:
    return lambda folder: None


def _moments(live: Live) -> dict[str, dict[str, torch.Tensor]]:
    """Return the moments of each parameter; the engine without ZeRO steps the parameters themselves."""
    states = live.candidate.engine.optimizer.state
    return {name: states[parameter] for name, parameter in live.candidate.module.named_parameters()}


def _moments_of_first_rank(live: Live) -> None:
    source = dist.get_process_group_ranks(live.tp_group)[0]
    for states in _moments(live).values():
        for name in ("exp_avg", "exp_avg_sq"):
            dist.broadcast(states[name], source, group=live.tp_group)


def _exchanged_moments(live: Live) -> None:
    moments = _moments(live)
    for name, states in moments.items():
        if name.endswith("gate_proj.weight"):
            other = moments[name.replace("gate_proj", "up_proj")]
            states["exp_avg"], other["exp_avg"] = other["exp_avg"], states["exp_avg"]


def _second_moments_lost(live: Live) -> None:
    for states in _moments(live).values():
        states["exp_avg_sq"].zero_()


def _other_rate(live: Live) -> None:
    for group in live.candidate.engine.optimizer.param_groups:
        group["lr"] *= 1.1


def _steps_not_counted(live: Live) -> None:
    live.candidate.engine.global_steps = 0


def _batches_from_the_beginning(live: Live) -> None:
    """Do as a Trainer with `ignore_data_skip=True`."""
    trainer = live.candidate.trainer
    run_epoch = trainer._run_epoch

    def run_whole_epoch(**what: Any) -> None:
        run_epoch(**{**what, "steps_trained_in_current_epoch": 0})

    trainer._run_epoch = run_whole_epoch


def _generators_of_first_rank(live: Live) -> None:
    """Load the states of generators that rank 0 saved, as from a file that all ranks share."""
    trainer = live.candidate.trainer
    load = trainer._load_rng_state

    def load_of_first(checkpoint: str) -> None:
        with patch.object(type(trainer.args), "process_index", 0):
            load(checkpoint)

    trainer._load_rng_state = load_of_first


def _one_weight_not_loaded(draw: Draw) -> Injection:
    name = draw.parameter("*_proj.weight")

    def change(live: Live, load: Load) -> Load:
        def load_others(folder: Path) -> None:
            parameter: Any = live.parameter(name)
            before = parameter.detach().clone()
            load(folder)
            if live.tp_rank == 1:
                with torch.no_grad():
                    parameter.copy_(before)

        return load_others

    return Injection(partial(_replace_loading(change)), Place(parameters=(name,)))


FAULTS = (
    _row("resume_loads_nothing", "load_checkpoint finds nothing, and says so in a log alone",
         inject_always(_replace_loading(_nothing_loaded)), "not_loaded"),
    _row("resume_without_optimizer", "Weights are loaded, and the optimizer starts anew",
         inject_always(_without(load_optimizer_states=False)), "tensor_missing"),
    _row("resume_moments_of_first_rank", "All ranks of a TP group load the moments of the first one",
         inject_always(_after_loading(_moments_of_first_rank)), "optimizer_state_of_another_rank"),
    _row("resume_moments_exchanged", "The first moments of gate and up are exchanged",
         inject_always(_after_loading(_exchanged_moments)), "tensor_of_another_layer"),
    _row("resume_second_moments_lost", "The second moments start at zero again",
         inject_always(_after_loading(_second_moments_lost)), "all_zero"),
    _row("resume_other_rate", "The learning rate is that of the script, not the one that was saved",
         inject_always(_after_loading(_other_rate)), "options_differ"),
    _row("resume_repeats_batches", "The count of steps is not restored, so that batches come again",
         inject_always(_after_loading(_steps_not_counted)), "samples_repeated"),
    _row("resume_one_weight_stays", "One rank does not load one weight",
         _one_weight_not_loaded, "not_loaded"),
    _row("resume_trainer_skips_no_batches", "The Trainer starts with the first batch again, as with ignore_data_skip",
         inject_always(_batches_from_the_beginning), "samples_repeated", options=_OF_TRAINER),
    _row("resume_trainer_generators_of_first_rank", "All ranks load the generators that the first one saved",
         inject_always(_generators_of_first_rank), None, options=_OF_TRAINER),
)  # fmt: skip
