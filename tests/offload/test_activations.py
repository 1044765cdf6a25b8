"""Activations under every action are bit-equal to plain PyTorch, and nothing outlives its graph."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.errors import (
    OffloadError,
    PlanMismatchError,
    SavedTensorModifiedError,
    TierFullError,
)
from memtrain.offload.extents import FreeList
from memtrain.planner.actions import Action, BlockDecision, Tier
from tests.offload.late_device import LateDevice
from tests.offload.latest_store import LatestEngine, LatestStore, LatestTicket, make_plan

WIDTH = 64
DEPTH = 5


class Block(nn.Module):
    """Attention, dropout, views of one storage, an in-place activation, and a shared argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, _ = hidden.shape
        qkv = self.qkv(self.norm(hidden)).view(batch, length, 3, 4, WIDTH // 4)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + F.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH)), 0.1)
        up = F.relu(self.up(hidden), inplace=True)
        if scale is not None:
            up = up * scale
        return hidden + F.dropout(self.down(up * torch.sigmoid(up)), 0.1)


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 4 * WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, scale=self.scale)
        return F.linear(hidden, self.embed.weight).logsumexp(-1).mean()


def every(action: Action, saved: Tier = Tier.DEVICE, entry: Tier = Tier.DEVICE) -> list[BlockDecision]:
    return [BlockDecision(block=b, action=action, saved_tier=saved, input_tier=entry) for b in range(DEPTH)]


DECISIONS = {
    "keep": every(Action.KEEP),
    "swap": every(Action.SWAP, Tier.NVME),
    "recompute": every(Action.RECOMPUTE),
    "recompute, input swapped": every(Action.RECOMPUTE, entry=Tier.NVME),
    "attention kept": every(Action.RECOMPUTE_EXCEPT_ATTENTION),
    "attention swapped": every(Action.RECOMPUTE_EXCEPT_ATTENTION, Tier.NVME, Tier.NVME),
    "mixed": [
        BlockDecision(block=0, action=Action.SWAP, saved_tier=Tier.NVME),
        BlockDecision(block=1, action=Action.RECOMPUTE, input_tier=Tier.NVME),
        BlockDecision(block=2, action=Action.SWAP, saved_tier=Tier.NVME),
        BlockDecision(block=3, action=Action.RECOMPUTE_EXCEPT_ATTENTION, saved_tier=Tier.NVME),
        BlockDecision(block=4, action=Action.KEEP),
    ],
}


def batch(length: int = 16) -> torch.Tensor:
    return torch.randint(0, 50, (2, length), generator=torch.Generator().manual_seed(3))


def run(model: nn.Module, *, passes: int = 3, autocast: bool = False) -> list[torch.Tensor]:
    """Losses of several passes and the accumulated gradients."""
    torch.manual_seed(11)
    model.zero_grad()
    found = []
    for index in range(passes):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(batch(16 - 3 * index))
        loss.backward()
        found.append(loss.detach())
    found.append(torch.rand(1))  # the RNG has moved as far as without memtrain
    return found + [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def executor_for(model: Net, decisions: list[BlockDecision], **staging: int) -> ActivationExecutor:
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    return ActivationExecutor(model, blocks, make_plan(decisions, **staging), LatestEngine())  # type: ignore[arg-type]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("name", DECISIONS)
def test_bit_equal_and_nothing_left(model: Net, name: str, slots: int, autocast: bool) -> None:
    plain = run(model, autocast=autocast)
    executor = executor_for(model, DECISIONS[name], slots=slots)
    executor.install()
    planned = run(model, autocast=autocast)
    store = executor._engine.nvme  # type: ignore[attr-defined]
    executor.remove()
    assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))
    assert not store.live
    assert (store.writes > 0) == ("swap" in name or name == "mixed")
    again = run(model, autocast=autocast)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert "forward" not in model.blocks[0].__dict__


