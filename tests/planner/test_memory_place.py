import pytest

from memtrain.planner.machine import Budget
from memtrain.planner.memory_place import MemoryPlace, Policy, parse_place


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("1", MemoryPlace(nodes=(1,), policy=Policy.PREFERRED)),
        ("1,2", MemoryPlace(nodes=(1, 2), policy=Policy.INTERLEAVE)),
        ("bind:1", MemoryPlace(nodes=(1,), policy=Policy.BIND)),
        ("preferred:2,1", MemoryPlace(nodes=(2, 1), policy=Policy.PREFERRED)),
        ("weighted_interleave:0,3", MemoryPlace(nodes=(0, 3), policy=Policy.WEIGHTED_INTERLEAVE)),
        ("/dev/dax1.0", MemoryPlace(dax="/dev/dax1.0")),
    ],
)
def test_a_place_is_read_and_written_alike(text, place):
    assert parse_place(text) == place
    assert str(place) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read '' as a place of memory: write a NUMA node such as '1'"),
        ("node1", "cannot read 'node1'"),
        ("1,", "cannot read '1,'"),
        ("-1", "cannot read '-1'"),
        ("bind:", "cannot read 'bind:'"),
        ("near:1", "'near' in 'near:1' is no policy: use one of preferred, bind, interleave, weighted"),
        ("interleave:1", "interleave needs two nodes or more, got 1 alone: name another, or write 1"),
        ("1,1", r"each NUMA node is named once, got \[1, 1\]"),
        ("1024", "a number from 0 to 1023, got 1024"),
        ("/dev/shm/x", "a dax device is named such as /dev/dax0.0, got '/dev/shm/x'"),
        ("/dev/dax0.0/../sda", "is named such as"),
    ],
)
def test_what_is_no_place_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_place(text)


def test_a_place_is_nodes_or_a_device():
    with pytest.raises(ValueError, match="at least one NUMA node"):
        MemoryPlace()
    with pytest.raises(ValueError, match=r"neither nodes nor a policy: name /dev/dax0\.0 alone"):
        MemoryPlace(nodes=(1,), dax="/dev/dax0.0")


def test_a_budget_names_places_of_host_and_cxl():
    budget = Budget(device="1GiB", host="interleave:0,1:2GiB", cxl="/dev/dax0.0:3GiB")
    assert budget.host_place == MemoryPlace(nodes=(0, 1), policy=Policy.INTERLEAVE)
    assert (budget.host_bytes, budget.cxl_bytes) == (2 << 30, 3 << 30)
    assert budget.cxl_place == MemoryPlace(dax="/dev/dax0.0")
    plain = Budget(device="1GiB", host="2GiB")
    assert (plain.host_bytes, plain.host_place, plain.cxl_place) == (2 << 30, None, None)
    assert Budget(device="1GiB", host=5).host_place is None


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"cxl": "64GiB"}, r"budget\.cxl must be WHERE:SIZE such as '1:64GiB', got '64GiB'"),
        ({"cxl": "near:1:64GiB"}, r"budget\.cxl 'near:1:64GiB': 'near' in 'near:1' is no policy"),
        ({"cxl": "1:"}, "cannot read '' as a size"),
        ({"host": "x:1GiB"}, r"budget\.host 'x:1GiB': cannot read 'x' as a place"),
        ({"host": "lots"}, "cannot read 'lots' as a size"),
    ],
)
def test_a_budget_refuses_what_is_no_place(budget, message):
    with pytest.raises(ValueError, match=message):
        Budget(device="1GiB", **budget)
