"""Gradients, weights and states of every kind of optimizer, put together from all ranks, are the unsharded run's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.backends import hand_made
from tests.runs.assembled import Parts, assembled, assert_same, steps_of
from tpcheck import Rank, UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.core.placement import Shard
from tpcheck.numerics.sketch import GlobalIndex
from tpcheck.runs.optimizer_view import view_of
from tpcheck.runs.optimizers.names import unwrapped, unwrapped_name, unwrapped_names


def built(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = hand_made.Model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return model


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def batch(dp_rank: int, step: int) -> torch.Tensor:
    return hand_made.tokens({"dp": dp_rank}, step)["tokens"]


def train(model: nn.Module, optimizer: Any, dp_ranks: Any, step: int, *, clip: float = 0.0) -> None:
    """Take a step on the mean of the replicas' losses."""
    for dp_rank in dp_ranks:
        (model(batch(dp_rank, step)) / len(dp_ranks)).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def expected_steps(
    rank: Rank,
    model: nn.Module,
    make: Callable[[Any], Any] = adamw,
    train_step: Callable[..., None] = train,
    **how: Any,
) -> list[Parts]:
    """Return the steps of an unsharded run on the batches of all replicas."""
    optimizer = make(model.parameters())
    view = view_of(model, optimizer, groups=alone())
    return steps_of(view, lambda step: train_step(model, optimizer, range(rank.topology.dp), step, **how))


def alone() -> Any:
    from tpcheck.backends.live_groups import LiveGroups

    return LiveGroups(0, (0,), (0,), "one rank")


def groups_of(rank: Rank) -> Any:
    from tpcheck.backends.live_groups import live_groups

    return live_groups(topology=rank.topology)


def assert_whole(rank: Rank, steps: list[Parts], expected: list[Parts], layouts: Any = None, **how: Any) -> None:
    for parts, unsharded in zip(steps, expected, strict=True):
        whole = {(part.kind, part.name, part.state): part.values.double() for part in unsharded}
        assert_same(assembled(rank, parts, layouts), whole, **how)


def shard_of(placement: Shard, shape: tuple[int, ...], tp_rank: int) -> GlobalIndex:
    return GlobalIndex.shard(shape, placement, 2, tp_rank)


# --- one process


def test_a_plain_optimizer_is_viewed_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": [model[0].weight], "lr": 0.5}, {"params": model[1].parameters()}], betas=(0.8, 0.9)
    )
    view = view_of(model)
    assert view.stepping == ()
    model(torch.ones(1, 3)).sum().backward()
    model[1].bias.grad = None
    assert view.owns(optimizer)
    assert [part.name for part in view.gradients(optimizer)] == ["0.weight", "1.weight"]
    gradient = next(view.gradients())
    assert gradient.values.data_ptr() == model[0].weight.grad.data_ptr()
    assert gradient.index == GlobalIndex.whole((2, 3))
    optimizer.step()
    assert [part.name for part in view.weights()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    states = [(part.name, part.state, tuple(part.values.shape)) for part in view.states()]
    assert states == [
        (name, state, shape if state != "step" else ())
        for name, shape in (("0.weight", (2, 3)), ("1.weight", (1, 2)))
        for state in ("step", "exp_avg", "exp_avg_sq")
    ]
    first, second = view.groups()
    assert (first.optimizer, first.parameters, second.parameters) == ("AdamW", ("0.weight",), ("1.weight", "1.bias"))
    assert (first.options["lr"], second.options["lr"]) == (0.5, 0.001)
    assert first.options["betas"] == (0.8, 0.9)
    assert "params" not in first.options


def test_optimizers_of_other_models_are_not_owned() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    view = view_of(model)
    assert not view.owns(torch.optim.SGD(other.parameters()))
    optimizers = [torch.optim.SGD([model.weight]), torch.optim.Adam([model.bias])]
    assert all(map(view.owns, optimizers))
    assert view.stepping == tuple(optimizers)


def test_several_optimizers_are_viewed_one_by_one() -> None:
    model = nn.Linear(2, 2)
    weight, bias = torch.optim.SGD([model.weight], lr=1.0), torch.optim.Adam([model.bias])
    view = view_of(model, [weight, bias])
    model(torch.ones(1, 2)).sum().backward()
    assert [part.name for part in view.gradients(bias)] == ["bias"]
    assert [group.optimizer for group in view.groups()] == ["SGD", "Adam"]
    assert not view.owns(torch.optim.SGD(model.parameters()))


def test_an_optimizer_without_a_parameter_of_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="an optimizer of this model's parameters"):
        view_of(nn.Linear(2, 2), torch.optim.SGD(nn.Linear(2, 2).parameters()))


