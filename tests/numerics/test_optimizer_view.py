"""What torch's optimizers get and hold, by name; from several ranks, put together, it is the unsharded run's."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.backends import hand_made
from tests.runs.assembled import (
    adamw,
    assembled,
    assert_whole,
    batch,
    built,
    expected_steps,
    groups_of,
    steps_of,
    train,
)
from tpcheck import Rank, UsageError
from tpcheck.core.placement import Shard
from tpcheck.numerics.optimizers.choose import view_of
from tpcheck.numerics.optimizers.names import unwrapped, unwrapped_name, unwrapped_names
from tpcheck.numerics.sketch import GlobalIndex


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


def test_flat_parameters_of_the_first_fsdp_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._fsdp_wrapped_module = nn.Linear(2, 2)

    with pytest.raises(UsageError, match="fully_shard"):
        view_of(FullyShardedDataParallel())


def test_a_tied_parameter_has_the_first_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert [part.name for part in view_of(model).weights()] == ["0.weight", "0.bias", "1.bias"]


def test_a_wrapper_of_an_optimizer_is_not_what_steps() -> None:
    class Wrapper(torch.optim.SGD):
        """As ZeroRedundancyOptimizer, and many of users: a torch optimizer that steps another."""

        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups)
            self.optim = inner

        def step(self) -> None:
            self.optim.step()

    model = nn.Linear(2, 1)
    inner = torch.optim.SGD(model.parameters())
    view, wrapper = view_of(model), Wrapper(inner)
    assert not view.owns(wrapper)
    assert view.owns(inner)
    assert view_of(model, wrapper).stepping == (inner,)


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


def test_a_fused_optimizer_that_does_nothing_is_counted_as_a_skipped_step() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    view = view_of(model)

    def step(_: int) -> None:
        scaler.scale(model(torch.full((1, 2), torch.inf)).sum()).backward()
        scaler.step(optimizer)

    steps_of(view, step, 1)
    assert view.num_skipped() == 1


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


def shard_of(placement: Shard, shape: tuple[int, ...], tp_rank: int) -> GlobalIndex:
    return GlobalIndex.shard(shape, placement, 2, tp_rank)


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
