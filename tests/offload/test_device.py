"""The CUDA layer runs here over a fake ``torch.cuda`` that notes what it is asked for, in order."""

import contextlib
import weakref

import pytest
import torch

from memtrain.offload.device import CpuDevice, CudaDevice, make_device
from memtrain.offload.errors import OffloadError
from memtrain.offload.slab import Ring, Slab
from memtrain.offload.surroundings import Surroundings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 7)])
def test_cpu_copies_every_bit_both_ways(dtype, shape):
    device, slab = CpuDevice(), Slab(4096)
    source = torch.randint(0, 2, shape).to(dtype).requires_grad_(dtype.is_floating_point)
    view = slab.buffer[: source.numel() * source.element_size()]
    event = device.copy_out(source, view)
    event.wait()
    event.synchronize()
    assert event.done()
    found = torch.zeros(shape, dtype=dtype)
    device.copy_in(view, found).synchronize()
    assert torch.equal(found, source)


@pytest.mark.parametrize("nbytes", [1, 100, 4096, 4097, (2 << 20) + 1])
def test_cpu_memory_is_of_exactly_the_size_asked_for(nbytes):
    memory = CpuDevice().empty(nbytes)
    assert (memory.shape, memory.dtype) == ((nbytes,), torch.uint8)


def test_cpu_needs_no_registration():
    device, slab = CpuDevice(), Slab(4096)
    device.register(slab)
    device.unregister(slab)
    device.synchronize()
    assert device.place == make_device("cpu").place == torch.device("cpu")


def test_copies_that_do_not_fit_are_refused():
    device, slab = CpuDevice(), Slab(4096)
    with pytest.raises(ValueError, match=r"only contiguous tensors are copied, got strides \(1, 4\)"):
        device.copy_out(torch.zeros(2, 4).t(), slab.buffer[:32])
    with pytest.raises(ValueError, match=r"between 32 bytes and torch\.uint8 of shape \(31,\)"):
        device.copy_in(slab.buffer[:31], torch.zeros(8))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        device.copy_out(torch.zeros(8), torch.zeros(32))


class FakeCuda:
    """Streams and events with names; every call is a line of ``log``."""

    def __init__(self, patch):
        self.log, self.streams, self.errors, self.over = [], iter(["out", "in"]), {}, True
        fake = self

        class Stream:
            def __init__(self, device=None):
                self.name = next(fake.streams) if device is not None else "compute"

            def wait_stream(self, other):
                fake.log.append(f"{self.name} waits for {other.name}")

            def wait_event(self, event):
                fake.log.append(f"{self.name} waits for event of {event.where}")

            def synchronize(self):
                fake.log.append(f"synchronize {self.name}")

        class Event:
            def __init__(self, blocking=False):
                assert blocking  # waiting must leave the processor to the threads that move bytes

            def record(self, stream):
                self.where = stream.name
                fake.log.append(f"record on {stream.name}")

            def synchronize(self):
                fake.log.append(f"synchronize event of {self.where}")

            def query(self):
                return fake.over

        @contextlib.contextmanager
        def stream(s):
            fake.log.append(f"enter {s.name}")
            yield
            fake.log.append(f"leave {s.name}")

        class Runtime:
            def cudaHostRegister(self, address, nbytes, flags):
                fake.log.append(f"register {nbytes} {flags}")
                return fake.errors.get("register", 0)

            def cudaHostUnregister(self, address):
                fake.log.append("unregister")
                return 0

        copy = torch.Tensor.copy_

        def logged_copy(target, source, non_blocking=False):
            fake.log.append(f"copy non_blocking={non_blocking}")
            return copy(target, source)

        @contextlib.contextmanager
        def current_device(place):
            fake.log.append(f"current {place}")
            yield
            fake.log.append("former current")

        self.current = Stream()
        patch.setattr(torch.cuda, "device", current_device)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: fake.current)
        patch.setattr(torch.cuda, "cudart", Runtime)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
        patch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.75)
        patch.setattr(
            torch.cuda,
            "set_per_process_memory_fraction",
            lambda fraction, device: fake.log.append(f"fraction {fraction} of {device}"),
        )
        patch.setattr(torch.Tensor, "copy_", logged_copy)


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize("direction", ["out", "in"])
def test_cuda_puts_an_edge_at_both_ends_of_every_copy(cuda, direction):
    device, slab, tensor = CudaDevice("cuda:0"), Slab(4096), torch.arange(8.0)
    if direction == "out":
        event = device.copy_out(tensor, slab.buffer[:32])
    else:
        event = device.copy_in(slab.buffer[:32], tensor)
    event.wait()
    event.synchronize()
    assert event.done()
    assert cuda.log == [
        f"{direction} waits for compute",
        f"enter {direction}",
        "copy non_blocking=True",
        f"record on {direction}",
        f"leave {direction}",
        f"compute waits for event of {direction}",
        f"synchronize event of {direction}",
    ]


