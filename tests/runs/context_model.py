"""A small causal language model by hand whose ranks hold slices of sequences: keys and values are gathered over CP.

With one fault each where a test asks for it. Tokens, positions and labels are cut contiguously or zigzag; with tensor
parallelism the heads and the hidden units are cut, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import tpcheck
from tpcheck import Rank, Topology

VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 64, 16, 4, 32, 4
IGNORED = -100


@dataclass(frozen=True)
class Setting:
    """How a run trains.

    Attributes:
        order: How sequences are cut: contiguous, zigzag or striped.
        adds: The loss is divided by the labels of the whole step, and gradients are summed over CP; else it is the mean
            over the slice's, and gradients are averaged.
        positions: The model is called with positions; else it numbers them itself.
        padded: Labels of the last half of each second sample are ignored.
        rotary: Positions rotate queries and keys inside the attention; else they are embedded.
        returns_loss: The model returns its loss, too, as those of transformers do.
        calls: Micro-batches of a step.
        dtype: Of the model.
        steps, replays: Of the recording.
        fault: What is wrong.
    """

    order: str = "contiguous"
    adds: bool = False
    positions: bool = True
    padded: bool = False
    rotary: bool = False
    returns_loss: bool = False
    calls: int = 1
    dtype: torch.dtype = torch.float64
    steps: int = 2
    replays: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Groups:
    """Process groups of a rank; None where it is alone."""

    tp: Any = None
    cp: Any = None
    tp_size: int = 1
    tp_rank: int = 0
    cp_size: int = 1
    cp_rank: int = 0
    dp: Any = None
    dp_size: int = 1
    dp_rank: int = 0


def places(setting: Setting, cp: int, cp_rank: int) -> torch.Tensor:
    """Return the positions of the tokens that a rank holds."""
    if setting.order == "striped":
        return torch.arange(cp_rank, LENGTH, cp)
    parts = torch.arange(LENGTH).chunk(2 * cp)
    held = (cp_rank, 2 * cp - 1 - cp_rank) if setting.order == "zigzag" else (2 * cp_rank, 2 * cp_rank + 1)
    return torch.cat([parts[part] for part in held])


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        summed = values.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = gradient.clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class _Gather(torch.autograd.Function):
    """All slices of [batch, heads, positions, width], one after the other; their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, groups: Groups) -> torch.Tensor:
        ctx.groups = groups
        slices = [torch.empty_like(values) for _ in range(groups.cp_size)]
        dist.all_gather(slices, values.contiguous(), group=groups.cp)
        return torch.cat(slices, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.groups.cp)
        return summed.chunk(ctx.groups.cp_size, 2)[ctx.groups.cp_rank], None


