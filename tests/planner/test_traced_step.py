"""A step put together from parts against the same model run at once, operation by operation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers")

from memtrain.planner.buffers import Buffer
from memtrain.planner.check_addresses import check_addresses
from memtrain.planner.estimate import LifetimeKind, ModelEstimate
from memtrain.planner.step_addresses import pack_step
from memtrain.planner.step_buffers import Step
from memtrain.planner.traced_step import step_of
from memtrain.planner.tracing import fake_model
from memtrain.planner.tracing.estimator import estimate_config, estimate_module
from memtrain.planner.tracing.kernel_shapes import KernelShapes
from memtrain.planner.tracing.recorder import Recorder, storage_key
from tests.planner.tracing_models import CONFIGS, ROWS, TOKENS


def load(step: Step) -> list[int]:
    """Bytes alive during each operation of the step."""
    change = [0] * (step.backward_starts[0] + step.blocks[0].backward_ops + 1)
    for b in step.buffers():
        change[b.start] += b.size
        change[b.end] -= b.size
    return list(accumulate(change[:-1]))


def at_once(step: Step, values: list[Any], tied: int) -> list[Any]:
    """Without the operations that make gradients at the turn of a part, which one run does not have."""
    turns = set(step.backward_starts[:-1]) | {step.backward_starts[0] + i for i in range(tied + 1)}
    return [value for i, value in enumerate(values) if i not in turns]


class Turn(torch.autograd.Function):
    """The loss and its gradient belong to whoever calls backward, here to nobody."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Tensor:
        return torch.empty_strided((), ())


def run_at_once(make: Callable[[], nn.Module], *, for_real: bool = False) -> tuple[list[str], list[int]]:
    """Operators of the whole model's forward and backward, and the bytes alive during each."""
    with ExitStack() as stack:
        if not for_real:
            stack.enter_context(FakeTensorMode())
            stack.enter_context(KernelShapes(on_gpu=False))
        model = make().train()
        batch = fake_model.token_batch(ROWS, TOKENS)
        outside = (*model.parameters(), *model.buffers(), *batch.values())
        recorder = Recorder({storage_key(t) for t in outside})
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        with fake_model.unpacked_rows():
            with recorder, recorder.saving():
                loss = [model(**batch).loss]
            start = Turn.apply(loss.pop())
            nothing = torch.zeros_like(start)
            with recorder:
                start.backward(nothing)
    change = [0] * (len(recorder.operations) + 1)
    for storage in recorder.storages:
        change[storage.born] += storage.size_bytes
        change[-1 if storage.died is None else storage.died] -= storage.size_bytes
    return [op.name for op in recorder.operations], list(accumulate(change[:-1]))


