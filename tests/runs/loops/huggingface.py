"""Training loops of models of transformers: its own tensor parallelism, DTensor plans, FSDP2, adapters."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional

from tests.runs.loops.hand_written import VOCABULARY, Training
from tests.runs.loops.loop import Weights
from tpcheck.backends.dtensor.candidate import clip_by_mesh

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class CausalTraining(Training):
    """A small model of transformers, unsharded.

    In float64 the loss is taken of the logits: the model's own rounds them to float32.
    """

    family = "llama"
    layers = 2
    tied = False
    kv_heads = 2
    attention = "eager"
    deviation = 0.1

    def build(self) -> nn.Module:
        model = self.unsharded()
        if self.compiled:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        return model

    def unsharded(self) -> Any:
        """Return the model of one process."""
        torch.manual_seed(self.model_seed)
        config, model_class = self.config_and_class()
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * self.deviation)
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.dtype)  # buffers stay float32, as from_pretrained leaves them
        return model

    def config_and_class(self) -> tuple[Any, Any]:
        options = {
            **SIZES,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "tie_word_embeddings": self.tied,
        }
        options["attn_implementation"] = self.attention
        if self.family == "qwen3":
            from transformers import Qwen3Config, Qwen3ForCausalLM

            return Qwen3Config(**options, head_dim=4), Qwen3ForCausalLM
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaConfig(**options), LlamaForCausalLM

    def make_optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        options = {"foreach": False, **dict(self.optimizer_options)}  # replicas and DTensors in one group
        return getattr(torch.optim, self.optimizer)(parameters, **options)  # type: ignore[no-any-return]

    def labels(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self.precision():
            if self.dtype is not torch.float64:
                return self.wrapped(input_ids=tokens, labels=labels).loss  # type: ignore[no-any-return]
            logits_BLV = self.wrapped(input_ids=tokens).logits
            return functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def clip_gradients(self) -> None:
        if self.clip is not None:
            clip_by_mesh(list(self.model.parameters()), self.clip)

    def weights(self) -> Weights:
        return {name: whole(parameter.detach()).clone() for name, parameter in self.parameters().items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class TransformersTp(CausalTraining):
    """transformers' tensor parallelism: saved, and loaded with a distributed configuration."""

    plan: tuple[tuple[str, str], ...] = ()

    def unsharded(self) -> Any:
        model = super().unsharded()
        if self.run.rank.world_size == 1:
            return model
        sharded = self.load_sharded(model)
        sharded.train()
        return sharded

    def load_sharded(self, model: Any) -> Any:
        from transformers.distributed import DistributedConfig

        folders = [tempfile.mkdtemp() if self.run.rank.rank == 0 else ""]
        dist.broadcast_object_list(folders)
        model.save_pretrained(folders[0])
        dist.barrier()
        config = DistributedConfig(tp_size=self.run.tp, fsdp_size=self.run.dp, **self.plan_override(model))
        sharded = type(model).from_pretrained(
            folders[0], dtype=self.dtype, distributed_config=config, attn_implementation=self.attention
        )
        dist.barrier()
        if self.run.rank.rank == 0:
            shutil.rmtree(folders[0])
        return sharded

    def plan_override(self, model: Any) -> dict[str, Any]:
        return {"tp_plan": dict(self.plan)} if self.plan else {}

    def reduce_gradients(self) -> None:
        """FSDP2 has, and transformers' hooks."""


class HeadNormsReducedAtOnce(TransformersTp):
    """qwen3 whose q_norm and k_norm sum each incoming gradient over the TP group."""

    family = "qwen3"
    plan = (
        ("model.layers.*.self_attn.q_norm", "replicate"),
        ("model.layers.*.self_attn.k_norm", "replicate"),
    )

    def start(self) -> None:
        if self.run.tp > 1:
            for name, parameter in self.model.named_parameters():
                if "q_norm" in name or "k_norm" in name:
                    parameter.register_hook(self.sum_over_tp)


class Generating(TransformersTp):
    """Generates under no_grad between micro-batches and steps."""

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        self.model.eval()
        with torch.no_grad():
            self.model.generate(self.tokens(9)[:2], max_new_tokens=3, do_sample=False)
        self.model.train()


class TransformersTpAutocast(TransformersTp):
    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16)


