import mmap
from collections import Counter

import pytest
import torch

from memtrain.offload import numa
from memtrain.offload.errors import PlacementError, UnsupportedPolicyError
from memtrain.offload.numa import Mode


def mapped(nbytes):
    return torch.frombuffer(
        mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8
    )


def test_pages_say_where_they_are_only_once_touched():
    memory = mapped(4 * 4096)
    numa.set_policy(memory.data_ptr(), 4 * 4096, Mode.BIND, [0])
    memory[4096] = 1
    nodes = numa.nodes_of_pages(memory.data_ptr(), 4 * 4096)
    assert nodes[1] == 0
    assert all(node < 0 for node in (nodes[0], nodes[2], nodes[3]))
    numa.populate(memory.data_ptr(), 4 * 4096)
    assert numa.pages_by_node(memory.data_ptr(), 4 * 4096) == Counter({0: 4})


def test_an_old_kernel_gets_its_pages_by_touching_them(monkeypatch):
    monkeypatch.setattr(numa, "_MADV_POPULATE_WRITE", 9999)
    memory = mapped(3 * 4096)
    numa.populate(memory.data_ptr(), 3 * 4096)
    assert numa.nodes_of_pages(memory.data_ptr(), 3 * 4096) == [0, 0, 0]


def test_memory_that_is_not_there_cannot_be_had():
    with pytest.raises(PlacementError, match="no memory for 4096 bytes: Cannot allocate memory"):
        numa.populate(4096, 4096)  # nothing is mapped there


def test_many_pages_take_several_calls(monkeypatch):
    monkeypatch.setattr(numa, "_PAGES_PER_CALL", 3)
    memory = mapped(10 * 4096)
    memory[::4096] = 1
    assert numa.nodes_of_pages(memory.data_ptr(), 10 * 4096) == [0] * 10


@pytest.mark.parametrize("node", [-1, 999])
def test_nodes_that_do_not_exist_are_refused(node):
    memory = mapped(4096)
    with pytest.raises(PlacementError, match=f"NUMA node {node} does not exist"):
        numa.set_policy(memory.data_ptr(), 4096, Mode.BIND, [0, node])


def test_what_the_kernel_refuses_is_told(monkeypatch):
    monkeypatch.setattr(numa, "online_nodes", lambda: (0, 5))
    memory = mapped(4096)
    with pytest.raises(
        PlacementError,
        match=r"mbind BIND to NUMA node 5 failed: Invalid argument; this process may use nodes 0",
    ):
        numa.set_policy(memory.data_ptr(), 4096, Mode.BIND, [5])


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (
            Mode.WEIGHTED_INTERLEAVE,
            r"knows no memory policy weighted_interleave; Linux 6\.9 and later do. Use int",
        ),
        (Mode.PREFERRED_MANY, r"knows no memory policy preferred_many; Linux 5\.15 and .* or name one node"),
    ],
)
def test_a_policy_younger_than_the_kernel_is_named(monkeypatch, mode, message):
    monkeypatch.setattr(numa, "_mbind", lambda address, nbytes, mode, nodes: 0 if mode is None else 22)
    assert not numa.supports(mode)
    with pytest.raises(UnsupportedPolicyError, match=message):
        numa.set_policy(mapped(4096).data_ptr(), 4096, mode, [0])


def test_every_mode_is_known_here_or_refused_by_name():
    for mode in Mode:
        memory = mapped(4096)
        if numa.supports(mode):
            numa.set_policy(memory.data_ptr(), 4096, mode, [0])
        else:
            with pytest.raises(UnsupportedPolicyError):
                numa.set_policy(memory.data_ptr(), 4096, mode, [0])


def test_unknown_machines_are_refused(monkeypatch):
    monkeypatch.setattr(numa.platform, "machine", lambda: "pdp11")
    with pytest.raises(PlacementError, match="pdp11"):
        numa.set_policy(mapped(4096).data_ptr(), 4096, Mode.BIND, [0])


def test_node_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    (tmp_path / "online").write_text("0-2,5\n")
    (tmp_path / "has_memory").write_text("0,2,5\n")
    (tmp_path / "has_cpu").write_text("0-1\n")
    (tmp_path / "node2").mkdir()
    (tmp_path / "node2" / "meminfo").write_text(
        "Node 2 MemTotal: 8 kB\nNode 2 MemFree:  4 kB\nNode 2 FilePages: 1 kB\n"
    )
    assert numa.online_nodes() == (0, 1, 2, 5)
    assert numa.memory_only_nodes() == (2, 5)
    assert (numa.node_bytes(2), numa.node_bytes(2, "FilePages")) == (4096, 1024)
    with pytest.raises(PlacementError, match="node 5 does not exist"):
        numa.node_bytes(5)
    with pytest.raises(PlacementError, match="node 2 does not say its Dirty"):
        numa.node_bytes(2, "Dirty")


def test_weights_are_the_systems(tmp_path, monkeypatch):
    monkeypatch.setattr(numa, "_WEIGHTS", tmp_path)
    (tmp_path / "node1").write_text("3\n")
    (tmp_path / "node2").write_text("1\n")
    assert numa.interleave_weights([2, 1]) == (1, 3)
    with pytest.raises(UnsupportedPolicyError, match="weighted_interleave"):
        numa.interleave_weights([1, 4])
