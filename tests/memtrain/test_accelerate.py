"""Training under Accelerate with memtrain equals training under Accelerate without it, bit for bit."""

from __future__ import annotations

import random
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import memtrain
from memtrain.offload.atomic import CheckpointError
from memtrain.offload.offloaded_grad import OffloadedGrad
from memtrain.optim import GaLore, classify, param_groups
from memtrain.planner.actions import Tier

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from memtrain.integrations import accelerate as integration  # noqa: E402
from memtrain.integrations.accelerate import (  # noqa: E402
    Accelerator,
    MemtrainPlugin,
    UnsupportedSetupError,
    check_setup,
    peek,
    stream_state,
)

FORCED = {
    "state": {"weight_tier": "device", "gradient_tier": "nvme", "optimizer_tier": "nvme"},
    "block": {"action": "swap"},
}
ROOMY: dict[str, dict[str, str]] = {}  # everything stays in memory


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in class attributes."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Block(nn.Module):
    """Large enough matrices (80,656 elements) for gradients and state to leave memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(284, 284), nn.Linear(284, 284)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.dropout(self.down(torch.tanh(self.up(x))), 0.1, self.training)


class Plain(nn.Module):
    """A model of one's own, which returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(301, 284)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = nn.functional.linear(x, self.table.weight)
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return SimpleNamespace(loss=loss)


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    if kind == "plain":
        return Plain().to(dtype)
    config = transformers.LlamaConfig(
        vocab_size=301, hidden_size=256, intermediate_size=288, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True, attention_dropout=0.1, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.train()


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.ids = torch.randint(0, 301, (8, 24), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def plugin(tmp_path: Path, schedule: str = "ahead", force: Any = FORCED, **settings: Any) -> MemtrainPlugin:
    swap = tmp_path / "swap"
    swap.mkdir(exist_ok=True)
    return MemtrainPlugin(
        budget=memtrain.Budget(device="6GiB", nvme=f"{swap}:256MiB"),
        options=memtrain.PlannerOptions(force=force, update_schedule=schedule, time_limit_seconds=2),
        **{"chunked_loss": False, **settings},
    )


@dataclass
class Run:
    """An ordinary Accelerate script."""

    accelerator: Any
    model: Any
    optimizer: Any
    loader: Any
    scheduler: Any
    trace: list[Any] = field(default_factory=list)

    def epoch(self) -> list[Any]:
        trace = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                trace.append(float(loss.detach()))
                if self.accelerator.sync_gradients:
                    trace.append(float(self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)))
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                trace.append(self.scheduler.get_last_lr())
        return trace

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def pieces(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, Any]:
    model = make_model(kind.removesuffix(" galore"), dtype)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    if kind.endswith("galore"):  # refreshed at steps 0 and 3; an epoch has two
        groups = param_groups(model, classify(model, rank=16))
        optimizer = GaLore(groups, lr=3e-3, weight_decay=0.1, rank=16, update_proj_gap=3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    torch.manual_seed(7)
    return model, optimizer, DataLoader(Texts(), batch_size=2, shuffle=True), scheduler


def without_memtrain(kind: str) -> Run:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    return Run(accelerator, *accelerator.prepare(*pieces(kind)))


def with_plugin(kind: str, chosen: MemtrainPlugin) -> Run:
    accelerator = Accelerator(memtrain_plugin=chosen, cpu=True, gradient_accumulation_steps=2)
    return Run(accelerator, *accelerator.prepare(*pieces(kind)))


def with_prepare(kind: str, chosen: MemtrainPlugin) -> Run:
    """``memtrain.prepare`` before an ordinary ``Accelerator.prepare``."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader, scheduler = pieces(kind)
    session = memtrain.prepare(
        model,
        optimizer,
        peek(loader),
        budget=chosen.budget,
        micro_batches=2,
        options=chosen.options,
        chunked_loss=False,
    )
    torch.manual_seed(7)
    run = Run(accelerator, *accelerator.prepare(session.model, session.optimizer, loader, scheduler))
    stream_state(accelerator, session)
    accelerator.memtrain_session = session
    return run


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("start", [with_plugin, with_prepare])
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [("llama", "ahead"), ("plain", "ahead"), ("plain", "sequential"), ("llama galore", "ahead")],
)
def test_equals_accelerate_without_memtrain(
    kind: str, schedule: str, start: Callable[[str, MemtrainPlugin], Run], tmp_path: Path
) -> None:
    plain = without_memtrain(kind)
    expected = [plain.epoch()]
    plain.accelerator.save_state(tmp_path / "plain")
    middle = plain.weights()
    expected.append(plain.epoch())
    end = plain.weights()
    _reset()
    run = start(kind, plugin(tmp_path, schedule))
    session = run.accelerator.memtrain_session
    assert {state.optimizer_tier for state in session.plan.states[:4]} == {Tier.NVME}  # table and blocks
    assert session.plan.update_schedule.value == schedule
    assert run.epoch() == expected[0]
    run.accelerator.save_state(tmp_path / "ours")
    assert_same(run.weights(), middle)
    assert run.epoch() == expected[1]
    assert_same(run.weights(), end)
    run.accelerator.load_state(tmp_path / "ours")
    assert_same(run.weights(), middle)
    assert run.epoch() == expected[1]
    assert_same(run.weights(), end)
    session.close()
    _reset()
    again = start(kind, plugin(tmp_path, "sequential", ROOMY))  # another plan, another process as it were
    again.accelerator.load_state(tmp_path / "ours")
    assert again.epoch() == expected[1]
    assert_same(again.weights(), end)
    again.accelerator.memtrain_session.close()


def _reset() -> None:
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def bytes_read(session: Any) -> int:
    return int(session.engine.store(Tier.NVME).statistics().bytes_read)


def test_offloaded_state_stays_where_it_is(tmp_path: Path) -> None:
    run = with_plugin("plain", plugin(tmp_path))
    session = run.accelerator.memtrain_session
    assert bytes_read(session) == 0
    run.epoch()
    session.flush()
    before = bytes_read(session)
    assert before > 0
    other = accelerate.Accelerator(cpu=True)
    wrapped = other.prepare(
        session.optimizer
    )  # calls state_dict() and load_state_dict() on a state that exists
    assert wrapped.device_placement is True
    assert wrapped.state_dict()["state"].keys() == session.optimizer.state_dict()["state"].keys()
    assert bytes_read(session) == before
    folder = tmp_path / "state"
    run.accelerator.save_state(folder)
    assert not list(folder.glob("optimizer*"))
    assert not list(folder.glob("model*"))
    state_bytes = sum(tensor.nbytes for _, _, tensor in session.optimizer.iter_state())
    stored = sum(path.stat().st_size for path in (folder / "memtrain").glob("optimizer-*"))
    assert 0 < stored - state_bytes < 8192  # the header, and no more
    run.accelerator.end_training()
    assert run.accelerator.memtrain_session is None


def test_gradients_are_away_while_accelerate_accumulates_and_clips(tmp_path: Path) -> None:
    run = with_plugin("plain", plugin(tmp_path))
    batch = next(iter(run.loader))
    with run.accelerator.accumulate(run.model):
        run.accelerator.backward(run.model(**batch).loss)
        grad = run.model.blocks[0].up.weight.grad
        assert isinstance(grad, OffloadedGrad)
        before = run.weights()
        run.optimizer.step()  # skipped: the second micro-batch is still to come
        run.optimizer.zero_grad()
        assert run.model.blocks[0].up.weight.grad is grad
        assert_same(run.weights(), before)
    run.accelerator.free_memory()


def test_master_weights_clip_the_gradients_that_are_stepped(tmp_path: Path) -> None:
    run = with_plugin_bf16(tmp_path)
    ours = run.epoch()
    weights = run.weights()
    run.accelerator.end_training()
    _reset()
    model, _, loader, _ = pieces("plain", torch.bfloat16)
    masters = [p.detach().float() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=3e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    expected: list[Any] = []
    for number, batch in enumerate(loader, 1):
        loss = model(**batch).loss
        (loss / 2).backward()
        expected.append(float(loss.detach()))
        if number % 2 == 0:
            for master, p in zip(masters, model.parameters(), strict=True):
                assert p.grad is not None
                master.grad = p.grad.float()
            expected.append(float(torch.nn.utils.clip_grad_norm_(masters, 0.5)))
            optimizer.step()
            scheduler.step()
            with torch.no_grad():
                for master, p in zip(masters, model.parameters(), strict=True):
                    p.copy_(master)
            model.zero_grad()
        expected.append(scheduler.get_last_lr())
    assert ours == expected
    assert_same(weights, {name: p.detach() for name, p in model.named_parameters()})


def with_plugin_bf16(tmp_path: Path) -> Run:
    accelerator = Accelerator(
        memtrain_plugin=plugin(tmp_path, master_weights=True), cpu=True, gradient_accumulation_steps=2
    )
    return Run(accelerator, *accelerator.prepare(*pieces("plain", torch.bfloat16)))


# -- looking at a batch ------------------------------------------------------------------------------------


def test_peeking_leaves_everything_as_it_was() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Texts(), batch_size=2, shuffle=True, generator=generator)
    before = generator.get_state()
    batch = peek(loader)
    assert torch.equal(generator.get_state(), before)
    assert batch["input_ids"].shape == (2, 24)
    first = next(iter(loader))["input_ids"]
    generator.set_state(before)
    peek(loader)
    assert torch.equal(next(iter(loader))["input_ids"], first)
    assert peek(DataLoader(Texts(), batch_size=None))["labels"].shape == (24,)


def test_prepare_draws_nothing(tmp_path: Path) -> None:
    accelerator = Accelerator(memtrain_plugin=plugin(tmp_path), cpu=True)
    parts = pieces("plain")
    random.seed(3)
    numpy.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    accelerator.prepare(*parts)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    accelerator.end_training()


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


class Backwards(torch.utils.data.Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter([1, 0])


@pytest.mark.parametrize(
    ("loader", "what"),
    [
        (DataLoader(Stream()), "an iterable dataset"),
        (DataLoader(TensorDataset(torch.zeros(2)), sampler=Backwards()), "Backwards"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(loader: Any, what: str) -> None:
    with pytest.raises(UnsupportedSetupError, match=f"from {what} without consuming it: give .*sample_batch"):
        peek(loader)


# -- what cannot be right ----------------------------------------------------------------------------------


def setup(**changes: Any) -> Any:
    state = {
        "mixed_precision": "no",
        "dynamo_plugin": SimpleNamespace(backend=accelerate.utils.DynamoBackend.NO),
    }
    return SimpleNamespace(
        distributed_type=changes.pop("distributed_type", accelerate.utils.DistributedType.NO),
        num_processes=changes.pop("num_processes", 1),
        state=SimpleNamespace(**{**state, **changes}),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"distributed_type": accelerate.utils.DistributedType.MULTI_GPU, "num_processes": 2},
            "MULTI_GPU with 2",
        ),
        (
            {"distributed_type": accelerate.utils.DistributedType.FSDP},
            "FSDP with 1: launch with --num_processes 1",
        ),
        ({"distributed_type": accelerate.utils.DistributedType.DEEPSPEED}, "DEEPSPEED with 1"),
        ({"mixed_precision": "fp16"}, r"mixed_precision='fp16' .*master_weights=True"),
        (
            {"dynamo_plugin": SimpleNamespace(backend=accelerate.utils.DynamoBackend.INDUCTOR)},
            "dynamo_backend=INDUCTOR",
        ),
    ],
)
def test_setups_that_are_refused(changes: dict[str, Any], message: str) -> None:
    check_setup(setup())
    with pytest.raises(UnsupportedSetupError, match=message):
        check_setup(setup(**changes))


def test_the_accelerator_checks_its_setup(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSetupError, match="mixed_precision='bf16'"):
        Accelerator(memtrain_plugin=plugin(tmp_path), cpu=True, mixed_precision="bf16")
    _reset()
    with pytest.raises(TypeError, match="memtrain_plugin must be a MemtrainPlugin"):
        Accelerator(memtrain_plugin="1GiB", cpu=True)
    with pytest.raises(TypeError, match=r"budget must be a memtrain.Budget"):
        MemtrainPlugin(budget="1GiB")
    with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
        plugin(tmp_path, micro_batches=0)


def test_prepare_refuses_what_no_plan_serves(tmp_path: Path) -> None:
    accelerator = Accelerator(
        memtrain_plugin=plugin(tmp_path, micro_batches=3), cpu=True, gradient_accumulation_steps=2
    )
    model, optimizer, loader, _ = pieces("plain")
    with pytest.raises(UnsupportedSetupError, match=r"micro_batches=3\) but gradient_accumulation_steps=2"):
        accelerator.prepare(model, optimizer, loader)
    with pytest.raises(UnsupportedSetupError, match="1 models and 0 optimizers"):
        accelerator.prepare(model)
    _reset()
    accelerator = Accelerator(memtrain_plugin=plugin(tmp_path), cpu=True)
    with pytest.raises(UnsupportedSetupError, match=r"pass a DataLoader to prepare\(\)"):
        accelerator.prepare(model, optimizer)
    assert accelerator.prepare(loader) is not None
    with pytest.raises(UnsupportedSetupError, match="has not prepared the session's optimizer"):
        stream_state(accelerator, SimpleNamespace(optimizer=optimizer))


def test_a_checkpoint_without_memtrain_is_refused(tmp_path: Path) -> None:
    plain = without_memtrain("plain")
    plain.accelerator.save_state(tmp_path / "plain")
    _reset()
    run = with_plugin("plain", plugin(tmp_path))
    with pytest.raises(CheckpointError, match=r"no folder memtrain, it was written without"):
        run.accelerator.load_state(tmp_path / "plain")
    run.accelerator.end_training()


def test_without_a_plugin_it_is_accelerate(tmp_path: Path) -> None:
    expected = without_memtrain("plain")
    trace = expected.epoch()
    _reset()
    accelerator = integration.Accelerator(cpu=True, gradient_accumulation_steps=2)
    run = Run(accelerator, *accelerator.prepare(*pieces("plain")))
    assert run.epoch() == trace
    accelerator.save_state(tmp_path / "at")
    assert (tmp_path / "at" / "optimizer.bin").exists()
    accelerator.load_state(tmp_path / "at")


def test_recipe_under_accelerate_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The example on a random tiny model: launched, saved, then resumed in this process."""
    recipe, output = "recipes/smollm2_135m_accelerate.py", str(tmp_path / "run")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    result = subprocess.run(
        [*launch, recipe, "--tiny", "--steps", "3", "--output", output],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "step 3/3" in result.stdout
    assert (tmp_path / "run" / "state" / "memtrain" / "model.safetensors").is_file()
    monkeypatch.setattr(sys, "argv", [recipe, "--tiny", "--steps", "4", "--output", output, "--resume"])
    runpy.run_path(recipe)["main"]()
    printed = capsys.readouterr().out
    assert "step 4/4" in printed
    assert "step 3/" not in printed
