"""The whole way of a GPU, over a stand-in whose memory is its own and whose copies are late.

``LateDevice`` says how it finds what a GPU would do in silence. Everything here is compared bit for bit with
plain PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memtrain
from memtrain.offload.errors import OffloadError, SavedTensorModifiedError, TierIOError
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.planner import bounding
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Link, Machine
from tests.offload.late_device import LateDevice

WIDTH = 272  # 272 * 272 = 73,984 elements: enough to leave memory
LINKS = tuple(
    Link(tier=tier, read_bytes_per_second=2e9, write_bytes_per_second=2e9, mixed_bytes_per_second=2e9)
    for tier in (Tier.HOST, Tier.NVME)
)
MACHINE = Machine(name="late", device="cuda:0", cores=2, dram_copy_bytes_per_second=5e9, links=LINKS)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        heads = self.mix(self.norm(hidden)).unflatten(-1, (4, -1)).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        mixed = torch.dropout(torch.tanh(mixed.transpose(1, 2).flatten(2)), 0.1, self.training)
        return hidden + self.out(mixed)


class Net(nn.Module):
    """A tied table, and blocks with attention and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return torch.logsumexp((hidden @ self.table.weight.t()).float(), -1).mean()


def tokens(number: int) -> torch.Tensor:
    return torch.randint(0, 300, (4, 8), generator=torch.Generator().manual_seed(number))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


class ByNorm(torch.optim.SGD):
    """Not elementwise: a step depends on the whole gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.mul_(0.9).add_(p.grad / (p.grad.norm() + 1e-6))
                    p.sub_(m, alpha=group["lr"])


def by_norm(parameters: Any) -> torch.optim.Optimizer:
    return ByNorm(parameters, lr=1e-2)


Make = Callable[[Any], torch.optim.Optimizer]
Backward = Callable[[torch.Tensor], None]


def build(make: Make, *, master: bool = False) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16 if master else torch.float32)
    return model, make(model.parameters())


def loop(
    model: nn.Module,
    optimizer: Any,
    steps: range = range(3),
    *,
    clip: Callable[[float], torch.Tensor],
    backward: Backward = torch.Tensor.backward,
) -> list[float]:
    """Two micro-batches, clipping, a step: an ordinary loop."""
    found = []
    for step in steps:
        for micro in range(2):
            torch.manual_seed(100 * step + micro)
            loss = model(tokens(2 * step + micro))
            backward(loss / 2)
            found.append(loss.item())
        found.append(float(clip(0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return found


class Masters:
    """Plain PyTorch with fp32 masters, behind the optimizer's face."""

    def __init__(self, model: nn.Module, make: Make) -> None:
        self.parameters = list(model.parameters())
        self.masters = [p.detach().float() for p in self.parameters]
        self.optimizer = make(self.masters)

    def clip(self, max_norm: float) -> torch.Tensor:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        return torch.nn.utils.clip_grad_norm_(self.masters, max_norm)

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


References = dict[tuple[str, bool], tuple[list[float], dict[str, torch.Tensor], list[Any]]]


@pytest.fixture(scope="module")
def references() -> References:
    """Losses and norms, weights, and optimizer state of plain runs, by optimizer and precision."""
    made: References = {}
    for make, master in ((adamw, False), (adamw, True), (by_norm, False)):
        model, optimizer = build(make, master=master)
        if master:
            plain = Masters(model, make)
            numbers = loop(model, plain, clip=plain.clip)
            optimizer = plain.optimizer
        else:
            parameters = list(model.parameters())
            numbers = loop(
                model, optimizer, clip=lambda n, p=parameters: torch.nn.utils.clip_grad_norm_(p, n)
            )
        state = [optimizer.state_dict()["state"][n] for n in range(len(optimizer.state_dict()["state"]))]
        made[make.__name__, master] = numbers, model.state_dict(), state
    return made


