"""What can be tried on one node; real nodes are those of test_guest.py."""

import mmap
from collections import Counter

import pytest
import torch

from memtrain.offload import numa, placement
from memtrain.offload import slab as slab_module
from memtrain.offload.errors import NodeFullError, PlacementError
from memtrain.offload.slab import Slab
from memtrain.planner.memory_place import MemoryPlace, Policy

MiB = 1 << 20
HERE = MemoryPlace(nodes=(0,))


@pytest.mark.parametrize("policy", [Policy.PREFERRED, Policy.BIND])
def test_a_slab_lies_on_its_node(policy):
    with Slab(5 * MiB, MemoryPlace(nodes=(0,), policy=policy)) as slab:
        assert numa.pages_by_node(slab.address, slab.nbytes) == Counter({0: 1280})
        assert int(slab.buffer.sum()) == 0


def test_more_than_is_free_is_refused_before_any_is_taken(monkeypatch):
    free = {"MemFree": 7 * MiB, "FilePages": 2 * MiB}
    monkeypatch.setattr(numa, "node_bytes", lambda node, line="MemFree": free[line])
    monkeypatch.setattr(numa, "populate", lambda *range: pytest.fail("pages were taken"))
    with pytest.raises(
        NodeFullError,
        match=r"node 0 cannot take 0\.008 GiB\. Free: node 0 0\.007 GiB \(page cache 0\.002 GiB\); lower",
    ):
        Slab(8 * MiB, HERE)


def test_interleaving_wants_room_on_every_node(monkeypatch):
    monkeypatch.setattr(numa, "node_bytes", lambda node, line="MemFree": (node + 1) * MiB)
    monkeypatch.setattr(numa, "interleave_weights", lambda nodes: (3, 1))
    place = MemoryPlace(nodes=(0, 1), policy=Policy.WEIGHTED_INTERLEAVE)
    with pytest.raises(NodeFullError, match=r"NUMA node 0 cannot take 0\.001 GiB"):
        placement.settle(0, 2 * MiB, place)


def test_pages_that_go_elsewhere_are_given_back(monkeypatch):
    """Another process takes the node's last pages after it was looked at."""
    steps, mappings = [], []

    def counted(address, nbytes):
        steps.append(nbytes)
        return Counter({0: 10}) if len(steps) == 1 else Counter({0: 7, 3: 2, 4: 1})

    def remembered(nbytes, *, huge_pages, inherited):
        mappings.append(slab_module._Mapping(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return mappings[-1]

    monkeypatch.setattr(placement, "STEP_BYTES", MiB)
    monkeypatch.setattr(numa, "pages_by_node", counted)
    monkeypatch.setattr(slab_module, "_anonymous", remembered)
    with pytest.raises(
        NodeFullError,
        match=r"3 of 10 pages are not on NUMA node 0 but 2 on node 3, 1 on node 4\. Free: node 0",
    ):
        Slab(4 * MiB, HERE)
    assert steps == [MiB, MiB]  # two of four steps were taken
    address = torch.frombuffer(mappings[0], dtype=torch.uint8).data_ptr()
    assert all(node < 0 for node in numa.nodes_of_pages(address, 4 * MiB))


def test_pages_that_are_nowhere_are_no_full_node():
    mapping = mmap.mmap(-1, 4 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
    with pytest.raises(PlacementError, match="4 of 4 pages are not on NUMA node 0 but 4 nowhere") as caught:
        placement.verify(address, 4 * 4096, (0,))
    assert not isinstance(caught.value, NodeFullError)
    numa.populate(address, 4 * 4096)
    placement.verify(address, 4 * 4096, (0,))
    with pytest.raises(PlacementError, match="4 of 4 pages are not on NUMA nodes 3,5 but 4 on node 0"):
        placement.verify(address, 4 * 4096, (3, 5))


@pytest.mark.parametrize(
    ("found", "weights", "message"),
    [
        ({1: 6000, 2: 4000}, (1, 1), None),  # a turn is 1024 pages
        ({1: 6100, 2: 3900}, (1, 1), "node 1 took 6100 of 10000 pages, and its share is 5000"),
        ({1: 7500, 2: 2500}, (3, 1), None),
        (
            {1: 5000, 2: 5000},
            (3, 1),
            r"node 1 took 5000 of 10000 pages, and its share is 7500 \(weights \[3, 1\]",
        ),
    ],
)
def test_shares_are_checked(monkeypatch, found, weights, message):
    monkeypatch.setattr(numa, "node_bytes", lambda node, line="MemFree": 0)
    place = MemoryPlace(nodes=(1, 2), policy=Policy.WEIGHTED_INTERLEAVE)
    if message is None:
        placement._check_shares(Counter(found), place, weights)
    else:
        with pytest.raises(NodeFullError, match=message):
            placement._check_shares(Counter(found), place, weights)
