"""Shards a model with DeepSpeed AutoTP and makes it trainable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from packaging.version import Version
from torch import nn

from tpcheck.backends.deepspeed.candidate import DeepSpeedCandidate, parallel_layers, parameter_layouts
from tpcheck.backends.deepspeed.config import CONFIG_VARIANTS, deepspeed_config, resolved
from tpcheck.backends.initialisation import BUILT_THEN_SHARDED, built_then_sharded
from tpcheck.backends.interface import Candidate, LayerTable, RankLike, TrainingOptions, WayToInitialise
from tpcheck.backends.layout import Layout
from tpcheck.backends.local_part import local_shape
from tpcheck.backends.optimizer import OptimizerByNames, make_optimizer
from tpcheck.core.errors import BackendError


@contextmanager
def without_plan(model: nn.Module) -> Iterator[None]:
    """Hide the tp_plans of `model`, its submodules, their classes and configurations, so that heuristics shard it."""
    with ExitStack() as stack:
        for module in model.modules():
            config = getattr(module, "config", None)
            for owner, name in ((module, "_tp_plan"), (type(module), "_tp_plan"), (config, "base_model_tp_plan")):
                if getattr(owner, name, None) is not None:
                    stack.enter_context(patch.object(owner, name, None))
        yield


class DeepSpeedBackend:
    """AutoTP through `tensor_parallel.autotp_size`."""

    name = "deepspeed"

    def versions(self) -> dict[str, str]:
        return {"deepspeed": deepspeed.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        return resolved(options)

    def config_variants(self) -> Sequence[Mapping[str, Any]]:
        return CONFIG_VARIANTS

    def layer_table(self) -> LayerTable:
        from tpcheck.backends.deepspeed.layer_table import layer_table  # imports names that other versions lack

        return layer_table()

    @contextmanager
    def session(self, options: TrainingOptions) -> Iterator[None]:
        with ExitStack() as stack:
            if options.dtype is torch.float64:
                stack.enter_context(_float64_allowed())
            if options.dtype is torch.float16:
                stack.enter_context(_float16_allowed())
            stack.enter_context(_device_of_the_cpu())
            if isinstance(options.optimizer, OptimizerByNames):  # Muon's kernels are compiled, for seconds
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if options.loop == "trainer":
                from tpcheck.backends.trainer_loop.stand_ins import trainer_session  # imports the Trainer, for seconds

                stack.enter_context(trainer_session())
            yield

    def layouts_of(self, model: nn.Module) -> Mapping[str, Layout]:
        group = next((layer.mp_group for _, layer in parallel_layers(model) if layer.mp_group is not None), None)
        return {} if group is None else parameter_layouts(model, group)

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        config = deepspeed_config(options, rank.topology.tp, _hidden_size(model))
        shapes = {name: local_shape(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
        with without_plan(model) if options.ignore_plan else nullcontext():
            if options.loop == "trainer":
                from tpcheck.backends.deepspeed.trainer import TrainerCandidate

                return TrainerCandidate(model, config, rank.topology, options, shapes)
            with _naming_lost_parameters(model):
                engine = self._engine(model, config, rank, options)
        return DeepSpeedCandidate(engine, rank.topology, options.accumulate, shapes)

    def ways_to_initialise(
        self, build: Callable[[], nn.Module], rank: RankLike, options: TrainingOptions
    ) -> Mapping[str, WayToInitialise]:
        return {BUILT_THEN_SHARDED: built_then_sharded(self, build, rank, options)}

    def _engine(self, model: nn.Module, config: dict[str, Any], rank: RankLike, options: TrainingOptions) -> Any:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if "optimizer" in config:  # DeepSpeed makes it
            return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
        return deepspeed.initialize(model=model, optimizer=make_optimizer(options, parameters), config=config)[0]


def _hidden_size(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "hidden_size", None)
    return size if isinstance(size, int) else None


@contextmanager
def _naming_lost_parameters(model: nn.Module) -> Iterator[None]:
    """Name the trained parameters that AutoTP has dropped, where ZeRO then fails on them.

    deepspeed 0.19.8 drops an adapter's parameters with their layer. ZeRO 1 and 2 look up the name of every parameter of
    the optimizer in the model (a KeyError that holds the parameter's numbers), ZeRO 3 its part (an AttributeError).
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    try:
        yield
    except (KeyError, AttributeError) as error:
        left = {name for name, _ in model.named_parameters()}
        lost = [name for name in trained if name not in left]
        if not lost:
            raise
        raise BackendError(
            f"deepspeed, sharding the model: AutoTP has replaced the layers of {len(lost)} trained parameters, which "
            f"the sharded model lacks ({lost[0]} is the first), and ZeRO fails on them ({type(error).__name__}). ZeRO "
            "stage 0 trains without them, silently."
        ) from error


class TpModelInitBackend(DeepSpeedBackend):
    """AutoTP through `deepspeed.tp_model_init`, the older entry point."""

    name = "deepspeed-tp-model-init"

    def _engine(self, model: nn.Module, config: dict[str, Any], rank: RankLike, options: TrainingOptions) -> Any:
        # The config keeps its autotp_size, as under transformers' Trainer. deepspeed 0.19.8 takes no tp_group here: it
        # then fails to print its config ("ProcessGroup is not JSON serializable").
        deepspeed.init_distributed(verbose=False)  # in deepspeed 0.17 `initialize` calls it too late for tp_model_init
        model = deepspeed.tp_model_init(model, tp_size=rank.topology.tp, dtype=options.dtype)
        return super()._engine(model, config, rank, options)


@contextmanager
def _float64_allowed() -> Iterator[None]:
    """Let DeepSpeed train in float64 on any accelerator.

    - The engine asserts that the accelerator supports the dtype of every gradient.
    - It makes norms with the accelerator's legacy constructor, which does not follow torch's default dtype.
    - ZeRO 3 asserts that the dtype of `zero.Init` is half, bfloat16 or float. It replaces the dtype by bfloat16 where
      the accelerator has no float16, so the assertion passes on most CPUs and fails on GPUs and on CPUs with
      AVX512-FP16 (https://github.com/deepspeedai/DeepSpeed/pull/8428). Existing parameters keep their dtype: only
      parameters created inside `zero.Init`, and buffers for NVMe, follow it.
    """
    accelerator = deepspeed.get_accelerator()
    supported = accelerator.supported_dtypes()
    set_dtype = InsertPostInitMethodToModuleSubClasses._set_dtype

    def set_dtype_or_float(init: Any, ds_config: Any, dtype: torch.dtype | None) -> None:
        if dtype is torch.float64:
            init.dtype = torch.float32
        else:
            set_dtype(init, ds_config, dtype)

    with (
        patch.object(accelerator, "supported_dtypes", lambda: [*supported, torch.float64]),
        patch.object(type(accelerator), "FloatTensor", torch.DoubleTensor),
        patch.object(InsertPostInitMethodToModuleSubClasses, "_set_dtype", set_dtype_or_float),
    ):
        yield


@contextmanager
def _float16_allowed() -> Iterator[None]:
    """Let DeepSpeed train in float16 where its accelerator says that the device does not support it.

    A CPU supports it by DeepSpeed's count where oneDNN does, which needs AVX512-FP16 (`is_fp16_supported` in
    accelerator/cpu_accelerator.py of 0.19.8). torch computes in float16 on every CPU, by kernels of its own: slower, of
    the same rounding, on both sides. Nothing else hangs on the answer but the dtype of what ZeRO 3 makes
    anew, which is bfloat16 without it: with it, it is what a GPU has.
    """
    with patch.object(deepspeed.get_accelerator(), "is_fp16_supported", lambda: True):
        yield


@contextmanager
def _device_of_the_cpu() -> Iterator[None]:
    """Make the CPU accelerator return a device that torch knows, in place of the text of LOCAL_RANK.

    Before 0.18 DeepSpeed asks for it when it checks the first batch.
    """
    if Version(deepspeed.__version__) >= Version("0.18"):
        yield
        return
    accelerator = deepspeed.get_accelerator()
    with patch.object(accelerator, "current_device", accelerator.current_device_name):
        yield
