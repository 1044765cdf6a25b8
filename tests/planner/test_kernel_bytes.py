"""What kernels take for themselves, by hand; and what an error or somebody's profiler makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from memtrain.planner.trace import profile_model
from memtrain.planner.tracing.kernel_bytes import hidden, with_peak
from memtrain.planner.tracing.live_bytes import LiveBytes

MiB = 1 << 20


def block() -> Tensor:
    return torch.empty(MiB, dtype=torch.uint8)


def two_of_three() -> Tensor:
    first, second = block(), block()
    del first
    third = block()
    del second
    return third


def test_the_most_at_once_and_not_the_sum() -> None:
    found, peak = with_peak(two_of_three)
    assert (found.nbytes, peak) == (MiB, 2 * MiB)
    assert with_peak(lambda: None) == (None, 0)


def test_what_dies_inside_gives_no_room_to_what_was_there_before() -> None:
    held = [block() for _ in range(4)]
    assert with_peak(held.clear) == (None, 0)


def test_an_error_passes_and_the_next_call_is_measured() -> None:
    def fail() -> None:
        block()
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        with_peak(fail)
    assert not torch.autograd._profiler_enabled()
    assert with_peak(block)[1] == MiB


def test_under_somebodys_profiler_nothing_is_known_and_theirs_goes_on() -> None:
    with torch.profiler.profile(profile_memory=True) as theirs:
        assert with_peak(two_of_three)[1] == 0
        assert torch.autograd._profiler_enabled()
    assert any(event.name == "aten::empty" for event in theirs.events())


def test_a_model_that_is_measured_under_a_profiler_is_warned_of() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    optimizer, batch = torch.optim.SGD(model.parameters()), torch.zeros(2, 8)
    with (
        torch.profiler.profile(),
        pytest.warns(UserWarning, match="not on the bill, because a profiler is running"),
    ):
        profile_model(model, batch, optimizer=optimizer, elementwise=True, block_names=["0", "1", "2"])


def test_another_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.autograd, "_enable_profiler_legacy")
    assert hidden() == f"torch {torch.__version__} has no legacy profiler"
    assert with_peak(block)[1] == 0


def test_live_bytes_counts_what_an_operator_has_beside_its_result() -> None:
    library = torch.library.Library("memtrain_test", "DEF")  # lives as long as the test
    library.define("greedy(Tensor x) -> Tensor")

    def greedy(x: Tensor) -> Tensor:
        scratch = [torch.empty(MiB, dtype=torch.uint8) for _ in range(5)]
        return x + len(scratch)

    library.impl("greedy", greedy, "CPU")
    x = torch.zeros(MiB // 4)
    with LiveBytes() as live:
        y = torch.ops.memtrain_test.greedy(x)
        assert live.now_bytes == y.nbytes == MiB
        assert 0 <= live.peak_bytes - 6 * MiB < 64  # a number is a tensor too
        live.restart_peak()
        z = y + 1
        assert live.now_bytes == 2 * MiB
        assert 0 <= live.peak_bytes - 2 * MiB < 64
        del y, z


def test_a_product_in_bf16_is_billed_for_what_this_processor_takes() -> None:
    """Its result, and three times that where sums are made in fp32 beside it."""
    left, right = torch.ones(512, 256, dtype=torch.bfloat16), torch.ones(256, 512, dtype=torch.bfloat16)
    result = left @ right
    with LiveBytes() as live:
        result = left @ right
    assert live.peak_bytes >= result.nbytes
    assert live.peak_bytes == with_peak(lambda: left @ right)[1]
