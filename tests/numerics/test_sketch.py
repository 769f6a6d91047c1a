"""Sketches: linear, the same for every cut of a tensor, unbiased, exact, deterministic."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcheck.backends.layout import Layout
from tpcheck.core.digests import BlockDigest, start_digests
from tpcheck.core.errors import UsageError
from tpcheck.core.placement import Shard
from tpcheck.numerics.sketch import (
    FLOAT32_ROUNDING,
    SIGN_SETS,
    TILES,
    GlobalIndex,
    RowKeys,
    Sketch,
    distance,
    fetch_sketches,
    row_keys,
    sample_keys,
    sketch,
    start_sketch,
)

EPSILON = torch.finfo(torch.float64).eps
FAST = settings(max_examples=60, deadline=None)

sizes = st.integers(1, 40)
shapes = st.one_of(
    st.tuples(), st.tuples(st.integers(0, 700)), st.tuples(sizes, sizes), st.tuples(st.integers(1, 6), sizes, sizes)
)
seeds = st.integers(0, 2**32)


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(actual: Sketch, expected: Sketch, *, of: torch.Tensor) -> None:
    """Up to the order in which numbers were added."""
    is_rounded = of.numel() > 1 << 16 and of.dtype in (torch.float32, torch.bfloat16, torch.float16)
    # Of two sketches, each of which is rounded by FLOAT32_ROUNDING in the mean over tiles.
    bound, of_squares = (2 * FLOAT32_ROUNDING, 2.0**-23) if is_rounded else (1e3 * EPSILON, 1e-12)
    assert distance(actual, expected) <= bound * float(torch.linalg.vector_norm(of.double()))
    assert actual.sum_squares == pytest.approx(expected.sum_squares, rel=of_squares)
    assert (actual.numel, actual.nonfinite) == (expected.numel, expected.nonfinite)


def total(sketches: list[Sketch]) -> Sketch:
    return sum(sketches, Sketch.zero())


# ---- linear


@FAST
@given(shapes, seeds, st.floats(-8, 8))
def test_sums_and_multiples_of_sketches_are_those_of_the_tensors(shape, seed, factor):
    first, second = normal(shape, seed), normal(shape, seed + 1)
    combined = sketch(first) + sketch(second).scaled(factor)
    assert distance(combined, sketch(first + factor * second)) <= 1e-12 * (1 + abs(factor)) * (1 + math.sqrt(1000))
    assert_same(sketch(first, scale=factor), sketch(first).scaled(factor), of=8 * first)


def test_the_sketch_of_a_difference_is_the_difference_of_sketches():
    actual, expected = normal((48, 32), 1), normal((48, 32), 2)
    difference = sketch(actual) - sketch(expected)
    assert torch.allclose(difference.tiles, sketch(actual - expected).tiles, atol=1e-12)
    assert math.isnan(difference.sum_squares)
    assert distance(sketch(actual), sketch(actual)) == 0.0


def test_terms_of_a_partial_tensor_add_up_to_their_sum():
    terms = [normal((40, 24), seed) for seed in range(3)]
    assert distance(total([sketch(term) for term in terms]), sketch(sum(terms))) < 1e-12


# ---- the same for every cut


@FAST
@given(st.data(), shapes.filter(len), seeds)
def test_shards_of_an_uneven_cut_of_any_dim_add_up_to_the_whole(data, shape, seed):
    tensor = normal(shape, seed)
    dim = data.draw(st.integers(0, len(shape) - 1))
    marks = sorted(data.draw(st.lists(st.integers(0, shape[dim]), max_size=4)))
    parts = tuple(end - start for start, end in zip([0, *marks], [*marks, shape[dim]], strict=True))
    placement = Shard(dim, sizes=(parts,))
    shards = torch.split(tensor, list(parts), dim)
    indices = [GlobalIndex.shard(shape, placement, len(parts), rank) for rank in range(len(parts))]
    whole = sketch(tensor)
    assert_same(total([sketch(*part) for part in zip(shards, indices, strict=True)]), whole, of=tensor)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("blocks", [(24, 8, 8), 2, 5])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_shards_of_fused_blocks_add_up_to_the_whole(tp, blocks, dim):
    tensor = normal((40, 40))
    layout = Layout.from_placement((40, 40), Shard(dim, blocks=blocks), tp)
    shards = [sketch(layout.local(tensor, rank), GlobalIndex.from_layout(layout, rank)) for rank in range(tp)]
    assert_same(total(shards), sketch(tensor), of=tensor)


@FAST
@given(st.data(), st.tuples(sizes, sizes), seeds)
def test_fragments_of_a_flattened_shard_add_up_to_the_shard(data, shape, seed):
    index = GlobalIndex.shard(shape, Shard(data.draw(st.integers(0, 1))), 2, 0)
    shard = normal(index.local_shape, seed)
    marks = sorted(data.draw(st.lists(st.integers(0, shard.numel()), max_size=3)))
    fragments = [
        sketch(shard.flatten()[start:end], GlobalIndex(shape, index.indices, fragment=(start, end)))
        for start, end in zip([0, *marks], [*marks, shard.numel()], strict=True)
    ]
    assert_same(total(fragments), sketch(shard, index), of=shard)


@FAST
@given(st.data(), shapes.filter(len), seeds)
def test_elements_at_any_positions_add_up_to_the_whole_without_their_padding(data, shape, seed):
    tensor = normal(shape, seed)
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(seed))
    cut = data.draw(st.integers(0, tensor.numel()))
    held = []
    for positions in (order[:cut], order[cut:]):
        values = torch.cat([tensor.flatten()[positions], torch.tensor([math.nan, 3.0])])
        padded = torch.cat([positions, torch.tensor([-1, -1])])
        held.append(sketch(values, GlobalIndex(shape, (None,) * len(shape), positions=padded)))
    assert_same(total(held), sketch(tensor), of=tensor)


def test_a_layout_that_is_no_placement_becomes_positions():
    positions = torch.arange(30).reshape(6, 5)
    checkerboard = positions.flatten() % 2 == 0
    layout = Layout.from_positions((6, 5), [positions.flatten()[checkerboard], positions.flatten()[~checkerboard]])
    tensor = normal((6, 5))
    indices = [GlobalIndex.from_layout(layout, rank) for rank in range(2)]
    assert all(index.positions is not None for index in indices)
    shards = [sketch(layout.local(tensor, rank), index) for rank, index in enumerate(indices)]
    assert_same(total(shards), sketch(tensor), of=tensor)


def test_padding_of_a_layout_is_not_counted():
    layout = Layout((3, 2), ((2, 2), (2, 2)), torch.tensor([0, 1, 2, 3, 4, 5]))
    tensor = normal((3, 2))
    shards = [sketch(layout.local(tensor, rank), GlobalIndex.from_layout(layout, rank)) for rank in range(2)]
    assert_same(total(shards), sketch(tensor), of=tensor)


def test_replicas_have_the_index_of_the_whole():
    index = GlobalIndex.from_layout(Layout.replicated((4, 6), 2), 1)
    assert index.piece() == GlobalIndex.whole((4, 6)).piece()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_tensors_are_the_same_on_1_2_and_8_ranks(dtype, dim):
    tensor = normal((1024, 640), dtype=dtype)
    whole = sketch(tensor)
    for tp in (1, 2, 8):
        indices = [GlobalIndex.shard((1024, 640), Shard(dim), tp, rank) for rank in range(tp)]
        shards = zip(tensor.chunk(tp, dim), indices, strict=True)
        assert_same(total([sketch(*shard) for shard in shards]), whole, of=tensor)


# ---- rows by content


def samples_of(batch: int, length: int, width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 1000, (batch, length), generator=generator)
    return tokens, torch.randn(batch, length, width, generator=generator, dtype=torch.float64)


def sketch_of_samples(tokens: torch.Tensor, hidden: torch.Tensor, index: GlobalIndex | None = None) -> Sketch:
    return sketch(hidden, index, rows=row_keys(sample_keys(tokens), tokens.shape[1]))


@FAST
@given(st.data(), st.integers(1, 6), st.integers(1, 40), st.integers(1, 30), seeds)
def test_order_and_dealing_of_samples_do_not_matter(data, batch, length, width, seed):
    tokens, hidden = samples_of(batch, length, width, seed)
    whole = sketch_of_samples(tokens, hidden)
    order = torch.tensor(data.draw(st.permutations(range(batch))))
    cut = data.draw(st.integers(0, batch))
    dealt = [sketch_of_samples(tokens[part], hidden[part]) for part in (order[:cut], order[cut:])]
    assert_same(total(dealt), whole, of=hidden)


def test_samples_of_large_batches_are_dealt_in_any_order():
    tokens, hidden = samples_of(6, 128, 200)
    hidden, order = hidden.float(), torch.randperm(6, generator=torch.Generator().manual_seed(0))
    dealt = [sketch_of_samples(tokens[part], hidden[part]) for part in (order[:2], order[2:])]
    assert_same(total(dealt), sketch_of_samples(tokens, hidden), of=hidden)


def test_fragments_of_a_large_matrix_add_up():
    tensor = normal((400, 300), dtype=torch.float32)
    marks = [0, 100, 50_050, 119_950, 120_000]
    fragments = [
        sketch(tensor.flatten()[start:end], GlobalIndex((400, 300), (None, None), fragment=(start, end)))
        for start, end in pairwise(marks)
    ]
    assert_same(total(fragments), sketch(tensor), of=tensor)


@pytest.mark.parametrize("length", [8, 200])
def test_rows_by_content_flattened_transposed_and_with_sharded_columns(length):
    tokens, hidden = samples_of(3, length, 48)
    rows = row_keys(sample_keys(tokens), length)
    whole = sketch(hidden, rows=rows)
    assert_same(sketch(hidden.reshape(-1, 48), rows=rows), whole, of=hidden)
    turned = RowKeys(*(part.reshape(3, length).T.reshape(-1) for part in (rows.keys, rows.tiles)))
    assert_same(sketch(hidden.transpose(0, 1).contiguous(), rows=turned), whole, of=hidden)
    assert_same(sketch(hidden.transpose(0, 1), rows=turned), whole, of=hidden)
    columns = [GlobalIndex.shard((48,), Shard(0, blocks=(24, 12, 12)), 2, rank) for rank in range(2)]
    shards = [sketch(hidden[..., index.indices[0]], index, rows=rows) for index in columns]
    assert_same(total(shards), whole, of=hidden)
    heads = hidden.reshape(3, length, 4, 12)
    assert_same(sketch(heads, rows=rows), whole, of=hidden)
    by_head = [GlobalIndex.shard((4, 12), Shard(0), 2, rank) for rank in range(2)]
    shards = [sketch(part, index, rows=rows) for part, index in zip(heads.chunk(2, 2), by_head, strict=True)]
    assert_same(total(shards), whole, of=hidden)


def test_sequence_shards_take_their_rows():
    tokens, hidden = samples_of(2, 64, 20)
    rows = row_keys(sample_keys(tokens), 64)
    shards = []
    for part in (slice(0, 40), slice(40, 64)):
        held = RowKeys(*(of_rows.reshape(2, 64)[:, part].reshape(-1) for of_rows in (rows.keys, rows.tiles)))
        shards.append(sketch(hidden[:, part], rows=held))
    assert_same(total(shards), sketch(hidden, rows=rows), of=hidden)


def test_rows_without_columns():
    tokens, hidden = samples_of(4, 10, 1)
    rows = row_keys(sample_keys(tokens), 10)
    assert_same(sketch(hidden[..., 0], rows=rows), sketch(hidden, rows=rows), of=hidden)
    per_sample = row_keys(sample_keys(tokens), 1)
    assert sketch(hidden[:, 0, 0], rows=per_sample).norm > 0


def test_the_tile_of_a_row_is_its_position():
    tokens, hidden = samples_of(2, 32, 16)
    hidden[:, :-2] = 0
    tile_norms = sketch_of_samples(tokens, hidden).tile_norms()
    assert (tile_norms[:-1] == 0).all()
    assert (tile_norms[-1] > 0).all()


def test_samples_have_equal_keys_if_and_only_if_their_content_is_equal():
    tokens = torch.tensor([[1, 2, 3], [3, 2, 1], [1, 2, 3], [1, 2, 0]])
    first, second, third, fourth = sample_keys(tokens).tolist()
    assert first == third
    assert len({first, second, fourth}) == 3
    assert sample_keys(tokens.to(torch.int32)).tolist() == sample_keys(tokens).tolist()
    assert sample_keys(tokens[:, :2])[0] != sample_keys(tokens[3:])[0]
    assert sample_keys(tokens[1:2])[0] == second


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_samples_of_every_dtype_have_keys(dtype):
    leaf = (10 * normal((3, 70000))).relu().to(dtype)
    keys = sample_keys(leaf)
    assert len(set(keys.tolist())) == 3
    assert sample_keys(leaf.reshape(3, 7, -1).transpose(1, 2).contiguous().transpose(1, 2)).equal(keys)


# ---- it measures


def variance_bound(difference: torch.Tensor) -> float:
    """Of the squared estimate, relative to the squared norm: the bound that the module's docstring proves."""
    rows = torch.arange(difference.shape[0]) * TILES // difference.shape[0]
    columns = torch.arange(difference.shape[1]) * TILES // difference.shape[1]
    energy = torch.zeros(TILES, difference.shape[1], dtype=torch.float64).index_add_(0, rows, difference.square())
    energy = torch.zeros(TILES, TILES, dtype=torch.float64).index_add_(1, columns, energy)
    terms = 4 * energy.square().sum() + 2 * energy.sum(0).square().sum() + 2 * energy.sum(1).square().sum()
    return float(terms / SIGN_SETS / energy.sum().square())


