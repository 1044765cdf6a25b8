"""Forks, second sessions, other users: what is in one process, or one user's, stays there."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.errors import OffloadError
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import NvmeStore
from memtrain.planner.actions import Tier
from tests.offload.faults.disks import in_child, open_descriptors
from tests.offload.faults.runs_on_disk import assert_trained, disk_of, open_run_in
from tests.offload.snapshot_runs import AHEAD, SEQUENTIAL, UNITS, Run
from tests.offload.tier_stores import CAPACITY, U, filled
from tests.offload.training import batches


class Batches(Dataset[Tensor]):
    """What a worker does besides fetching: compute, collect garbage, and drop everything it inherited."""

    def __init__(self, count: int) -> None:
        self.data = batches(count)
        self.inherited: list[object] = []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        self.inherited.clear()
        gc.collect()
        (torch.randn(200, 200) @ torch.randn(200, 200)).sum().item()
        return self.data[index]


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_workers_of_a_data_loader_and_their_exit_change_nothing(tmp_path: Path, schedule: object) -> None:
    with open_run_in(tmp_path, schedule=schedule) as run:
        run.train(batches(6)[:2])
        dataset = Batches(6)
        dataset.inherited += [run, run.optimizer, disk_of(run)]  # a worker's copy of it dies in the worker
        loader = DataLoader(dataset, batch_size=None, sampler=range(2, 6), num_workers=2)
        for batch in loader:  # forked while transfers are under way; two workers end before the loop does
            run.train([batch])
        assert_trained(run, 6)
        assert len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == []


def test_a_child_that_closes_collects_and_exits_takes_nothing_from_its_parent(tmp_path: Path) -> None:
    with open_run_in(tmp_path) as run:
        run.train(batches(4)[:2])

        def work() -> str:
            refusals = []
            for use in (run.optimizer.flush, lambda: disk_of(run).allocate("x", U)):
                try:
                    use()
                except OffloadError as error:
                    refusals.append("forked child may not use it" in str(error))
            disk_of(run).close()
            gc.collect()
            return str(refusals)

        assert in_child(work) == "[True, True]"
        run.train(batches(4)[2:])
        assert_trained(run, 4)


def test_an_interpreter_exit_in_a_child_leaves_the_run_and_its_directory(tmp_path: Path) -> None:
    program = """
import os, sys
from pathlib import Path
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.tiers import NvmeStore
from memtrain.planner.actions import Tier
from tests.offload.faults.runs_on_disk import assert_trained
from tests.offload.snapshot_runs import AHEAD, Run, adamw
from tests.offload.training import batches, make_model, make_plan, trainable, wrap
engine = Engine({Tier.NVME: NvmeStore(sys.argv[1], 8 << 20)}, make_device("cpu"))
model = make_model()
run = Run(model, wrap(model, adamw(trainable(model)), engine, make_plan(AHEAD, Tier.NVME, Tier.NVME)))
run.train(batches(3)[:2])
if os.fork() == 0:
    sys.exit(0)  # with everything that was registered for the exit
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
assert len(os.listdir(sys.argv[1])) == 1
run.train(batches(3)[2:])
assert_trained(run, 3)
print("trained")  # and nobody closes it
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, tmp_path],
        capture_output=True, text=True, timeout=100, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained\n", "")
    assert os.listdir(tmp_path) == []


def test_memory_that_a_child_does_not_inherit_is_not_given_to_anything_else_in_it() -> None:
    slabs = [Slab(1 << 20) for _ in range(4)]
    for slab in slabs:
        slab.buffer.fill_(7)

    def work() -> int:
        own = [Slab(1 << 20) for _ in range(8)]
        assert not {slab.address for slab in own} & {slab.address for slab in slabs}
        for slab in slabs:
            slab.close()
        slabs.clear()
        gc.collect()  # the inherited mappings are unmapped here
        own += [Slab(1 << 20) for _ in range(8)]
        for number, slab in enumerate(own):
            slab.buffer.fill_(number)
        return sum(int(slab.buffer[-1]) for slab in own)

    assert in_child(work) == sum(range(16))
    assert all(int(slab.buffer[123]) == 7 for slab in slabs)