def test_last_slots_are_found_without_a_read(model: Net) -> None:
    executor = executor_for(model, DECISIONS["swap"], slots=2)
    executor.install()
    model(batch()).backward()
    store = executor._engine.nvme  # type: ignore[attr-defined]
    # Five blocks through two slots: the last two are still there at the turn, and are never written.
    assert store.reads == DEPTH - 2
    executor.remove()


def test_one_copy_per_storage(model: Net) -> None:
    executor = executor_for(model, DECISIONS["swap"], slots=DEPTH)
    executor.install()
    loss = model(batch())
    sizes = [group._used_bytes for group in executor._living()]
    # fp32, 32 tokens of width 64 (8192 B): input, norm output, qkv (3x, saved once as one storage),
    # attention output (the reshape of the transpose is a copy), dropout mask, residual, dropout mask; the
    # 4x-wide relu output, sigmoid, scaled value, product. log-sum-exp, norm statistics are below a page.
    token = 2 * 16 * WIDTH * 4
    wide = 4 * token
    assert sizes[0] == sizes[1]
    assert sizes[0] % token == 0
    assert 8 * token + 4 * wide <= sizes[0] <= 11 * token + 5 * wide
    loss.backward()
    executor.remove()


def test_two_forwards_before_backward_and_dropped_graphs(model: Net) -> None:
    def twice() -> list[torch.Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        first, second = model(batch(16)), model(batch(12))
        model(batch(9))  # dropped
        second.backward()
        first.backward()
        return [first.detach(), second.detach()] + [p.grad.clone() for p in model.parameters()]

    plain = twice()
    for decisions in DECISIONS.values():
        executor = executor_for(model, decisions, slots=2)
        executor.install()
        planned = twice()
        executor.remove()
        assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))


def test_backward_twice_over_one_graph(model: Net) -> None:
    def run_twice() -> list[torch.Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        loss = model(batch())
        loss.backward(retain_graph=True)
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = run_twice()
    for decisions in DECISIONS.values():
        executor = executor_for(model, decisions, slots=2)
        executor.install()
        planned = run_twice()
        executor.remove()
        assert all(torch.equal(a, b) for a, b in zip(plain, planned, strict=True))


def test_no_grad_forward_moves_nothing(model: Net) -> None:
    executor = executor_for(model, DECISIONS["swap"])
    executor.install()
    with torch.no_grad():
        model(batch())
    assert executor._engine.nvme.writes == 0  # type: ignore[attr-defined]
    executor.remove()


def test_larger_batch_than_planned_is_refused_by_name(model: Net) -> None:
    executor = executor_for(model, DECISIONS["swap"], slot_bytes=64 << 10)
    executor.install()
    with pytest.raises(PlanMismatchError, match=r"blocks\.0.*65536"):
        model(batch())
    gc.collect()
    executor.remove()


def test_wrong_number_of_blocks(model: Net) -> None:
    with pytest.raises(PlanMismatchError, match="4 blocks, the model has 5"):
        executor_for(model, DECISIONS["swap"][:4])


def test_input_changed_after_the_block_raises() -> None:
    class Careless(Net):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(tokens) * 1.0
            for block in self.blocks:
                before = hidden
                hidden = block(hidden)
                before.detach().add_(1.0)
            return hidden.sum()

    model = Careless(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))
    executor = executor_for(model, DECISIONS["recompute"])
    executor._kept = {}  # as on a GPU: what stays is kept by reference
    executor.install()
    with pytest.raises(SavedTensorModifiedError, match="changed in place"):
        model(batch()).backward()


@pytest.mark.parametrize("name", ["swap", "recompute", "attention swapped"])
def test_weight_changed_between_forward_and_backward_raises(model: Net, name: str) -> None:
    """As in plain PyTorch, whose own check does not reach tensors that pass through hooks."""
    executor = executor_for(model, DECISIONS[name])
    executor.install()
    loss = model(batch())
    with torch.no_grad():
        model.blocks[2].qkv.weight.add_(1.0)
    with pytest.raises(SavedTensorModifiedError, match="changed in place"):
        loss.backward()


