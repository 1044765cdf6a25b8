"""Random matrices from a key: the definitions, and the compiled ones to the bit."""

import math

import pytest
import torch

from memtrain.optim.projection.draw import (
    normal,
    quantiles,
    rademacher,
    reference_normal,
    reference_rademacher,
)
from memtrain.optim.storage import RandomKey, random_bits

CPU = torch.device("cpu")
KEY = RandomKey(seed=3, parameter=1, step=4)
SHAPES = [(1, 1), (0, 3), (3, 7), (33, 129), (257, 512)]


@pytest.mark.parametrize(("draw", "plain"), [(normal, reference_normal), (rademacher, reference_rademacher)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_is_plain_to_the_bit(draw, plain, shape, dtype):
    expected = plain(KEY, shape, CPU, scale=0.3, dtype=dtype)
    assert expected.dtype == dtype
    assert torch.equal(draw(KEY, shape, CPU, scale=0.3, dtype=dtype), expected)


def test_entries_follow_from_their_words():
    words = [word % 2**32 for word in random_bits(KEY, 3).tolist()]
    signs = rademacher(KEY, (2, 40), CPU).view(-1).tolist()
    assert signs == [2.0 * (words[e // 32] >> e % 32 & 1) - 1 for e in range(80)]
    table = quantiles().tolist()
    halves = [words[e // 2] >> 16 * (e % 2) & 0xFFFF for e in range(6)]
    assert normal(KEY, (6,), CPU).tolist() == [table[h % 2048] * (-1 if h & 0x8000 else 1) for h in halves]


def test_quantiles_have_the_moments_of_the_normal_distribution():
    table = quantiles().double()
    assert float(table.square().mean()) == pytest.approx(1, abs=1e-6)
    assert float(table.mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-3)
    assert float(table.pow(4).mean()) == pytest.approx(3, abs=0.02)
    assert float(table.max()) == pytest.approx(3.67, abs=0.01)
    # Checkpoints rely on them: a sketch goes on with the same numbers.
    assert [float(table[i]) * 2**20 for i in (0, 1000, 2047)] == [321, 688546, 3847139]


def test_a_key_with_an_offset_draws_what_lies_there():
    assert torch.equal(rademacher(KEY.skip(2), (40,), CPU), rademacher(KEY, (104,), CPU)[64:])
    assert torch.equal(normal(KEY.skip(2), (40,), CPU), normal(KEY, (44,), CPU)[4:])
