"""A DeepSpeed engine as a candidate: layouts and gradients of its parameters, the norm of a step, its ways to save."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import GatherReplacedLayerParams
from deepspeed.runtime import engine as engine_module
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
)
from torch import nn

from tpcheck.backends.interface import STEPS_TAKEN, WayToResume
from tpcheck.backends.layout import Layout
from tpcheck.backends.live_groups import distinct_ranks
from tpcheck.backends.local_part import local_shape, restored_data
from tpcheck.backends.sgd import LOW_PRECISION, states_like
from tpcheck.core.topology import Topology

Shapes = dict[str, tuple[int, ...]]  # of parameters, by name
StateNames = dict[tuple[int, ...], list[str]]


def parallel_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) for each layer that DeepSpeed has replaced by a tensor-parallel one."""
    for name, module in model.named_modules():
        if hasattr(module, "gather_params") and hasattr(module, "mp_group"):
            yield name, module


def parameter_layouts(model: nn.Module, group: Any) -> dict[str, Layout]:
    """Return the layout of every parameter except those that their layer cannot gather. Collective over the TP group.

    Each layer gathers, through its own `gather_params`, a shard whose values are their positions: the result is the
    layout, whatever the layer does inside.
    """
    tp = dist.get_world_size(group)
    layouts = {
        name: Layout.replicated(local_shape(parameter), tp)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    layers = list(parallel_layers(model))
    shapes_by_rank: list[list[Shapes]] = [[] for _ in range(tp)]
    dist.all_gather_object(shapes_by_rank, [_local_shapes(layer) for _, layer in layers], group=group)
    for (prefix, layer), *shapes in zip(layers, *shapes_by_rank, strict=True):
        for name, layout in _layer_layouts(layer, shapes, dist.get_rank(group)).items():
            full_name = f"{prefix}.{name}" if prefix else name
            if layout is None:
                del layouts[full_name]
            else:
                layouts[full_name] = layout
    return layouts


def unmarked_layouts(model: nn.Module, group: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Layout]:
    """Return the layouts of shards that no parallel layer holds. Collective over the TP group.

    AutoTP replaces embeddings that it does not recognise, such as T5's bias of relative positions, by narrower plain
    ones (`_slice_embedding`, module_inject/auto_tp.py of 0.19.8). What is smaller in one dim, and complete over the
    ranks, is taken for chunks in their order: the comparison of the gathered weights shows whether it is.

    Args:
        shapes: The shapes of the unsharded model, by name.
    """
    of_layers = {prefix for prefix, _ in parallel_layers(model)}
    unlike = {
        name: local_shape(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[0] not in of_layers
        and local_shape(parameter) != shapes.get(name, local_shape(parameter))
    }
    by_rank: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(by_rank, unlike, group=group)
    layouts = {}
    for name in unlike:
        chunks = _chunks(shapes[name], [of_rank.get(name, shapes[name]) for of_rank in by_rank])
        if chunks is not None:
            layouts[name] = Layout.from_positions(shapes[name], chunks)
    return layouts


def _chunks(shape: tuple[int, ...], local_shapes: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, ...] | None:
    """Return each rank's positions in a tensor that is cut in one dim; None where the shapes do not add up."""
    if any(len(local) != len(shape) for local in local_shapes):
        return None
    cut = [dim for dim, sizes in enumerate(zip(shape, *local_shapes, strict=True)) if len(set(sizes)) > 1]
    if len(cut) != 1 or sum(local[cut[0]] for local in local_shapes) != shape[cut[0]]:
        return None
    positions = torch.arange(prod(shape)).reshape(shape)
    return torch.split(positions, [local[cut[0]] for local in local_shapes], dim=cut[0])


def _parameters_of(layer: Any) -> dict[str, Any]:
    parameters = {name: getattr(layer, name, None) for name in ("weight", "bias")}
    return {name: parameter for name, parameter in parameters.items() if parameter is not None}


def _local_shapes(layer: Any) -> Shapes:
    return {name: local_shape(parameter) for name, parameter in _parameters_of(layer).items()}


def _layer_layouts(layer: Any, shapes_by_rank: Sequence[Shapes], tp_rank: int) -> dict[str, Layout | None]:
    """Return the layouts of a layer's weight and bias, None where the layer cannot gather them.

    Args:
        shapes_by_rank: The shapes of each rank's shards.
    """
    present, own_shapes = _parameters_of(layer), shapes_by_rank[tp_rank]
    with restored_data(present.values()):
        for name, parameter in present.items():
            sizes = [prod(shapes[name]) for shapes in shapes_by_rank]
            start = sum(sizes[:tp_rank])
            # float64, since the data of a parameter must be floating point: exact below 2**53 elements
            positions = torch.arange(start, start + sizes[tp_rank], dtype=torch.float64, device=parameter.device)
            parameter.data = positions.reshape(own_shapes[name])
        try:
            layer.gather_params(list(present.values()))  # before 0.19 a None in the place of a bias crashes
        except RuntimeError:  # fused blocks that interleave: DeepSpeed trains them but no rank can reassemble them
            return dict.fromkeys(present)
        gathered = {name: parameter.data.clone() for name, parameter in present.items()}
    return {
        name: _layout(source.to(torch.int64), tuple(shapes[name] for shapes in shapes_by_rank))
        for name, source in gathered.items()
    }


def _layout(source: torch.Tensor, local_shapes: tuple[tuple[int, ...], ...]) -> Layout:
    is_replicated = all(shape == tuple(source.shape) for shape in local_shapes)
    return Layout(tuple(source.shape), local_shapes, None if is_replicated else source.reshape(-1).cpu())


def ways_to_resume(engine: Any) -> Mapping[str, WayToResume]:
    """Return the ways to save a training and go on from it, by the names that users know."""
    save, load = partial(_save_training, engine), partial(_load_training, engine)
    ways = {"save_checkpoint": WayToResume(save, load, other_sizes=("dp",))}
    if engine.zero_optimization() and "adam" in type(_inner_optimizer(engine)).__name__.lower():
        ways["universal checkpoint"] = WayToResume(
            partial(_save_universal, engine),
            partial(_load_training, engine, tag="universal"),
            config={"checkpoint": {"load_universal": True}},
            other_sizes=("tp", "dp", "zero"),
        )  # ds_to_universal converts only Adam's states
    return ways


def _inner_optimizer(engine: Any) -> Any:
    """Return the torch optimizer inside DeepSpeed's."""
    optimizer = engine.optimizer
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def _save_training(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(str(folder))


def _load_training(engine: Any, folder: Path, tag: str | None = None) -> None:
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise RuntimeError("load_checkpoint returned no path: it has loaded nothing")


_WEIGHTS = "pytorch_model.bin"


def ways_to_save(engine: Any) -> Mapping[str, Callable[[Path], None]]:
    """Return the ways to save by the names that users know; each is collective over the world."""
    gathers = engine.autotp_size() > 1 or engine.zero_optimization_partition_weights()
    is_sharded_by_tp_alone = engine.autotp_size() > 1 and not engine.zero_optimization_partition_weights()
    return {
        "save_16bit_model": lambda folder: engine.save_16bit_model(str(folder), save_filename=_WEIGHTS),
        **({"consolidated state dict": partial(_save_consolidated, engine)} if gathers else {}),
        **({"GatherReplacedLayerParams": partial(_save_gathered, engine)} if is_sharded_by_tp_alone else {}),
        "save_checkpoint": lambda folder: engine.save_checkpoint(str(folder)),
        **({"universal checkpoint": partial(_save_universal, engine)} if engine.zero_optimization() else {}),
    }


def _save_consolidated(engine: Any, folder: Path) -> None:
    """Save what accelerate's `get_state_dict` returns, which transformers' Trainer saves, too."""
    state = engine._consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        torch.save(dict(state), folder / _WEIGHTS)


def _save_gathered(engine: Any, folder: Path) -> None:
    """Save as `docs/guides/gather.md` says."""
    names = set(engine.module.state_dict())
    state: dict[str, torch.Tensor] = {}
    for prefix, module in engine.module.named_modules():
        own = dict(module.named_parameters(prefix, recurse=False)) | dict(module.named_buffers(prefix, recurse=False))
        with GatherReplacedLayerParams(list(module.parameters(recurse=False)), module):
            state |= {name: tensor.detach().cpu().clone() for name, tensor in own.items() if name in names}
    if dist.get_rank() == 0:
        torch.save(state, folder / _WEIGHTS)


def _save_universal(engine: Any, folder: Path) -> None:
    training, universal = folder / "training", folder / "universal"
    engine.save_checkpoint(str(training), tag="step")
    dist.barrier()
    if dist.get_rank() == 0:
        from deepspeed.checkpoint import ds_to_universal

        for file in (training / "step").glob("*_optim_states.pt"):
            _add_adam_state(file)
        folders = {"input_folder": str(training / "step"), "output_folder": str(universal)}
        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        flags = {"keep_temp_folder": False, "strict": True, "inject_missing_state": False}
        ds_to_universal.main(Namespace(**folders, **workers, **flags))  # as its command line parses them


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

    def __init__(
        self, engine: Any, topology: Topology, accumulate: int = 1, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        self.engine = engine
        self.module: nn.Module = engine.module
        self._topology = topology
        self._accumulate = accumulate
        self._shapes = dict(shapes or {})
        self._num_backward = 0
        self._num_skipped = 0
        self._norm: float | None = None
        self._state_names: StateNames | None = None  # of the last step; None where the steps are not taken here

    def group_ranks(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        dp = {"dp": distinct_ranks([self.engine.seq_data_parallel_group])}
        if self._topology.tp == 1:  # DeepSpeed makes no TP group
            return dp
        layer_groups = [layer.mp_group for _, layer in parallel_layers(self.module) if layer.mp_group is not None]
        return {"tp": distinct_ranks([groups.get_tensor_model_parallel_group(), *layer_groups]), **dp}

    def layouts(self) -> dict[str, Layout]:
        if self._topology.tp == 1:
            parameters = self.module.named_parameters()
            return {name: Layout.replicated(local_shape(parameter), tp=1) for name, parameter in parameters}
        group = groups.get_tensor_model_parallel_group()
        return {**parameter_layouts(self.module, group), **unmarked_layouts(self.module, group, self._shapes)}

    def parameter(self, name: str) -> torch.Tensor:
        parameter = self.module.get_parameter(name)
        if not hasattr(parameter, "ds_id"):  # not partitioned by ZeRO-3
            return parameter.detach().clone()
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def gradient(self, name: str) -> torch.Tensor | None:
        gradient = safe_get_full_grad(self.module.get_parameter(name))
        if gradient is None:
            return None
        scale, gradient = self.loss_scale(), gradient.detach()
        unscaled: torch.Tensor = gradient.clone() if scale == 1 else gradient.float() / scale
        return unscaled

    def loss_scale(self) -> float:
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0))

    def has_skipped(self) -> bool:
        before, self._num_skipped = self._num_skipped, self.engine.skipped_steps
        return self._num_skipped > before

    def forward(self, batch: Mapping[str, Any]) -> Any:
        return self.engine(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)  # which divides it by gradient_accumulation_steps
        self._num_backward += 1
        if self._num_backward % self._accumulate:
            self.engine.step()  # counts the micro-batch; the one at the boundary takes the step

    def step(self) -> None:
        self._state_names = {}
        scale = self.loss_scale()
        with observed_clipping() as norms:
            self.engine.step()
        norm = norms[-1] if norms else self.engine.get_global_grad_norm()
        is_known = norm is not None and not steps_by_muon_under_zero(self.engine)  # which tells that of the updates
        self._norm = self._unscaled_norm(norm, scale) if is_known else None

    def gradient_norm(self) -> float | None:
        return self._norm

    def _unscaled_norm(self, norm: Any, scale: float) -> float:
        """Return the norm that gradients are clipped by: without ZeRO the engine tells that of scaled ones.

        See `unscale_and_clip_grads` in runtime/fp16/unfused_optimizer.py of 0.19.8.
        """
        return float(norm) / (scale if hasattr(self.engine.optimizer, "fp32_groups") else 1.0)

    def optimizer_state(self, name: str) -> Mapping[str, torch.Tensor]:
        return optimizer_state(self.engine, self.module.get_parameter(name), self._state_names)

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        return ways_to_save(self.engine)

    def ways_to_resume(self) -> Mapping[str, WayToResume]:
        return ways_to_resume(self.engine)

    def trained(self) -> tuple[Any, Any]:
        return self.engine, None

    def counters(self) -> Mapping[str, Any]:
        return {STEPS_TAKEN: self.engine.global_steps, "steps skipped": self.engine.skipped_steps}


def optimizer_state(engine: Any, parameter: Any, known_names: StateNames | None = None) -> dict[str, torch.Tensor]:
    """Return copies of the states of a parameter that have its shape, gathered over DP. Collective over its group.

    Args:
        known_names: What states there are, by the ranks of the group; grows by those that are gathered.
    """
    optimizer = engine.optimizer
    is_low_precision = parameter.dtype in LOW_PRECISION
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        _link_states_of_all_groups(optimizer)
        # Under Muon parameters have states of other names, and DeepSpeed raises where it is asked for one that is not.
        names: list[str] = []
        if not steps_by_muon_under_zero(engine):
            group = getattr(parameter, "ds_process_group", None) or parameter._dp_group
            known_names, ranks = {} if known_names is None else known_names, tuple(dist.get_process_group_ranks(group))
            if ranks not in known_names:
                known_names[ranks] = _state_names(optimizer, group)
            names = known_names[ranks]
        states = {name: safe_get_full_optimizer_state(parameter, name) for name in names}
        if is_low_precision:
            states["master"] = safe_get_full_fp32_param(parameter)
        shape = local_shape(parameter)
        return {name: value.detach().reshape(shape).clone() for name, value in states.items() if value is not None}
    if isinstance(optimizer, torch.optim.Optimizer):
        return {name: value.clone() for name, value in states_like(parameter, optimizer).items()}
    if not hasattr(optimizer, "fp32_groups"):  # else FP16_UnfusedOptimizer
        return {}  # ZeRO, of which the parameter is no part: it is frozen
    for group, copies in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=False):
        for known, copy in zip(group, copies, strict=True):
            if known is parameter:
                return {"master": copy.detach().clone(), **states_like(copy, optimizer.optimizer)}
    return {}


def steps_by_muon_under_zero(engine: Any) -> bool:
    """Return whether ZeRO orthogonalises gradients before it clips them."""
    return bool(engine.zero_optimization() and engine.optimizer_name() == "muon")


def _link_states_of_all_groups(optimizer: Any) -> None:
    """Link the states of every group to the parameters, by which `safe_get_full_optimizer_state` finds them.

    ZeRO 1 and 2 of DeepSpeed 0.19.8 link once, when the first group has stepped and the others have no states yet
    (`_optimizer_step` in stage_1_and_2.py).
    """
    if hasattr(optimizer, "_hp_optimizer_states_linked") and len(optimizer.optimizer.param_groups) > 1:
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _state_names(optimizer: Any, group: Any) -> list[str]:
    """Return the names of the states with an element for each of a partition's, over a DP group. Collective over it."""
    inner = optimizer.optimizer
    names = {
        name
        for stepped, state in inner.state.items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() and value.shape == stepped.shape
    }
    by_rank: list[set[str]] = [set() for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(by_rank, names, group=group)
    return sorted(set().union(*by_rank))


@contextmanager
def observed_clipping() -> Iterator[list[Any]]:
    """Collect the norms that `clip_grad_norm_` returns: at ZeRO 0 in float32 and float64 the engine discards them."""
    norms: list[Any] = []
    clip = engine_module.clip_grad_norm_

    def observed(*args: Any, **kwargs: Any) -> Any:
        norms.append(clip(*args, **kwargs))
        return norms[-1]

    with patch.object(engine_module, "clip_grad_norm_", observed):
        yield norms