@pytest.fixture(autouse=True)
def no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices are forced here; what the solver makes of them is tested beside the planner."""
    monkeypatch.setattr(bounding, "_in_child", lambda search, _: [(s, None) for s in search.space.schedules])


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    """The device that every session of the test gets; nothing was handed on too early, nothing is left."""
    device = LateDevice()
    monkeypatch.setattr("memtrain.preparing.make_device", lambda name: device)
    yield device
    assert device.faults == []
    assert device.registered == {}


def open_session(
    folder: Path, force: dict[str, Any], make: Make = adamw, *, master: bool = False, schedule: str = "auto"
) -> memtrain.Session:
    model, optimizer = build(make, master=master)
    return memtrain.prepare(
        model,
        optimizer,
        (tokens(0),),
        budget=memtrain.Budget(device="4GiB", host="1GiB", nvme=f"{folder}:1GiB"),
        micro_batches=2,
        master_weights=master,
        options=memtrain.PlannerOptions(force=force, update_schedule=schedule),
        machine=MACHINE,
    )


def assert_trains_like_plain(
    references: References,
    folder: Path,
    force: dict[str, Any],
    make: Make = adamw,
    backward: Backward = torch.Tensor.backward,
    **how: Any,
) -> None:
    numbers, weights, state = references[make.__name__, how.get("master", False)]
    folder.mkdir(exist_ok=True)
    with open_session(folder, force, make, **how) as session:
        optimizer = session.optimizer
        assert loop(session.model, optimizer, clip=optimizer.clip_grad_norm_, backward=backward) == numbers
        found = copy.deepcopy(optimizer.state_dict())["state"]
        for number, values in enumerate(state):
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(found[number][key]), torch.as_tensor(value)), key
        model = session.model
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not list(folder.iterdir())


STATE_AWAY = {"gradient_tier": "host", "optimizer_tier": "nvme"}
BLOCKS = {
    "keep": {"action": "keep"},
    "swap host": {"action": "swap", "saved_tier": "host"},
    "swap nvme": {"action": "swap", "saved_tier": "nvme"},
    "recompute device": {"action": "recompute", "input_tier": "device"},
    "recompute host": {"action": "recompute", "input_tier": "host"},
    "recompute nvme": {"action": "recompute", "input_tier": "nvme"},
    **{
        f"attention {saved}, input {entry}": {
            "action": "recompute_except_attention",
            "saved_tier": saved,
            "input_tier": entry,
        }
        for saved, entry in (("device", "device"), ("host", "nvme"), ("nvme", "nvme"), ("nvme", "device"))
    },
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_action_and_tier_of_activations(
    references: References, late: LateDevice, tmp_path: Path, name: str
) -> None:
    late._eagerness = 0.0  # as late as can be
    assert_trains_like_plain(
        references, tmp_path, {"block": BLOCKS[name], "state": {"optimizer_tier": "device"}}
    )


@pytest.mark.parametrize(
    ("tier", "schedule", "master"), [("host", "sequential", True), ("nvme", "ahead", False)]
)
def test_streamed_weights(
    references: References, late: LateDevice, tmp_path: Path, tier: str, schedule: str, master: bool
) -> None:
    force = {"block": BLOCKS["swap host"], "state": STATE_AWAY | {"weight_tier": tier}}
    assert_trains_like_plain(references, tmp_path, force, schedule=schedule, master=master)


@pytest.mark.parametrize(("schedule", "master"), [("sequential", True), ("ahead", False)])
@pytest.mark.parametrize("optimizer_tier", ["device", "host", "nvme"])
@pytest.mark.parametrize("gradient_tier", ["device", "host", "nvme"])
def test_every_tier_of_gradients_and_state(
    references: References,
    late: LateDevice,
    tmp_path: Path,
    gradient_tier: str,
    optimizer_tier: str,
    schedule: str,
    master: bool,
) -> None:
    state = {"gradient_tier": gradient_tier, "optimizer_tier": optimizer_tier}
    force = {"block": {"action": "keep"}, "state": state}
    assert_trains_like_plain(references, tmp_path, force, schedule=schedule, master=master)
    moves = (gradient_tier, optimizer_tier) != ("device", "device")
    assert (late.copies["in"] > 0, late.copies["out"] > 0) == (moves, moves)


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
def test_an_optimizer_that_needs_whole_parameters(
    references: References, late: LateDevice, tmp_path: Path, schedule: str
) -> None:
    force = {"block": BLOCKS["swap nvme"], "state": STATE_AWAY}
    assert_trains_like_plain(references, tmp_path, force, by_norm, schedule=schedule)


def in_another_thread(loss: torch.Tensor) -> None:
    """As CUDA's backward, which runs in a thread of autograd's own."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            loss.backward()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("name", ["swap host", "attention host, input nvme"])
def test_backward_in_a_thread_of_its_own(
    references: References, late: LateDevice, tmp_path: Path, name: str
) -> None:
    force = {"block": BLOCKS[name], "state": STATE_AWAY}
    for schedule in ("sequential", "ahead"):
        assert_trains_like_plain(
            references, tmp_path, force, backward=in_another_thread, schedule=schedule, master=True
        )


def test_blocks_of_every_kind_in_one_model(references: References, late: LateDevice, tmp_path: Path) -> None:
    kinds = ["swap host", "keep", "attention nvme, input device", "recompute nvme"]
    force: dict[str, Any] = {f"block.{number}": BLOCKS[name] for number, name in enumerate(kinds)}
    for seed in range(3):
        late._random.seed(seed)
        assert_trains_like_plain(references, tmp_path, {**force, "state": STATE_AWAY}, schedule="ahead")


