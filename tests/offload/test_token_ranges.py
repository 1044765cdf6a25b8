"""A block whose first tokens alone are computed again trains as plain PyTorch does."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.errors import TokenRangeError
from memtrain.planner.actions import Action, BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.decisions import Decisions
from memtrain.planner.plan import Staging
from memtrain.planner.simulate import simulate
from memtrain.planner.tracing.live_bytes import LiveBytes
from tests.offload.late_device import LateDevice
from tests.offload.latest_store import LatestEngine, make_plan
from tests.offload.token_models import DEPTH, WIDTH, CausalBlock, CausalNet, batches, gpt2, llama, train
from tests.planner.toys import make_block, make_machine, make_prefixes, make_profile

DEVICE, NVME, HOST, CXL = Tier.DEVICE, Tier.NVME, Tier.HOST, Tier.CXL


def every(first: int | None, rest: Tier = DEVICE, **fields: Any) -> list[BlockDecision]:
    fields.setdefault("action", Action.RECOMPUTE)
    return [BlockDecision(block=b, recomputed_tokens=first, rest_tier=rest, **fields) for b in range(DEPTH)]


def executor_for(
    model: Any, decisions: list[BlockDecision], *, late: bool = False, **plan: Any
) -> ActivationExecutor:
    engine = LatestEngine()
    if late:
        engine.device = LateDevice(eagerness=0.1)  # type: ignore[assignment]
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    return ActivationExecutor(model, blocks, make_plan(decisions, **plan), engine)  # type: ignore[arg-type]


def compare(
    make: Callable[[], nn.Module],
    decisions: list[BlockDecision],
    data: list[Tensor],
    *,
    late: bool = False,
    autocast: bool = False,
    **plan: Any,
) -> tuple[list[Tensor], list[Tensor], ActivationExecutor]:
    """What plain PyTorch and the executor find from the same start."""
    torch.manual_seed(0)
    model = make()
    twin = copy.deepcopy(model)
    plain = train(twin, data, autocast=autocast)
    executor = executor_for(model, decisions, late=late, **plan)
    executor.install()
    planned = train(model, data, autocast=autocast)
    engine: Any = executor._engine
    executor.remove()
    assert engine.live_bytes == 0
    if late:
        assert engine.device.faults == []
    return plain, planned, executor


def assert_equal(plain: list[Tensor], planned: list[Tensor]) -> None:
    assert all(a.isfinite().all() for a in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))


def assert_as_probed(
    plain: list[Tensor], planned: list[Tensor], executor: ActivationExecutor, bound: float
) -> None:
    """Bit-equal where the probe says so, otherwise within rounding: ``bound`` of a tensor's largest entry."""
    probes = executor.token_probes
    assert len(probes) == DEPTH
    if all(probe.bit_equal for probe in probes.values()):
        assert_equal(plain, planned)
    for a, b in zip(plain, planned, strict=True):
        assert (a - b).abs().max() <= bound * a.abs().max()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("rest", "entry"), [(DEVICE, DEVICE), (NVME, NVME), (CXL, HOST)])
@pytest.mark.parametrize("first", [1, 7, 16])
@pytest.mark.parametrize("rows", [1, 2])
def test_bit_equal_where_rows_do_not_depend_on_their_number(
    rows: int, first: int, rest: Tier, entry: Tier, late: bool
) -> None:
    plain, planned, executor = compare(
        CausalNet, every(first, rest, input_tier=entry), batches(rows, 17), late=late
    )
    assert_equal(plain, planned)
    assert all(probe.bit_equal for probe in executor.token_probes.values())