class Attention(nn.Module):
    def __init__(self, setting: Setting, groups: Groups) -> None:
        super().__init__()
        self.setting, self.groups = setting, groups
        width = WIDTH // groups.tp_size
        self.q, self.k, self.v = (nn.Linear(WIDTH, width, bias=False) for _ in range(3))
        self.o = nn.Linear(width, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        groups, setting = self.groups, self.setting
        if groups.tp is not None:
            hidden = _SumBackward.apply(hidden, groups.tp)
        heads = HEADS // groups.tp_size
        q, k, v = (layer(hidden).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if setting.rotary:
            q, k = rotated(q, positions), rotated(k, positions)
        rows = places(setting, groups.cp_size, groups.cp_rank)
        columns = rows
        if groups.cp is not None and setting.fault != "keys not gathered":
            k, v = (_Gather.apply(each.contiguous(), groups) for each in (k, v))
            columns = torch.cat([places(setting, groups.cp_size, rank) for rank in range(groups.cp_size)])
        if setting.fault == "mask of the first slice":
            rows = places(setting, groups.cp_size, 0)
        mask = columns[None] <= rows[:, None]
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        out = self.o(out.transpose(1, 2).flatten(2))
        return out if groups.tp is None else _SumForward.apply(out, groups.tp)


def rotated(values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    half = values.shape[-1] // 2
    angles = positions[..., None] / 10 ** (torch.arange(half) / half)
    cos, sin = angles.cos().to(values.dtype), angles.sin().to(values.dtype)
    first, second = values.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Layer(nn.Module):
    def __init__(self, setting: Setting, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(setting, groups)
        self.up = nn.Linear(WIDTH, 2 * WIDTH // groups.tp_size)
        self.down = nn.Linear(2 * WIDTH // groups.tp_size, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.norm1(hidden), positions)
        inside = self.norm2(hidden)
        if self.groups.tp is not None:
            inside = _SumBackward.apply(inside, self.groups.tp)
        out = self.down(nn.functional.gelu(self.up(inside)))
        return hidden + (out if self.groups.tp is None else _SumForward.apply(out, self.groups.tp))


class Model(nn.Module):
    def __init__(self, setting: Setting, groups: Groups) -> None:
        super().__init__()
        self.setting, self.groups = setting, groups
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer(setting, groups) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, loss: Any = None) -> Any:
        if position_ids is None:
            position_ids = places(self.setting, self.groups.cp_size, self.groups.cp_rank)
            if self.setting.fault == "positions from 0":
                position_ids = torch.arange(input_ids.shape[1])
        hidden = self.tokens(input_ids)
        if not self.setting.rotary:
            hidden = hidden + self.places(position_ids)
        for layer in self.layers:
            hidden = layer(hidden, position_ids)
        logits = self.head(self.norm(hidden))
        return logits if loss is None else (loss(logits), logits)


def build(setting: Setting, groups: Groups) -> Model:
    """Return this rank's part of one model."""
    generator = torch.Generator().manual_seed(0)
    whole = Model(setting, Groups()).double()
    for parameter in whole.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3
    model = Model(setting, groups).double()
    weights = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        dims = [dim for dim in range(parameter.dim()) if parameter.shape[dim] != weights[name].shape[dim]]
        part = weights[name].detach()
        parameter.data = (part.chunk(groups.tp_size, dims[0])[groups.tp_rank] if dims else part).clone()
    return model.to(setting.dtype)


def batch(step: int, setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whole tokens and labels of a step."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    if setting.padded:
        labels[::2, LENGTH // 2 :] = IGNORED
    return tokens[:, :-1], labels


def train(topology: Topology, rank: Rank | None, path: str, setting: Setting) -> None:
    """Train one process, or this rank of a world of any topology; record into `path`."""
    groups = Groups() if rank is None else groups_of(rank.rank, topology)
    model = build(setting, groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = places(setting, groups.cp_size, groups.cp_rank)
    with tpcheck.record(model, path, optimizer=optimizer, topology=topology, replays=setting.replays):
        for step in range(setting.steps):
            tokens, labels = batch(step, setting)
            if setting.fault == "slice of another sample" and groups.cp_rank == 1:
                tokens = tokens.roll(1, 0)
            position_ids = held
            if setting.fault == "positions from 0":
                position_ids = torch.arange(len(held))
            if setting.fault == "positions in another order":
                position_ids = torch.arange(len(held)) + groups.cp_rank * len(held)
            calls = groups.dp_size * setting.calls
            for call in range(setting.calls):
                rows = slice(groups.dp_rank * setting.calls + call, None, calls)
                given: dict[str, Any] = {}
                if setting.positions:
                    given["position_ids"] = position_ids.expand(BATCH // calls, -1)

                def loss(logits: torch.Tensor, rows: slice = rows, labels: torch.Tensor = labels) -> torch.Tensor:
                    return train_on(logits, labels, labels[rows, held], setting, groups)

                if setting.returns_loss:
                    model(tokens[rows, held], loss=loss, **given)[0].backward()
                else:
                    loss(model(tokens[rows, held], **given)).backward()
            reduce_gradients(model, setting, groups)
            optimizer.step()
            optimizer.zero_grad()


def train_on(
    logits: torch.Tensor, labels: torch.Tensor, own: torch.Tensor, setting: Setting, groups: Groups
) -> torch.Tensor:
    """Return the loss that this rank goes back from."""
    summed = nn.functional.cross_entropy(logits.flatten(0, 1), own.flatten(), ignore_index=IGNORED, reduction="sum")
    if setting.fault == "local number of labels":
        return summed / (own != IGNORED).sum()
    loss = summed / (labels != IGNORED).sum()
    return loss if setting.adds else loss * groups.cp_size * groups.dp_size


def reduce_gradients(model: Model, setting: Setting, groups: Groups) -> None:
    for name, parameter in model.named_parameters():
        if parameter.grad is None or (setting.fault == "not reduced" and name == "layers.0.norm1.weight"):
            continue
        if setting.fault == "nothing reduced":
            continue
        for group, size in ((groups.cp, groups.cp_size), (groups.dp, groups.dp_size)):
            left_out = setting.fault == "not reduced over cp" and name == "layers.0.norm1.weight" and group is groups.cp
            if group is not None and not left_out:
                dist.all_reduce(parameter.grad, group=group)
                if not setting.adds or setting.fault == "mean of terms":
                    parameter.grad /= size


def groups_of(rank: int, topology: Topology) -> Groups:
    coordinate = topology.coordinate(rank)

    def group(axis: str) -> Any:
        return _made(rank, topology, axis) if getattr(topology, axis) > 1 else None

    return Groups(
        *(group("tp"), group("cp"), topology.tp, coordinate["tp"], topology.cp, coordinate.get("cp", 0)),
        *(group("dp"), topology.dp, coordinate["dp"]),
    )


def _made(rank: int, topology: Topology, axis: str) -> Any:
    made = [dist.new_group(list(ranks)) for ranks in topology.groups(axis)]
    return next(group for group, ranks in zip(made, topology.groups(axis), strict=True) if rank in ranks)
