"""A small Llama whose weights are streamed, and the plain PyTorch loop that it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from memtrain.offload.device import Device, make_device
from memtrain.offload.engine import Engine
from memtrain.offload.io import IOBackend
from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.shards import Unit
from memtrain.offload.tiers import MemoryStore, NvmeStore, Store
from memtrain.planner.actions import Tier, UpdateSchedule
from memtrain.planner.plan import WindowClass
from memtrain.weight_guard import WeightGuard
from tests.offload.training import STAGING, make_plan

WIDTH = 256  # 256 * 256 elements: enough to leave memory
VOCABULARY = 300
DEPTH = 4
CAPACITY_BYTES = 96 << 20
STREAMED = ("prologue", *(f"model.layers.{index}" for index in range(DEPTH)), "epilogue")


def llama(
    *,
    tied: bool = False,
    depth: int = DEPTH,
    dtype: torch.dtype = torch.float32,
    vocabulary: int = VOCABULARY,
) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def blocks_of(model: Any) -> list[tuple[str, nn.Module]]:
    return [(f"model.layers.{index}", layer) for index, layer in enumerate(model.model.layers)]


def units_of(model: nn.Module) -> list[Unit]:
    named = list(model.named_parameters())
    blocks = [name for name, _ in blocks_of(model)]

    def below(*names: str) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in named if name.startswith(names)]

    tied = [("lm_head.weight", model.lm_head.weight)] if "lm_head.weight" not in dict(named) else []
    return [
        ("prologue", below("model.embed_tokens.")),
        *((name, below(f"{name}.")) for name in blocks),
        ("epilogue", [*below("model.norm.", "lm_head."), *tied]),
    ]


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (2, 11), generator=generator) for _ in range(count)]


@contextmanager
def open_engine(
    tmp_path: Path | None = None, *, device: Device | None = None, backend: IOBackend | None = None
) -> Iterator[Engine]:
    """With a host tier, and an nvme tier where there is a directory."""
    with ExitStack() as stack:
        stores: dict[Tier, Store] = {
            Tier.HOST: MemoryStore(Tier.HOST, CAPACITY_BYTES, backend=None if tmp_path else backend)
        }
        if tmp_path is not None:
            stores[Tier.NVME] = NvmeStore(tmp_path, CAPACITY_BYTES, direct="allow_buffered", backend=backend)
        yield stack.enter_context(Engine(stores, device or make_device("cpu")))


def stream(
    model: nn.Module,
    engine: Engine,
    *,
    slots: int | Sequence[WindowClass] = 3,
    tier: Tier = Tier.HOST,
    units: Sequence[str] | None = None,
    tiers: Mapping[str, Tier] | None = None,
) -> ParameterStreamer:
    """Streams ``units``, all by default."""
    every = units_of(model)
    chosen = [name for name, _ in every] if units is None else units
    streamer = ParameterStreamer(
        model,
        blocks_of(model),
        every,
        tiers=dict.fromkeys(chosen, tier) if tiers is None else tiers,
        engine=engine,
        slots=slots,
    )
    streamer.install()
    return streamer


def plain_steps(
    model: nn.Module,
    make: Callable[[Any], torch.optim.Optimizer],
    *,
    steps: int = 3,
    accumulate: int = 1,
    max_norm: float | None = None,
    master: bool = False,
) -> list[Tensor]:
    """Losses, gradient norms, and the weights at the end."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    masters = [p.detach().float() for p in parameters] if master else parameters
    optimizer = make(masters)
    data, found = iter(batches(steps * accumulate)), []
    for _ in range(steps):
        for _ in range(accumulate):
            tokens = next(data)
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / accumulate).backward()
            found.append(loss.detach())
        if master:
            for m, p in zip(masters, parameters, strict=True):
                m.grad = None if p.grad is None else p.grad.float()
        if max_norm is not None:
            found.append(torch.nn.utils.clip_grad_norm_(masters, max_norm))
        optimizer.step()
        if master:
            with torch.no_grad():
                for m, p in zip(masters, parameters, strict=True):
                    p.copy_(m)
        for p in parameters:
            p.grad = None
    return found


@contextmanager
def streamed_optimizer(
    model: nn.Module,
    streamer: ParameterStreamer,
    engine: Engine,
    make: Callable[[Any], torch.optim.Optimizer],
    *,
    schedule: UpdateSchedule = UpdateSchedule.SEQUENTIAL,
    state_tier: Tier = Tier.HOST,
    gradient_tier: Tier = Tier.HOST,
    **config: Any,
) -> Iterator[OffloadedOptimizer]:
    units = units_of(model)
    plan = make_plan(
        schedule,
        gradient_tier,
        state_tier,
        dataclasses.replace(STAGING, gradient_slot_bytes=1 << 20, update_slot_bytes=8 << 20),
        tuple(name for name, _ in units),
    )
    optimizer = OffloadedOptimizer(
        make([p for p in model.parameters() if p.requires_grad]),
        engine=engine,
        plan=plan,
        units=units,
        config=OptimizerConfig(**config),
        weights=streamer,
    )
    guard = WeightGuard(model, blocks_of(model), units, optimizer.ensure)
    try:
        yield optimizer
    finally:
        guard.remove()
        optimizer.close()


def streamed_steps(
    model: nn.Module,
    optimizer: OffloadedOptimizer,
    *,
    steps: int = 3,
    accumulate: int = 1,
    max_norm: float | None = None,
) -> list[Tensor]:
    """The same as ``plain_steps``."""
    data, found = iter(batches(steps * accumulate)), []
    for _ in range(steps):
        for _ in range(accumulate):
            tokens = next(data)
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / accumulate).backward()
            found.append(loss.detach())
        if max_norm is not None:
            found.append(optimizer.clip_grad_norm_(max_norm))
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()
    return found


def assert_same(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    assert len(one) == len(other)
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a, b), number


def assert_same_weights(plain: nn.Module, streamer: ParameterStreamer, model: nn.Module) -> None:
    """Of the model where it is streamed: unit by unit."""
    expected = dict(plain.named_parameters())
    seen = 0
    for unit, members in units_of(model):
        with streamer.hold(unit):
            for name, parameter in members:
                if name in expected:
                    assert torch.equal(parameter, expected[name]), name
                    seen += 1
    assert seen == len(expected)