@pytest.mark.parametrize("slots", [2, 3, 4, 6])
def test_a_block_that_uses_two_tiers_takes_two_slots_as_predicted(slots: int) -> None:
    """Rests on one tier and inputs on another: what is still in its slot when backward begins is not read."""
    torch.manual_seed(0)
    model = CausalNet()
    executor = executor_for(model, every(16, CXL, input_tier=HOST), slots=slots)
    executor.install()
    model(batches(2, 33, 1)[0]).backward()
    engine: Any = executor._engine
    found = {tier: engine.store(tier).reads for tier in (CXL, HOST)}
    executor.remove()
    prefixes = make_prefixes(tokens=33, lengths=(16,), differences=(0.0,), cut_bytes=33 << 10)
    block = {"input_bytes": 33 << 10, "attention_bytes": 0, "prefixes": prefixes}
    profile = make_profile(block_profiles=tuple(make_block(i, **block) for i in range(DEPTH)))
    decisions = Decisions(
        blocks=tuple(every(16, CXL, input_tier=HOST)),
        states=tuple(StateDecision(unit=unit.name) for unit in profile.units),
        staging=Staging(input_slots=slots, input_slot_bytes=1 << 20),
        update_schedule=UpdateSchedule.SEQUENTIAL,
    )
    events = simulate(profile, make_machine(CXL, HOST), decisions).events
    predicted = Counter(event.resource for event in events)
    assert found == {tier: predicted[f"read:{tier.value}"] for tier in (CXL, HOST)}
    assert sum(found.values()) == 2 * DEPTH - slots


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("first", [5, 16, 32])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_real_models(make: Callable[[], nn.Module], first: int, autocast: bool) -> None:
    decisions = [
        BlockDecision(block=0, action=Action.RECOMPUTE, recomputed_tokens=first, rest_tier=NVME),
        BlockDecision(block=1, action=Action.RECOMPUTE, recomputed_tokens=first, input_tier=NVME),
        BlockDecision(block=2, action=Action.RECOMPUTE_EXCEPT_ATTENTION, recomputed_tokens=first),
    ]
    for rows in (1, 2):
        found = compare(make, decisions, batches(rows, 33), autocast=autocast)
        assert_as_probed(*found, bound=0.1 if autocast else 1e-4)
        # Nothing is stored whole: weights in autocast's precision are made again.
        assert {probe.whole_bytes for probe in found[2].token_probes.values()} == {0}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("first", "attention"), [(None, 8), (24, 8), (24, 23), (24, 0)])
@pytest.mark.parametrize(("saved", "rest"), [(DEVICE, DEVICE), (NVME, DEVICE), (HOST, NVME)])
def test_attention_by_prefix(saved: Tier, rest: Tier, first: int | None, attention: int, late: bool) -> None:
    decisions = every(
        first,
        rest if first is not None else DEVICE,
        action=Action.RECOMPUTE_EXCEPT_ATTENTION,
        saved_tier=saved,
        attention_tokens=attention,
    )
    for make in (llama, gpt2):
        found = compare(make, decisions, batches(2, 33, 2), late=late, slots=3)
        assert_as_probed(*found, bound=1e-4)


