"""Exceptions and Ctrl-C in the middle of a step, after which training goes on; buffers that are changed under
a transfer."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path
from types import FrameType

import pytest
import torch

from memtrain.offload.errors import OffloadError
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from tests.offload.faults.runs_on_disk import assert_trained, disk_of, expected, open_run_in
from tests.offload.snapshot_runs import AHEAD, SEQUENTIAL, UNITS, Run
from tests.offload.training import batches

SECONDS_A_STEP = 0.02
"""About; interruptions are drawn from a few of them."""


class Interruption(BaseException):
    """As KeyboardInterrupt: no ordinary handler catches it."""


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_an_exception_in_backward_costs_that_pass_alone(tmp_path: Path, schedule: object) -> None:
    with open_run_in(tmp_path, schedule=schedule) as run:
        run.train(batches(4)[:2])
        for where in (run.model.embed.weight, run.model.second.weight):
            hook = where.register_hook(lambda gradient: 1 / 0)
            for unit in UNITS:
                run.optimizer.ensure(unit)
            with pytest.raises(ZeroDivisionError):
                run.model(batches(4)[2]).backward()
            hook.remove()
            run.optimizer.zero_grad()
        run.train(batches(4)[2:])
        assert_trained(run, 4)


def interrupted_step(run: Run, batch: torch.Tensor, seconds: float) -> str:
    """``backward`` or ``update``, whichever Ctrl-C met; or ``none``."""
    armed = [True]

    def interrupt(number: int, frame: FrameType | None) -> None:
        if armed[0]:
            armed[0] = False
            raise Interruption

    place = "backward"
    before = signal.signal(signal.SIGVTALRM, interrupt)
    timer = threading.Timer(seconds, signal.pthread_kill, (threading.get_ident(), signal.SIGVTALRM))
    timer.start()
    try:
        for unit in UNITS:
            run.optimizer.ensure(unit)
        run.model(batch).backward()
        place = "update"
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.flush()
        armed[0] = False
        place = "none"
    except Interruption:
        pass
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGVTALRM, before)
    return place


def is_trained(run: Run, steps: int) -> bool:
    return all(torch.equal(p, expected(steps)[name]) for name, p in run.model.named_parameters())


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("seed", range(4))
def test_ctrl_c_at_any_moment_leaves_whole_weights_or_an_error(
    tmp_path: Path, seed: int, schedule: object
) -> None:
    """An interrupted pass is run again; after an interrupted update a checkpoint is loaded, and what is there
    is not half of one, unless it is refused."""
    rng = random.Random(seed)
    slow = {number: Fault(delay_seconds=0.002) for number in range(400)}
    backend = FaultyBackend(ThreadPoolBackend(2), slow)

    def work() -> bool:
        """Whether it could go on."""
        with open_run_in(tmp_path, backend=backend, schedule=schedule) as run:
            run.train(batches(4)[:2])
            run.flush()
            save_checkpoint(tmp_path / "at", run, progress={})
            place = interrupted_step(run, batches(4)[2], rng.uniform(0, 5 * SECONDS_A_STEP))
            if place == "update":
                run.flush()
                assert is_trained(run, 2) or is_trained(run, 3)
                return False
            if place == "backward":
                run.optimizer.zero_grad()
                run.train(batches(4)[2:3])
            run.train(batches(4)[3:])
            assert_trained(run, 4)
            return True

    try:
        went_on = work()
    except OffloadError:
        went_on = False
    if not went_on:
        with open_run_in(tmp_path) as run:
            load_checkpoint(tmp_path / "at", run)
            run.train(batches(4)[2:])
            assert_trained(run, 4)


def test_a_forward_that_is_given_up_holds_nothing(tmp_path: Path) -> None:
    with open_run_in(tmp_path) as run:
        used = disk_of(run).used_bytes
        for batch in batches(3):
            for unit in UNITS:
                run.optimizer.ensure(unit)
            loss = run.model(batch)
            del loss
        run.train(batches(3))
        assert_trained(run, 3)
        assert disk_of(run).used_bytes == used
    assert expected(3)