def test_a_tied_parameter_has_the_first_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert [part.name for part in view_of(model).weights()] == ["0.weight", "0.bias", "1.bias"]


def test_sparse_gradients_are_dense() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    view = view_of(model, torch.optim.SparseAdam(model.parameters()))
    model(torch.tensor([1, 1])).sum().backward()
    (gradient,) = view.gradients()
    assert gradient.values.tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_under_a_grad_scaler_are_those_of_the_loss(fused: bool) -> None:
    """A fused optimizer gets them scaled, with the scale; others get them unscaled."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    view = view_of(model)

    def step(_: int) -> None:
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    (gradient,) = (part for part in steps_of(view, step, 1)[0] if part.kind == "gradient")
    assert gradient.scale == (1 / 1024 if fused else 1.0)
    assert (gradient.values * gradient.scale).tolist() == [[1.0, 1.0]]


def test_factored_moments_have_no_place_in_the_parameter() -> None:
    model = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.Adafactor(model.parameters())
    view = view_of(model, optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    indices = {part.state: part.index for part in view.states()}
    assert indices["row_var"] is None
    assert indices["step"] == GlobalIndex.whole(())


def test_wrappers_are_stripped_from_models_and_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    compiled = torch.compile(model)
    assert unwrapped(compiled) is model
    assert [part.name for part in view_of(compiled).weights()] == ["0.weight", "0.bias"]
    assert unwrapped_name("module.module._orig_mod.a._fsdp_wrapped_module.b") == "a.b"
    assert unwrapped_name("a.module.b") == "a.module.b"
    assert unwrapped_names(["module.a", "a", "b"]) == {"module.a": "module.a", "a": "a", "b": "b"}
    with pytest.raises(UsageError, match=r"a torch.nn.Module or an engine"):
        unwrapped(3)


def test_a_model_of_peft_has_its_adapters_and_the_frozen_base() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"], r=2))
    view = view_of(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    model(torch.ones(1, 4)).sum().backward()
    assert [part.name for part in view.weights()] == [
        "0.base_layer.weight",
        "0.base_layer.bias",
        "0.lora_A.default.weight",
        "0.lora_B.default.weight",
    ]
    assert [part.name for part in view.gradients()] == ["0.lora_A.default.weight", "0.lora_B.default.weight"]


# --- torch on several ranks


@pytest.mark.tpcheck(tp=2, dp=2)
def test_hand_made_layers_in_distributed_data_parallel(tp_rank: Rank) -> None:
    expected = expected_steps(tp_rank, built())
    model = built()
    hand_made.shard(model, tp_rank)
    ddp = nn.parallel.DistributedDataParallel(model, process_group=tp_rank.group("dp"))
    optimizer = adamw(ddp.parameters())
    view = view_of(ddp, groups=groups_of(tp_rank))
    steps = steps_of(view, lambda step: train(ddp, optimizer, [tp_rank.dp_rank], step))
    assert all(part.index is None for part in steps[0] if part.values.dim())  # nobody knows what these layers cut
    layouts = {}
    for number in range(2):
        up, down = f"layers.{number}.up", f"layers.{number}.down"
        layouts[f"{up}.weight"] = partial(shard_of, Shard(0), (hand_made.HIDDEN, hand_made.WIDTH))
        layouts[f"{up}.bias"] = partial(shard_of, Shard(0), (hand_made.HIDDEN,))
        layouts[f"{down}.weight"] = partial(shard_of, Shard(1), (hand_made.WIDTH, hand_made.HIDDEN))
    assert_whole(tp_rank, steps, expected, layouts)


def parallelized(mesh: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = built()
    plan = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    return parallelize_module(model, mesh, plan, src_data_rank=None)


@pytest.mark.tpcheck(tp=2)
def test_dtensors(tp_rank: Rank) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    expected = expected_steps(tp_rank, built(), clip=0.5)
    model = parallelized(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    optimizer = adamw(model.parameters())
    view = view_of(model, optimizer, groups=groups_of(tp_rank))
    steps = steps_of(view, lambda step: train_clipped_by_mesh(model, optimizer, 0, step, 0.5))
    assert_whole(tp_rank, steps, expected)


def train_clipped_by_mesh(model: nn.Module, optimizer: Any, dp_rank: int, step: int, clip: float) -> None:
    from tpcheck.backends.dtensor.candidate import clip_by_mesh

    model(batch(dp_rank, step)).backward()
    clip_by_mesh(list(model.parameters()), clip)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.tpcheck(tp=2)
def test_gradients_with_other_placements_than_their_weight(tp_rank: Rank) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as ShardedOver

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    full = torch.arange(12.0).reshape(4, 3)
    model = nn.Module()
    for name in ("term", "mean", "copy"):
        placements = [ShardedOver(0)]
        model.register_parameter(name, nn.Parameter(distribute_tensor(full, mesh, placements, src_data_rank=None)))
    terms = full / 4 if tp_rank.rank == 0 else full * 3 / 4
    model.term.grad = DTensor.from_local(terms, mesh, [Partial()])
    model.mean.grad = DTensor.from_local(terms * 2, mesh, [Partial("avg")])
    model.copy.grad = DTensor.from_local(full, mesh, [Replicate()])
    view = view_of(model, torch.optim.SGD(model.parameters()), groups=groups_of(tp_rank))
    gradients = list(view.gradients())
    assert [part.is_term for part in gradients] == [True, True, False]
    for tensor in assembled(tp_rank, gradients).values():
        assert torch.equal(tensor, full.double())


@pytest.mark.tpcheck(tp=1, dp=4)
def test_fsdp2_with_uneven_shards(tp_rank: Rank) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = expected_steps(tp_rank, odd())
    model = odd()
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model.parameters())
    view = view_of(model, optimizer, groups=groups_of(tp_rank))
    steps = steps_of(view, lambda step: train(model, optimizer, [tp_rank.dp_rank], step))
    assert_whole(tp_rank, steps, expected)


class Odd(nn.Sequential):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens).square().mean()


def odd() -> nn.Module:
    """Return a model whose sizes, and whose shards over two TP ranks, two ranks cannot halve."""
    torch.manual_seed(0)
    return Odd(nn.Embedding(hand_made.VOCABULARY, 5), nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 3)).double()


@pytest.mark.tpcheck(tp=2, dp=2)
@pytest.mark.parametrize("is_odd", [False, True])
def test_fsdp2_over_tp(tp_rank: Rank, is_odd: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    expected = expected_steps(tp_rank, odd() if is_odd else built())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    if is_odd:
        plan = {"1": ColwiseParallel(), "3": RowwiseParallel()}
        model = parallelize_module(odd(), mesh["tp"], plan, src_data_rank=None)
    else:
        model = parallelized(mesh["tp"])
    fully_shard(model[1] if is_odd else model.layers[0], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = adamw(model.parameters())
    view = view_of(model, optimizer, groups=groups_of(tp_rank))
    steps = steps_of(view, lambda step: train(model, optimizer, [tp_rank.dp_rank], step))
    assert_whole(tp_rank, steps, expected)
    norms = [part for part in steps[0] if part.index is None and part.values.dim()]
    assert all(part.index_in_shard is not None for part in norms)


@pytest.mark.tpcheck(tp=2)
def test_transformers_tp(tp_rank: Rank) -> None:
    """The gradient of the embedding is a whole one, its weight a shard."""
    pytest.importorskip("transformers.distributed")
    from tpcheck.backends.transformers.backend import distributed_config, save_and_load, sync_replicated_parameters

    expected = expected_steps(tp_rank, llama(), train_step=train_on_labels)
    config = distributed_config({}, tp_rank.topology)
    model = save_and_load(llama(), torch.float64, distributed_config=config)
    sync_replicated_parameters(model)
    optimizer = adamw(model.parameters())
    view = view_of(model, optimizer)
    steps = steps_of(view, lambda step: train_on_labels(model, optimizer, [0], step))
    assert_whole(tp_rank, steps, expected)
    embedding = [part for part in steps[0] if part.name == "model.embed_tokens.weight" and not part.state]
    rows = {part.kind: part.values.shape[0] for part in embedding}
    assert rows == {"gradient": hand_made.VOCABULARY, "weight": hand_made.VOCABULARY // 2}


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=hand_made.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double()


def train_on_labels(model: nn.Module, optimizer: Any, dp_ranks: Any, step: int) -> None:
    for dp_rank in dp_ranks:
        (model(input_ids=batch(dp_rank, step), labels=batch(dp_rank, step)).loss / len(dp_ranks)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.tpcheck(dp=2)
def test_an_optimizer_that_accelerate_prepared(tp_rank: Rank) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = expected_steps(tp_rank, built())
    model = built()
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, adamw(model.parameters()))
    view = view_of(model, optimizer)
    assert view.stepping == (optimizer.optimizer,)
    steps = steps_of(view, lambda step: train(model, optimizer, [tp_rank.dp_rank], step))
    assert_whole(tp_rank, steps, expected)


# --- DeepSpeed


def deepspeed_engine(rank: Rank, model: nn.Module, make: Callable[[Any], Any], config: dict[str, Any]) -> Any:
    import deepspeed

    from tpcheck.backends.deepspeed.config import merged

    defaults = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "tensor_parallel": {"autotp_size": rank.topology.tp, "partition_config": PARTITION},
        "steps_per_print": 1_000_000,
    }
    optimizer = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=merged(defaults, config))[0]


PARTITION = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.up\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.down\.weight$"], "partition_type": "row"},
        {"patterns": [r".*(norm|head|embed)\.weight$"], "partition_type": "skip"},
    ],
}


def zero(stage: int, **changes: Any) -> dict[str, Any]:
    persistence = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **persistence, **changes}}


def two_groups(parameters: Any) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() == 1]
    groups = [{"params": matrices, "lr": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def train_engine(engine: Any, dp_rank: int, step: int) -> None:
    engine.backward(engine(batch(dp_rank, step)))
    engine.step()


@pytest.mark.tpcheck(tp=2, dp=2)
@pytest.mark.parametrize(
    ("config", "make"),
    [
        (zero(0), adamw),
        (zero(1), two_groups),
        (zero(1, round_robin_gradients=True), adamw),
        (zero(2), two_groups),
        (zero(3), two_groups),
        (zero(3, sub_group_size=200), adamw),
    ],
    ids=["0", "1, two groups", "1, round robin", "2, two groups", "3, two groups", "3, sub-groups"],
)
def test_a_deepspeed_engine(tp_rank: Rank, config: dict[str, Any], make: Callable[[Any], Any]) -> None:
    pytest.importorskip("deepspeed")
    from tpcheck.backends.deepspeed.backend import _float64_allowed
    from tpcheck.numerics.precision import everything_in_float64

    clip = 0.5
    expected = expected_steps(tp_rank, built(), lambda parameters: make(list(parameters)), clip=clip)
    model = built()
    with _float64_allowed(), everything_in_float64():
        engine = deepspeed_engine(tp_rank, model, make, {**config, "gradient_clipping": clip})
        view = view_of(engine)
        steps = steps_of(view, lambda step: train_engine(engine, tp_rank.dp_rank, step))
    assert_whole(tp_rank, steps, expected)
    names = [group.parameters for group in view.groups()]
    assert sorted(name for group in names for name in group) == sorted({part.name for part in expected[0]})
    assert view.num_skipped() == 0
    assert not view.not_viewed()


ACCUMULATE = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}
BF16 = {**ACCUMULATE, "bf16": {"enabled": True}}
FP16 = {**ACCUMULATE, "fp16": {"enabled": True, "loss_scale": 128.0}}
FLOAT32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
FUSED = "fused"


@pytest.mark.tpcheck(tp=2, dp=2)
@pytest.mark.parametrize(
    ("config", "how"),
    [
        ({**BF16, **zero(0)}, ""),
        ({**BF16, **zero(1), **FLOAT32_ACCUMULATION}, ""),
        ({**BF16, **zero(2)}, ""),
        ({**BF16, **zero(3)}, ""),
        ({**FP16, **zero(0)}, ""),
        ({**FP16, **zero(0)}, FUSED),
        ({**FP16, **zero(2)}, ""),
    ],
    ids=["bf16 0", "bf16 1, float32 accumulation", "bf16 2", "bf16 3", "fp16 0", "fp16 0, fused", "fp16 2"],
)
def test_a_deepspeed_engine_with_masters(tp_rank: Rank, config: dict[str, Any], how: str) -> None:
    """AdamW of the gradients, from the states before the step, gives the masters after it; these give the weights."""
    pytest.importorskip("deepspeed")
    dtype = torch.bfloat16 if "bf16" in config else torch.float16
    clip = config["gradient_clipping"]
    with low_precision_allowed(how):
        engine = deepspeed_engine(tp_rank, built().to(dtype), adamw, config)
        view = view_of(engine)
        assert view.weights_follow_the_hook
        before = assembled(tp_rank, list(view.states()))
        for step in range(2):
            (parts,) = steps_of(view, lambda step: train_accumulated(engine, tp_rank.dp_rank, step), 1)
            after = assembled(tp_rank, parts)
            assert_step_of_adamw(before, after, dtype)
            before = after
        gradients = {name: tensor for (kind, name, _), tensor in after.items() if kind == "gradient"}
        norm = torch.stack([tensor.norm() for tensor in gradients.values()]).norm()
        told = view.told_norm()
        assert told is not None
        if told > clip * view.loss_scale():
            assert float(norm) == pytest.approx(clip, rel=0.3)  # clipped by the norm of one TP rank at ZeRO 0
    assert view.loss_scale() == (128.0 if "fp16" in config else 1.0)


def train_accumulated(engine: Any, dp_rank: int, step: int) -> None:
    for micro_batch in range(2):
        train_engine(engine, dp_rank, 2 * step + micro_batch)


def assert_step_of_adamw(before: dict[Any, torch.Tensor], after: dict[Any, torch.Tensor], dtype: torch.dtype) -> None:
    names = [name for kind, name, _ in after if kind == "weight"]
    assert len(names) == len(set(names)) == 14
    for name in names:
        master, gradient = after["master", name, ""], after["gradient", name, ""]
        start = before["master", name, ""]
        state = {key: before.get(("state", name, key), torch.zeros(())) for key in ("step", "exp_avg", "exp_avg_sq")}
        count = float(state["step"]) + 1
        average = 0.9 * state["exp_avg"] + 0.1 * gradient
        square = 0.999 * state["exp_avg_sq"] + 0.001 * gradient**2
        update = (average / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        expected = start * (1 - 0.01 * 0.1) - 0.01 * update
        assert float(after["state", name, "step"]) == count
        torch.testing.assert_close(after["state", name, "exp_avg"], average, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(master, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(after["weight", name, ""], master.to(dtype).double())


@contextmanager
def low_precision_allowed(how: str) -> Iterator[None]:
    """Let DeepSpeed train in float16 on any CPU; take AdamW for its FusedAdam, which has to be compiled."""
    import deepspeed
    from deepspeed.runtime import engine

    with ExitStack() as stack:
        stack.enter_context(patch.object(deepspeed.get_accelerator(), "is_fp16_supported", lambda: True))
        if how == FUSED:
            stack.enter_context(patch.object(engine, "FusedAdam", torch.optim.AdamW))
        yield


@pytest.mark.tpcheck(tp=2)
def test_a_step_that_deepspeed_skips_is_counted(tp_rank: Rank) -> None:
    pytest.importorskip("deepspeed")
    config = {**zero(1), "fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}}
    with low_precision_allowed(""):
        engine = deepspeed_engine(tp_rank, built().half(), adamw, config)
        view = view_of(engine)
        (parts,) = steps_of(view, lambda step: train_engine(engine, 0, step), 1)
    assert view.num_skipped() == 1
    assert {part.kind for part in parts} == {"weight", "master"}


@pytest.mark.tpcheck(tp=1, dp=2)
def test_the_module_of_an_engine_needs_its_optimizer(tp_rank: Rank) -> None:
    pytest.importorskip("deepspeed")
    engine = deepspeed_engine(tp_rank, built().float(), adamw, zero(1))
    with pytest.raises(UsageError, match="the DeepSpeed engine"):
        view_of(engine.module)
    view = view_of(engine.module, engine.optimizer)
    assert view.stepping == (engine.optimizer.optimizer,)
    assert len(list(view.weights())) == 14


# --- Megatron


class CudaTypes(TorchFunctionMode):
    """Megatron looks at the names of types: it has optimizers for tensors of CUDA alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and len(args) == 1 else result


