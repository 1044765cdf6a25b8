"""Dropout in vertical order: the masks of the loop, the generator where the loop leaves it, or an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.errors import OffloadError, RandomDrawsError
from memtrain.offload.random_advance import NOTHING, Advance, advance_between
from memtrain.offload.surroundings import random_states
from memtrain.planner.actions import Action, BlockDecision, MicroBatchOrder, Tier
from tests.offload.latest_store import make_plan
from tests.offload.streamed import DEPTH, assert_same, blocks_of, llama
from tests.offload.test_parameters_activations import DECISIONS, streaming
from tests.offload.test_vertical import vertical_plan
from tests.offload.vertical_runs import (
    Loss,
    forward_and_backward,
    gradients,
    hugging_face,
    micro_batches,
    no_thread_left,
    vertical,
)

CPU = torch.device("cpu")
SEED = 11


def dropping(*, tied: bool = False, attention: float = 0.2) -> nn.Module:
    """Drops parts of embeddings, attention's probabilities, both residuals, and what the head is given."""
    model: Any = llama(tied=tied)

    def drop(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return F.dropout(output, 0.1, module.training)

    for _, block in blocks_of(model):
        block.self_attn.attention_dropout = attention
        block.self_attn.o_proj.register_forward_hook(drop)
        block.mlp.down_proj.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)
    model.model.norm.register_forward_hook(drop)
    return model


def looped(
    model: nn.Module, data: Sequence[Tensor], loss_of: Loss = hugging_face
) -> tuple[list[Tensor], list[Advance]]:
    """Losses, gradients and a last random number of the loop; and what each pass drew."""
    torch.manual_seed(SEED)
    losses, draws = [], []
    for tokens in data:
        before = random_states(CPU)
        losses.append(forward_and_backward(model, tokens, len(data), loss_of))
        draws.append(advance_between(before, random_states(CPU)))
    assert None not in draws
    return [*losses, *gradients(model), torch.rand(3)], draws


