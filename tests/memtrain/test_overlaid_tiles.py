"""Gradients of layers in tiles at addresses that activations have left: bit-equal, each in its place."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import memtrain
from memtrain.streamed_models import streamed_model
from memtrain.tiling import tiles_of
from tests.memtrain.test_session import MACHINE
from tests.memtrain.test_tiling import TILE_BYTES, config, in_memory, in_tiles

STEPS = 4
SMALL = 65536


def batch(step: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 1203, (4, 48), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def prepare(model, budget, state, block=None, **arguments):
    force = {"state": state} if block is None else {"state": state, "block": block}
    return memtrain.prepare(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        batch(0),
        budget=budget,
        options=memtrain.PlannerOptions(force=force, **arguments.pop("options", {})),
        machine=MACHINE,
        master_weights=True,
        **arguments,
    )


def train(session) -> list[float]:
    losses = []
    for step in range(STEPS):
        loss = session.model(**batch(step)).loss
        loss.backward()
        losses.append(loss.item())
        session.optimizer.step()
        session.optimizer.zero_grad()
    return losses


STAY = {"weight_tier": "device", "gradient_tier": "device", "optimizer_tier": "device"}
AWAY = {"weight_tier": "nvme", "gradient_tier": "device", "optimizer_tier": "nvme"}


@pytest.mark.parametrize(("schedule", "allocator"), [("sequential", "planned"), ("ahead", "default")])
def test_bit_equal_and_each_gradient_in_its_place(tmp_path: Path, schedule: str, allocator: str) -> None:
    with prepare(in_tiles(in_memory(config())), memtrain.Budget(device="4GiB"), STAY) as plain:
        expected = train(plain)
        weights = {name: value.detach().clone() for name, value in plain.model.named_parameters()}
    (tmp_path / "swap").mkdir()
    budget = memtrain.Budget(device="4GiB", nvme=f"{tmp_path / 'swap'}:256MiB")
    torch.manual_seed(0)
    made = streamed_model(config(), dtype=torch.bfloat16, budget=budget, tile_bytes=TILE_BYTES)
    made.model.train()
    options = {"overlay": True, "update_schedule": schedule}
    with (
        made,
        prepare(
            made.model, budget, AWAY, {"action": "keep"}, options=options, allocator=allocator
        ) as session,
    ):
        staging = session.plan.staging
        assert staging.overlaid_bytes > 0
        assert (staging.update_overlaid_bytes > 0) == (schedule == "sequential")
        slab = session._activations.overlaid.slab
        inside = range(slab.address, slab.address + slab.nbytes)
        seen: list[bool] = []

        def look(parameter: torch.Tensor) -> None:
            if parameter.numel() >= SMALL:
                seen.append(parameter.grad.data_ptr() in inside)

        hooks = [p.register_post_accumulate_grad_hook(look) for p in session.model.parameters()]
        assert train(session) == expected
        large = sum(p.numel() >= SMALL for p in session.model.parameters())
        assert len(seen) == STEPS * large
        assert all(seen)
        assert len(tiles_of(session.model)) > 10
        for hook in hooks:
            hook.remove()
        session.flush()
        for name, parameter in session.model.named_parameters():
            unit = session.weights.unit_of(parameter)
            with session.weights.hold(unit) if unit is not None else nullcontext():
                assert torch.equal(parameter.detach(), weights[name]), name