def one_tile(seed: int) -> torch.Tensor:
    difference = torch.zeros(64, 96, dtype=torch.float64)
    difference[4:8, 12:18] = torch.outer(normal((4,), seed), normal((6,), seed + 1))
    return difference


def only(part: tuple[object, ...]):
    def difference(seed: int) -> torch.Tensor:
        kept = torch.zeros(64, 96, dtype=torch.float64)
        kept[part] = normal((64, 96), seed)[part]
        return kept

    return difference


# Standard deviations that the module's docstring states, for what is spread evenly.
STATED = {"dense": 0.04, "one element": 1e-9, "one row": 0.18, "one column": 0.18, "rank one": 0.26, "one tile": 1.41}
DIFFERENCES = {
    "dense": lambda seed: normal((64, 96), seed),
    "one element": only((5, 70)),
    "one row": only((5, slice(None))),
    "one column": only((slice(None), 70)),
    "rank one": lambda seed: torch.outer(normal((64,), seed), normal((96,), seed + 1)),
    "rank one of equal numbers": lambda seed: torch.outer(normal((64,), seed).sign(), normal((96,), seed + 1).sign()),
    "rank two": lambda seed: normal((64, 2), seed) @ normal((2, 96), seed + 1),
    "one shard": only((slice(None), slice(0, 48))),
    "one tile": one_tile,
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_the_squared_distance_is_unbiased_and_spreads_as_far_as_is_stated(kind):
    number = 600
    ratios, bounds = [], []
    for seed in range(number):
        expected = normal((64, 96), 10**6 + seed)
        difference = DIFFERENCES[kind](7 * seed)
        estimate = distance(sketch(expected + difference), sketch(expected))
        ratios.append(estimate**2 / float(difference.square().sum()))
        bounds.append(variance_bound(difference))
    measured = torch.tensor(ratios, dtype=torch.float64)
    bound = sum(bounds) / number
    assert abs(measured.mean() - 1) < 4 * math.sqrt(bound / number)
    assert measured.var() < 1.5 * bound  # the variance of 600 numbers with heavy tails spreads, too
    assert measured.std() < 1.4 * STATED.get(kind, 1.0)  # normal numbers are not spread evenly


def test_one_element_is_exact():
    difference = torch.zeros(64, 96, dtype=torch.float64)
    difference[5, 70] = 3.0
    found = sketch(difference)
    assert found.norm == 3.0
    assert found.tile_norms()[5 * TILES // 64, 70 * TILES // 96] == 3.0
    assert found.tile_norms().count_nonzero() == 1


@pytest.mark.parametrize("length", [1, 5, 256, 4000])
def test_the_norm_of_a_vector_is_within_the_stated_spread(length):
    found = [sketch(normal((length,), seed)) for seed in range(99)]
    ratios = [of_vector.norm**2 / of_vector.sum_squares for of_vector in found]
    assert sum(ratios) / 99 == pytest.approx(1, abs=0.03)
    assert torch.tensor(ratios).std() < 0.1


def test_signs_do_not_depend_on_each_other():
    """Rows, columns and sign sets: the mean product of two is that of coins."""
    length = 4096
    elements = torch.eye(1, dtype=torch.float64)
    signs = torch.cat(
        [
            sketch(elements, GlobalIndex((length, 1), (torch.tensor([row]), None))).tiles[:, row * TILES // length, :1]
            for row in range(0, length, 8)
        ],
        dim=1,
    )
    correlation = signs @ signs.T / signs.shape[1] - torch.eye(SIGN_SETS, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(signs.shape[1])
    assert signs.mean(1).abs().max() < 5 / math.sqrt(signs.shape[1])


# ---- exact, deterministic, of every kind of tensor


@pytest.mark.parametrize("shape", [(384, 100), (7, 3000), (3000, 7), (100000,), (5, 33, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_sketched_without_rounding(dtype, shape):
    tensor = normal(shape, dtype=dtype)
    assert distance(sketch(tensor), sketch(tensor.double())) <= 1e-14 * float(tensor.double().norm())
    assert sketch(tensor).sum_squares == pytest.approx(float(tensor.double().square().sum()), rel=1e-13)


LARGE = {
    "normal": lambda: normal((2048, 96), dtype=torch.float32),
    "bfloat16": lambda: normal((512, 384), dtype=torch.bfloat16),
    "float16": lambda: normal((512, 384), dtype=torch.float16),
    "transposed": lambda: normal((768, 200), dtype=torch.float32).T,
    "equal numbers": lambda: torch.full((512, 384), 0.1),
    "one sign": lambda: normal((512, 384)).abs().float(),
    "few rows": lambda: normal((20, 9000), dtype=torch.float32),
    "tiles of 128 and 129 rows": lambda: normal((2050, 96), dtype=torch.float32),
    "tiles of 600 rows": lambda: normal((9600, 500), dtype=torch.float32),
    "a wide vocabulary": lambda: normal((33, 20000), dtype=torch.float32),
    "one large row": lambda: torch.cat([1e4 * normal((1, 384)), normal((511, 384))]).float(),
    "small numbers": lambda: 1e-15 * normal((512, 384), dtype=torch.float32),
}


@pytest.mark.parametrize("kind", LARGE)
def test_the_sketch_of_a_large_tensor_is_rounded_as_far_as_is_stated(kind):
    tensor = LARGE[kind]()
    found, exact = sketch(tensor), sketch(tensor.double())
    # Where one row outweighs all others, each of up to 16 roundings is of it: sqrt(16 / 3) u instead of 1.7 u.
    bound = (16 / 3) ** 0.5 * 2.0**-24 if kind == "one large row" else FLOAT32_ROUNDING
    assert 0 < distance(found, exact) <= bound * exact.sum_squares**0.5
    assert found.sum_squares == pytest.approx(exact.sum_squares, rel=2.0**-23)


def test_a_small_update_of_a_large_weight_is_measured():
    weight = normal((1024, 256), dtype=torch.float32)
    updated = weight + 1e-5 * normal((1024, 256), 1).float()
    difference = float((updated.double() - weight.double()).norm())
    assert distance(sketch(updated), sketch(weight)) == pytest.approx(difference, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_is_taken_in_the_pass_of_a_large_sketch(dtype):
    tensor = normal((520, 384), dtype=dtype)
    bits = start_digests([tensor])()[0]
    digest = BlockDigest(tensor)
    start_sketch(tensor, digest=digest)
    tensor.zero_()  # what is read from here on has other bits
    assert digest.digest() == bits


OTHERWISE = {
    "small": lambda: normal((40, 30)),
    "float64": lambda: normal((520, 384)),
    "transposed": lambda: normal((520, 384), dtype=torch.float32).T,
    "complex": lambda: torch.complex(normal((300, 384)), normal((300, 384), 1)).to(torch.complex64),
    "conjugate": lambda: torch.complex(normal((300, 384)), normal((300, 384), 1)).to(torch.complex64).conj(),
    "a wide vocabulary": lambda: normal((33, 20000), dtype=torch.float32),
    "infinite": lambda: normal((520, 384), dtype=torch.float32).masked_fill(torch.arange(384) == 7, math.inf),
    "empty": lambda: torch.zeros(0, 5),
    "a vector": lambda: normal((700,)),
}


@pytest.mark.parametrize("kind", OTHERWISE)
def test_the_digest_beside_a_sketch_is_that_of_the_bits(kind):
    tensor = OTHERWISE[kind]()
    digest = BlockDigest(tensor)
    started = start_sketch(tensor, digest=digest)
    assert digest.digest() == start_digests([tensor])()[0]
    assert torch.equal(started.packed, start_sketch(tensor).packed)


@pytest.mark.parametrize("size", [1e25, 1e-25, 0.0])
def test_squares_beyond_float32_do_not_matter(size):
    tensor = (size * normal((512, 384))).float()
    found, exact = sketch(tensor), sketch(tensor.double())
    assert distance(found, exact) <= 1e-14 * exact.sum_squares**0.5
    assert found.sum_squares == pytest.approx(exact.sum_squares, rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_integers_bools_and_float8_are_numbers(dtype):
    tensor = (normal((33, 20)).abs() * 4).to(dtype)
    assert_same(sketch(tensor), sketch(tensor.double()), of=tensor)


@pytest.mark.parametrize("shape", [(12, 10), (700,), ()])
def test_a_complex_number_is_two_columns(shape):
    tensor = torch.complex(normal(shape, 1), normal(shape, 2))
    found = sketch(tensor)
    assert found.numel == tensor.numel()
    assert found.sum_squares == pytest.approx(float(tensor.abs().square().sum()))
    assert_same(sketch(tensor.conj().resolve_conj()), sketch(tensor.conj()), of=tensor.abs())
    if shape:
        indices = [GlobalIndex.shard(shape, Shard(-1), 2, rank) for rank in range(2)]
        shards = [sketch(part, index) for part, index in zip(tensor.chunk(2, -1), indices, strict=True)]
        assert_same(total(shards), found, of=tensor.abs())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (0, 3, 4)])
def test_an_empty_tensor_is_zero(shape):
    found = sketch(torch.zeros(shape))
    assert (found.norm, found.sum_squares, found.numel, found.nonfinite) == (0.0, 0.0, 0, 0)
    if len(shape) == 2:
        assert sketch(torch.zeros(shape), rows=row_keys(torch.zeros(shape[0], dtype=torch.int64), 1)).norm == 0.0


def test_a_scalar_is_its_absolute_value():
    assert sketch(torch.tensor(-2.5)).norm == 2.5


@pytest.mark.parametrize("shape", [(64, 48), (300,), (20, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_infinities_and_nan_are_counted_and_kept_out_of_the_sums(dtype, shape):
    tensor = normal(shape, dtype=dtype)
    zeroed = tensor.clone()
    zeroed.view(-1)[[3, 17, 19]] = 0
    tensor.view(-1)[[3, 17, 19]] = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)
    found, expected = sketch(tensor), sketch(zeroed)
    assert found.nonfinite == 3
    assert torch.equal(found.tiles, expected.tiles)
    assert found.sum_squares == expected.sum_squares


def test_infinities_of_a_large_tensor_are_counted():
    tensor = normal((512, 384), dtype=torch.float32)
    tensor[7, [3, 17, 19]] = torch.tensor([math.nan, math.inf, -math.inf])
    assert_same(replace(sketch(tensor), nonfinite=0), sketch(tensor.nan_to_num(0.0, 0.0, 0.0)), of=tensor.nan_to_num())
    assert sketch(tensor).nonfinite == 3


def test_numbers_whose_square_is_infinite_are_finite():
    found = sketch(torch.full((4, 4), 1e200, dtype=torch.float64))
    assert found.nonfinite == 0
    assert torch.isfinite(found.tiles).all()


@pytest.mark.parametrize(
    "view",
    [
        lambda tensor: tensor.T.contiguous().T,
        lambda tensor: tensor.repeat_interleave(2, 1)[:, ::2],
        lambda tensor: torch.nn.functional.pad(tensor, (1, 5, 2, 0))[2:, 1:-5],
    ],
    ids=["transposed", "strided", "narrowed"],
)
def test_memory_does_not_matter(view):
    tensor = normal((96, 200))
    assert not view(tensor).is_contiguous()
    assert_same(sketch(view(tensor)), sketch(tensor), of=tensor)


def test_the_same_tensor_has_the_same_sketch_to_the_bit():
    tensor = normal((300, 200), dtype=torch.float32)
    assert torch.equal(sketch(tensor).tiles, sketch(tensor.clone()).tiles)


def test_signs_are_the_same_in_every_version():
    """Two traces of different versions of tpcheck would otherwise differ everywhere."""
    found = sketch(torch.arange(6.0).reshape(2, 3))
    assert found.tiles.sum((1, 2)).tolist() == [-15.0, -3.0, -9.0, -3.0]
    assert sketch(torch.arange(6.0)).tiles.sum((1, 2)).tolist() == [3.0, -7.0, -11.0, -15.0]
    assert sample_keys(torch.tensor([[1, 2, 3]])).tolist() == [-876157997464484058]


def test_gradients_autocast_and_inference_mode_leave_it_alone():
    tensor = normal((64, 64), dtype=torch.float32).requires_grad_()
    expected = sketch(tensor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sketch(tensor).tiles, expected.tiles)
    with torch.inference_mode():
        started = start_sketch(tensor)
    assert torch.equal(fetch_sketches([started.add(start_sketch(tensor))])[0].tiles, 2 * expected.tiles)


# ---- on the device


def test_micro_batches_are_summed_before_they_are_fetched():
    first, second = normal((32, 32), 1), normal((32, 32), 2)
    fetched = fetch_sketches([start_sketch(first).add(start_sketch(second)), start_sketch(first)])
    assert_same(fetched[0], sketch(first) + sketch(second), of=first)
    assert_same(fetched[1], sketch(first), of=first)
    assert fetch_sketches([]) == []


def test_sketches_on_the_cpu_lie_outside_the_heap_in_a_few_blocks():
    """Between the activations of a step they would leave holes that no gradient fits into."""
    tensor = normal((32, 32))
    started = [start_sketch(tensor) for _ in range(300)]
    started += [first.add(second) for first, second in pairwise(started)]
    places = {each.packed.data_ptr() for each in started}
    assert len(places) == len(started)
    assert len({each.block.data_ptr() for each in started}) <= 6
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(address, 16) for address in line.split()[0].split("-"))
        if any(first <= place < last for place in places):
            assert "[heap]" not in line
            assert line.split()[1] == "rw-p", "a forked process would write into it"


def test_a_block_of_sketches_is_freed_with_the_last_of_them():
    started = [start_sketch(normal((4, 4))) for _ in range(300)]
    blocks = [weakref.ref(each.block) for each in started]
    kept = started[150]
    del started
    assert blocks[0]() is None
    assert blocks[150]() is kept.block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64])
@pytest.mark.parametrize("shape", [(64, 48), (30, 7), (300,), ()])
def test_nothing_waits_for_a_device(shape, dtype):
    """A meta tensor has no values: whatever asks for one raises."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    assert start_sketch(tensor).packed.shape == (SIGN_SETS * TILES * TILES + 2,)
    if len(shape) == 2:
        keys = row_keys(sample_keys(torch.empty(shape, dtype=torch.int64, device="meta")), 1)
        start_sketch(tensor, rows=keys)
        start_sketch(tensor, GlobalIndex.shard((shape[0], 3 * shape[1]), Shard(1), 3, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.int64])
@pytest.mark.parametrize("shape", [(64, 48), (30, 7), (5, 30, 77), (300,), (), (0, 3)])
def test_a_device_computes_the_same(monkeypatch, shape, dtype):
    """Here the CPU takes a device's way."""
    tensor = (10 * normal(shape)).to(dtype)
    if tensor.numel() > 20 and dtype != torch.int64:
        tensor.view(-1)[[3, 17, 19]] = math.nan
    rows = row_keys(torch.arange(shape[0]), 1) if shape else None
    expected, expected_rows = sketch(tensor), sketch(tensor, rows=rows)
    for module in ("axes", "sketches", "store", "sums"):
        monkeypatch.setattr(f"tpcheck.numerics.sketch.{module}.is_host", lambda device: False)
    for actual, wanted in ((sketch(tensor), expected), (sketch(tensor, rows=rows), expected_rows)):
        assert distance(actual, wanted) <= (1e-6 if dtype == torch.bfloat16 else 1e-14) * wanted.norm
        assert actual.sum_squares == pytest.approx(wanted.sum_squares, rel=1e-6)
        assert (actual.numel, actual.nonfinite) == (wanted.numel, wanted.nonfinite)


# ---- pieces


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (GlobalIndex.whole((4, 6)), GlobalIndex((4, 6), (torch.arange(4), None))),
        (GlobalIndex.whole((4, 6)), GlobalIndex((4, 6), (None, None), fragment=(0, 24))),
        (GlobalIndex.shard((4, 6), Shard(0), 2, 1), GlobalIndex((4, 6), (None, None), fragment=(12, 24))),
        (GlobalIndex.shard((4, 6), Shard(0), 2, 1), GlobalIndex((4, 6), (None, None), positions=torch.arange(12, 24))),
        (
            GlobalIndex.shard((4, 6), Shard(1), 2, 0),
            GlobalIndex((4, 6), (None, None), positions=torch.tensor([-1, 0, 1, 2, 6, 7, 8, 12, 13, 14, 20, 19, 18])),
        ),
        (GlobalIndex((4, 6), (None, torch.tensor([5, 0]))), GlobalIndex((4, 6), (None, torch.tensor([0, 5])))),
        (
            GlobalIndex((4, 6), (None, torch.tensor([0, 5])), fragment=(1, 4)),
            GlobalIndex((4, 6), (None, None), positions=torch.tensor([5, 6, 11])),
        ),
        (GlobalIndex((4, 6), (None, None), fragment=(3, 3)), GlobalIndex((4, 6), (torch.tensor([]).long(), None))),
    ],
)
def test_indices_of_the_same_elements_are_one_piece(first, second):
    assert first.piece() == second.piece()


def test_a_fragment_of_an_index_that_was_named_before_is_another_piece():
    index = GlobalIndex.whole((4, 3))
    assert index.piece() != replace(index, fragment=(0, 6)).piece()


def test_indices_of_other_elements_are_other_pieces():
    indices = [
        GlobalIndex.whole((4, 6)),
        GlobalIndex.whole((6, 4)),
        GlobalIndex.whole((24,)),
        *(GlobalIndex.shard((4, 6), Shard(0), 2, rank) for rank in range(2)),
        *(GlobalIndex.shard((4, 6), Shard(1), 2, rank) for rank in range(2)),
        GlobalIndex((4, 6), (None, None), fragment=(0, 11)),
        GlobalIndex((4, 6), (None, None), fragment=(0, 0)),
        GlobalIndex((4, 6), (torch.tensor([0, 2]), None)),
        GlobalIndex((4, 6), (None, None), positions=torch.tensor([0, 7, 3])),
    ]
    assert len({index.piece() for index in indices}) == len(indices)


# ---- wrong arguments


@pytest.mark.parametrize(
    ("tensor", "index", "rows"),
    [
        (torch.zeros(3, 4), GlobalIndex.whole((4, 3)), None),
        (torch.zeros(3, 4), GlobalIndex((3, 4), (None, None), fragment=(0, 5)), None),
        (torch.zeros(3, 4), None, row_keys(torch.zeros(2, dtype=torch.int64), 2)),
        (torch.zeros(3, 4), GlobalIndex.whole((5,)), row_keys(torch.zeros(3, dtype=torch.int64), 1)),
    ],
)
def test_a_tensor_of_another_shape_is_refused(tensor, index, rows):
    with pytest.raises(UsageError, match="expected"):
        sketch(tensor, index, rows=rows)