def ordered(
    model: nn.Module,
    data: Sequence[Tensor],
    draws: Sequence[Advance],
    loss_of: Loss = hugging_face,
    *,
    seed: int = SEED,
) -> list[Tensor]:
    torch.manual_seed(seed)
    return [*vertical(model, data, loss_of, draws=draws), torch.rand(3)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_masks_and_generator_are_those_of_the_loop(tied: bool, count: int) -> None:
    data = micro_batches(count)
    expected, draws = looped(dropping(tied=tied), data)
    assert NOTHING not in draws
    assert_same(expected, ordered(dropping(tied=tied), data, draws))
    if count > 1:  # the masks are different ones, and it shows
        other = ordered(dropping(tied=tied), data, draws, seed=SEED + 1)
        assert not torch.equal(other[1], expected[1])


def test_one_micro_batch_of_several_draws() -> None:
    def sometimes(model: nn.Module, tokens: Tensor) -> Tensor:
        loss = hugging_face(model, tokens)
        return loss * torch.rand(40).mean() if tokens.shape[1] == 11 else loss

    data = micro_batches(3)
    expected, draws = looped(llama(), data, sometimes)
    assert draws == [NOTHING, Advance(words=40), NOTHING]
    assert_same(expected, ordered(llama(), data, draws, sometimes))


RANGES = {
    "first tokens": [
        BlockDecision(block=b, action=Action.RECOMPUTE, recomputed_tokens=5, rest_tier=Tier.HOST)
        for b in range(DEPTH)
    ],
}


@pytest.mark.parametrize("name", [*DECISIONS, *RANGES])
def test_under_every_action(name: str) -> None:
    data = micro_batches(3, same_length=True)
    attention = 0.2 if name in DECISIONS else 0.0  # with dropout its tokens cannot be told apart
    expected, draws = looped(dropping(tied=True, attention=attention), data)
    model = dropping(tied=True, attention=attention)
    with streaming(model, slots=2) as (_, engine):
        plan = vertical_plan(name, 3) if name in DECISIONS else ranges_plan(name)
        executor = ActivationExecutor(model, blocks_of(model), plan, engine)
        executor.install()
        for _ in range(2):  # tokens are probed in the first pass, which must leave no trace
            found = ordered(model, data, draws)
            model.zero_grad()
        again, same = looped(model, data)  # a loop of one's own goes on working
        executor.remove()
    assert same == draws
    if name in DECISIONS or all(probe.bit_equal for probe in executor.token_probes.values()):
        assert_same(expected, found)
    assert_same(again, found)


def ranges_plan(name: str) -> Any:
    return dataclasses.replace(
        make_plan(RANGES[name], slots=3, slot_bytes=2 << 20),
        micro_batches=3,
        micro_batch_order=MicroBatchOrder.VERTICAL,
    )


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_pass_that_draws_otherwise_is_an_error_and_the_generator_is_put_back(
    which: int, change: int
) -> None:
    data = micro_batches(3)
    expected, draws = looped(dropping(), data)
    wrong = list(draws)
    wrong[which] = Advance(words=draws[which].words + change)
    model = dropping()
    torch.manual_seed(SEED)
    state = torch.get_rng_state()
    message = f"micro-batch {which} draws more or fewer random numbers than were drawn.*zero_grad"
    with no_thread_left(), pytest.raises(RandomDrawsError, match=message):
        vertical(model, data, draws=wrong)
    assert torch.equal(state, torch.get_rng_state())
    model.zero_grad()
    assert_same(expected, [*vertical(model, data, draws=draws), torch.rand(3)])


def test_numbers_where_none_are_known_of_are_refused_by_name_before_gradients() -> None:
    model: Any = llama()
    model.model.layers[1].mlp.down_proj = nn.Sequential(nn.Linear(384, 256), nn.Dropout(0.1))
    state = torch.get_rng_state()
    with (
        no_thread_left(),
        pytest.raises(RandomDrawsError, match=r"random numbers \(forward of model\.layers\.1\)"),
    ):
        vertical(model, micro_batches(2))
    assert not gradients(model)  # nothing was added up
    assert torch.equal(state, torch.get_rng_state())
    model.eval()
    vertical(model, micro_batches(2))


def test_numbers_before_the_blocks_and_in_the_loss_are_seen_too() -> None:
    model = llama()

    def before(model: nn.Module, tokens: Tensor) -> Tensor:
        torch.rand(1)
        return hugging_face(model, tokens)

    with pytest.raises(OffloadError, match=r"random numbers \(the part before the blocks"):
        vertical(model, micro_batches(2), before)

    def behind(model: nn.Module, tokens: Tensor) -> Tensor:
        return hugging_face(model, tokens) + torch.rand(())

    with pytest.raises(OffloadError, match=r"random numbers \(the part behind the blocks"):
        vertical(model, micro_batches(2), behind)
    torch.manual_seed(SEED)
    data = micro_batches(2)
    expected = [forward_and_backward(model, tokens, 2, behind) for tokens in data]
    state = torch.get_rng_state()
    torch.manual_seed(SEED)
    model.zero_grad()
    assert_same(expected, vertical(model, data, behind, draws=[Advance(words=1)] * 2)[:2])
    assert torch.equal(state, torch.get_rng_state())


def test_another_failure_puts_the_generator_back() -> None:
    data = micro_batches(2)
    _, draws = looped(dropping(), data)
    model = dropping()

    def failing(model: nn.Module, tokens: Tensor) -> Tensor:
        loss = hugging_face(model, tokens)
        raise ZeroDivisionError(str(loss.item()))

    state = torch.get_rng_state()
    with no_thread_left(), pytest.raises(ZeroDivisionError):
        vertical(model, data, failing, draws=draws)
    assert torch.equal(state, torch.get_rng_state())
