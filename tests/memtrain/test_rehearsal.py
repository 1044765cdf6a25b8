"""What the tracer is told of blocks that are computed again in part: by hand, and against what runs."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain import rehearsal
from memtrain.offload.block_survey import BlockSurvey
from memtrain.offload.token_kinds import TokenProbe
from memtrain.offload.token_probe import probe_tokens
from memtrain.offload.unmoved import FixedTensors
from memtrain.planner.actions import Action, BlockDecision
from memtrain.planner.options import PlannerOptions
from memtrain.planner.profile import BlockProfile, Prefixes
from memtrain.planner.trace import profile_model
from memtrain.planner.tracing.live_bytes import LiveBytes
from memtrain.rehearsal import BlockRehearsal

WIDTH, INNER, HEADS, TOKENS = 32, 80, 4, 24
HIDDEN = 2 * TOKENS * WIDTH * 4
"""Bytes of one hidden state: two rows of 24 tokens in fp32."""


class Gated(nn.Module):
    """A Llama block without rotary embedding: norm, attention, norm, SwiGLU."""

    def __init__(self, *, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norms[0](hidden)
        q, k, v = (p(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        hidden = hidden + self.o(mixed.transpose(1, 2).flatten(2))
        normed = self.norms[1](hidden)
        return hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Net(nn.Module):
    def __init__(self, **block: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Gated(**block) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().mean()


def profile_of(model: nn.Module) -> BlockProfile:
    tokens = torch.randint(50, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters())
    profile = profile_model(
        model, (tokens,), optimizer=optimizer, elementwise=True, rehearsal=BlockRehearsal(model)
    )
    return profile.blocks[1]


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def test_nearly_free_stores_products_and_attention_but_not_the_last_product(model: Net) -> None:
    found = profile_of(model).nearly_free
    assert found is not None
    # q, k, v, attention's output and the logarithms of its sums, o, gate and up.
    logarithms = 2 * HEADS * TOKENS * 4
    wide = 2 * TOKENS * INNER * 4
    assert found.stored_bytes == 5 * HIDDEN + logarithms + 2 * wide
    assert found.stored_tensors == 8
    assert found.forward_seconds > 0.0


def test_backward_of_nearly_free_needs_what_is_computed_again_alone(model: Net) -> None:
    block = profile_of(model)
    assert block.nearly_free is not None
    # Everything that the block saves but the input and what is stored of it comes again: not one byte of
    # the stored outputs is counted, and less than a whole recompute would need.
    whole = block.saved_bytes + max(block.forward_transient_bytes, block.backward_transient_bytes)
    stored_and_saved = block.attention_bytes + 3 * HIDDEN + 2 * (2 * TOKENS * INNER * 4)  # q, k, v; gate, up
    assert (
        block.saved_bytes - stored_and_saved <= block.nearly_free.backward_bytes <= whole - stored_and_saved
    )


def test_prefixes_are_eighths_and_every_saved_byte_has_a_token(model: Net) -> None:
    block = profile_of(model)
    found = block.prefixes
    assert found is not None
    assert (found.tokens, found.lengths) == (TOKENS, (3, 6, 9, 12, 15, 18, 21))
    assert (found.cut_bytes, found.whole_bytes) == (block.saved_bytes, 0)
    assert found.attention_whole_bytes == 0
    assert found.largest_bytes == 2 * TOKENS * INNER * 4
    assert all(0.0 <= difference < 1e-4 for difference in found.differences)


def test_a_run_takes_what_the_profile_says_to_look_at_tokens(model: Net) -> None:
    """Whichever prefix a plan has chosen, of tokens or of attention: the longest takes the most."""
    prefixes = profile_of(model).prefixes
    assert prefixes is not None
    # A row of the product of gate and up, which the last linear saves; of the output of attention, and the
    # logarithms of its sums.
    assert prefixes.witness_bytes == 2 * 4 * (INNER + WIDTH + HEADS)
    hidden, peaks = torch.randn(2, TOKENS, WIDTH, requires_grad=True), []
    decisions = [
        decision
        for length in prefixes.lengths
        for decision in (
            BlockDecision(block=0, action=Action.RECOMPUTE, recomputed_tokens=length),
            BlockDecision(block=0, action=Action.RECOMPUTE_EXCEPT_ATTENTION, attention_tokens=length),
        )
    ]
    for decision in decisions:
        survey = BlockSurvey("layers.1", model.layers[1], decision, FixedTensors(model).__contains__)
        with LiveBytes() as live:
            survey.parts(model.layers[1].forward, (hidden,), {})
        peaks.append(live.peak_bytes + HIDDEN)
    assert max(peaks) == prefixes.probe_bytes


def test_a_block_that_looks_ahead_has_no_prefixes_and_says_why() -> None:
    block = profile_of(Net(causal=False))
    assert block.prefixes is None
    assert "causal" in block.prefix_reason
    assert block.nearly_free is not None


def test_rows_too_short_to_be_cut(model: Net) -> None:
    found = BlockRehearsal(model).prefixes(
        "layers.0", model.layers[0], (torch.randn(2, 1, WIDTH),), {}, lengths=lambda _: (), largest_bytes=0
    )
    assert found == "it has 1 tokens, too few to be cut"


def prefixes_of_two(monkeypatch: pytest.MonkeyPatch, model: Net, **shorter: int) -> Prefixes | str:
    """What a rehearsal makes of prefixes of 6 and 12 tokens if the probe of the shorter says ``shorter``."""

    def probe(*args: Any, **kwargs: Any) -> TokenProbe:
        found = probe_tokens(*args, **kwargs)
        return replace(found, **shorter) if kwargs["prefix"] == 6 else found

    monkeypatch.setattr(rehearsal, "probe_tokens", probe)
    hidden = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    return BlockRehearsal(model).prefixes(
        "layers.0", model.layers[0].forward, (hidden,), {}, lengths=lambda _: (6, 12), largest_bytes=0
    )


def test_what_is_stored_whole_under_any_prefix_counts(monkeypatch: pytest.MonkeyPatch, model: Net) -> None:
    found = prefixes_of_two(monkeypatch, model, whole_bytes=40)
    assert isinstance(found, Prefixes)
    assert found.whole_bytes == 40  # the longer one has none


def test_rows_that_depend_on_the_prefix_are_none(monkeypatch: pytest.MonkeyPatch, model: Net) -> None:
    found = prefixes_of_two(monkeypatch, model, row_bytes=8)
    assert isinstance(found, str)
    assert "depends on the prefix ([8, " in found


def test_a_rehearsal_leaves_no_trace(model: Net) -> None:
    weights = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    profile_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_nothing_outlives_a_rehearsal(model: Net) -> None:
    """A graph whose hooks hold it is a cycle through C++ that no collector sees."""
    hidden = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    with LiveBytes() as live:
        found = BlockRehearsal(model).prefixes(
            "layers.0", model.layers[0].forward, (hidden,), {}, lengths=lambda _: (6, 12), largest_bytes=0
        )
        assert not isinstance(found, str)
        gc.collect()
        assert live.now_bytes == 0


def test_what_the_options_rule_out_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch, model: Net) -> None:
    monkeypatch.setattr(rehearsal, "probe_tokens", None)  # whoever calls them fails
    monkeypatch.setattr(rehearsal, "wanted_results", None)
    options = PlannerOptions(force={"block": {"action": "swap"}})
    tokens = torch.zeros(2, TOKENS, dtype=torch.long)
    optimizer = torch.optim.SGD(model.parameters())
    least = BlockRehearsal(model, options=options)
    profile = profile_model(model, (tokens,), optimizer=optimizer, elementwise=True, rehearsal=least)
    for block in profile.blocks:
        assert (block.nearly_free, block.prefixes) == (None, None)
        assert "the options of this plan rule it out" in block.prefix_reason


def test_without_a_rehearsal_nothing_is_cut(model: Net) -> None:
    tokens = torch.zeros(2, TOKENS, dtype=torch.long)
    profile = profile_model(model, (tokens,), optimizer=torch.optim.SGD(model.parameters()), elementwise=True)
    assert all(block.nearly_free is None and block.prefixes is None for block in profile.blocks)
