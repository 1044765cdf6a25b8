"""Masters of which records hold the lower half: the bits of whole ones, in fewer bytes, or an error."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from memtrain.offload import lower_halves, snapshot
from memtrain.offload.async_snapshot import AsyncCheckpointer, snapshot_bytes
from memtrain.offload.atomic import CheckpointError
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.lower_halves import LOWER_KEY
from memtrain.offload.snapshot import load_checkpoint, load_optimizer_state, save_checkpoint
from memtrain.optim.kernels import fused_adamw
from memtrain.optim.kernels.fused_adamw import same_bits
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.async_runs import Gate, assert_same_folders, nvme_run
from tests.offload.lower_half_runs import FUSED, LARGE, PLANS, fused_run
from tests.offload.optimizer_runs import (
    AHEAD,
    OPTIMIZERS,
    SEQUENTIAL,
    assert_equal_models,
    assert_equal_state,
    train,
)
from tests.offload.snapshot_runs import assert_same, open_run, states
from tests.offload.training import (
    STAGING,
    batches,
    make_model,
    make_plan,
    open_engine,
    plain_run,
    trainable,
    wrap,
)

pytestmark = pytest.mark.skipif(
    not fused_adamw.agrees(), reason="this build of torch rounds in another order, or there is no compiler"
)


PAGE = 4096


def pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def test_records_and_slots_in_bytes() -> None:
    with fused_run() as run:
        layout, records = run.optimizer.layout, 0
        assert layout.halves == LARGE
        for shard, found in layout.shards.items():
            if shard.small:
                assert not any(t.key == LOWER_KEY for p in shard.pieces for t in found.specs[p.name].tensors)
                continue
            record = sum(pages(2 * p.elements) + 2 * pages(4 * p.elements) for p in shard.pieces)
            assert found.record_bytes == record
            assert found.slot_bytes == record + sum(pages(2 * p.elements) for p in shard.pieces)
            records += record
        gradients = sum(pages(2 * run.model.get_parameter(name).numel()) for name in LARGE)
        store = run.optimizer._records.home(next(s for s in layout.shards if not s.small))[0]
        assert store.used_bytes == records + gradients
        run.train(batches(3))
        run.flush()
        moved = sum(run.model.get_parameter(name).numel() for name in LARGE - {"unused"})
        assert run.optimizer.records.changed_bytes == {Tier.HOST: 3 * 10 * moved}


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (OPTIMIZERS["adamw"], {}),
        (OPTIMIZERS["adam amsgrad"], {}),
        (lambda p: torch.optim.AdamW(p, fused=True, amsgrad=True), {}),
        (lambda p: torch.optim.AdamW(p, fused=True, lr=torch.tensor(1e-3)), {}),
        (FUSED, {"split_masters": False}),
        (FUSED, {"elementwise": False}),
    ],
)
def test_everything_else_keeps_whole_masters(make: Callable[[Any], Any], config: dict[str, Any]) -> None:
    plan = make_plan(staging=replace(STAGING, update_slot_bytes=4 << 20, update_shard_elements=90_000))
    with open_run(plan, torch.bfloat16, make, master_weights=True, **config) as run:
        assert not run.optimizer.layout.halves
        shard = run.optimizer.index.all_shards()[-1]
        specs = run.optimizer.layout.shards[shard].specs
        assert all(tensor.key != LOWER_KEY for p in shard.pieces for tensor in specs[p.name].tensors)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("one_pass", [True, False])
def test_training_is_bit_equal(plan: str, one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against plain PyTorch with whole masters; also where each step takes the optimizer's own code, in
    slices that end within pieces."""
    if not one_pass:
        monkeypatch.setattr(fused_adamw, "serves", lambda *_: False)
        monkeypatch.setattr(lower_halves, "SLICE_ELEMENTS", 4096)
    expected, plain, norms = plain_run(FUSED, accumulate=2, max_norm=0.05, dtype=torch.bfloat16, master=True)
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, FUSED(trainable(model)), engine, PLANS[plan], master_weights=True)
        assert optimizer.layout.halves == LARGE
        found = train(model, optimizer, accumulate=2, clip=lambda: optimizer.clip_grad_norm_(0.05))
        assert all(torch.equal(*pair) for pair in zip(found, norms, strict=True))
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_settings_that_change_on_the_way(schedule: UpdateSchedule) -> None:
    """A rate of 0 at the start and in between, a tensor for a rate: what the one pass does not serve."""

    def factor(step: int) -> float:
        return 0.0 if step in (0, 3) else 1.0 / (1 + step)

    def scheduled(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    expected, plain, _ = plain_run(FUSED, steps=6, dtype=torch.bfloat16, master=True, schedule=scheduled)
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, FUSED(trainable(model)), engine, make_plan(schedule), master_weights=True)
        train(model, optimizer, steps=6, scheduler=scheduled(optimizer))
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
        plain.param_groups[0]["lr"] = torch.tensor(1e-3)
        model(batches(1)[0]).backward()
        optimizer.step()
        optimizer.flush()
        assert optimizer.scalar_state()["embed.weight"]["step"] == 7
        optimizer.param_groups[0]["betas"] = (0.9, -0.5)
        optimizer.zero_grad()
        for p in trainable(model):
            p.grad = torch.zeros_like(p)
        if schedule is AHEAD:
            optimizer.step()
            step = optimizer.flush
        else:
            step = optimizer.step
        with pytest.raises(OffloadError, match=r"second moments below zero.*split_masters=False"):
            step()
        optimizer.close()


