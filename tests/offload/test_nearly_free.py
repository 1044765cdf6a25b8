"""Products and attention are stored, the rest is computed again: bit for bit what plain PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memtrain.offload.errors import OffloadError
from memtrain.offload.result_survey import wanted_results
from memtrain.offload.results import PRODUCTS_AND_ATTENTION, is_product_or_attention
from memtrain.planner.actions import Action, BlockDecision, Tier
from tests.offload.test_activations import Block, Net
from tests.offload.test_token_ranges import assert_equal, compare, executor_for
from tests.offload.token_models import DEPTH, WIDTH, CausalNet, batches, gpt2, llama

DEVICE, NVME, HOST = Tier.DEVICE, Tier.NVME, Tier.HOST


def every(saved: Tier = DEVICE, entry: Tier = DEVICE, blocks: int = DEPTH) -> list[BlockDecision]:
    return [
        BlockDecision(block=b, action=Action.RECOMPUTE_NEARLY_FREE, saved_tier=saved, input_tier=entry)
        for b in range(blocks)
    ]


class Changing(nn.Module):
    """Results of products that are changed in place: through themselves, and through an unsafe view."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH, bias=False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        gate = self.gate(hidden).mul_(3.0)
        up = F.silu(self.up(hidden), inplace=True)
        up.add_(1.0)
        return hidden + self.down(gate * up.clone()).tanh()


def changing() -> nn.Module:
    return CausalNet(Changing)


def gpt2_with_dropout() -> nn.Module:
    return gpt2(0.1)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("saved", "entry"), [(DEVICE, DEVICE), (NVME, DEVICE), (DEVICE, HOST), (NVME, NVME)])
@pytest.mark.parametrize("make", [llama, gpt2_with_dropout, changing])
def test_bit_equal(
    make: Callable[[], nn.Module], saved: Tier, entry: Tier, autocast: bool, late: bool
) -> None:
    data = [batches(2, 33)[0], batches(1, 20)[0]]
    plain, planned, _ = compare(make, every(saved, entry), data, late=late, autocast=autocast)
    assert_equal(plain, planned)


class Operators(TorchDispatchMode):
    """Counts products and attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += is_product_or_attention(func)
        return func(*args, **(kwargs or {}))


def test_backward_runs_no_product_again() -> None:
    torch.manual_seed(0)
    model = llama()
    tokens = batches(2, 33)[0]
    counts = []
    for decisions in (None, every()):
        executor = None
        if decisions is not None:
            executor = executor_for(model, decisions)
            executor.install()
            model(tokens)  # looks at the blocks
        with Operators() as forward:
            loss = model(tokens)
        with Operators() as backward:
            loss.backward()
        counts.append((forward.count, backward.count))
        if executor is not None:
            executor.remove()
    assert counts[0] == counts[1]
    assert counts[0][0] == DEPTH * 8 + 1  # q, k, v, attention, o, gate, up, down; the head


def survey(block: nn.Module, hidden: Tensor) -> frozenset[int]:
    fixed = {p.untyped_storage().data_ptr() for p in block.parameters()}
    return wanted_results(
        PRODUCTS_AND_ATTENTION,
        block.forward,
        (hidden,),
        {},
        is_fixed=lambda tensor: tensor.untyped_storage().data_ptr() in fixed,
    )


def test_what_is_not_asked_for_again_or_changed_in_place_is_not_stored() -> None:
    hidden = torch.randn(2, 5, WIDTH, requires_grad=True)
    # The gate's product (0) and the other (1) are changed in place; the last one (2) is needed by tanh, which
    # saves its own result.
    assert survey(Changing(), hidden) == {2}
    # qkv, attention, out and up, of which relu takes the last in place; after down comes a dropout's mask.
    assert survey(Block(), hidden) == {0, 1, 2, 4}


def test_the_bytes_are_those_of_the_contract() -> None:
    """docs/architecture.md: the input, and every product and attention but the last projection."""
    torch.manual_seed(0)
    model = llama()
    executor = executor_for(model, every(NVME, HOST), slots=2 * DEPTH)
    executor.install()
    tokens = batches(2, 64, 1)[0]
    loss = model(tokens)
    sizes = {group.tier: group._used_bytes for group in executor._living()[:2]}
    token = 2 * 64 * 4
    assert sizes[HOST] == token * WIDTH
    # q 64, k and v 32 each, attention 64 with a number for each of 4 heads (2048 bytes: below a page, not
    # moved), o 64, gate and up 160 each.
    assert sizes[NVME] == token * (64 + 32 + 32 + 64 + 64 + 160 + 160)
    loss.backward()
    executor.remove()


def test_two_walks_over_one_graph() -> None:
    def walks(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(4)
        model.zero_grad()
        loss = model(batches(2, 33)[0])
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    for make in (llama, changing):
        torch.manual_seed(0)
        model = make()
        plain = walks(model)
        for saved in (DEVICE, NVME):
            executor = executor_for(model, every(saved))
            executor.install()
            found = walks(model)
            executor.remove()
            assert_equal(plain, found)


def test_dropout_views_and_shared_arguments() -> None:
    for late in (False, True):
        plain, planned, _ = compare(Net, every(NVME, blocks=5), batches(2, 16), late=late)
        assert_equal(plain, planned)


def test_a_second_forward_with_more_products_is_refused() -> None:
    class Moody(nn.Linear):
        again = False

        def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
            if self.again:
                super().forward(hidden)
                super().forward(hidden)
            return super().forward(hidden).tanh()

    torch.manual_seed(0)
    model = CausalNet(lambda: Moody(WIDTH, WIDTH))
    executor = executor_for(model, every())
    executor.install()
    loss = model(batches(2, 17)[0])
    model.blocks[1].again = True
    with pytest.raises(OffloadError, match=r"blocks\.1.*another way"):
        loss.backward()
    executor.remove()