def test_shared_arguments_stay(model: Net) -> None:
    """The table that all blocks get is not copied for each of them."""
    model.scale = torch.nn.Buffer(torch.ones(1))  # replaced below by an argument that is no buffer
    table = torch.rand(2, 16, 4 * WIDTH)
    executor = executor_for(model, every(Action.SWAP, Tier.NVME), slots=DEPTH)
    executor.install()
    hidden = torch.randn(2, 16, WIDTH, requires_grad=True)
    first = model.blocks[0](hidden)
    without = executor._living()[0]._used_bytes
    second = model.blocks[1](hidden, scale=table)
    # up * scale saves both factors: the wide product's input is new, the table is not moved.
    wide = 2 * 16 * 4 * WIDTH * 4
    assert executor._living()[1]._used_bytes - without == wide
    (first.sum() + second.sum()).backward()
    executor.remove()


def test_block_that_depends_on_outside_state_raises() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, hidden: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            self.calls += 1
            for _ in range(self.calls):
                hidden = super().forward(hidden).tanh()
            return hidden

    model = Net(lambda: Counting(WIDTH, WIDTH))
    executor = executor_for(model, DECISIONS["recompute"])
    executor.install()
    model(batch()).backward()  # the second pass saves the same tensors, and more after them: not needed
    model.blocks[0].calls = 3
    loss = model(batch())
    model.blocks[0].calls = 0
    with pytest.raises(OffloadError, match=r"blocks\.0.*another way"):
        loss.backward()


def test_backward_after_removal_raises(model: Net) -> None:
    for name in ("swap", "recompute, input swapped"):
        executor = executor_for(model, DECISIONS[name])
        executor.install()
        loss = model(batch())
        executor.remove()
        assert not executor._engine.nvme.live  # type: ignore[attr-defined]
        with pytest.raises(OffloadError, match="session was closed"):
            loss.backward()


def test_more_graphs_than_kept_slots(model: Net) -> None:
    """A second graph finds no slab and keeps its tensors as plain PyTorch does."""
    torch.manual_seed(5)
    plain = [model(batch(16)), model(batch(12))]
    torch.manual_seed(5)
    executor = executor_for(model, DECISIONS["keep"])
    executor.install()
    planned = [model(batch(16)), model(batch(12))]
    for pair in zip(plain, planned, strict=True):
        found = [torch.autograd.grad(loss, list(model.parameters())) for loss in pair]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    executor.remove()


