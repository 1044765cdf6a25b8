"""What is checked inside the guest of qemu_guest.py: run there, by test_guest.py, one line of JSON a check.

    guest_checks.py plain           without torch, on a kernel without weighted interleave
    guest_checks.py full PLAN.json  on a kernel with it, with CXL devices, with torch

What lies on CXL devices is small: QEMU emulates each access to them.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import signal
import sys
import time
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memtrain.offload import dax, numa, placement
from memtrain.offload.errors import NodeFullError, PlacementError, UnsupportedPolicyError
from memtrain.offload.numa import PAGE_BYTES, Mode
from memtrain.planner.memory_place import parse_place

MiB = 1 << 20
WEIGHTS = Path("/sys/kernel/mm/mempolicy/weighted_interleave")
PLAIN: list[Callable[[], None]] = []
FULL: list[Callable[[], None]] = []


def plain(check: Callable[[], None]) -> Callable[[], None]:
    PLAIN.append(check)
    return check


def full(check: Callable[[], None]) -> Callable[[], None]:
    FULL.append(check)
    return check


def both(check: Callable[[], None]) -> Callable[[], None]:
    return full(plain(check))


def refused(kind: type[Exception], pattern: str, call: Callable[..., object], *arguments: object) -> None:
    """``pytest.raises`` without pytest, which takes seconds to import in the guest."""
    told = None
    try:
        call(*arguments)
    except kind as error:
        told = str(error)
    assert told is not None, f"not refused: expected {kind.__name__} with {pattern}"
    assert re.search(pattern, told), f"{told} does not say {pattern}"


@contextmanager
def mapped(nbytes: int, *, huge: bool = False) -> Iterator[int]:
    """The address of untouched memory."""
    with mmap.mmap(-1, nbytes + 2 * MiB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        yield -(-first // (2 * MiB)) * 2 * MiB


def settled(text: str, nbytes: int, *, huge: bool = False) -> list[int]:
    """The node of each page of memory that was placed."""
    with mapped(nbytes, huge=huge) as address:
        placement.settle(address, nbytes, parse_place(text))
        return numa.nodes_of_pages(address, nbytes)


def policy_of(address: int) -> str:
    """As the kernel shows it."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        start, policy = line.split()[:2]
        if int(start, 16) == address:
            return policy
    raise AssertionError(f"{address:x} is not mapped")


def kills() -> int:
    """Processes that the kernel has killed for want of memory."""
    return int(re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.M)[1])  # type: ignore[index]


@contextmanager
def filled(node: int, free_bytes: int) -> Iterator[None]:
    """Another user of the node has taken all but ``free_bytes`` of it."""
    with mapped(300 * MiB) as address:
        numa.set_policy(address, 300 * MiB, Mode.PREFERRED, [node])
        for first in range(0, 300 * MiB, MiB):
            if numa.node_bytes(node) <= free_bytes:
                break
            numa.populate(address + first, MiB)
        yield


# ---- without torch


@both
def the_nodes_are_those_of_the_machine() -> None:
    assert numa.online_nodes()[:3] == (0, 1, 2)
    assert numa.memory_only_nodes()[:2] == (1, 2)
    assert 100 * MiB < numa.node_bytes(1) < 256 * MiB


@both
def preferred_takes_the_node() -> None:
    assert settled("1", 8 * MiB) == [1] * 2048
    assert settled("preferred:2", 8 * MiB, huge=True) == [2] * 2048


@plain
def preferred_takes_any_of_several() -> None:
    assert set(settled("preferred:1,2", 8 * MiB)) <= {1, 2}
    with filled(1, 16 * MiB):
        assert Counter(settled("preferred:1,2", 64 * MiB))[2] >= 48 * MiB // PAGE_BYTES


