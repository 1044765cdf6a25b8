"""``Session.accumulate`` with dropout in vertical order: the loop's bits and its generator, or refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import memtrain
from memtrain.draws import Draws
from memtrain.offload.errors import RandomDrawsError
from memtrain.planner.actions import MicroBatchOrder
from memtrain.planner.vertical import OrderError
from memtrain.recipe import PlannerSection
from memtrain.train import train
from tests.memtrain.sessions import MACHINE
from tests.memtrain.streamed_sessions import optimizer_for
from tests.memtrain.tiny_runs import recipe_for
from tests.memtrain.vertical_sessions import COUNT, prepare, recipe
from tests.offload.test_vertical_random import dropping

LENGTHS = (16, 16, 12, 16)
"""Of the batches, in turn: two kinds."""
STEPS = 3
SEED = 4


def batch(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 300, (2, LENGTHS[number % 4]), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def steps(model: nn.Module, optimizer: Any, counts: tuple[int, ...], run: Callable[[list[Any]], Any]) -> Any:
    """Losses, norms and last the generator's state, of steps of so many micro-batches."""
    torch.manual_seed(SEED)
    found, begin = [], 0
    for count in counts:
        found += [loss.item() for loss in run([batch(number) for number in range(begin, begin + count)])]
        begin += count
        clip = getattr(optimizer, "clip_grad_norm_", None)
        found.append(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) if clip is None else clip(0.5))
        )
        optimizer.step()
        optimizer.zero_grad()
    return found, torch.get_rng_state()


def made(*, tied: bool, action: str) -> nn.Module:
    """Attention with dropout has no fused kernel, whose outputs could be stored."""
    return dropping(tied=tied, attention=0.0 if action == "recompute_except_attention" else 0.2)


def plain(model: nn.Module, counts: tuple[int, ...]) -> tuple[list[float], Tensor, dict[str, Tensor]]:

    def loop(batches: list[Any]) -> list[Tensor]:
        losses = []
        for each in batches:
            losses.append(model(**each).loss)
            (losses[-1] / len(batches)).backward()
        return losses

    return *steps(model, optimizer_for(model), counts, loop), model.state_dict()


@pytest.mark.parametrize(
    ("tied", "schedule", "action", "state"),
    [
        (False, "sequential", "keep", "device"),
        (True, "ahead", "recompute", "nvme"),
        (False, "ahead", "swap", "nvme"),
        (True, "sequential", "recompute_nearly_free", "nvme"),
        (False, "sequential", "recompute_except_attention", "device"),
    ],
)
def test_trains_bit_for_bit(tmp_path: Path, tied: bool, schedule: str, action: str, state: str) -> None:
    """The third step has fewer micro-batches than planned, of kinds that are known by then."""
    counts = (COUNT, COUNT, 2)
    losses, generator, weights = plain(made(tied=tied, action=action), counts)
    model = made(tied=tied, action=action)
    force = {
        "block": {"action": action},
        "state": {"weight_tier": "nvme", "optimizer_tier": state, "gradient_tier": state},
    }
    with prepare(model, tmp_path, schedule=schedule, force=force) as session:
        assert session.plan.micro_batch_order is MicroBatchOrder.VERTICAL
        found, state_after = steps(model, session.optimizer, counts, session.accumulate)
        assert found == losses
        assert torch.equal(state_after, generator)
        assert session.weights is not None
        assert "vertical order: 1 of 3 steps went one micro-batch after the other" in session.report()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_weights_are_read_as_without_dropout_once_it_is_known(tmp_path: Path) -> None:
    same = [batch(0)] * COUNT
    with prepare(dropping(), tmp_path) as session:
        assert session.weights is not None
        reads = []
        for _ in range(3):
            before = session.weights.statistics().reads
            session.accumulate(same)
            reads.append(session.weights.statistics().reads - before)
        predicted = sum(event.name.startswith("read weights") for event in session.plan.timeline)
        windows = sum(each.slots for each in session.plan.staging.weight_windows)
        assert predicted - windows <= reads[2] <= predicted
        assert reads[0] > 2 * reads[2]


