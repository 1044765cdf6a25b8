"""The CUDA layer runs here over a fake ``torch.cuda`` that notes what it is asked for, in order."""

import contextlib

import pytest
import torch

from memtrain.offload.device import CpuDevice, CudaDevice, make_device
from memtrain.offload.errors import OffloadError
from memtrain.offload.slab import Slab


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
        self.log, self.streams, self.errors = [], iter(["out", "in"]), {}
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
                return True

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

        compute = Stream()
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "current_stream", lambda device: compute)
        patch.setattr(torch.cuda, "cudart", Runtime)
        patch.setattr(torch.Tensor, "copy_", logged_copy)
        patch.setattr(
            torch.Tensor,
            "record_stream",
            lambda t, s: fake.log.append(f"{t.dtype} recorded on {s.name}"),
            raising=False,
        )


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
        f"torch.float32 recorded on {direction}",
        f"compute waits for event of {direction}",
        f"synchronize event of {direction}",
    ]


def test_cuda_registers_once_and_waits_before_it_unregisters(cuda):
    device, slab = CudaDevice("cuda:0"), Slab(5000)
    device.unregister(slab)
    device.register(slab)
    device.register(slab)
    device.unregister(slab)
    device.unregister(slab)
    assert cuda.log == ["register 8192 0", "synchronize out", "synchronize in", "unregister"]


def test_a_refused_registration_says_what_to_do(cuda):
    cuda.errors["register"] = 2
    with pytest.raises(OffloadError, match=r"cannot register a slab of 4096 bytes \(error 2\).*ulimit -l"):
        CudaDevice("cuda:0").register(Slab(4096))


def test_unknown_devices_are_refused():
    with pytest.raises(OffloadError, match="'mps' is not known: use cpu, cuda or cuda:N"):
        make_device("mps")
