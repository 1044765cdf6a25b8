"""Bytes that are torn, old, another's or flipped: found, and named, or the state before them is there."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from memtrain.offload import atomic
from memtrain.offload.atomic import CorruptCheckpointError, publish
from memtrain.offload.errors import CorruptExtentError, OffloadError
from memtrain.offload.io import Direction, Fault, FaultyBackend, IORequest, ThreadPoolBackend
from memtrain.offload.snapshot import latest_checkpoint
from memtrain.offload.tiers import NvmeStore, wait_all
from tests.offload.faults.runs_on_disk import open_run_in
from tests.offload.tier_stores import CAPACITY, U, filled
from tests.offload.training import batches

EXTENTS = 6
EXTENT_BYTES = 9 * U + 5


def rewrite_for_ever(directory: Path, ready: int) -> None:
    """Generation g of extent n holds bytes made of both; every fourth generation is saved."""
    store = NvmeStore(directory, CAPACITY, run_id="r", resumable=True, piece_bytes=2 * U)
    extents = [store.allocate(f"t{number}", EXTENT_BYTES) for number in range(EXTENTS)]
    for generation in range(10**6):
        wait_all(store.write(extent, filled(EXTENT_BYTES, 1000 * generation + number))
                 for number, extent in enumerate(extents))  # fmt: skip
        if generation % 4 == 0:
            store.save()
            os.write(ready, b"%d " % generation)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_reopened_after_sigkill_is_what_was_saved_or_is_refused(tmp_path: Path, seed: int) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            rewrite_for_ever(tmp_path, writer)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        os.read(reader, 1)
        time.sleep(random.Random(seed).uniform(0.0, 0.05))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.set_blocking(reader, False)
    with os.fdopen(reader) as pipe:
        last = int(("0" + pipe.read()).split()[-1])
    with NvmeStore(tmp_path, CAPACITY, run_id="r", resumable=True, piece_bytes=2 * U) as store:
        for number in range(EXTENTS):
            extent, found = store.extents()[f"t{number}"], filled(EXTENT_BYTES, 10**9)
            generation = extent.generation - 1
            assert generation % 4 == 0
            assert generation in (last, last + 4)  # the table of a save that was not yet told of
            refused = ""
            try:
                store.read(extent, found).wait()
            except CorruptExtentError as error:
                refused = str(error)
            if refused:
                assert f"tensor t{number}" in refused
                continue
            assert torch.equal(found, filled(EXTENT_BYTES, 1000 * generation + number))


class DiskLog:
    """What a writer asks of the disk, and what a loss of power at any moment may leave of it.

    Until a file is synced, any part of its end may be missing, or zeros; until a folder is synced, the latest
    changes of its names may be missing.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls = root, []
        real = {name: getattr(os, name) for name in ("write", "fsync", "fdatasync", "rename", "mkdir")}

        def path_of(descriptor: int) -> str:
            return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root)

        def write(descriptor: int, data: Any) -> int:
            count = real["write"](descriptor, data)
            self.calls.append(("write", path_of(descriptor), bytes(data[:count])))
            return count

        def sync(name: str) -> Any:
            def call(descriptor: int) -> None:
                real[name](descriptor)
                self.calls.append(("sync", path_of(descriptor), b""))

            return call

        def rename(one: Path, other: Path) -> None:
            real["rename"](one, other)
            self.calls.append(("rename", os.path.relpath(one, root), os.path.relpath(other, root).encode()))

        def exchange(one: Path, other: Path) -> None:
            real_exchange(one, other)
            self.calls.append(("exchange", os.path.relpath(one, root), os.path.relpath(other, root).encode()))

        real_exchange = atomic._exchange
        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "fsync", sync("fsync"))
        monkeypatch.setattr(os, "fdatasync", sync("fdatasync"))
        monkeypatch.setattr(os, "rename", rename)
        monkeypatch.setattr(atomic, "_exchange", exchange)
        self.calls: list[tuple[str, str, bytes]] = []

    def lose_power(self, after: int, before: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
        """Files by path after the first ``after`` calls and a loss of power."""
        files, synced = dict(before), dict.fromkeys(before, True)
        names: list[tuple[str, str, str]] = []  # changes of names that no sync has made durable

        def apply(changes: list[tuple[str, str, str]]) -> None:
            for kind, one, other in changes:
                moved = {p: files.pop(p) for p in list(files) if p.startswith((f"{one}/", f"{other}/"))}
                for path, data in moved.items():
                    top, _, rest = path.partition("/")
                    target = other if top == one else one
                    if kind == "exchange" or top == one:
                        files[f"{target}/{rest}"] = data
                        synced[f"{target}/{rest}"] = synced.get(path, True)

        for kind, path, data in self.calls[:after]:
            if kind == "write":
                files[path], synced[path] = files.get(path, b"") + data, False
            elif kind == "sync" and path == ".":
                apply(names)
                names = []
            elif kind == "sync":
                synced[path] = True
            else:
                names.append((kind, path, data.decode()))
        # An unsynced file may be cut, or have its length and zeros.
        for path in [path for path in files if not synced.get(path, True)]:
            cut = rng.randint(0, len(files[path]))
            files[path] = files[path][:cut] + bytes(len(files[path]) - cut) * rng.randint(0, 1)
        apply(names[: rng.randint(0, len(names))])
        return files


def test_no_loss_of_power_costs_more_than_the_checkpoint_in_the_making(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = tmp_path / "live"
    live.mkdir()

    def save(name: str, content: str) -> None:
        with publish(live / name) as writer:
            for file in "abc":
                writer.write_text(file, f"{content}{file}" * 50)

    save("at", "old")
    before = {str(p.relative_to(live)): p.read_bytes() for p in live.rglob("*") if p.is_file()}
    with monkeypatch.context() as patched:
        log = DiskLog(live, patched)
        save("at", "new")
        replaced = len(log.calls)
        save("next", "third")
    rng, seen = random.Random(0), set()
    for after in range(len(log.calls) + 1):
        for _ in range(6):
            disk = tmp_path / "disk"
            for path, data in log.lose_power(after, before, rng).items():
                (disk / path).parent.mkdir(parents=True, exist_ok=True)
                (disk / path).write_bytes(data)
            for folder in disk.iterdir():
                if ".tmp-" not in folder.name:
                    atomic.verify(folder)  # what has its name is whole
            content = (disk / "at" / "a").read_text()[:3]
            seen.add(content)
            assert content == "old" or after > 0
            assert content == "new" or after < replaced
            latest = latest_checkpoint(disk)
            assert latest is not None
            atomic.verify(latest)
            shutil.rmtree(disk)
    assert seen == {"old", "new"}


def raw(store: NvmeStore) -> int:
    """The arena as the disk has it."""
    return os.open(f"/proc/self/fd/{store._target.descriptor}", os.O_RDWR)


def test_two_extents_that_lie_in_each_others_place_and_an_old_generation(tmp_path: Path) -> None:
    with NvmeStore(tmp_path, CAPACITY) as store:
        one, other, found = store.allocate("one", 4 * U), store.allocate("other", 4 * U), filled(4 * U, 9)
        same = filled(4 * U, 1)  # equal bytes: only identity tells them apart
        wait_all([store.write(one, same), store.write(other, same)])
        arena = raw(store)
        of_one = os.pread(arena, 4 * U, one.arena_offset)
        store.write(one, filled(4 * U, 2)).wait()
        os.pwrite(arena, of_one, one.arena_offset)
        os.fsync(arena)
        with pytest.raises(CorruptExtentError, match="tensor one"):
            store.read(one, found).wait()  # stale
        os.pwrite(arena, os.pread(arena, 4 * U, one.arena_offset), other.arena_offset)
        os.fsync(arena)
        os.close(arena)
        store.read(other, found).wait()  # the same bytes in the right place are right
        assert torch.equal(found, same)
        one.arena_offset, other.arena_offset = other.arena_offset, one.arena_offset
        with pytest.raises(CorruptExtentError, match="tensor one"):
            store.read(one, found).wait()  # misdirected


class OneBit(FaultyBackend):
    """Flips a bit of the ``nth`` transfer of a direction; 0 the first after ``armed``."""

    def __init__(self, direction: Direction, nth: int) -> None:
        super().__init__(ThreadPoolBackend(2))
        self.direction, self.left, self.armed, self.hit = direction, nth, False, ""

    def submit(self, request: IORequest) -> None:
        if self.armed and request.direction is self.direction:
            if self.left == 0:
                self.plan[self.submitted] = Fault(flip_bit=8 * (request.buffer.numel() - 1))
                self.hit = request.tensor_name
            self.left -= 1
        super().submit(request)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("nth", [0, 3, 7])
def test_no_flipped_bit_in_a_run_goes_unnoticed(tmp_path: Path, direction: Direction, nth: int) -> None:
    backend = OneBit(direction, nth)

    def work() -> None:
        with open_run_in(tmp_path, backend=backend) as run:
            run.train(batches(6)[:2])
            backend.armed = True
            run.train(batches(6)[2:])
            run.flush()

    with pytest.raises(OffloadError) as caught:
        work()
    errors: list[BaseException] = [caught.value]
    while (cause := errors[-1].__cause__ or errors[-1].__context__) is not None:
        errors.append(cause)
    assert any(isinstance(e, CorruptExtentError) and backend.hit in str(e) for e in errors), errors


def test_a_checkpoint_file_that_is_older_than_the_others_is_named(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with publish(tmp_path / content) as writer:
            writer.write_text("a", content)
            writer.write_text("b", content)
    shutil.copy(tmp_path / "old" / "b", tmp_path / "new" / "b")
    with pytest.raises(CorruptCheckpointError, match="b has another checksum"):
        atomic.verify(tmp_path / "new")
