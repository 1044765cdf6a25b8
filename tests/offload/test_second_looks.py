"""A block may do otherwise than when it was looked at, and a look must not change it: never in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.offload import attention_probe
from memtrain.offload import compare as compare_module
from memtrain.offload.errors import OffloadError, SavedTensorModifiedError, TokenRangeError
from memtrain.planner.actions import Action, BlockDecision, Tier
from tests.offload.test_token_ranges import assert_as_probed, assert_equal, compare, every, executor_for
from tests.offload.token_models import DEPTH, WIDTH, CausalNet, RowwiseLinear, batches, llama, train

FREE, EXCEPT_ATTENTION = Action.RECOMPUTE_NEARLY_FREE, Action.RECOMPUTE_EXCEPT_ATTENTION
BY_PREFIX = {"cut": every(8), "attention": every(None, action=EXCEPT_ATTENTION, attention_tokens=8)}
ALL = {"whole": every(None), "free": every(None, action=FREE), **BY_PREFIX}


class Attending(nn.Module):
    """Attention under the mask that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.qkv(hidden).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return hidden + self.out(mixed.transpose(1, 2).flatten(2)).tanh()


class SeeingPrefix(CausalNet):
    """As a prefix language model: the first tokens, as many as ``sees`` says, see each other."""

    def __init__(self) -> None:
        super().__init__(Attending)
        self.sees = 0

    def forward(self, tokens: Tensor) -> Tensor:
        count = tokens.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool).tril()
        mask[: self.sees, : self.sees] = True
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, mask=mask.expand(tokens.shape[0], 1, -1, -1))
        return F.linear(hidden, self.embed.weight).logsumexp(-1).mean()


@pytest.mark.parametrize("name", BY_PREFIX)
def test_a_mask_that_looks_ahead_in_a_later_batch(name: str) -> None:
    torch.manual_seed(0)
    model = SeeingPrefix()
    executor = executor_for(model, BY_PREFIX[name])
    executor.install()
    tokens = batches(2, 17, 1)[0]
    for sees in (0, 5, 8):  # tokens before the eighth see none behind it
        model.sees = sees
        model(tokens).backward()
    model.sees = 12
    loss = model(tokens)
    with pytest.raises(TokenRangeError, match=r"blocks\.2: the first 8 tokens alone give other values"):
        loss.backward()
    executor.remove()


def test_a_training_that_has_diverged_is_left_alone() -> None:
    class Diverging(CausalNet):
        def __init__(self) -> None:
            super().__init__(lambda: nn.Linear(WIDTH, WIDTH))

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.embed(tokens)
            if tokens[0, 0] == 0:
                hidden = hidden / torch.zeros(())
            for block in self.blocks:
                hidden = block(hidden)
            return hidden.tanh().mean()

    data = batches(2, 17, 2)
    data[0][0, 0], data[1][0, 0] = 1, 0
    plain, planned, _ = compare(Diverging, every(8), data)
    assert any(a.isnan().any() for a in plain)
    assert [a.isnan().any() for a in plain] == [b.isnan().any() for b in planned]