@both
def bind_takes_the_node_and_stays_bound() -> None:
    with mapped(8 * MiB) as address:
        placement.settle(address, 8 * MiB, parse_place("bind:2"))
        assert numa.nodes_of_pages(address, 8 * MiB) == [2] * 2048
        assert policy_of(address) == "bind:2"
        placement.verify(address, 8 * MiB, [2])
        refused(
            NodeFullError,
            "2048 of 2048 pages are not on NUMA node 1 but 2048 on node 2",
            placement.verify,
            address,
            8 * MiB,
            [1],
        )


@both
def interleave_goes_round_page_by_page() -> None:
    nodes = settled("interleave:1,2", 8 * MiB)
    assert nodes in ([1, 2] * 1024, [2, 1] * 1024), Counter(nodes)


@both
def interleave_goes_round_by_huge_pages() -> None:
    nodes = settled("1,2", 16 * MiB, huge=True)
    stripes = [nodes[first : first + 512] for first in range(0, len(nodes), 512)]
    assert all(len(set(stripe)) == 1 for stripe in stripes)
    assert Counter(nodes) == {1: 2048, 2: 2048}


@plain
def a_node_without_room_is_an_error_and_nobody_dies() -> None:
    before = kills()
    with filled(1, 24 * MiB):
        for text in ("1", "bind:1", "1,2"):
            nbytes = 96 * MiB if text == "1,2" else 48 * MiB
            refused(NodeFullError, r"NUMA node 1 cannot take .* Free: node 1 0\.0", settled, text, nbytes)
    assert kills() == before


@plain
def a_node_that_fills_up_meanwhile_is_an_error_and_nobody_dies() -> None:
    """The check for room is left out, as if it had come before the others took theirs."""
    before, looked = kills(), placement._check_room
    placement._check_room = lambda *_: None
    try:
        with filled(1, 24 * MiB):
            for text in ("1", "bind:1"):
                refused(NodeFullError, r"pages are not on NUMA node 1 but", settled, text, 48 * MiB)
            refused(NodeFullError, "node", settled, "1,2", 128 * MiB)
    finally:
        placement._check_room = looked
    assert kills() == before


@plain
def touching_memory_bound_to_a_full_node_kills() -> None:
    """What the two checks above prevent, as it happens without them."""
    before = kills()
    with filled(1, 24 * MiB):
        child = os.fork()
        if child == 0:
            Path("/proc/self/oom_score_adj").write_text("1000")
            with mapped(96 * MiB) as address:
                numa.set_policy(address, 96 * MiB, Mode.BIND, [1])
                ctypes.memset(address, 1, 96 * MiB)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert kills() == before + 1


@plain
def absent_nodes_are_named() -> None:
    refused(PlacementError, r"node 9 does not exist\. Nodes online: \[0, 1, 2", settled, "9", MiB)
    refused(PlacementError, r"node 9 does not exist", settled, "1,9", MiB)


@plain
def a_kernel_without_weights_says_so() -> None:
    refused(
        UnsupportedPolicyError,
        r"Linux 6\.1\..* knows no memory policy weighted_interleave; Linux 6\.9 and",
        settled,
        "weighted_interleave:1,2",
        MiB,
    )
    with mapped(MiB) as address:
        weighted = (address, MiB, Mode.WEIGHTED_INTERLEAVE, [1, 2])
        refused(UnsupportedPolicyError, "weighted_interleave", numa.set_policy, *weighted)
    assert [mode for mode in Mode if not numa.supports(mode)] == [Mode.WEIGHTED_INTERLEAVE]


@full
def weighted_interleave_obeys_the_weights() -> None:
    assert all(map(numa.supports, Mode))
    assert numa.interleave_weights([1, 2]) == (1, 1)
    (WEIGHTS / "node1").write_text("3")
    try:
        nodes = settled("weighted_interleave:1,2", 8 * MiB)
        turns = {tuple(nodes[first : first + 4]) for first in range(0, 2048, 4)}
        assert len(turns) == 1, turns
        assert Counter(nodes) == {1: 1536, 2: 512}
    finally:
        (WEIGHTS / "node1").write_text("1")


