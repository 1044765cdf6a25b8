import mmap

import pytest
import torch

from memtrain.offload import numa
from memtrain.offload.errors import PlacementError


def mapped(nbytes):
    return torch.frombuffer(
        mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8
    )


def test_pages_say_where_they_are_only_once_touched():
    memory = mapped(4 * 4096)
    numa.bind(memory.data_ptr(), 4 * 4096, 0)
    memory[4096] = 1
    nodes = numa.nodes_of_pages(memory.data_ptr(), 4 * 4096)
    assert nodes[1] == 0
    assert all(node < 0 for node in (nodes[0], nodes[2], nodes[3]))


def test_verify_counts_pages_that_are_elsewhere():
    memory = mapped(4 * 4096)
    memory[::4096] = 1
    numa.verify(memory.data_ptr(), 4 * 4096, 0)
    with pytest.raises(PlacementError, match="4 of 4 pages are not on NUMA node 3"):
        numa.verify(memory.data_ptr(), 4 * 4096, 3)


def test_many_pages_take_several_calls(monkeypatch):
    monkeypatch.setattr(numa, "_PAGES_PER_CALL", 3)
    memory = mapped(10 * 4096)
    memory[::4096] = 1
    assert numa.nodes_of_pages(memory.data_ptr(), 10 * 4096) == [0] * 10


@pytest.mark.parametrize("node", [-1, 999])
def test_bind_refuses_nodes_that_do_not_exist(node):
    memory = mapped(4096)
    with pytest.raises(PlacementError, match=f"NUMA node {node} does not exist"):
        numa.bind(memory.data_ptr(), 4096, node)


def test_bind_reports_what_the_kernel_refuses(monkeypatch):
    monkeypatch.setattr(numa, "online_nodes", lambda: (0, 5))
    memory = mapped(4096)
    with pytest.raises(PlacementError, match="mbind to NUMA node 5 failed: Invalid argument"):
        numa.bind(memory.data_ptr(), 4096, 5)


def test_unknown_machines_are_refused(monkeypatch):
    monkeypatch.setattr(numa.platform, "machine", lambda: "pdp11")
    with pytest.raises(PlacementError, match="pdp11"):
        numa.bind(mapped(4096).data_ptr(), 4096, 0)


def test_node_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(numa, "_NODES", tmp_path)
    (tmp_path / "online").write_text("0-2,5\n")
    (tmp_path / "has_memory").write_text("0,2,5\n")
    (tmp_path / "has_cpu").write_text("0-1\n")
    (tmp_path / "node2").mkdir()
    (tmp_path / "node2" / "meminfo").write_text("Node 2 MemTotal: 8 kB\nNode 2 MemFree:  4 kB\n")
    assert numa.online_nodes() == (0, 1, 2, 5)
    assert numa.memory_only_nodes() == (2, 5)
    assert numa.node_free_bytes(2) == 4096
    with pytest.raises(PlacementError, match="node 5 does not exist"):
        numa.node_free_bytes(5)