def built(name: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    return fake_model.build(fake_model.read_config(CONFIGS[name]), dtype, "default")


@pytest.mark.parametrize("name", ["grouped", "gpt2"])
def test_fake_tensors_live_as_long_as_real_ones(name: str) -> None:
    fake, real = (run_at_once(lambda: built(name), for_real=for_real) for for_real in (False, True))
    assert fake == real


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_load_is_that_of_the_whole_model_run_at_once(name: str, dtype: torch.dtype) -> None:
    estimate = estimate_config(CONFIGS[name], sequence=TOKENS, batch=ROWS, dtype=dtype)
    step = step_of(estimate)
    operators, alive = run_at_once(lambda: built(name, dtype))
    tied = sum(life.kind is LifetimeKind.TIED_GRADIENT for life in estimate.epilogue.lifetimes)
    assert at_once(step, traced_operators(estimate), tied) == operators
    found = at_once(step, load(step), tied)
    first, last = first_block_backward(step, tied)
    assert found[:first] == alive[:first]
    assert found[last:] == alive[last:]
    # What blocks share dies with its last reader, somewhere in this backward, and here at the end of it.
    shared = sum(tensor.size_bytes for tensor in estimate.shared)
    late = [mine - theirs for mine, theirs in zip(found[first:last], alive[first:last], strict=True)]
    assert late == sorted(late)
    assert (late[0], late[-1]) == (0, shared)


def half_frozen() -> nn.Module:
    """Neither the embedding nor the first of two blocks is trained: backward ends in the second."""
    model = built("grouped")
    for module in (model.get_input_embeddings(), model.model.layers[0]):
        module.requires_grad_(False)
    return model


def test_blocks_without_a_backward_are_joined_as_well() -> None:
    with FakeTensorMode():
        batch = fake_model.token_batch(ROWS, TOKENS)
    estimate = estimate_module(half_frozen, batch)
    step = step_of(estimate)
    assert [block.backward_ops > 0 for block in step.blocks] == [False, False, True, True]
    operators, alive = run_at_once(half_frozen)
    assert at_once(step, traced_operators(estimate), 0) == operators
    found = at_once(step, load(step), 0)
    turn = step.forward_starts[-1]
    assert found[:turn] == alive[:turn]
    shared = sum(tensor.size_bytes for tensor in estimate.shared)
    assert {mine - theirs for mine, theirs in zip(found, alive, strict=True)} <= {0, shared // 2, shared}


def traced_operators(estimate: ModelEstimate) -> list[str]:
    parts = [[op.name for op in part.operations] for part in estimate.parts()]
    turns = [part.forward_operations for part in estimate.parts()]
    forward = [name for names, turn in zip(parts, turns, strict=True) for name in names[:turn]]
    backward = [names[turn:] for names, turn in zip(parts, turns, strict=True)]
    return forward + [name for names in reversed(backward) for name in names]


def first_block_backward(step: Step, tied: int) -> tuple[int, int]:
    """Its operations in ``at_once``."""
    numbers = at_once(step, list(range(len(load(step)))), tied)
    prologue_start, start = step.backward_starts[:2]
    return sum(n < start for n in numbers), sum(n < prologue_start for n in numbers)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_addresses_are_sound(name: str) -> None:
    step = step_of(
        estimate_config(CONFIGS[name], sequence=TOKENS, batch=ROWS), staging_slots=2, staging_slot_bytes=6144
    )
    packing = pack_step(step, time_limit_seconds=2)
    buffers = step.buffers()
    assert check_addresses(buffers, packing.offsets, capacity=packing.height, alignment=512) == ()
    assert packing.load <= packing.height <= packing.two_level_height


def test_a_whole_step_of_80_layers_is_packed_to_its_load() -> None:
    step = step_of(
        estimate_config("llama-3-70b", sequence=4096), staging_slots=2, staging_slot_bytes=64 << 20
    )
    # 110 operations of a block make 112 buffers: two of them, the attention kernel and its backward, more.
    assert len(step.buffers()) > 80 * 110
    packing = pack_step(step, time_limit_seconds=10)
    assert packing.height == packing.load
    assert packing.two_level_height / packing.load - 1 < 0.005
    assert check_addresses(step.buffers(), packing.offsets, capacity=packing.load, alignment=512) == ()


@pytest.fixture(scope="module")
def llama() -> ModelEstimate:
    """Two blocks; in fp32 autograd keeps a block's input."""
    return estimate_config(CONFIGS["grouped"], sequence=TOKENS, batch=ROWS, dtype=torch.float32)


def test_a_block_by_hand(llama: ModelEstimate) -> None:
    step = step_of(llama, staging_slots=2, staging_slot_bytes=100)
    prologue, first, second, epilogue = step.blocks
    hidden = ROWS * TOKENS * 64 * 4
    assert first is second
    assert (first.forward_ops, first.output.size, first.input_gradient.size) == (34, hidden, hidden)
    # In fp32 a norm's input is no copy: the block keeps what it is given.
    assert first.input_end == 34
    assert first.input_kept_end > 0
    assert sum(k.size for k in first.kept) + hidden == llama.classes[0].saved_bytes
    # The embedding's output is held by the model's frame as well, so it is of the whole step.
    assert prologue.output is None
    assert prologue.input_gradient is None
    assert epilogue.output is None
    spanning = {b.name: b for b in step.spanning}
    returns = step.backward_starts[1] + first.input_kept_end
    assert spanning["0.output"] == Buffer("0.output", 0, returns, hidden)
    outputs = {b.name: (b.start, b.end) for b in step.buffers() if b.name.endswith(".output")}
    assert outputs["1.output"][1] == step.backward_starts[2] + second.input_kept_end
    assert {"staging.0", "staging.1"} <= {b.name for b in step.buffers()}


def test_what_a_plan_removes_is_there_while_it_is_made_and_while_it_is_read(llama: ModelEstimate) -> None:
    whole, less = step_of(llama), step_of(llama, kept={llama.blocks[1].name: ()})
    part = llama.classes[0]
    assert less.blocks[1] == whole.blocks[1]
    second = less.blocks[2]
    assert (second.kept, second.input_kept_end) == ((), 0)
    assert {b.start for b in second.backward if b.name.endswith(("saved", "input"))} == {0}
    before, after = load(whole), load(less)
    returns = whole.backward_starts[2]
    removed = [0] * whole.forward_starts[3]
    removed += [part.saved_bytes] * (
        returns - whole.forward_starts[3]
    )  # forward of the head, and its backward
    removed += [0] * part.forward_operations * 9
    assert [b - a for b, a in zip(before, after, strict=True)] == removed[: len(before)]
    assert check_addresses(less.buffers(), pack_step(less, time_limit_seconds=1).offsets) == ()


@pytest.mark.parametrize("kept", [None, ()])
def test_an_input_that_something_is_computed_from_stays(
    llama: ModelEstimate, kept: tuple[int, ...] | None
) -> None:
    second = llama.blocks[1].name
    step = step_of(llama, kept=None if kept is None else {second: kept}, kept_inputs=[second])
    block = step.blocks[2]
    assert block.input_kept_end == block.backward_ops
    assert not [b for b in block.backward if b.name.endswith(".input")]
    (output,) = (b for b in step.buffers() if b.name == "1.output")
    assert output.end == step.backward_starts[1]
    assert step.blocks[1] == step_of(llama).blocks[1]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (
            {"model.layers.7": ()},
            "kept names 'model.layers.7'; choose from prologue, model.layers.0, ",
        ),
        ({"prologue": (3,)}, "kept names saved tensor 3 of prologue, which has 0"),
    ],
)
def test_unknown_parts_and_tensors_are_refused(
    llama: ModelEstimate, kept: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        step_of(llama, kept=kept)
    with pytest.raises(ValueError, match=r"kept_inputs names 'prologue'; choose from model\.layers\.0, "):
        step_of(llama, kept_inputs=["prologue"])


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adding() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        for layer in self.layers:
            x = layer(x)
        return x


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.inner(x.detach()))


def test_blocks_that_work_in_place_are_refused() -> None:
    estimate = estimate_module(InPlace, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"layers\.0 gives layers\.1 the very storage that it was given"):
        step_of(estimate)