def tied_masters(run: Any) -> dict[tuple[str, str], torch.Tensor]:
    """The run's state with masters of which half are ties, in both directions, and its weights to match."""
    entries = {place: tensor.clone() for place, tensor in states(run.optimizer).items()}
    with torch.no_grad():
        for (name, key), tensor in entries.items():
            if key == "master_weight":
                bits = tensor.view(torch.int32).view(-1)[::2]
                bits.copy_((bits & ~0xFFFF) | 0x8000)
                run.model.get_parameter(name).copy_(tensor)
    return entries


@pytest.mark.parametrize("order", [1, -1])
def test_ties_survive_loading_in_any_order_and_steps(order: int) -> None:
    with fused_run() as whole, fused_run(split_masters=False) as reference:
        for run in (whole, reference):
            run.train(batches(2))
            run.flush()
        assert_same(whole, reference)
        entries = tied_masters(whole)
        others = tied_masters(reference)
        assert same_bits(entries["embed.weight", "master_weight"], others["embed.weight", "master_weight"])
        scalars = whole.optimizer.scalar_state()
        for run in (whole, reference):
            run.optimizer.load_state(dict(list(entries.items())[::order]), scalars)
        found = states(whole.optimizer)
        assert all(same_bits(found[place], tensor) for place, tensor in entries.items())
        parts: dict[tuple[str, str], list[torch.Tensor]] = {}
        for name, key, part in whole.optimizer.stored_parts():
            parts.setdefault((name, key), []).append(part.reshape(-1).clone())
        stored = {place: torch.cat(tensors) for place, tensors in parts.items()}
        ties = int(stored["embed.weight", "exp_avg_sq"].signbit().sum())
        upper = entries["embed.weight", "master_weight"].view(-1).view(torch.int32) >> 16
        lower = stored["embed.weight", LOWER_KEY]
        assert ties == int(((lower == -0x8000) & (upper % 2 == 1)).sum()) > 10_000
        for run in (whole, reference):
            run.train(batches(3))
        assert_same(whole, reference)


def test_negative_second_moments_are_refused() -> None:
    with fused_run() as run:
        run.train(batches(1))
        entries, scalars = states(run.optimizer), run.optimizer.scalar_state()
        entries["first.weight", "exp_avg_sq"][0, 0] = -1e-30
        with pytest.raises(PlanMismatchError, match=r"exp_avg_sq of first.weight has numbers below zero"):
            run.optimizer.load_state(entries, scalars)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("plan", ["host", "device", "small shards"])
def test_checkpoints_load_into_either_kind(before: bool, after: bool, plan: str, tmp_path: Path) -> None:
    data = batches(5)
    with fused_run(split_masters=before) as whole:
        whole.train(data[:3])
        folder = save_checkpoint(tmp_path / "at", whole, progress={})
        assert f'"format_version": {2 if before else 1},' in (folder / "optimizer.json").read_text()
        tensors = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
        assert sum(tensor.nbytes for tensor in tensors) == (
            snapshot_bytes(whole) - 90_000 * (10 if before else 12)  # ``unused`` has no state
        )
        with fused_run(PLANS[plan], seed_weights=False, split_masters=after) as resumed:
            load_checkpoint(folder, resumed)
            assert_same(whole, resumed)
            whole.train(data[3:])
            resumed.train(data[3:])
            assert_same(whole, resumed)


def test_a_plain_optimizer_over_copies_takes_the_joined_masters(tmp_path: Path) -> None:
    with fused_run() as run:
        run.train(batches(2))
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        expected = states(run.optimizer)
    model = make_model(torch.bfloat16)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    masters = [p.detach().float() for p in trainable(model)]
    plain = FUSED(masters)
    load_optimizer_state(folder, plain, model)
    for name, master in zip(names, masters, strict=True):
        if (name, "master_weight") in expected:
            assert torch.equal(master, expected[name, "master_weight"])
            assert torch.equal(plain.state[master]["exp_avg_sq"], expected[name, "exp_avg_sq"])