DTENSOR_PLAN = {
    "model.embed_tokens": "embedding",
    "model.layers.*.self_attn.q_proj": "column",
    "model.layers.*.self_attn.k_proj": "column",
    "model.layers.*.self_attn.v_proj": "column",
    "model.layers.*.self_attn.o_proj": "row",
    "model.layers.*.mlp.gate_proj": "column",
    "model.layers.*.mlp.up_proj": "column",
    "model.layers.*.mlp.down_proj": "row",
    "lm_head": "head",
}


class CompiledModel(TransformersTp):
    """`model.compile()`, which compiles the whole call and leaves the module as it is."""

    def start(self) -> None:
        self.model.compile(backend="aot_eager")


class DTensorTp(CausalTraining):
    """`parallelize_module` over TP, `fully_shard` of each layer and the model over DP."""

    sequence_layout = False

    def unsharded(self) -> Any:
        model = super().unsharded()
        if self.run.rank.world_size == 1:
            return model
        mesh = init_device_mesh("cpu", (self.run.dp, self.run.tp), mesh_dim_names=("dp", "tp"))
        if self.run.tp > 1:
            parallelize_module(model, mesh["tp"], self.styles(), src_data_rank=None)
        if self.run.dp > 1:
            self.shard_over_dp(model, mesh["dp"])
        return model

    def styles(self) -> dict[str, Any]:
        styles = {
            "embedding": RowwiseParallel(input_layouts=Replicate()),
            "column": ColwiseParallel(),
            "row": RowwiseParallel(),
            "head": ColwiseParallel(output_layouts=Replicate()),
        }
        return {pattern: styles[style] for pattern, style in DTENSOR_PLAN.items()}

    def shard_over_dp(self, model: Any, mesh: Any) -> None:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def reduce_gradients(self) -> None:
        """FSDP2 has."""


class SyncsAtTheLast(DTensorTp):
    """FSDP2 reduces the gradients with the last micro-batch alone, and keeps those of others to itself."""

    def backward(self, loss: torch.Tensor) -> None:
        if self.run.dp > 1:
            self.model.set_requires_gradient_sync(self.micro_batch == self.accumulate - 1)
        super().backward(loss)


class WholeBatchOnEachReplica(DTensorTp):
    """Each replica trains on the whole batch: the mean of equal gradients is what one process has."""

    def micro_batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        tokens = self.tokens(step)
        return [(part, self.labels(part)) for part in tokens.chunk(self.accumulate)]


class DTensorSequence(Training):
    """The model written by hand, under torch's sequence-parallel styles."""

    def shard(self, model: Any) -> None:
        mesh = init_device_mesh("cpu", (self.run.tp,), mesh_dim_names=("tp",))
        plan = {
            "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "blocks.*.norm": SequenceParallel(use_local_output=True),
            "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
            "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
            "norm": SequenceParallel(use_local_output=True),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh, plan, src_data_rank=None)

    def weights(self) -> Weights:
        return {name: whole(parameter.detach()).clone() for name, parameter in self.parameters().items()}


class Adapters(TransformersTp):
    """PEFT's LoRA adapters on the attention projections of a model that transformers has sharded."""

    targets = ("q_proj", "v_proj")

    def build(self) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        model = super().build()
        torch.manual_seed(5)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=list(self.targets), task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    values = torch.randn(parameter.shape, generator=generator).to(self.dtype) * 0.2
                    if isinstance(parameter.data, DTensor):
                        mesh, placements = parameter.data.device_mesh, parameter.data.placements
                        values = distribute_tensor(values, mesh, placements, src_data_rank=None)
                    parameter.data = parameter.data.to(self.dtype).copy_(values)
        return adapted


class WithAccelerate(CausalTraining):
    """accelerate's loop over replicas: `prepare`, `accumulate`, `backward`, `clip_grad_norm_`."""

    def wrap(self, model: nn.Module) -> Any:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.accumulate)
        return self.accelerator.prepare_model(model)

    def make_optimizers(self) -> list[torch.optim.Optimizer]:
        self.plain_optimizers = super().make_optimizers()
        return [self.accelerator.prepare_optimizer(self.plain_optimizers[0])]

    def train_step(self, step: int) -> None:
        optimizer = self.optimizers[0]
        for tokens, labels in self.micro_batches(step):
            with self.accelerator.accumulate(self.wrapped):
                self.accelerator.backward(self.loss(tokens, labels))
                if self.clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
                optimizer.step()
                optimizer.zero_grad()
