"""The streamed optimizer equals plain PyTorch bit for bit."""

from __future__ import annotations

import dataclasses
import os
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.offloaded_grad import OffloadedGrad
from memtrain.offload.shards import Shard
from memtrain.offload.update import Update
from memtrain.planner.actions import Tier, UpdateSchedule
from memtrain.planner.plan import Staging
from tests.offload.optimizer_runs import (
    AHEAD,
    OPTIMIZERS,
    SEQUENTIAL,
    assert_equal_models,
    assert_equal_state,
    train,
)
from tests.offload.training import (
    batches,
    make_model,
    make_plan,
    open_engine,
    plain_run,
    trainable,
    wrap,
)


@pytest.mark.parametrize(("kind", "schedule"), list(product(OPTIMIZERS, [SEQUENTIAL, AHEAD])))
def test_fp32_equals_plain_pytorch(kind: str, schedule: UpdateSchedule) -> None:
    make = OPTIMIZERS[kind]
    expected, plain, norms = plain_run(make, accumulate=3, max_norm=0.05)
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(schedule))
        assert optimizer.layout.elementwise == (kind != "adafactor")
        order = ("epilogue", "prologue", "block")
        ours = train(
            model, optimizer, accumulate=3, order=order,
            clip=lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05),
        )  # fmt: skip
        assert float(norms[0]) > 0.05
        assert torch.equal(torch.stack(ours), torch.stack(norms))
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


@pytest.mark.parametrize(
    ("kind", "schedule"),
    list(product(["adamw", "adamw fused", "sgd", "lion", "adafactor"], [SEQUENTIAL, AHEAD])),
)
def test_bf16_with_masters_equals_plain_pytorch(kind: str, schedule: UpdateSchedule) -> None:
    make = OPTIMIZERS[kind]
    expected, plain, norms = plain_run(make, accumulate=2, max_norm=0.05, dtype=torch.bfloat16, master=True)
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(schedule), master_weights=True)
        ours = train(model, optimizer, accumulate=2, clip=lambda: optimizer.clip_grad_norm_(0.05))
        assert torch.equal(torch.stack(ours), torch.stack(norms))
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


@pytest.mark.parametrize("tiers", list(product([Tier.DEVICE, Tier.HOST], repeat=2)))
@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("master", [False, True])
def test_every_pair_of_tiers(tiers: tuple[Tier, Tier], schedule: UpdateSchedule, master: bool) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    expected, _, norms = plain_run(
        OPTIMIZERS["adamw"], accumulate=2, max_norm=0.05, dtype=dtype, master=master
    )
    model = make_model(dtype)
    with open_engine() as engine:
        plan = make_plan(schedule, gradient_tier=tiers[0], optimizer_tier=tiers[1])
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, plan, master_weights=master)
        ours = train(model, optimizer, accumulate=2, clip=lambda: optimizer.clip_grad_norm_(0.05))
        assert torch.equal(torch.stack(ours), torch.stack(norms))
        assert_equal_models(model, expected)
        assert isinstance(model.first.weight.grad, OffloadedGrad) is False
        optimizer.close()


def test_with_everything_on_the_device_no_slab_is_needed() -> None:
    expected, _, _ = plain_run(OPTIMIZERS["adamw"])
    model = make_model()
    with open_engine() as engine:
        plan = make_plan(
            gradient_tier=Tier.DEVICE,
            optimizer_tier=Tier.DEVICE,
            staging=Staging(update_shard_elements=50_000),
        )
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, plan)
        train(model, optimizer)
        assert_equal_models(model, expected)
        assert engine.store(Tier.HOST).statistics().peak_used_bytes == 0


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_groups_and_schedulers(schedule: UpdateSchedule) -> None:
    def groups(parameters: list[Any]) -> list[dict[str, Any]]:
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr": 3e-2},
        ]

    def cosine(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)

    make = OPTIMIZERS["adamw"]
    expected, _, _ = plain_run(make, schedule=cosine, groups=groups)
    model = make_model()
    with open_engine() as engine:
        inner = make(groups(trainable(model)))
        optimizer = wrap(model, inner, engine, make_plan(schedule))
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert optimizer.param_groups is inner.param_groups
        train(model, optimizer, scheduler=cosine(optimizer))
        assert_equal_models(model, expected)


def test_an_update_ahead_waits_for_ensure_and_survives_new_gradients() -> None:
    model, reference = make_model(), make_model()
    plain = OPTIMIZERS["adamw"](trainable(reference))
    first = batches(1)[0]
    reference(first).backward()
    plain.step()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(AHEAD))
        before = model.first.weight.detach().clone()
        model(first).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.first.weight, before)
        # Nobody called ensure: the hook must, before a gradient that the update needs is overwritten.
        nn.functional.linear(torch.randn(3, 101), model.first.weight).sum().backward()
        assert torch.equal(model.first.weight, reference.first.weight)
        assert not torch.equal(model.second.weight, reference.second.weight)
        optimizer.flush()
        assert_equal_models(model, reference)


