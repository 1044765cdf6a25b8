"""What is drawn is counted to the word, states are moved on to the byte; what has no count is found out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.offload import mersenne, random_advance
from memtrain.offload.random_advance import NOTHING, Advance, advance_between, advanced
from memtrain.offload.surroundings import random_states, set_random_states

CPU = torch.device("cpu")
DRAWS: list[Callable[[int], object]] = [
    lambda n: torch.nn.functional.dropout(torch.ones(n), 0.1),
    lambda n: torch.nn.functional.dropout(torch.ones(n, 3, dtype=torch.bfloat16), 0.5),
    lambda n: torch.rand(n, dtype=torch.float64),
    lambda n: torch.randn(16 + n),
    lambda n: torch.randperm(n),
    lambda n: torch.randint(9, (n,)),
    lambda n: torch.empty(n, dtype=torch.int32).random_(),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(7)


def test_words_by_hand() -> None:
    """An int32 takes a word, an int64 two; 624 words are a round of the generator."""
    before = random_states(CPU)
    torch.empty(623, dtype=torch.int32).random_()
    torch.empty(2, dtype=torch.int64).random_(1 << 40)
    after = random_states(CPU)
    assert advance_between(before, after) == Advance(words=627)
    assert torch.equal(advanced(before, Advance(words=627))[0], after[0])
    assert advance_between(before, before) == NOTHING


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(DRAWS), st.integers(1, 40_000)), max_size=5), st.integers(0, 700))
def test_any_draws_are_counted_and_repeated(
    draws: list[tuple[Callable[[int], object], int]], at: int
) -> None:
    torch.empty(at, dtype=torch.int32).random_()
    before = random_states(CPU)
    for draw, size in draws:
        draw(size)
    after = random_states(CPU)
    found = advance_between(before, after)
    assert found is not None
    assert torch.equal(advanced(before, found)[0], after[0])
    # From elsewhere in the stream, too.
    set_random_states(CPU, after)
    for draw, size in draws:
        draw(size)
    assert torch.equal(advanced(after, found)[0], random_states(CPU)[0])


@pytest.mark.parametrize(
    "draw", [lambda: torch.manual_seed(8), lambda: torch.manual_seed(7), lambda: torch.randn(1)]
)
def test_what_has_no_count(draw: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeded anew, to another seed or back; half of a pair of normal numbers left over."""
    monkeypatch.setattr(random_advance, "MOST_WORDS", 1 << 18)
    torch.rand(5)
    before = random_states(CPU)
    draw()
    assert advance_between(before, random_states(CPU)) is None


def test_half_a_pair_that_was_there_before_stays() -> None:
    torch.randn(1)
    before = random_states(CPU)
    torch.rand(4)
    assert advance_between(before, random_states(CPU)) == Advance(words=4)


@pytest.mark.parametrize("before", [0, 1, 623, 624, 1000])
@pytest.mark.parametrize("words", [624, 625, 1247, 24_960, 100_000])
def test_jumps_end_where_drawing_does(before: int, words: int) -> None:
    """From a generator that was just seeded, and from the first, last and some word of a round."""
    torch.empty(before, dtype=torch.int32).random_()
    state = torch.get_rng_state()
    torch.empty(words, dtype=torch.int32).random_()
    assert torch.equal(mersenne._jumped(state, words), torch.get_rng_state())


def test_a_long_advance_jumps() -> None:
    state = torch.get_rng_state()
    words = 2 * mersenne.DRAWN_WORDS + 17
    torch.empty(words, dtype=torch.int32).random_()
    assert torch.equal(mersenne.after_words(state, words), torch.get_rng_state())
    assert advance_between([state], random_states(CPU), Advance(words=words)) == Advance(words=words)
    assert advance_between([state], random_states(CPU), Advance(words=words + 1)) == Advance(words=words)
    # What nobody could draw is as far in one jump as in two.
    far = mersenne.after_words(state, 3 << 60)
    half = mersenne.after_words(mersenne.after_words(state, 3 << 59), 3 << 59)
    assert torch.equal(far, half)


def gpu_state(seed: int, offset: int) -> torch.Tensor:
    """As torch.cuda.get_rng_state gives it."""
    return torch.tensor([seed, offset], dtype=torch.int64).view(torch.uint8)


def test_states_of_a_gpu_are_moved_by_their_offset() -> None:
    cpu = torch.get_rng_state()
    before, after = [cpu, gpu_state(5, 8)], [cpu, gpu_state(5, 20)]
    found = advance_between(before, after)
    assert found == Advance(words=0, offset=12)
    moved = advanced(after, found)
    assert torch.equal(moved[1], gpu_state(5, 32))
    assert torch.equal(after[1], gpu_state(5, 20))  # a copy
    assert advance_between(before, [cpu, gpu_state(6, 20)]) is None
    assert advance_between(after, before) is None


@pytest.mark.gpu
def test_a_real_gpu() -> None:
    device = torch.device("cuda", 0)
    before = random_states(device)
    torch.nn.functional.dropout(torch.ones(1000, device=device), 0.1)
    torch.rand(3)
    after = random_states(device)
    found = advance_between(before, after)
    assert found is not None
    assert found.words == 3
    assert all(map(torch.equal, advanced(before, found), after))