@full
def a_cxl_device_is_a_node() -> None:
    assert "System RAM (kmem)" in Path("/proc/iomem").read_text()
    assert 3 in numa.memory_only_nodes()
    assert settled("bind:3", MiB) == [3] * 256
    assert Counter(settled("1,2,3", 3 * MiB)) == {1: 256, 2: 256, 3: 256}


@full
def a_cxl_device_is_mapped() -> None:
    (device,) = dax.dax_devices()
    assert device == dax.DaxDevice(path="/dev/dax0.0", size_bytes=256 * MiB, align_bytes=2 * MiB, node=3)
    memory = dax.map_device("/dev/dax0.0", 3 * MiB, mmap.mmap)
    assert len(memory) == 4 * MiB
    memory[:5] = b"bytes"
    refused(PlacementError, "in use by another job", dax.map_device, "/dev/dax0.0", MiB, mmap.mmap)
    del memory  # the device is held for as long as the mapping lives
    assert dax.map_device("/dev/dax0.0", MiB, mmap.mmap)[:5] == b"bytes"
    refused(NodeFullError, "has 268435456 bytes", dax.map_device, "/dev/dax0.0", 257 * MiB, mmap.mmap)
    refused(
        PlacementError,
        "mode system-ram: its memory is NUMA node 3",
        dax.map_device,
        "/dev/dax1.0",
        MiB,
        mmap.mmap,
    )
    refused(
        PlacementError,
        r"no /dev/dax5.0 .*mode devdax: /dev/dax0.0",
        dax.map_device,
        "/dev/dax5.0",
        MiB,
        mmap.mmap,
    )


# ---- with torch


def leave_out_the_compiler() -> None:
    """torch.optim imports torch's compiler, which nothing here uses and which doubles the import."""
    import torch

    stub = types.ModuleType("torch._dynamo")
    stub.disable = lambda function, *_, **__: function  # type: ignore[attr-defined]
    stub.graph_break = lambda *_, **__: None  # type: ignore[attr-defined]
    sys.modules["torch._dynamo"] = torch._dynamo = stub


def nodes_of(tensor: Any) -> set[int]:
    """The nodes of all pages that hold bytes of a tensor."""
    start = tensor.data_ptr()
    first = start - start % PAGE_BYTES
    return set(numa.nodes_of_pages(first, start + tensor.nbytes - first))


def store_on(text: str, capacity_bytes: int, tier: str = "cxl") -> Any:
    from memtrain.offload.tiers import MemoryStore
    from memtrain.planner.actions import Tier

    return MemoryStore(Tier(tier), capacity_bytes, parse_place(text))


def round_trip(store: Any, nbytes: int) -> list[int]:
    """Write a tensor and read it back; the nodes of the pages of its extent."""
    import torch

    from memtrain.offload.slab import Slab

    with Slab(nbytes) as staging:
        staging.buffer.random_(0, 256)
        written = staging.buffer.clone()
        extent = store.allocate("tensor", nbytes)
        store.write(extent, staging.buffer).wait()
        staging.buffer.zero_()
        store.read(extent, staging.buffer).wait()
        assert torch.equal(staging.buffer, written)
        if store.slab.place.dax:
            return []
        return numa.nodes_of_pages(store.slab.address + extent.arena_offset, nbytes)


