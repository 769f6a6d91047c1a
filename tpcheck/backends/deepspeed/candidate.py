"""A DeepSpeed engine as a candidate: its parameters and gradients by name, the norm of a step, its ways to save."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime import engine as engine_module
from deepspeed.utils import groups, safe_get_full_grad
from torch import nn

from tpcheck.backends.deepspeed.layouts import local_shape, parallel_layers, parameter_layouts
from tpcheck.backends.layout import Layout
from tpcheck.backends.live_groups import distinct_ranks
from tpcheck.core.topology import Topology

_WEIGHTS = "pytorch_model.bin"


def ways_to_save(engine: Any) -> Mapping[str, Callable[[Path], None]]:
    """Return the ways to save by the names that users know; each is collective over the world."""
    gathers = engine.autotp_size() > 1 or engine.zero_optimization_partition_weights()
    return {
        "save_16bit_model": partial(_save_16bit_model, engine),
        **({"consolidated state dict": partial(_save_consolidated, engine)} if gathers else {}),
        "save_checkpoint": partial(_save_checkpoint, engine),
        **({"universal checkpoint": partial(_save_universal, engine)} if engine.zero_optimization() else {}),
    }


def _save_16bit_model(engine: Any, folder: Path) -> None:
    engine.save_16bit_model(str(folder), save_filename=_WEIGHTS)


def _save_consolidated(engine: Any, folder: Path) -> None:
    state = engine._consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        torch.save(dict(state), folder / _WEIGHTS)


def _save_checkpoint(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(str(folder))


def _save_universal(engine: Any, folder: Path) -> None:
    training, universal = folder / "training", folder / "universal"
    engine.save_checkpoint(str(training), tag="step")
    dist.barrier()
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        for file in (training / "step").glob("*_optim_states.pt"):
            _add_adam_state(file)
        ds_to_universal.main(_conversion(training / "step", universal))


def _conversion(training: Path, universal: Path) -> Namespace:
    """Return the arguments of ds_to_universal, as its command line parses them."""
    return Namespace(
        input_folder=str(training),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )


def _add_adam_state(file: Path) -> None:
    """Add moments of zero to optimizer states that this run has just written: ds_to_universal converts only Adam's."""
    saved = torch.load(file, map_location="cpu", weights_only=False)
    zero = saved["optimizer_state_dict"]
    masters = zero.get("fp32_flat_groups") or zero["single_partition_of_fp32_groups"]
    states = (zero.get("optimizer_state_dict") or zero["base_optimizer_state"])["state"]
    for number, master in enumerate(masters):
        state = states.setdefault(number, {})
        for moment in ("exp_avg", "exp_avg_sq"):
            state.setdefault(moment, torch.zeros_like(master))
    torch.save(saved, file)


class DeepSpeedCandidate:
    """Implements `adapters.Candidate` over a DeepSpeed engine."""

    def __init__(self, engine: Any, topology: Topology) -> None:
        self._engine = engine
        self._topology = topology
        self._norm: float | None = None

    @property
    def engine(self) -> Any:
        """The DeepSpeed engine."""
        return self._engine

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self._engine.module
        return module

    def group_ranks(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        dp = {"dp": distinct_ranks([self._engine.seq_data_parallel_group])}
        if self._topology.tp == 1:  # DeepSpeed makes no TP group
            return dp
        layer_groups = [layer.mp_group for _, layer in parallel_layers(self.module) if layer.mp_group is not None]
        return {"tp": distinct_ranks([groups.get_tensor_model_parallel_group(), *layer_groups]), **dp}

    def layouts(self) -> dict[str, Layout]:
        if self._topology.tp == 1:
            parameters = self.module.named_parameters()
            return {name: Layout.replicated(local_shape(parameter), tp=1) for name, parameter in parameters}
        return parameter_layouts(self.module, groups.get_tensor_model_parallel_group())

    def parameter(self, name: str) -> torch.Tensor:
        parameter = self.module.get_parameter(name)
        if not hasattr(parameter, "ds_id"):  # not partitioned by ZeRO-3
            return parameter.detach().clone()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def gradient(self, name: str) -> torch.Tensor | None:
        gradient = safe_get_full_grad(self.module.get_parameter(name))
        return None if gradient is None else gradient.detach().clone()

    def forward(self, batch: Mapping[str, Any]) -> Any:
        return self._engine(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        with _observed_clipping() as norms:
            self._engine.step()
        norm = norms[-1] if norms else self._engine.get_global_grad_norm()
        self._norm = None if norm is None else float(norm)

    def gradient_norm(self) -> float | None:
        return self._norm

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        return ways_to_save(self._engine)


@contextmanager
def _observed_clipping() -> Iterator[list[Any]]:
    """Collect the norms that `clip_grad_norm_` returns: at ZeRO 0 in float32 and float64 the engine discards them."""
    norms: list[Any] = []
    clip = engine_module.clip_grad_norm_

    def observed(*args: Any, **kwargs: Any) -> Any:
        norms.append(clip(*args, **kwargs))
        return norms[-1]

    with patch.object(engine_module, "clip_grad_norm_", observed):
        yield norms
