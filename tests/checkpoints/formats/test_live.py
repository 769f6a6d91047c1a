"""A model in memory is read as a checkpoint; shards are gathered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tpcheck
from tests.checkpoints.reading import open_source, read_all, same_tensors
from tpcheck import Topology
from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.live import LiveFormat
from tpcheck.core.errors import CheckpointError


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, attention_bias=True, **sizes, **settings))


def test_a_model_is_read_with_its_buffers_and_config():
    model = llama()
    model.register_buffer("kept", torch.arange(3))
    model.register_buffer("dropped", torch.arange(3), persistent=False)
    assert same_tensors(read_all(model), model.state_dict())
    checkpoint = open_source(model)
    assert checkpoint.description == "LlamaForCausalLM in memory"
    assert checkpoint.config["hidden_size"] == 16
    assert "kept" in checkpoint.names()
    assert checkpoint.extent("kept") is None


def test_tied_weights_are_ties():
    assert open_source(llama(tie_word_embeddings=True)).ties == (
        frozenset({"lm_head.weight", "model.embed_tokens.weight"}),
    )
    assert open_source(llama()).ties == ()


def test_a_compiled_model_is_the_model_within():
    model = nn.Linear(2, 2)
    assert same_tensors(read_all(torch.compile(model)), model.state_dict())


def test_a_mapping_of_tensors_is_read():
    weight = torch.randn(3, 2)
    state = {"a": weight, "b": weight, "turned": weight.t(), "conj": torch.randn(2, dtype=torch.complex64).conj()}
    assert same_tensors(read_all(state), {name: one.resolve_conj() for name, one in state.items()})
    assert open_source(state).ties == (frozenset({"a", "b"}),)


def test_entries_that_are_not_tensors_are_unread():
    checkpoint = open_source({"a": torch.ones(1), "a._extra_state": None})
    assert checkpoint.names() == ("a",)
    assert checkpoint.unread == {"a._extra_state": "is a NoneType, not a tensor"}


@pytest.mark.parametrize("source", [{}, {"a": 1}, {1: torch.ones(1)}, [torch.ones(1)], "model", None])
def test_other_objects_are_not_recognised(source):
    assert not LiveFormat().recognises(source)


def test_tensors_without_plain_elements_are_unread():
    state = {"meta": torch.ones(1, device="meta"), "sparse": torch.eye(2).to_sparse(), "a": torch.ones(1)}
    checkpoint = open_source(state)
    assert checkpoint.names() == ("a",)
    assert checkpoint.unread == {
        "meta": "has no data: it is on the meta device",
        "sparse": "is sparse or quantized",
    }


def test_a_change_while_it_is_read_is_an_error():
    model = nn.Linear(2, 2)
    checkpoint = open_source(model)
    checkpoint.require_unchanged()
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(CheckpointError, match="'weight' of the model in memory was changed"):
        checkpoint.require_unchanged()


def _dtensors(rank):
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    expected = {"a": torch.randn(5, 4), "b": torch.randn(3), "plain": torch.ones(2)}
    module = nn.Module()
    for name, placement in (("a", Shard(0)), ("b", Replicate())):
        setattr(module, name, nn.Parameter(distribute_tensor(expected[name], mesh, [placement])))
    module.plain = nn.Parameter(expected["plain"])
    module.tied = module.a
    checkpoint = LiveFormat().open(module, ReadOptions())
    found = read_all(module)
    whole = {**expected, "tied": expected["a"]}
    state = module.state_dict()
    right = (
        same_tensors(found, whole)
        and same_tensors(read_all(state), whole)
        and open_source(state).ties == checkpoint.ties
    )
    return right, checkpoint.ties, checkpoint.description


def test_dtensors_are_gathered():
    with tpcheck.spawn(Topology(tp=2), timeout=60) as world:
        for right, ties, description in world.run(_dtensors):
            assert right
            assert ties == (frozenset({"a", "tied"}),)
            assert description == "Module in memory, gathered from all ranks"


def _deepspeed(rank, zero, tied):
    import deepspeed

    model = llama(tie_word_embeddings=tied)
    expected = copy.deepcopy(model.state_dict())
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "tensor_parallel": {"autotp_size": 2},
        "zero_optimization": {"stage": zero},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    before = {name: one.detach().clone() for name, one in engine.module.named_parameters()}
    found = read_all(engine)
    untouched = all(torch.equal(before[name], one) for name, one in engine.module.named_parameters())
    checkpoint = open_source(engine)
    return same_tensors(found, expected), untouched, len(checkpoint.ties), checkpoint.description


@pytest.mark.parametrize(("zero", "tied"), [(0, True), (1, False), (3, False)])
def test_a_deepspeed_engine_is_gathered_and_left_as_it_was(zero, tied):
    with tpcheck.spawn(Topology(tp=2), timeout=60) as world:
        for right, untouched, ties, description in world.run(_deepspeed, zero, tied):
            assert right
            assert untouched
            assert ties == tied
            assert description == "LlamaForCausalLM in memory, gathered from all ranks"


def _megatron(rank):
    module = nn.Linear(2, 2)
    module.weight.tensor_model_parallel = True
    try:
        open_source(module)
    except CheckpointError as error:
        return str(error)


def test_a_shard_of_megatron_is_refused():
    with tpcheck.spawn(Topology(tp=2), timeout=60) as world:
        for message in world.run(_megatron):
            assert message.startswith("Parameter 'weight' is this rank's shard of a tensor-parallel parameter")


class FusedLayer(nn.Linear):
    """Behaves like a layer of DeepSpeed with an interleaved layout."""

    mp_group = "tp"

    def gather_params(self, parameters):
        raise RuntimeError("cannot gather")


def test_a_layer_that_cannot_be_gathered_is_refused():
    model = nn.Sequential(FusedLayer(2, 2))
    with pytest.raises(CheckpointError, match="Layer '0' holds a shard of its parameters"):
        open_source(model)
