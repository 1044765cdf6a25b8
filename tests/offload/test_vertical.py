"""Micro-batches in vertical order: the horizontal loop's bits, fewer reads, nothing left of what fails."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.errors import OffloadError
from memtrain.offload.vertical import VerticalPass
from memtrain.planner.actions import MicroBatchOrder
from memtrain.planner.plan import Plan
from tests.offload.latest_store import make_plan
from tests.offload.streamed import DEPTH, STREAMED, assert_same, blocks_of, llama, open_engine, stream
from tests.offload.test_parameters_activations import DECISIONS, streaming
from tests.offload.vertical_runs import (
    gradients,
    horizontal,
    hugging_face,
    micro_batches,
    no_thread_left,
    noting,
    vertical,
)

BLOCKS = [f"model.layers.{index}" for index in range(DEPTH)]


# -- order -------------------------------------------------------------------------------------------


def test_blocks_are_passed_last_first_and_backward_first_first() -> None:
    model = llama(depth=2)
    seen: list[tuple[str, str]] = []
    data = micro_batches(3)
    waits: list[str] = []
    order = VerticalPass[None](
        blocks_of(model), torch.device("cpu"), lambda: waits.append(threading.current_thread().name)
    )
    with noting(blocks_of(model), seen):
        order.run([lambda t=tokens: hugging_face(model, t).backward() for tokens in data])
    short = [(name.replace("model.layers.", ""), int(who[-1])) for name, who in seen]
    down = [(f"forward {block}", number) for block in (0, 1) for number in (2, 1, 0)]
    up = [(f"backward {block}", number) for block in (1, 0) for number in (0, 1, 2)]
    assert short == down + up
    # Before each turn (two forwards, loss, two backwards, the part before the blocks), and at the end.
    assert Counter(waits) == {f"micro-batch {number}": 7 for number in range(3)}


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_sums_of_gradients_are_those_of_the_loop(tied: bool, count: int) -> None:
    plain, model = llama(tied=tied), llama(tied=tied)
    data = micro_batches(count)
    assert_same(horizontal(plain, data), vertical(model, data))
    # Sums go on, as they do in the loop.
    assert_same(horizontal(plain, data), vertical(model, data))


def test_the_order_of_additions_shows() -> None:
    """What the tests above would find: the micro-batches backwards give other bits."""
    data = micro_batches(4)
    turned = horizontal(llama(), data[::-1])[4:]
    assert not all(torch.equal(a, b) for a, b in zip(horizontal(llama(), data)[4:], turned, strict=True))


class Nested(nn.Module):
    """Blocks inside of containers, called twice, with what a loss needs taken on the way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(300, 64)
        self.stack = nn.ModuleDict(
            {"blocks": nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(3))}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, loss = self.table(tokens), torch.zeros(())
        for block in (*self.stack["blocks"], *self.stack["blocks"]):
            hidden = hidden + block(hidden)
            loss = loss + hidden.square().mean()
        return loss + (hidden @ self.table.weight.T).logsumexp(-1).mean()


def test_blocks_that_are_called_twice_and_looked_at_on_the_way() -> None:
    data = micro_batches(3)
    plain, model = Nested(), Nested()
    named = [(f"stack.blocks.{i}", block) for i, block in enumerate(model.stack["blocks"])]
    expected = horizontal(plain, data, lambda m, t: m(t))
    assert_same(expected, vertical(model, data, lambda m, t: m(t), named))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=300, use_cache=False, **quiet)
    ).train()


def test_gpt2_with_its_tied_head() -> None:
    data = micro_batches(3)
    model = gpt2()
    named = [(f"transformer.h.{i}", block) for i, block in enumerate(model.transformer.h)]
    assert_same(horizontal(gpt2(), data), vertical(model, data, blocks=named))


def test_frozen_blocks_have_no_turn_in_backward() -> None:
    def partly() -> nn.Module:
        model = llama()
        model.model.embed_tokens.requires_grad_(False)
        for block in model.model.layers[:2]:
            block.requires_grad_(False)
        return model

    data = micro_batches(3)
    assert_same(horizontal(partly(), data), vertical(partly(), data))