class Stretched(nn.Module):
    """Positions that are scaled in rows of more than 20 tokens, as some rotary embeddings are."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = RowwiseLinear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        tokens = hidden.shape[1]
        places = torch.arange(tokens)[:, None] * min(1.0, 20 / tokens)
        return hidden + (self.mix(hidden) + places.sin()).tanh()


def test_longer_rows_are_looked_at_anew() -> None:
    data = [batches(2, tokens, 1)[0] for tokens in (17, 12, 19)]
    plain, planned, _ = compare(lambda: CausalNet(Stretched), every(8), data)
    assert_equal(plain, planned)
    with pytest.raises(TokenRangeError, match=r"blocks\.0: gives other values for the first 8 tokens"):
        compare(lambda: CausalNet(Stretched), every(8), [*data, batches(2, 21, 1)[0]])


class Choosing(nn.Module):
    """One of four experts for every token, all of which are computed; the choice is saved."""

    looks = 0

    def __init__(self) -> None:
        super().__init__()
        self.router = RowwiseLinear(WIDTH, 4)
        self.experts = RowwiseLinear(WIDTH, 4 * WIDTH)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        Choosing.looks += 1
        weight, expert = self.router(hidden).softmax(-1).topk(1, -1)
        found = self.experts(hidden).unflatten(-1, (4, WIDTH))
        chosen = found.gather(2, expert[..., None].expand(-1, -1, -1, WIDTH)).squeeze(2)
        return hidden + chosen * weight


def test_a_block_that_chooses_is_looked_at_for_every_size() -> None:
    """Its indices are an expanded tensor: autograd saves what lies in one place many times."""
    data = [*batches(2, 17, 2), batches(3, 17, 1)[0], batches(2, 12, 1)[0]]
    plain, planned, _ = compare(lambda: CausalNet(Choosing), every(8), data)
    assert_equal(plain, planned)
    torch.manual_seed(0)
    model = CausalNet(Choosing)
    executor = executor_for(model, every(8))
    executor.install()
    looks = []
    for tokens in data:
        Choosing.looks = 0
        model(tokens)
        looks.append(Choosing.looks // DEPTH)
    executor.remove()
    assert looks == [5, 1, 5, 5]  # four to look, and the forward itself


class Rounding(nn.Module):
    """Rounds otherwise in rows of as many tokens as ``sizes`` names, as matrix products do."""

    sizes: tuple[int, ...] = ()
    looks = 0

    def __init__(self) -> None:
        super().__init__()
        self.mix = RowwiseLinear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        Rounding.looks += 1
        return hidden + (self.mix(hidden) * (1.0 + 2.0**-22 * (hidden.shape[1] in self.sizes))).tanh()


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> type[Rounding]:
    monkeypatch.setattr(Rounding, "sizes", (12,))
    return Rounding


def test_rows_of_another_length_are_rounded_otherwise(rounding: type[Rounding]) -> None:
    """Shorter ones than those that were looked at: let pass, unless the plan promises that all is exact."""
    data = [batches(2, tokens, 1)[0] for tokens in (17, 15, 12)]
    assert_equal(*compare(lambda: CausalNet(rounding), every(8), data[:2], exact_only=True)[:2])
    plain, planned, _ = compare(lambda: CausalNet(rounding), every(8), data)
    assert not all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))
    with pytest.raises(
        TokenRangeError, match=r"^blocks\.0: the first 8 of 12 tokens .*exact_only: false .*, plan without"
    ):
        compare(lambda: CausalNet(rounding), every(8), data, exact_only=True)


@pytest.mark.parametrize("apart", [0.0, 1e-7])
def test_attention_of_a_prefix_must_be_as_exact(monkeypatch: pytest.MonkeyPatch, apart: float) -> None:
    """As found by a probe, here made up: kernels of some machines are exact for these sizes."""
    monkeypatch.setattr(
        attention_probe, "token_axis", lambda *given: (compare_module.token_axis(*given)[0], apart)
    )
    torch.manual_seed(0)
    model = SeeingPrefix()
    for exact_only in (False, True):
        executor = executor_for(
            model, every(None, action=EXCEPT_ATTENTION, attention_tokens=4), exact_only=exact_only
        )
        executor.install()
        if exact_only and apart:
            with pytest.raises(TokenRangeError, match=r"^blocks\.0: the first 4 of 17 tokens .* 1\.0e-07 "):
                model(batches(2, 17, 1)[0])
        else:
            model(batches(2, 17, 1)[0])
        executor.remove()


def test_every_size_is_looked_at_once_where_the_plan_promises_bits(rounding: type[Rounding]) -> None:
    torch.manual_seed(0)
    model = CausalNet(rounding)
    executor = executor_for(model, every(8), exact_only=True)
    executor.install()
    looks = []
    for tokens in (17, 17, 15, 17, 15, 8):
        rounding.looks = 0
        model(batches(2, tokens, 1)[0])
        looks.append(rounding.looks // DEPTH)
    executor.remove()
    assert looks == [5, 1, 5, 1, 1, 1]  # rows of 8 tokens are computed again as a whole


def test_a_promise_is_kept_in_backward_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that were looked at round otherwise later, which no look foresees: the witness row shows it."""
    torch.manual_seed(0)
    model = CausalNet(Rounding)
    tokens = batches(2, 17, 1)[0]
    for exact_only in (False, True):
        monkeypatch.setattr(Rounding, "sizes", ())
        executor = executor_for(model, every(8), exact_only=exact_only)
        executor.install()
        model(tokens).backward()
        monkeypatch.setattr(Rounding, "sizes", (17,))
        loss = model(tokens)
        if exact_only:
            with pytest.raises(
                TokenRangeError, match=r"blocks\.2: the first 8 tokens alone give other values"
            ):
                loss.backward()
        else:
            loss.backward()
        executor.remove()