class Noisy(nn.Module):
    """Draws before its blocks, as ``draw`` says."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(3))
        self.draw = draw

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.draw(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.square().mean()


def prepared(folder: Path, order: str, model: nn.Module) -> memtrain.Session:
    return memtrain.prepare(
        model,
        optimizer_for(model),
        torch.ones(4, 8, 256),
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:256MiB"),
        machine=MACHINE,
        micro_batches=COUNT,
        options=memtrain.PlannerOptions(force={"state": {"weight_tier": "nvme"}}, micro_batch_order=order),
    )


def half_a_pair(hidden: Tensor) -> Tensor:
    return hidden * torch.randn(1)


def test_what_cannot_be_counted_is_refused_before_training_and_auto_does_without(tmp_path: Path) -> None:
    with pytest.raises(OrderError, match="draws random numbers that cannot be counted"):
        prepared(tmp_path, "vertical", Noisy(half_a_pair))
    with prepared(tmp_path, "auto", Noisy(half_a_pair)) as session:
        assert session.plan.micro_batch_order is MicroBatchOrder.HORIZONTAL
        session.accumulate([torch.ones(4, 8, 256)] * COUNT)
    model = Noisy(lambda hidden: F.dropout(hidden, 0.1))
    with prepared(tmp_path, "vertical", model) as session:
        model.draw = half_a_pair
        with pytest.raises(RandomDrawsError, match="cannot be counted"):
            session.accumulate([torch.ones(4, 8, 256)] * COUNT)


def test_draws_that_depend_on_values_are_refused_by_name(tmp_path: Path) -> None:
    def by_value(hidden: Tensor) -> Tensor:
        return hidden * torch.rand(int(hidden.flatten()[0])).mean()

    given = [torch.full((4, 8, 256), float(value)) for value in (3, 5, 3)]
    with prepared(tmp_path, "vertical", Noisy(by_value)) as session:
        with pytest.raises(
            RandomDrawsError, match=r"5 words where another batch of equal shapes drew 3 words"
        ):
            session.accumulate(given)
        session.optimizer.zero_grad()
    with prepared(tmp_path, "vertical", Noisy(by_value)) as session:
        session.accumulate([given[0]] * COUNT)
        session.optimizer.zero_grad()
        state = torch.get_rng_state()
        with pytest.raises(RandomDrawsError, match="micro-batch 1 draws more or fewer"):
            session.accumulate(given)
        assert torch.equal(state, torch.get_rng_state())


def test_dropout_that_is_switched_on_is_measured_when_the_step_is_repeated(tmp_path: Path) -> None:
    given = [torch.ones(4, 8, 256)] * COUNT
    model, twin = (Noisy(lambda hidden: hidden) for _ in range(2))
    with prepared(tmp_path, "vertical", model) as session:
        session.accumulate(given)
        assert "one micro-batch after the other" not in session.report()  # what draws nothing is not measured
        session.optimizer.zero_grad()
        model.draw = twin.draw = lambda hidden: F.dropout(hidden, 0.1)
        torch.manual_seed(SEED)
        with pytest.raises(RandomDrawsError, match=r"draws random numbers \(the part before the blocks"):
            session.accumulate(given)
        session.optimizer.zero_grad()
        losses = session.accumulate(given) + session.accumulate(given)
    torch.manual_seed(SEED)
    assert [loss.item() for loss in losses] == [twin(each).item() for each in given * 2]


def test_a_change_that_shows_while_measuring_is_measured_when_the_step_is_repeated(tmp_path: Path) -> None:
    known = torch.ones(4, 8, 256)
    model = Noisy(lambda hidden: F.dropout(hidden, 0.1))
    with prepared(tmp_path, "vertical", model) as session:
        session.accumulate([known] * COUNT)
        session.optimizer.zero_grad()
        model.draw = lambda hidden: F.dropout(F.dropout(hidden, 0.1), 0.1)
        given = [known, torch.ones(4, 6, 256), known]
        state = torch.get_rng_state()
        with pytest.raises(RandomDrawsError, match="the same batches again measure it anew"):
            session.accumulate(given)
        assert torch.equal(state, torch.get_rng_state())
        session.optimizer.zero_grad()
        session.accumulate(given)
        session.accumulate(given)
        assert "2 of 4 steps" not in session.report()
        assert "3 of 4 steps" in session.report()


def test_kinds_are_shapes_types_modes_and_precision() -> None:
    model = Noisy(half_a_pair)
    draws = Draws(model, torch.device("cpu"), drawn=True)

    def kind(given: Any) -> Any:
        return draws.kinds([given])[0]

    first = kind({"a": torch.ones(2, 3), "n": 3})
    assert first == kind({"a": torch.zeros(2, 3), "n": 3})
    others = [
        {"a": torch.ones(3, 2), "n": 3},
        {"a": torch.ones(2, 3).double(), "n": 3},
        {"a": torch.ones(2, 3), "n": 4},
        {"b": torch.ones(2, 3), "n": 3},
        (torch.ones(2, 3), 3),
    ]
    kinds = {first, *map(kind, others)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kinds.add(kind({"a": torch.ones(2, 3), "n": 3}))
    model.blocks[1].eval()
    kinds.add(kind({"a": torch.ones(2, 3), "n": 3}))
    model.eval()
    kinds.add(kind({"a": torch.ones(2, 3), "n": 3}))
    assert len(kinds) == 9


# -- the trainer -------------------------------------------------------------------------------------


def test_a_run_that_is_taken_up_again_ends_as_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PlannerSection.options
    force = {"state": {"weight_tier": "nvme"}}
    monkeypatch.setattr(
        PlannerSection, "options", lambda section: dataclasses.replace(options(section), force=force)
    )

    def run(order: str) -> dict[str, Tensor]:
        given = recipe(tmp_path, order)
        config = {**given.model.config, "attention_dropout": 0.1}
        train(
            recipe_for(
                tmp_path / order,
                model={"config": config},
                budget={"nvme": "256MiB"},
                planner={"micro_batch_order": order},
                training={"steps": 4, "accumulation": 3},
                checkpoint={"every": 2},
            )
        )
        plan = json.loads((tmp_path / order / "plan.json").read_text())["plan"]
        assert plan["micro_batch_order"] == order
        return load_file(tmp_path / order / "checkpoint" / "step-000004" / "model.safetensors")

    expected, whole = run("horizontal"), run("vertical")
    (tmp_path / "vertical" / "checkpoint" / "step-000004").rename(tmp_path / "lost")
    resumed = run("vertical")  # from step 2; the next is measured anew
    for found in (whole, resumed):
        assert all(torch.equal(expected[name], value) for name, value in found.items())