# -- what is a thread's own --------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False])
def test_autocast_is_taken_along(cache: bool) -> None:
    data = micro_batches(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=cache):
        expected = horizontal(llama(tied=True), data)
        found = vertical(llama(tied=True), data)
    assert_same(expected, found)
    assert not torch.equal(expected[0], horizontal(llama(tied=True), data)[0])  # it does something


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.entered = 0

    def __enter__(self) -> Any:
        self.entered += 1
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Seeing(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[getattr(func, "__name__", "")] += 1
        return func(*args, **(kwargs or {}))


def test_modes_and_saved_tensor_hooks_are_taken_along() -> None:
    data = micro_batches(2)
    counts = []
    for run in (horizontal, vertical):
        packed = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal packed
            packed += 1
            return tensor

        model = llama()
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with Seeing() as seeing, Counting() as counting, hooks:
            run(model, data)
        assert counting.entered == 1
        counts.append((packed, counting.calls["aten.mm.default"], seeing.calls["linear"]))
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_context_and_threads_are_the_callers() -> None:
    import contextvars

    place = contextvars.ContextVar("place", default="nowhere")
    place.set("here")
    threads = torch.get_num_threads()
    found = VerticalPass[Any]([], torch.device("cpu")).run(
        [lambda: (place.get(), torch.get_num_threads(), torch.is_grad_enabled())] * 2
    )
    assert found == [("here", threads, True)] * 2


# -- what would not be exact -------------------------------------------------------------------------


def test_a_block_that_changes_a_buffer_is_refused_by_name() -> None:
    model = llama()
    model.model.layers[2].register_buffer("seen", torch.zeros(()))

    def count(module: nn.Module, args: Any) -> None:
        module.seen.add_(1)

    model.model.layers[2].register_forward_pre_hook(count)
    with pytest.raises(OffloadError, match=r"changes the buffer model\.layers\.2\.seen"):
        vertical(model, micro_batches(2))
    assert not gradients(model)


def test_micro_batches_that_go_different_ways_are_refused() -> None:
    model = llama()
    blocks = model.model.layers

    def leave_out(model: nn.Module, tokens: Tensor) -> Tensor:
        model.model.layers = blocks if tokens.shape[1] > 7 else nn.ModuleList([blocks[0], *blocks[2:]])
        return hugging_face(model, tokens)

    with no_thread_left(), pytest.raises(OffloadError, match=r"forward of model\.layers\.[12] where another"):
        vertical(model, micro_batches(2), leave_out, [(f"model.layers.{i}", b) for i, b in enumerate(blocks)])


def vertical_plan(name: str, micro_batches: int) -> Plan:
    return dataclasses.replace(
        make_plan(DECISIONS[name], slots=3, slot_bytes=2 << 20),
        micro_batches=micro_batches,
        micro_batch_order=MicroBatchOrder.VERTICAL,
    )


# -- streamed weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "slots"), [*((name, 2) for name in DECISIONS), ("mixed", 3)])
def test_under_every_action(name: str, slots: int) -> None:
    data = micro_batches(3, same_length=True)
    plain, model = llama(tied=True), llama(tied=True)
    expected = horizontal(plain, data)
    with streaming(model, slots=slots) as (streamer, engine):
        executor = ActivationExecutor(model, blocks_of(model), vertical_plan(name, 3), engine)
        executor.install()
        assert_same(expected, vertical(model, data))
        assert streamer.statistics().peak_in_use == slots
        model.zero_grad()
        assert_same(expected, horizontal(model, data))  # a loop of one's own goes on working
        executor.remove()


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_read_once_in_each_direction(tied: bool) -> None:
    data = micro_batches(4)
    reads = {}
    for run in (horizontal, vertical):
        model = llama(tied=tied)
        with open_engine() as engine:
            streamer = stream(model, engine, slots=2)
            run(model, data)  # what the windows hold is as in a long run from here on
            model.zero_grad()
            before = streamer.statistics().reads
            run(model, data)
            reads[run] = streamer.statistics().reads - before
            streamer.remove()
    assert len(STREAMED) == 6
    # Two windows: a pass finds the first two units there, and backward the last two; all others are read.
    assert reads[vertical] < reads[horizontal] / 3
    assert reads[horizontal] == 4 * reads[vertical]


def test_streamed_blocks_alone() -> None:
    data = micro_batches(3)
    expected = horizontal(llama(), data)
    model = llama()
    with streaming(model, slots=2, units=BLOCKS):
        assert_same(expected, vertical(model, data))


# -- faults ------------------------------------------------------------------------------------------


def test_a_first_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "micro-batch 1":
            raise RuntimeError("can't start new thread")
        begin(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with no_thread_left(), pytest.raises(RuntimeError, match="can't start"):
        vertical(llama(), micro_batches(3))