def test_a_checkpoint_goes_on_under_another_plan(
    references: References, late: LateDevice, tmp_path: Path
) -> None:
    numbers, weights, _ = references["adamw", True]
    plans = [
        {"block": BLOCKS["swap nvme"], "state": STATE_AWAY},
        {"block": BLOCKS["keep"], "state": {"gradient_tier": "device", "optimizer_tier": "device"}},
        {"block": BLOCKS["recompute host"], "state": {"gradient_tier": "nvme", "optimizer_tier": "host"}},
    ]
    (tmp_path / "swap").mkdir()
    found = []
    for step, force in enumerate(plans):
        with open_session(tmp_path / "swap", force, master=True) as session:
            if step:
                assert load_checkpoint(tmp_path / "saved", session) == {"step": step}
            clip = session.optimizer.clip_grad_norm_
            found += loop(session.model, session.optimizer, range(step, step + 1), clip=clip)
            save_checkpoint(tmp_path / "saved", session, progress={"step": step + 1})
            model = session.model
    assert found == numbers
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# what goes wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
@pytest.mark.parametrize("good_writes", [2, 9, 23, 40])
def test_a_full_disk_is_a_typed_error_and_no_hang(
    late: LateDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str, good_writes: int
) -> None:
    force = {"block": BLOCKS["swap nvme"], "state": {"gradient_tier": "nvme", "optimizer_tier": "nvme"}}
    session = open_session(tmp_path, force, schedule=schedule)
    write, left = os.pwritev, [good_writes]

    def full(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(TierIOError, match="the disk is full"):
        loop(session.model, session.optimizer, clip=session.optimizer.clip_grad_norm_)
    monkeypatch.setattr(os, "pwritev", write)
    with contextlib.suppress(OffloadError):  # what failed may be said again; it may not hang
        session.close()


@pytest.mark.parametrize("copies", [3, 60, 200, 333])
def test_a_device_that_fails_is_heard_and_the_session_closes(
    late: LateDevice, tmp_path: Path, copies: int
) -> None:
    session = open_session(tmp_path, {"block": BLOCKS["swap nvme"], "state": STATE_AWAY}, schedule="ahead")
    late._fail_after = sum(late.copies.values()) + copies
    with pytest.raises(RuntimeError, match="the device has failed"):
        loop(session.model, session.optimizer, clip=session.optimizer.clip_grad_norm_)
    late._fail_after = None
    with contextlib.suppress(OffloadError):
        session.close()


def test_a_tensor_changed_while_it_leaves_is_refused(late: LateDevice, tmp_path: Path) -> None:
    """Its bytes may be those of before or of after: plain PyTorch would raise in backward."""
    late._eagerness = 0.0
    session = open_session(tmp_path, {"block": BLOCKS["swap nvme"], "state": {"optimizer_tier": "device"}})
    layers = session.model.layers
    saved: list[torch.Tensor] = []

    def change(*_: Any) -> None:
        saved[0].add_(1.0)

    layers[0].norm.register_forward_hook(lambda module, args, output: saved.append(output.detach()))
    layers[1].norm.register_forward_pre_hook(change)
    with session, pytest.raises(SavedTensorModifiedError, match="changed in place"):
        session.model(tokens(0))


def test_a_model_on_another_device_than_the_machine_is_refused(tmp_path: Path) -> None:
    class Elsewhere(LateDevice):
        place = torch.device("cuda:0")

    model, optimizer = build(adamw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memtrain.preparing.make_device", lambda name: Elsewhere())
        with pytest.raises(ValueError, match="the model is on cpu, machine late computes on cuda:0"):
            memtrain.prepare(
                model, optimizer, (tokens(0),), budget=memtrain.Budget(device="4GiB"), machine=MACHINE
            )


def test_parameters_on_several_devices_are_named() -> None:
    model, optimizer = build(adamw)
    model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"parameters are on cpu, meta: memtrain trains on"):
        memtrain.prepare(model, optimizer, (tokens(0),), budget=memtrain.Budget(device="4GiB"))


def test_the_device_is_held_to_the_budget_while_the_session_lasts(late: LateDevice, tmp_path: Path) -> None:
    with open_session(tmp_path, {}) as session:
        libraries_bytes = session.profile.baseline_bytes
        assert libraries_bytes > 0
        assert late.limit_bytes == session.budget.device_bytes - libraries_bytes
    assert late.limit_bytes is None


def test_staging_without_host_memory_is_infeasible_by_the_bytes(late: LateDevice, tmp_path: Path) -> None:
    model, optimizer = build(adamw)
    with pytest.raises(memtrain.InfeasibleError, match="short of host by") as caught:
        memtrain.prepare(
            model,
            optimizer,
            (tokens(0),),
            budget=memtrain.Budget(device="4GiB", nvme=f"{tmp_path}:1GiB"),
            options=memtrain.PlannerOptions(force={"block": BLOCKS["swap nvme"]}),
            machine=MACHINE,
        )
    assert set(dict(caught.value.plan.shortfall_bytes)) == {Tier.HOST}