def test_closure_hooks_and_frozen_groups() -> None:
    model = make_model()
    with open_engine() as engine:
        inner = OPTIMIZERS["sgd"](list(model.parameters()))  # frozen ones too
        fired: list[str] = []
        inner.register_step_pre_hook(lambda *_: fired.append("inner"))
        optimizer = wrap(model, inner, engine)
        optimizer.register_step_post_hook(lambda *_: fired.append("outer"))

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(batches(1)[0])
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        assert fired == ["inner", "outer"]
        with pytest.raises(PlanMismatchError, match="add_param_group after the plan was made"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


class NoRate(torch.optim.Optimizer):
    """Finds its own rate, as transformers' Adafactor does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": None, "scale": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["scale"])


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_an_optimizer_without_a_learning_rate(schedule: UpdateSchedule) -> None:
    expected, _, _ = plain_run(NoRate)
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, NoRate(trainable(model)), engine, make_plan(schedule))
        train(model, optimizer)
        assert_equal_models(model, expected)
        optimizer.close()


def test_a_group_whose_decay_is_coupled_is_stepped_as_torch_does() -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        group = {"params": list(parameters), "decoupled_weight_decay": False}
        return torch.optim.AdamW([group], lr=1e-2, weight_decay=0.3, fused=True)

    expected, _, _ = plain_run(make)
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine)
        train(model, optimizer)
        assert_equal_models(model, expected)
        optimizer.close()


def test_reasons_against_one_pass_are_counted_by_parameter() -> None:
    model = make_model()
    parameters = trainable(model)
    groups = [
        {"params": parameters[:1], "amsgrad": True},
        {"params": parameters[1:3], "decoupled_weight_decay": False},
        {"params": parameters[3:]},
    ]
    with open_engine() as engine:
        optimizer = wrap(model, torch.optim.AdamW(groups, lr=1e-2, fused=True), engine)
        found = optimizer.refused_one_pass()
        optimizer.close()
    others = {reason: count for reason, count in found.items() if "compiler" not in reason}
    assert others == {"amsgrad=True": 1, "decoupled_weight_decay=False": 2}
    assert sum(found.values()) == (len(parameters) if len(found) > len(others) else 3)


def test_shards_that_need_no_slot_are_not_walked_past(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    away = make_plan(AHEAD).state("epilogue")
    near = make_plan(AHEAD, Tier.DEVICE, Tier.DEVICE)
    plan = dataclasses.replace(near, states=(*near.states[:2], away))
    asked: list[str] = []
    needs_slot = Update.needs_slot

    def noted(update: Update, shard: Shard) -> bool:
        asked.append(shard.unit)
        return needs_slot(update, shard)

    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, plan)
        model(batches(1)[0]).backward()
        optimizer.step()
        monkeypatch.setattr(Update, "needs_slot", noted)
        assert len(optimizer._updates._update.waiting["prologue"]) == 3
        for _ in range(10):
            optimizer.ensure("some module's")  # both shards of the epilogue have been read ahead
        assert asked == []
        optimizer.flush()
        assert "epilogue" in asked


def test_a_forked_child_reads_state_that_stays() -> None:
    model = make_model()
    plan = make_plan(optimizer_tier=Tier.DEVICE)
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, plan)
        train(model, optimizer, steps=1)
        expected = optimizer.read_state("first.bias", "exp_avg")
        assert expected.any()
        shard, piece = optimizer.index.pieces["first.bias"][0]
        state = optimizer.layout.shards[shard].state(optimizer._records.memory(shard, None), piece)
        child = os.fork()
        if child == 0:
            same = False
            try:
                same = torch.equal(state["exp_avg"], expected)
            finally:
                os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        optimizer.close()


def test_what_is_on_the_tier_and_in_slabs_in_bytes() -> None:
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, master_weights=True)
        page = 4096
        records = gradients = 0
        for shard in optimizer.index.all_shards():
            if not shard.small:
                records += sum(3 * -(-piece.elements * 4 // page) * page for piece in shard.pieces)
        for name in ("embed.weight", "unused", "first.weight", "second.weight"):
            gradients += -(-model.get_parameter(name).numel() * 2 // page) * page
        assert engine.store(Tier.HOST).used_bytes == records + gradients
        assert optimizer.gradients._ring.size_bytes == 3 * (64 << 10)
        assert optimizer._updates.ring_bytes == 3 * (2 << 20)
        train(model, optimizer, steps=2)
        assert engine.store(Tier.HOST).statistics().peak_used_bytes == records + gradients
        assert not optimizer.optimizer.state
        optimizer.close()
        assert engine.store(Tier.HOST).used_bytes == 0


def test_accelerate_moves_nothing_and_trains_alike() -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        wrapped = accelerator.prepare(optimizer)
        scheduler = accelerator.prepare(
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        )
        norms = []
        for batch in batches(8):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch))
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.05))
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
        return norms

    model, reference = make_model(), make_model()
    expected = run(reference, OPTIMIZERS["adamw"](trainable(reference)))
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(AHEAD))
        # No pre-forward hooks here: a pending update must not be read past.
        model.register_forward_pre_hook(lambda *_: optimizer.flush())
        norms = run(model, optimizer)
        optimizer.flush()
        assert torch.equal(torch.stack(norms), torch.stack(expected))
        assert_equal_models(model, reference)