def test_a_lower_half_without_its_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fused_run() as run:
        run.train(batches(1))
        with monkeypatch.context() as patched:
            patched.setattr(snapshot, "_upper_halves", lambda session: {"embed.weight": "unused"})
            folder = save_checkpoint(tmp_path / "at", run, progress={})
        with pytest.raises(CheckpointError, match=r"lower half of the master of embed.weight, and no bf16"):
            load_checkpoint(folder, run)


def test_a_lower_half_is_never_taken_for_that_of_another_tensor_at_its_address(tmp_path: Path) -> None:
    """Parts and views of a weight, empty tensors, and two weights in one storage."""
    data = batches(4)

    def with_views(run: Any) -> None:
        weight = run.model.first.weight
        for name, value in {
            "row": weight.detach()[0],
            "flat": weight.detach().view(-1),
            "transposed": weight.detach().t(),
            "bits": weight.detach().view(torch.int16),
            "nothing": weight.detach()[:0],
            "nothing_either": torch.empty(0, dtype=torch.bfloat16),
        }.items():
            run.model.second.register_buffer(name, value)  # behind the weight in the state dict

    with fused_run() as run, fused_run(seed_weights=False) as resumed:
        with torch.no_grad():
            first, second = run.model.first.weight, run.model.second.weight
            both = torch.cat([first.view(-1), second.view(-1)])
            first.data = both[: first.numel()].view_as(first)
            second.data = both[first.numel() :].view_as(second)
        with_views(run)
        with_views(resumed)
        run.train(data[:2])
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        document = json.loads((folder / "optimizer.json").read_text())
        names = LARGE - {"unused"}
        assert document["upper_halves"] == {name: name for name in names}
        load_checkpoint(folder, resumed)
        run.train(data[2:])
        resumed.train(data[2:])
        assert_same(run, resumed)


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_a_snapshot_beside_training_is_the_synchronous_one(
    schedule: UpdateSchedule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and lower halves of one step, whatever updates have done to either meanwhile."""
    data = batches(9)
    kind: dict[str, Any] = {"make": FUSED, "master_weights": True}
    with (
        nvme_run(tmp_path / "a", schedule, torch.bfloat16, **kind) as plain,
        nvme_run(tmp_path / "b", schedule, torch.bfloat16, **kind) as run,
        AsyncCheckpointer(run, spare_bytes={Tier.NVME: 1 << 20}) as snapshots,
    ):
        assert run.optimizer.layout.halves
        for step in range(3):
            now = data[3 * step : 3 * step + 3]
            plain.train(now)
            run.train(now)
            save_checkpoint(tmp_path / f"sync-{step}", plain, progress={})
            with monkeypatch.context() as patched:
                gate = Gate(patched, after=12 * step)
                snapshots.save(tmp_path / f"async-{step}", progress={})
                gate.open_after(0.05)
                plain.train(data[:2])
                run.train(data[:2])
                snapshots.wait()
            assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")
        load_checkpoint(tmp_path / "async-1", run)
        load_checkpoint(tmp_path / "sync-1", plain)
        plain.train(data[:1])
        run.train(data[:1])
        assert_same(plain, run)


def test_state_dicts_show_whole_masters() -> None:
    data = batches(5)
    with fused_run() as run, fused_run(split_masters=False) as reference:
        run.train(data[:3])
        reference.train(data)
        run.flush()
        kept = {name: value.clone() for name, value in run.model.state_dict().items()}
        copied = copy.deepcopy(run.optimizer.state_dict())
        state = copied["state"][1]  # number 0 has no gradient
        assert {key for key in state if torch.is_tensor(state[key]) and state[key].dim()} == {
            "master_weight", "exp_avg", "exp_avg_sq",
        }  # fmt: skip
        assert state["master_weight"].dtype == torch.float32
        run.train(data[:1])
        run.flush()
        run.model.load_state_dict(kept)  # weights first
        run.optimizer.load_state_dict(copied)
        run.train(data[3:])
        assert_same(run, reference)


def test_state_that_the_optimizer_had_before_is_taken_over() -> None:
    def started(parameters: list[nn.Parameter]) -> Any:
        optimizer = FUSED(parameters)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in parameters:
            state = optimizer.state[p]
            state["exp_avg"], state["exp_avg_sq"] = state["exp_avg"].float(), state["exp_avg_sq"].float()
            p.grad = None
        return optimizer

    with (
        open_run(None, torch.bfloat16, started, master_weights=True) as run,
        open_run(None, torch.bfloat16, started, master_weights=True, split_masters=False) as reference,
    ):
        assert run.optimizer.layout.halves == LARGE
        run.train(batches(2))
        reference.train(batches(2))
        assert_same(run, reference)