def in_turns(runs: list[Run], steps: int) -> Iterator[None]:
    """One module of one, one of the other: forward, backward and update of both are mixed."""
    for data in batches(steps):
        losses = []
        for run in runs:
            for unit in UNITS:
                run.optimizer.ensure(unit)
            losses.append(run.model(data))
        for loss in reversed(losses):
            loss.backward()
        for run in runs:
            run.optimizer.step()
        for run in reversed(runs):
            run.optimizer.zero_grad()
        yield


@pytest.mark.parametrize("schedules", [(AHEAD, AHEAD), (AHEAD, SEQUENTIAL)])
def test_two_sessions_in_one_process_and_one_directory(
    tmp_path: Path, schedules: tuple[object, object]
) -> None:
    with ExitStack() as both:
        runs = [both.enter_context(open_run_in(tmp_path, schedule=schedule)) for schedule in schedules]
        assert len(os.listdir(tmp_path)) == 2
        for _ in in_turns(runs, 4):
            pass
        for run in runs:
            assert_trained(run, 4)


def test_two_sessions_in_two_threads(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(run: Run) -> None:
        try:
            run.train(batches(4))
            run.flush()
        except BaseException as error:
            failures.append(error)

    with ExitStack() as both:  # made one after the other: they draw from one generator
        runs = [both.enter_context(open_run_in(tmp_path)) for _ in range(2)]
        threads = [threading.Thread(target=work, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        for run in runs:
            assert_trained(run, 4)


def test_a_session_leaves_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    with open_run_in(tmp_path) as run:  # what the first one leaves to all: compiled code, caches
        run.train(batches(1))
    before, threads = open_descriptors(), set(threading.enumerate())
    for _ in range(2):
        with open_run_in(tmp_path) as run:
            run.train(batches(2))
    assert open_descriptors() == before
    assert set(threading.enumerate()) == threads


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_reads_neither_the_directory_nor_the_arena(tmp_path: Path) -> None:
    for path in (tmp_path, *list(tmp_path.parents)[:2]):
        path.chmod(0o755)
    parent = os.getpid()
    with NvmeStore(tmp_path, CAPACITY) as store:
        store.write(store.allocate("w", U), filled(U)).wait()
        (directory,) = tmp_path.iterdir()
        descriptor = store._target.descriptor

        def work() -> list[str]:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            found = []
            for path in (
                directory,
                directory / "lock",
                f"/proc/{parent}/fd/{descriptor}",
                f"/proc/{parent}/mem",
            ):
                try:
                    os.open(path, os.O_RDONLY)
                    found.append(f"{path} is open to others")
                except PermissionError:
                    pass
            return found

        assert in_child(work) == []


def test_a_core_dump_leaves_staging_out() -> None:
    def flags(address: int) -> list[str]:
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            head = line.split(" ")[0]
            if "-" in head and not head.endswith(":"):
                start, stop = (int(part, 16) for part in head.split("-"))
                inside = start <= address < stop
            elif inside and line.startswith("VmFlags:"):
                return line.split()[1:]
        raise AssertionError("not mapped")

    with Slab(1 << 20) as slab:
        assert "dd" in flags(slab.address)


def test_a_killed_run_leaves_what_the_next_one_removes(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open_run_in(tmp_path) as run:
                run.train(batches(1))
                os.write(writer, b"x")
                run.train(batches(200))
        finally:
            os._exit(1)
    try:
        os.read(reader, 1)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    assert len(os.listdir(tmp_path)) == 1
    with Engine({Tier.NVME: NvmeStore(tmp_path, CAPACITY)}, make_device("cpu")):
        assert [int(name.split("-")[2]) for name in os.listdir(tmp_path)] == [os.getpid()]
    assert os.listdir(tmp_path) == []