@pytest.mark.tpcheck(tp=2, dp=2)
@pytest.mark.parametrize(
    ("dtype", "distributed"),
    [(torch.float64, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["float64", "float32, distributed", "bfloat16", "bfloat16, distributed"],
)
def test_an_optimizer_of_megatron(tp_rank: Rank, dtype: torch.dtype, distributed: bool) -> None:
    pytest.importorskip("megatron.core")
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from tests.backends.megatron_models import gpt, tokens
    from tpcheck.backends.megatron.backend import MegatronBackend, TokenLoss, fill_shards, parameter_layouts
    from tpcheck.backends.megatron.config import configured, transformer_config
    from tpcheck.backends.megatron.session import groups_of_topology, use_groups

    def build() -> nn.Module:
        return TokenLoss(gpt(hidden_dropout=0.0, attention_dropout=0.0))

    def token_batch(dp_rank: int, step: int) -> dict[str, torch.Tensor]:
        ids = tokens({"dp": dp_rank}, step)["input_ids"]
        return {"input_ids": ids, "labels": ids.roll(1)}

    def soft_adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0, eps=1e-3)

    clip = 0.5 if distributed else 0.0  # Megatron asserts that a gradient that it clips is float32
    backend = MegatronBackend()
    settings = TrainingOptions(dtype=torch.float64)
    with backend.session(settings), CudaTypes():
        torch.manual_seed(0)
        reference = build().to(torch.float64)
        groups = groups_of_topology(tp_rank.topology)
        with use_groups(groups), configured(2, {}):
            model = build().to(torch.float64)
            fill_shards(model, reference, parameter_layouts(model, reference, 2), tp_rank)
            model = model.to(dtype)
            ddp_config = DistributedDataParallelConfig(
                use_distributed_optimizer=distributed, grad_reduce_in_fp32=dtype is torch.bfloat16
            )
            ddp = DistributedDataParallel(transformer_config(model, 2), ddp_config, model)
            config = OptimizerConfig(
                lr=0.01, weight_decay=0.0, adam_eps=1e-3, clip_grad=clip, use_distributed_optimizer=distributed,
                bf16=dtype is torch.bfloat16, params_dtype=dtype,
            )  # fmt: skip
            optimizer = get_megatron_optimizer(config, [ddp], use_gloo_process_groups=False)
            view = view_of(ddp, optimizer)
            if dtype is torch.bfloat16:
                with pytest.raises(UsageError, match="Megatron's optimizer"):
                    view_of(ddp)

            def step(number: int) -> None:
                ddp.zero_grad_buffer()
                optimizer.zero_grad()
                ddp(**token_batch(tp_rank.dp_rank, number)).backward()
                finalize_model_grads([ddp])
                optimizer.step()

            steps = steps_of(view, step)
        plain = soft_adamw(reference.parameters())
        reference_view = view_of(reference, plain, groups=alone())

        def reference_step(number: int) -> None:
            plain.zero_grad()
            for dp_rank in range(2):
                (reference(**token_batch(dp_rank, number)) / 2).backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or 1e9)
            plain.step()

        expected = steps_of(reference_view, reference_step)
    rtol = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]  # losses are of float32
    assert view.weights_follow_the_hook == (dtype is not torch.float64)
    masters = {part.name for part in steps[0] if part.kind == "master"}
    assert bool(masters) == (dtype is torch.bfloat16)
    assert_whole(tp_rank, [[part for part in parts if part.kind != "master"] for parts in steps], expected, rtol=rtol)
    whole = assembled(tp_rank, steps[-1])
    for name in set.union(*tp_rank.gather(masters)):
        assert torch.equal(whole["master", name, ""].to(dtype).double(), whole["weight", name, ""])
