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
from memtrain.offload.errors import ExtentStateError, OffloadError, PlanMismatchError
from memtrain.offload.in_backward import HalfDoneStepError
from memtrain.offload.lower_halves import LOWER_KEY, WeightsWrittenError
from memtrain.offload.optimizer_state import StaleStateError
from memtrain.offload.snapshot import load_checkpoint, load_optimizer_state, save_checkpoint
from memtrain.optim.kernels import fused_adamw
from memtrain.optim.kernels.fused_adamw import same_bits
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.async_runs import Gate, assert_same_folders, nvme_run
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
WRITTEN = r"of first.weight were written.*call weights_written\(\).*split_masters=False"
FUSED = OPTIMIZERS["adamw fused"]
LARGE = {"embed.weight", "first.weight", "second.weight", "unused"}
PAGE = 4096
PLANS = {
    "host": make_plan(),
    "ahead": make_plan(AHEAD),
    "device": make_plan(gradient_tier=Tier.DEVICE, optimizer_tier=Tier.DEVICE),
    "state away": make_plan(gradient_tier=Tier.DEVICE),
    "gradients away": make_plan(optimizer_tier=Tier.DEVICE),
    "small shards": make_plan(AHEAD, staging=replace(STAGING, update_shard_elements=9_000)),
}


def fused_run(plan: Any = None, **config: Any) -> Any:
    return open_run(plan, torch.bfloat16, FUSED, master_weights=True, **config)


def pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def test_records_and_slots_in_bytes() -> None:
    with fused_run() as run:
        layout, records = run.optimizer.layout, 0
        assert layout.halves == LARGE
        for shard, found in layout.shards.items():
            if shard.small:
                assert not any(LOWER_KEY in key for _, key in found.state_offsets)
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
        assert all(LOWER_KEY not in key for _, key in run.optimizer.layout.shards[shard].state_offsets)


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


def test_weights_that_were_swapped_out_and_back_lose_nothing() -> None:
    data = batches(4)
    with fused_run(PLANS["ahead"]) as run, fused_run(split_masters=False) as reference:
        reference.train(data)
        run.train(data[:2])
        run.flush()
        weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        with torch.no_grad():
            for p in run.model.parameters():
                p.zero_()
            run.model.load_state_dict(weights, strict=False)
        run.train(data[2:])
        assert_same(run, reference)


@pytest.mark.parametrize("counted", [True, False])
def test_weights_that_were_written_are_refused_and_nothing_is_changed(counted: bool, tmp_path: Path) -> None:
    data = batches(3)
    with fused_run() as run, fused_run(split_masters=False) as reference:
        run.train(data[:2])
        reference.train(data)
        run.flush()
        weight = run.model.first.weight
        before = weight.detach().clone()
        with torch.no_grad():
            (weight if counted else weight.data)[5, 7].add_(1.0)

        def snapshot_beside() -> None:
            with AsyncCheckpointer(run) as snapshots:
                snapshots.save(tmp_path / "at", progress={})

        for use in (
            snapshot_beside,
            lambda: save_checkpoint(tmp_path / "at", run, progress={}),
            lambda: run.optimizer.read_state("first.weight", "master_weight"),
        ):
            with pytest.raises(WeightsWrittenError, match=WRITTEN):
                use()
        assert not (tmp_path / "at").exists()
        run.model(data[2]).backward()
        if counted:
            with pytest.raises(WeightsWrittenError, match=WRITTEN):
                run.optimizer.step()
            with torch.no_grad():
                weight.copy_(before)
            run.optimizer.zero_grad()
            run.train(data[2:])
            assert_same(run, reference)
            return
        with pytest.raises(WeightsWrittenError):  # found when its turn comes
            run.optimizer.step()
        with pytest.raises(OffloadError, match="Restore the last checkpoint"):
            run.optimizer.step()
        with pytest.raises(OffloadError):
            run.optimizer.read_state("embed.weight", "master_weight")


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_weights_that_are_said_to_count_are_the_masters(plan: str, counted: bool, tmp_path: Path) -> None:
    """All of a parameter of which one element was written, and nothing of any other."""
    data = batches(6)
    with fused_run(PLANS[plan]) as run, fused_run(split_masters=False) as reference:
        for one in (run, reference):
            one.train(data[:3])
            one.flush()
            weight = one.model.first.weight
            with torch.no_grad():
                (weight if counted else weight.data)[-1, -1] = -0.0
        entries = states(reference.optimizer)
        master = entries["first.weight", "master_weight"]
        assert not torch.equal(master, reference.model.first.weight.float())
        entries["first.weight", "master_weight"] = reference.model.first.weight.detach().float()
        reference.optimizer.load_state(entries, reference.optimizer.scalar_state())
        handle = run.optimizer.state_dict()["state"][1]["master_weight"]
        assert run.optimizer.weights_written() == ["first.weight"]
        with pytest.raises(StaleStateError):
            handle.materialize()
        found = states(run.optimizer)
        assert all(same_bits(found[place], tensor) for place, tensor in entries.items())
        assert run.optimizer.weights_written() == []
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        run.train(data[3:])
        reference.train(data[3:])
        assert_same(run, reference)
        load_checkpoint(folder, run)
        run.train(data[3:])
        assert_same(run, reference)