@pytest.mark.parametrize("decisions", [every(5), every(5, Tier.NVME, input_tier=Tier.NVME)])
def test_parameters_that_are_frozen_and_freed(decisions: list[BlockDecision]) -> None:
    class Toggling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()
            self.blocks = self.inner.blocks
            self.steps = 0

        def forward(self, tokens: Tensor) -> Any:
            for name, parameter in self.blocks.named_parameters():
                if "q_proj" in name or "up_proj" in name:
                    parameter.requires_grad_(self.steps % 2 == 1)
                    parameter.grad = None
            self.steps += 1
            return self.inner(tokens)

    found = compare(Toggling, decisions, batches(2, 17))
    assert_as_probed(*found, bound=1e-4)


def test_dropouts_that_are_switched() -> None:
    class Switching(CausalNet):
        def __init__(self) -> None:
            super().__init__(lambda: nn.Sequential(RowwiseLinear(WIDTH, WIDTH), nn.Dropout(0.2), nn.Tanh()))
            self.steps = 0

        def forward(self, tokens: Tensor) -> Tensor:
            self.steps += 1
            hidden = self.embed(tokens)
            for block in self.blocks:
                block[1].train(self.steps % 2 == 0)
                hidden = block(hidden)
            return hidden.square().mean()

    plain, planned, _ = compare(Switching, every(8), batches(2, 17))
    assert_equal(plain, planned)


def test_attention_of_a_frozen_block_is_rounded_too() -> None:
    """Nothing is saved there, so that no type says what rounding may do."""

    def frozen() -> nn.Module:
        model = llama()
        model.model.model.embed_tokens.weight.requires_grad_(False)
        model.blocks[0].requires_grad_(False)
        return model

    decisions = every(5, action=EXCEPT_ATTENTION, attention_tokens=3)
    assert_as_probed(*compare(frozen, decisions, batches(2, 17)), bound=1e-4)


# blocks that change something ---------------------------------------------------------------------


class Counting(nn.Module):
    """Changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = RowwiseLinear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        self.mean += hidden.detach().mean((0, 1))
        return self.mix(hidden).tanh()


class Doubling(nn.Module):
    """Changes its argument, where autograd allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = RowwiseLinear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        return self.mix(hidden * 2 if hidden.requires_grad else hidden.mul_(2.0)).tanh()


def run(block: Callable[[], nn.Module], decisions: list[BlockDecision]) -> None:
    torch.manual_seed(0)
    model = CausalNet(block)
    model.embed.weight.requires_grad_(False)
    executor = executor_for(model, decisions)
    executor.install()
    try:
        train(model, batches(2, 17))
    finally:
        executor.remove()


@pytest.mark.parametrize("name", ["whole", "free", "cut"])
def test_a_block_that_changes_a_buffer_is_refused(name: str) -> None:
    with pytest.raises(OffloadError, match=r"blocks\.0: its forward changes a tensor of shape \(64,\) in pl"):
        run(Counting, ALL[name])


def test_a_block_that_changes_its_argument_is_refused() -> None:
    with pytest.raises(OffloadError, match=r"blocks\.0: its forward changes a tensor of shape \(2, 17, 64\)"):
        run(Doubling, ALL["free"])
    with pytest.raises(TokenRangeError, match=r"blocks\.0: .*saved tensor 0"):
        run(Doubling, ALL["cut"])


class Spoiling(nn.Module):
    """Changes what exp has saved: plain PyTorch refuses that."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = RowwiseLinear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        grown = self.mix(hidden).tanh().exp()
        spoiled = grown.mul_(0.5)
        return hidden + spoiled.tanh()


@pytest.mark.parametrize("name", ["whole", "free"])
def test_a_saved_tensor_that_is_changed_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(CausalNet(Spoiling), batches(2, 17, 1))
    with pytest.raises(SavedTensorModifiedError, match="changed in place"):
        run(Spoiling, ALL[name])


@pytest.mark.parametrize("name", ["free", "cut"])
def test_what_a_look_leaves_behind_is_named(name: str) -> None:
    """A list outside of the block, as of router logits, gets what was computed to look at it."""
    kept: list[Tensor] = []

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = RowwiseLinear(WIDTH, WIDTH)

        def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
            kept.append(self.mix(hidden).tanh())
            return hidden + kept[-1]

    torch.manual_seed(0)
    model = CausalNet(Keeping)
    executor = executor_for(model, ALL[name])
    executor.install()
    loss = model(batches(2, 17, 1)[0])
    with pytest.raises(OffloadError, match="run only to look at a block: something kept what it computed"):
        (loss + sum(part.square().mean() for part in kept if part.shape[1] == 17)).backward()
    executor.remove()