class Dropping(nn.Module):
    """Dropouts of several shapes and orders in memory, a whole row that is dropped, and one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = CausalBlock()

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        heads = F.dropout(hidden.unflatten(-1, (4, 16)).transpose(1, 2), 0.3)
        mixed = torch.native_dropout(heads.contiguous(), 0.2, True)[0]
        keep = torch.rand(hidden.shape[0], 1, 1).gt(0.1)
        hidden = self.inner(hidden + mixed.transpose(1, 2).flatten(2) * keep, table)
        folded = F.dropout(hidden.flatten(0, 1) * 1.0, 0.5, inplace=True)
        return F.dropout(folded.view_as(hidden), 0.1)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_dropout_is_the_same_as_without_token_ranges(rows: int, late: bool) -> None:
    plain, planned, executor = compare(
        lambda: CausalNet(Dropping), every(7, NVME), batches(rows, 17), late=late
    )
    assert_equal(plain, planned)
    probe = executor.token_probes["blocks.0"]
    assert probe.bit_equal
    assert [axis and axis.dim for axis in probe.drawn] == [2, 2, 0, 1]


def test_dropout_of_a_real_model() -> None:
    found = compare(lambda: gpt2(0.1), every(16, NVME), batches(2, 33))
    assert_as_probed(*found, bound=1e-4)


def test_random_numbers_that_no_dropout_draws_are_refused() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
            return hidden + self.mix(hidden * torch.rand_like(hidden)).tanh()

    refused(lambda: CausalNet(Noisy), r"blocks\.0: gives other values for the first 8 tokens")


def test_a_mask_of_a_padded_batch_is_stored_whole() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()
            self.blocks = self.inner.blocks

        def forward(self, tokens: Tensor) -> Any:
            mask = torch.ones_like(tokens)
            mask[0, -5:] = 0
            return self.inner.model(input_ids=tokens, attention_mask=mask, labels=tokens).loss

    found = compare(Padded, every(16, NVME), batches(2, 33))
    assert_as_probed(*found, bound=1e-4)
    # A float mask of 2 x 33 x 33, made of a bool one for each kernel.
    assert {probe.whole_bytes for probe in found[2].token_probes.values()} == {2 * 33 * 33 * 4}


def test_batches_of_other_sizes() -> None:
    """Longer and shorter ones, more and fewer rows, and one that is computed again as a whole."""
    data = [batches(2, 17, 1)[0], batches(1, 21, 1)[0], batches(3, 9, 1)[0], batches(2, 8, 1)[0]]
    plain, planned, executor = compare(CausalNet, every(8, NVME), data)
    assert_equal(plain, planned)
    assert {probe.tokens for probe in executor.token_probes.values()} == {21}  # one row: looked at anew


def test_the_bytes_are_those_of_the_contract() -> None:
    """docs/architecture.md: rows 0 to 8 of the input, and rows 8 to 17 of every saved storage."""
    torch.manual_seed(0)
    model = CausalNet()
    executor = executor_for(model, every(8, NVME, input_tier=HOST), slots=2 * DEPTH)
    executor.install()
    loss = model(batches(2, 17, 1)[0])
    sizes = {group.tier: group._used_bytes for group in executor._living()[:2]}
    probe = executor.token_probes["blocks.0"]
    token = 2 * WIDTH * 4  # of both rows of the batch
    assert sizes[HOST] == 8 * token
    # By hand: input and its norm; query, key and value in one (three), and the query with its table; tanh of
    # the sums; mixed, as rows; the second product, grown, and relu: eleven in all. Two numbers of the norm
    # for every token are less than a page and are not moved.
    assert probe.whole_bytes == 0
    assert probe.row_bytes == 11 * token + 2 * 2 * 4
    assert sizes[NVME] == (17 - 8) * 11 * token
    loss.backward()
    executor.remove()


def test_joined_rows_are_not_there_twice() -> None:
    """Beside slots and what backward itself needs: all saved bytes, and the first rows of one storage."""
    peaks = []
    tokens, first = 512, 256
    hidden = torch.randn(1, tokens, WIDTH)
    for cut in (False, True):
        torch.manual_seed(0)
        model = CausalNet(Flat)
        executor = executor_for(model, every(first), slot_bytes=16 << 20)
        if cut:
            executor.install()
        output = model.blocks[0](hidden.clone().requires_grad_())
        edge, gradient = torch.autograd.graph.get_gradient_edge(output), torch.ones_like(output)
        del output
        with LiveBytes() as live:
            torch.autograd.backward(edge, gradient)
        peaks.append(live.peak_bytes)
        executor.remove()
    plain, joined = peaks
    wide = tokens * 4 * WIDTH * 4
    saved = executor.token_probes["blocks.0"].row_bytes * tokens
    assert saved == tokens * WIDTH * 4 + 3 * wide
    assert joined <= plain + saved + wide * first // tokens


def test_two_walks_over_one_graph_and_dropped_graphs() -> None:
    def walks(model: nn.Module) -> list[Tensor]:
        first, second = model(batches(2, 17)[0]), model(batches(1, 12)[0])
        model(batches(2, 9)[0])  # dropped
        second.backward(retain_graph=True)
        second.backward()
        (one,) = torch.autograd.grad(first, [model.blocks[0].norm.weight], retain_graph=True)
        first.backward()
        return [one, *(p.grad.clone() for p in model.parameters())]

    torch.manual_seed(0)
    model = CausalNet()
    plain = walks(model)
    for rest in (DEVICE, NVME):
        model.zero_grad()
        executor = executor_for(model, every(7, rest))
        executor.install()
        found = walks(model)
        executor._sweep(patient=True)
        live = executor._engine.live_bytes  # type: ignore[attr-defined]
        executor.remove()
        assert live == 0
        assert_equal(plain, found)


def test_storages_are_shared_as_they_were() -> None:
    """Query, key and value are views of one storage again, which is there once."""
    seen: list[set[int]] = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *parts: Tensor) -> Tensor:
            ctx.save_for_backward(*parts)
            return parts[0] + parts[1] + parts[2]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            parts = ctx.saved_tensors
            seen.append({part.untyped_storage().data_ptr() for part in parts})
            assert [int(part.storage_offset()) for part in parts] == [0, WIDTH, 2 * WIDTH]
            assert {part.stride() for part in parts} == {(3 * 17 * WIDTH, 3 * WIDTH, 1)}
            return grad, grad, grad

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
            return hidden + Watch.apply(*self.up(hidden).chunk(3, -1))

    torch.manual_seed(0)
    model = CausalNet(Parts)
    executor = executor_for(model, every(7))
    executor.install()
    model(batches(2, 17)[0]).backward()
    executor.remove()
    assert [len(addresses) for addresses in seen] == [1] * DEPTH


class Flat(nn.Module):
    """Saves its input, and three tensors of four times its width."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        return self.down(torch.tanh(self.up(hidden)).sigmoid().exp())