def test_a_checkpoint_looks_at_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fused_run(PLANS["small shards"]) as run:
        run.train(batches(2))
        run.flush()
        weights = [p for name in LARGE - {"unused"} for _, p in run.optimizer.index.pieces[name]]
        looked_at: list[int] = []

        def digest(weight: torch.Tensor) -> bytes:
            looked_at.append(weight.data_ptr())
            return original(weight)

        original = lower_halves.digest
        monkeypatch.setattr(lower_halves, "digest", digest)
        save_checkpoint(tmp_path / "at", run, progress={})
        assert sorted(looked_at) == sorted(piece.weight().data_ptr() for piece in weights)


def test_what_is_said_to_count_may_be_named() -> None:
    with fused_run() as run:
        assert run.optimizer.weights_written() == []  # there is no state
        run.train(batches(2))
        run.flush()
        with torch.no_grad():
            run.model.first.weight.mul_(0.5)
            run.model.second.weight.mul_(0.5)
            run.model.second.bias.mul_(0.5)  # a whole master: it follows by itself
        with pytest.raises(PlanMismatchError, match=r"shape \(683, 101\) is none of the 6 parameters"):
            run.optimizer.weights_written([run.model.first.weight.detach()])
        found = run.optimizer.weights_written([run.model.second.weight, run.model.second.bias])
        assert found == ["second.weight"]
        run.model(batches(1)[0]).backward()
        with pytest.raises(WeightsWrittenError, match=WRITTEN):
            run.optimizer.step()
        assert run.optimizer.weights_written() == ["first.weight"]
        run.optimizer.step()


def test_a_step_that_was_refused_is_made_with_clipped_gradients() -> None:
    """Clipping leaves its factor with the gradient: it is to be there still when the step is made."""
    data = batches(3)
    found = []
    for refused in (False, True):
        with fused_run() as run:
            run.train(data[:2])
            run.flush()
            with torch.no_grad():
                run.model.first.weight.mul_(0.5)
            if not refused:
                run.optimizer.weights_written()
            run.model(data[2]).backward()
            assert run.optimizer.clip_grad_norm_(1e-3) > 1e-3
            if refused:
                with pytest.raises(WeightsWrittenError, match=WRITTEN):
                    run.optimizer.step()
                run.optimizer.weights_written()
            run.optimizer.step()
            run.flush()
            found.append({name: state.clone() for name, state in states(run.optimizer).items()})
    assert found[0].keys() == found[1].keys()
    assert all(same_bits(state, found[1][place]) for place, state in found[0].items())


def test_moments_that_cannot_be_read_are_not_taken_for_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading replaces a record whose last write failed; here its moments are to stay."""
    with fused_run() as run:
        run.train(batches(2))
        run.flush()
        with torch.no_grad():
            run.model.first.weight.mul_(0.5)

        def unreadable(shard: Any, slot: Any) -> Any:
            raise ExtentStateError("its last write failed")

        with monkeypatch.context() as patched:
            patched.setattr(run.optimizer.records, "read", unreadable)
            with pytest.raises(ExtentStateError):
                run.optimizer.weights_written()
        assert run.optimizer.weights_written() == ["first.weight"]
        assert states(run.optimizer)["first.weight", "exp_avg_sq"].all()


def test_what_a_failure_has_left_undone_is_done_when_it_is_said_again() -> None:
    """Two parameters of one record, which was not written when the second's weights could not be had."""
    staging = replace(STAGING, update_shard_elements=200_000, update_slot_bytes=16 << 20)
    with fused_run(make_plan(gradient_tier=Tier.DEVICE, staging=staging)) as run:
        unused, halves = run.model.unused, run.optimizer.records.halves
        run.model(batches(1)[0]).backward()
        unused.grad = torch.ones_like(unused)
        run.optimizer.step()
        run.optimizer.zero_grad()
        with torch.no_grad():
            unused.mul_(0.3)
            run.model.embed.weight.mul_(0.3)
        hold = halves._hold

        def failing(name: str) -> Any:
            if name == "embed.weight":
                raise OSError("the weights cannot be read")
            return hold(name)

        halves._hold = failing
        with pytest.raises(OSError, match="cannot be read"):
            run.optimizer.weights_written()
        halves._hold = hold
        assert run.optimizer.weights_written() == ["unused", "embed.weight"]
        master = states(run.optimizer)["unused", "master_weight"]
        assert same_bits(master, unused.detach().float())


def test_in_backward_they_are_refused_before_any_unit_is_updated() -> None:
    with fused_run(make_plan(UpdateSchedule.IN_BACKWARD)) as run:
        run.train(batches(2))
        weight = run.model.first.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        with pytest.raises(WeightsWrittenError):
            run.train(batches(1))
        with torch.no_grad():
            weight.copy_(before)
        run.optimizer.zero_grad()
        run.train(batches(1))  # nothing was lost
        with torch.no_grad():
            weight.zero_()
        run.model(batches(1)[0])
        assert run.optimizer.weights_written() == ["first.weight"]
        run.model(batches(1)[0]).backward()
        with pytest.raises(HalfDoneStepError):
            run.optimizer.weights_written()
        run.optimizer.step()


def test_state_of_other_weights_follows_the_weights_that_are_there() -> None:
    """As whole masters do at the next step."""
    data = batches(4)
    with fused_run() as run, fused_run(split_masters=False) as reference:
        for one in (run, reference):
            one.train(data[:2])
            entries, scalars = states(one.optimizer), one.optimizer.scalar_state()
            with torch.no_grad():
                one.model.first.weight[3:9].mul_(0.5)
            one.optimizer.load_state(entries, scalars)
            one.train(data[2:])
        assert_same(run, reference)


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