@pytest.mark.parametrize("how", ["wait", "synchronize", "done", "next copy"])
def test_a_tensor_is_held_until_its_memory_may_be_used_again(cuda, how):
    device, slab, tensor = CudaDevice("cuda:0"), Slab(4096), torch.arange(8.0)
    dead = weakref.ref(tensor)
    cuda.over = False
    event = device.copy_out(tensor, slab.buffer[:32])
    del tensor
    device.copy_in(slab.buffer[:32], torch.zeros(8)).done()
    assert dead() is not None
    own = cuda.current
    cuda.current = torch.cuda.Stream.__new__(torch.cuda.Stream)
    cuda.current.name = "another"
    event.wait()  # that stream may go on; the one that owns the memory knows nothing of it
    assert dead() is not None
    cuda.current = own
    cuda.over = how in ("done", "next copy")
    if how == "next copy":
        del event
        device.copy_in(slab.buffer[:32], torch.zeros(8))
    else:
        getattr(event, how)()
    assert dead() is None


def test_cuda_registers_once_and_waits_before_it_unregisters(cuda):
    device, slab = CudaDevice("cuda:1"), Slab(5000)
    device.unregister(slab)
    device.register(slab)
    device.register(slab)
    device.unregister(slab)
    device.unregister(slab)
    assert cuda.log == [
        *("current cuda:1", "register 8192 0", "former current"),
        *("synchronize out", "synchronize in"),
        *("current cuda:1", "unregister", "former current"),
    ]


def test_another_slab_at_an_address_that_is_still_registered_is_refused(cuda):
    device, slab = CudaDevice("cuda:0"), Slab(8192)
    device.register(slab)
    slab.nbytes = 4096  # as after a slab was closed, unregistered never, and another one mapped in its place
    with pytest.raises(OffloadError, match="of 4096 bytes lies where one of 8192 bytes is still registered"):
        device.register(slab)


def test_cuda_limits_the_allocator_to_the_budget_and_lifts_it(cuda):
    device = CudaDevice("cuda:1")
    for nbytes in (2 << 30, 9 << 30, None):
        device.limit(nbytes)
    assert cuda.log == ["fraction 0.25 of cuda:1", "fraction 0.75 of cuda:1", "fraction 0.75 of cuda:1"]


def test_a_refused_registration_says_what_to_do(cuda):
    cuda.errors["register"] = 2
    with pytest.raises(OffloadError, match=r"cannot register a slab of 4096 bytes \(error 2\).*ulimit -l"):
        CudaDevice("cuda:0").register(Slab(4096))


def test_a_bare_cuda_is_the_current_device_from_then_on(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert CudaDevice("cuda").place == torch.device("cuda:3")


def test_cuda_counts_on_its_own_device(cuda, monkeypatch):
    asked = []
    for name in ("memory_reserved", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: asked.append((name, device)) or 7)
    device = CudaDevice("cuda:1")
    device.reset_peak()
    assert (device.used_bytes(), device.peak_bytes(), device.shares_memory) == (7, 7, False)
    assert {place for _, place in asked} == {torch.device("cuda:1")}
    assert [name for name, _ in asked] == [
        "reset_peak_memory_stats",
        "memory_reserved",
        "max_memory_reserved",
    ]


def test_a_ring_is_registered_as_long_as_it_lives(cuda):
    ring = Ring(2, 4096, device=CudaDevice("cuda:0"))
    assert cuda.log[1] == "register 8192 0"
    ring.close()
    ring.close()
    assert [line for line in cuda.log if "current" not in line] == [
        *("register 8192 0", "synchronize out", "synchronize in", "unregister")
    ]


def test_recompute_keeps_the_random_state_of_the_tensors_device(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or "now")
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: asked.append((state, device)))
    place = torch.device("cuda:1")
    with Surroundings(place).again():
        pass
    assert asked == [place, place, ("now", place), ("now", place)]


def test_unknown_devices_are_refused():
    with pytest.raises(OffloadError, match="'mps' is not known: use cpu, cuda or cuda:N"):
        make_device("mps")