def refused(make: Callable[[], nn.Module], match: str, batch: Tensor | None = None) -> None:
    torch.manual_seed(0)
    model = make()
    executor = executor_for(model, every(8))
    executor.install()
    before = torch.get_rng_state()
    with pytest.raises(TokenRangeError, match=match):
        model(batches(2, 17)[0] if batch is None else batch)
    assert torch.equal(before, torch.get_rng_state())
    executor.remove()


def test_a_block_that_looks_ahead_is_refused() -> None:
    class Ahead(nn.Module):
        """As in BERT: every token sees all."""

        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(WIDTH, WIDTH)

        def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
            heads = self.mix(hidden).unflatten(-1, (4, 16)).transpose(1, 2)
            mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads)
            return hidden + mixed.transpose(1, 2).flatten(2).tanh()

    refused(lambda: CausalNet(Ahead), r"blocks\.0: is not causal.*saved tensor \d")


def test_eager_attention_is_refused() -> None:
    refused(lambda: llama(attn_implementation="eager"), r"blocks\.0: saves a tensor.*two dimensions")


def test_an_input_without_tokens_is_refused() -> None:
    class Vector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = tokens.flatten().float()[:WIDTH].requires_grad_()
            for block in self.blocks:
                hidden = block(hidden)
            return hidden.sum()

    refused(Vector, r"blocks\.0: its first tensor argument has no tokens", batch=batches(8, 9, 1)[0])


def test_a_block_that_changes_after_the_probe_is_refused() -> None:
    class Growing(nn.Linear):
        more = False

        def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
            hidden = super().forward(hidden).tanh()
            return hidden.exp().tanh() if self.more else hidden

    torch.manual_seed(0)
    model = CausalNet(lambda: Growing(WIDTH, WIDTH))
    executor = executor_for(model, every(8))
    executor.install()
    model(batches(2, 17)[0]).backward()
    model.blocks[0].more = True
    with pytest.raises(TokenRangeError, match=r"blocks\.0: saves more tensors than the 2"):
        model(batches(2, 17)[0])
    executor.remove()