def test_gradient_that_is_a_saved_tensor_keeps_its_slot() -> None:
    """A function may return a saved tensor as its gradient: the slot must not be reused under it."""

    class Pass(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x + weight.sum() * 0

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            (x,) = ctx.saved_tensors
            return grad, x.view(-1)[: WIDTH * WIDTH].view(WIDTH, WIDTH)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            return Pass.apply((x * 1.5).tanh(), self.weight)

    torch.manual_seed(1)
    model = Net(Odd)
    tokens = torch.randint(0, 50, (4, 64))
    model(tokens).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    executor = executor_for(model, DECISIONS["swap"], slots=DEPTH + 1)
    executor.install()
    model(tokens).backward()
    model(tokens)
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


class Gate(nn.Module):
    """A small result that its own backward needs: below a page, so it stays where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        return hidden + torch.sigmoid(self.gate(hidden)) * self.mix(hidden)


@pytest.mark.parametrize("name", ["keep", "swap", "recompute"])
def test_graphs_without_backward_leave_nothing(name: str) -> None:
    model = Net(Gate)
    executor = executor_for(model, DECISIONS[name])
    executor.install()
    for _ in range(3):
        model(batch())
        assert not executor._living()
    executor.remove()


def test_a_forward_that_raises_gives_its_slot_back() -> None:
    class Failing(Block):
        def forward(self, hidden: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
            super().forward(hidden, scale)
            raise ZeroDivisionError

    model = Net(Failing)
    kept = []
    for name in ("keep", "swap", "recompute, input swapped"):
        executor = executor_for(model, DECISIONS[name])
        executor.install()
        for _ in range(DEPTH + 2):
            with pytest.raises(ZeroDivisionError) as caught:
                model(batch())
            kept.append(caught.value)  # its traceback keeps the frames alive
        executor.remove()


def test_a_failed_write_is_reported_once(model: Net) -> None:
    executor = executor_for(model, DECISIONS["swap"], slots=2)
    executor.install()
    store = executor._engine.nvme  # type: ignore[attr-defined]
    real = store.write
    failures = iter([OffloadError("injected")])

    def write(extent: dict[str, Any], buffer: torch.Tensor) -> LatestTicket:
        ticket = real(extent, buffer)
        if failure := next(failures, None):
            move = ticket._move

            def fail() -> None:
                assert move is not None
                move()
                raise failure

            ticket._move = fail
        return ticket

    store.write = write
    with pytest.raises(OffloadError, match="injected"):
        model(batch())
    for _ in range(3):
        model(batch()).backward()
    executor.remove()
    assert not store.live


@pytest.mark.parametrize("refused", [1, 2, 3, 4])
def test_staging_memory_that_is_refused_leaves_none_registered(model: Net, refused: int) -> None:
    engine, late = LatestEngine(), LateDevice(refuse_registration=refused)
    engine.device = late  # type: ignore[assignment]
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
    plan = make_plan(DECISIONS["mixed"])
    if refused <= 3:  # saved, input and kept
        with pytest.raises(OffloadError, match="the limit of locked memory"):
            ActivationExecutor(model, blocks, plan, engine)  # type: ignore[arg-type]
        assert late.ever_registered == refused - 1
    else:
        executor = ActivationExecutor(model, blocks, plan, engine)  # type: ignore[arg-type]
        assert len(late.registered) == 3
        executor.remove()  # somebody else failed before this was installed
        executor.remove()
    assert late.registered == {}


class Ragged(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, wide)
        self.down = nn.Linear(wide, WIDTH)

    def forward(self, hidden: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(hidden)))


class ExactStore(LatestStore):
    """No byte more than a pass needs; writes of ``late`` blocks alone are as late as they may be."""

    def __init__(self, capacity_bytes: int, late: tuple[str, ...]) -> None:
        super().__init__()
        self.space, self.late = FreeList(capacity_bytes), late

    def allocate(self, name: str, nbytes: int) -> dict[str, Any]:
        offset = self.space.allocate(nbytes)
        if offset is None:
            raise TierFullError(
                f"{name}: {self.space.free_bytes} free, {self.space.largest_bytes} in one run"
            )
        return {**super().allocate(name, nbytes), "offset": offset}

    def write(self, extent: dict[str, Any], buffer: torch.Tensor) -> LatestTicket:
        ticket = super().write(extent, buffer)
        if not extent["name"].endswith(self.late):
            ticket.wait()
        return ticket

    def free(self, extent: dict[str, Any]) -> None:
        self.space.free(extent["offset"], extent["nbytes"])


@pytest.mark.parametrize("late", [("1",), ("3",), ("0", "2"), ("1", "3")])
@pytest.mark.parametrize("slots", [2, DEPTH])
def test_the_room_of_one_pass_is_enough_for_all(slots: int, late: tuple[str, ...]) -> None:
    """Extents of several sizes, and transfers of the pass before that end out of order: without a gap."""
    widths = iter((64, 64, 64, 64, 128))
    model = Net(lambda: Ragged(next(widths)))
    executor = executor_for(model, DECISIONS["swap"], slots=slots)
    # Input and tanh of 32 tokens in fp32, 64 or 128 wide: 8192 bytes each, or 16384.
    exact = ExactStore(4 * 2 * 8192 + 8192 + 16384, late)
    executor._engine.nvme = exact  # type: ignore[attr-defined]
    executor.install()
    for _ in range(4):
        model(batch()).backward()
    executor.remove()
    assert exact.space.free_bytes == exact.space.capacity_bytes