@full
def stores_lie_where_their_policy_says() -> None:
    for text, tier, nodes in (
        ("1", "cxl", {1: 128}),
        ("bind:2", "cxl", {2: 128}),
        ("interleave:0,1", "host", {0: 64, 1: 64}),
        ("bind:3", "cxl", {3: 128}),
    ):
        with store_on(text, MiB, tier) as store:
            assert set(numa.nodes_of_pages(store.slab.address, store.slab.nbytes)) == set(nodes), text
            assert Counter(round_trip(store, MiB // 2)) == nodes, text


@full
def a_long_tensor_is_striped_over_both_nodes() -> None:
    with store_on("1,2", 16 * MiB) as store:
        found = Counter(round_trip(store, 8 * MiB))
        assert set(found) == {1, 2}
        assert abs(found[1] - found[2]) <= 2 * 512, found  # a stripe at each end
    (WEIGHTS / "node2").write_text("3")
    try:
        with store_on("weighted_interleave:1,2", 32 * MiB) as store:
            assert Counter(round_trip(store, 16 * MiB)) == {1: 1024, 2: 3072}  # two turns of four huge pages
    finally:
        (WEIGHTS / "node2").write_text("1")


@full
def a_tier_on_a_full_node_is_refused_and_leaves_nothing() -> None:
    with filled(2, 24 * MiB):
        free = numa.node_bytes(2)
        for text in ("2", "bind:2"):
            refused(
                NodeFullError, r"NUMA node 2 cannot take 0\.062 GiB\. Free: node 2", store_on, text, 64 * MiB
            )
        assert abs(numa.node_bytes(2) - free) < 4 * MiB
    with store_on("bind:2", 64 * MiB):
        pass


@full
def a_tier_on_a_cxl_device_keeps_its_bytes() -> None:
    with store_on("/dev/dax0.0", 3 * MiB) as store:
        assert store.slab.nbytes == 4 * MiB
        round_trip(store, MiB)
        refused(PlacementError, "in use by another job", store_on, "/dev/dax0.0", MiB)
    store_on("/dev/dax0.0", MiB).close()


@full
def the_planners_placement_is_carried_out() -> None:
    """Saved activations on the CXL nodes; weights, gradients and optimizer state in DRAM; the same bits."""
    import torch

    leave_out_the_compiler()
    from memtrain.planner.actions import Tier
    from tests.offload.guest_training import train_by_plan, train_plainly

    seen = Counter[str]()

    def look(when: str, engine: Any, net: Any, optimizer: Any) -> None:
        store = engine.store(Tier.CXL)
        slab = store.slab
        placement.verify(slab.address, slab.nbytes, [1, 2])
        inside = 0
        if when == "forward":
            assert store.used_bytes > 9 * MiB
            striped = Counter(numa.nodes_of_pages(slab.address, store.used_bytes))
            assert min(striped[1], striped[2]) > 2 * MiB // PAGE_BYTES, striped
        for parameter in net.parameters():
            assert nodes_of(parameter) == {0}
            seen["weight"] += 1
            if when == "backward":
                assert nodes_of(parameter.grad) == {0}
                seen["gradient"] += 1
        if when == "update":
            records = optimizer._records
            assert not records._extents  # no state on a tier
            for record in records._memory.values():
                assert nodes_of(record) == {0}
                seen["moments, bytes"] += record.nbytes
        # And nothing else of the process: staging, libraries, the heap.
        for line in Path("/proc/self/numa_maps").read_text().splitlines():
            if int(line.split()[0], 16) == slab.address:
                inside += 1
                assert line.split()[1] == "interleave:1-2", line
            else:
                assert not re.search(r" N[1-9]=", line), line
        assert inside == 1

    losses, net, _ = train_by_plan(Path(sys.argv[2]), look)
    expected, plain_net = train_plainly()
    assert losses == expected
    assert all(map(torch.equal, net.parameters(), plain_net.parameters()))
    # 8 parameters, 2 steps of 3 looks each; AdamW's two moments
    elements = sum(parameter.numel() for parameter in net.parameters())
    assert seen.pop("moments, bytes") >= 2 * elements * 8
    assert seen == {"weight": 48, "gradient": 16}, seen


def main(checks: list[Callable[[], None]]) -> int:
    failed = 0
    for check in checks:
        error, start = "", time.monotonic()
        try:
            check()
        except BaseException:
            error, failed = traceback.format_exc(), failed + 1
        seconds = round(time.monotonic() - start, 2)
        print(json.dumps({"check": check.__name__, "seconds": seconds, "error": error}), flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main({"plain": PLAIN, "full": FULL}[sys.argv[1]]))
