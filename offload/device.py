"""Copies between the device and staging memory: a thin layer over streams and events.

On a CPU a copy is made inline and is over when the call returns. On CUDA each direction has a stream of its
own, and every copy has an event edge at both ends: it waits for what the compute stream has queued so far,
and whoever uses the result waits for the copy. The tensor is held until the stream that owns its memory has
waited for the copy, or the host has: the caching allocator would otherwise hand the memory out again while
the copy is under way. ``record_stream`` would do that too, but gives the memory back only after every copy
that was queued until the tensor died: the next block's bytes would pile up beside it, and no bill could say
how many.

Where a device shares the host's memory a staging slot is itself what the arithmetic works on; where it does
not, executors keep a mirror of the slot in the device's memory and copy between the two.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import torch

from memtrain.offload.errors import OffloadError
from memtrain.offload.slab import Slab
from memtrain.planner import resident


class Event(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Make the work that the device is given from now on wait for the copy; the caller goes on."""

    def synchronize(self) -> None:
        """Return when the copy is over."""

    def done(self) -> bool:
        """Whether ``synchronize`` would return at once."""


class Device(Protocol):
    """Where the arithmetic happens."""

    place: torch.device
    """Of its tensors, with an index where there may be several."""
    shares_memory: bool
    """Whether staging memory is the device's own: a slot can then be computed on as it is."""

    def empty(self, nbytes: int) -> torch.Tensor:
        """``nbytes`` of the device's memory, uint8, with anything in them."""

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Copy the bytes of ``source`` (contiguous, on the device) to ``target`` (1-D uint8 view of a slab).

        ``source`` may be changed or dropped by work queued after the event's ``wait``; ``target`` may be
        read after its ``synchronize``.
        """

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        """Copy ``source`` (1-D uint8 view of a slab) over the bytes of ``target`` (contiguous, on the
        device).

        ``target`` may be read by work queued after the event's ``wait``; ``source`` may be changed after its
        ``synchronize``.
        """

    def register(self, slab: Slab) -> None:
        """Let the device reach the slab directly. Raises OffloadError where it refuses."""

    def unregister(self, slab: Slab) -> None:
        """Undo ``register``, before the slab is closed. Waits for copies under way."""

    def synchronize(self) -> None:
        """Return when every copy is over."""

    def used_bytes(self) -> int:
        """What this process's tensors, and on a CPU the whole process, occupy of the device now."""

    def peak_bytes(self) -> int:
        """The most that ``used_bytes`` has been since the last ``reset_peak``."""

    def reset_peak(self) -> bool:
        """Let the peak start again from what is in use now; False where that is not permitted, and the peak
        goes on counting from the start."""

    def limit(self, nbytes: int | None) -> None:
        """Have what would take more than ``nbytes`` for tensors fail instead; None: as it was before.

        Only where the device's allocator can: a CPU's process is limited by its memory group.
        """


class CpuDevice:
    """Device and host are the same memory."""

    place = torch.device("cpu")
    shares_memory = True

    def empty(self, nbytes: int) -> torch.Tensor:
        # Not from the heap, which rounds up; and faulted in by huge pages. What a slab is rounded up to is
        # cut off, and a forked child may read it, for these are ordinary tensors to whoever gets them.
        return Slab(nbytes, inherited=True).buffer[:nbytes]

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        target.copy_(_bytes_of(source, target))
        return _DONE

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        _bytes_of(target, source).copy_(source)
        return _DONE

    def register(self, slab: Slab) -> None:
        """Nothing to do: it is reachable."""

    def unregister(self, slab: Slab) -> None:
        """Nothing to do."""

    def synchronize(self) -> None:
        """Nothing to do: copies are over when their call returns."""

    def used_bytes(self) -> int:
        return resident.rss_bytes()

    def peak_bytes(self) -> int:
        return resident.peak_bytes()

    def reset_peak(self) -> bool:
        return resident.reset_peak()

    def limit(self, nbytes: int | None) -> None:
        """Nothing to do: the memory group limits the process, and ``reclaim`` keeps the heap small."""


class CudaDevice:
    """One CUDA device, a stream per direction beside its compute stream."""

    shares_memory = False

    def __init__(self, device: str | torch.device = "cuda") -> None:
        named = torch.device(device)
        # A bare "cuda" means another device in another thread, and equals no tensor's device.
        index = torch.cuda.current_device() if named.index is None else named.index
        self.place = self._device = torch.device("cuda", index)
        self._out = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._in = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._own_fraction: float = torch.cuda.get_per_process_memory_fraction(self._device)
        """What the program itself lets its allocator take."""
        self._registered: dict[int, int] = {}
        self._under_way: deque[_CudaEvent] = deque()

    def empty(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        return self._copy(self._out, _bytes_of(source, target), target, on_device=source)

    def copy_in(self, source: torch.Tensor, target: torch.Tensor) -> Event:
        return self._copy(self._in, source, _bytes_of(target, source), on_device=target)

    def register(self, slab: Slab) -> None:
        known_bytes = self._registered.get(slab.address)
        if known_bytes == slab.nbytes:
            return
        if known_bytes is not None:
            raise OffloadError(
                f"a slab of {slab.nbytes} bytes lies where one of {known_bytes} bytes is still registered "
                f"with {self._device}: unregister a slab before it is closed"
            )
        with torch.cuda.device(self._device):  # the runtime acts on the thread's current device
            self._check(_runtime().cudaHostRegister(slab.address, slab.nbytes, 0), "register", slab)
        self._registered[slab.address] = slab.nbytes

    def unregister(self, slab: Slab) -> None:
        if self._registered.pop(slab.address, None) is None:
            return
        self.synchronize()
        with torch.cuda.device(self._device):
            self._check(_runtime().cudaHostUnregister(slab.address), "unregister", slab)

    def synchronize(self) -> None:
        self._out.synchronize()
        self._in.synchronize()

    def used_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def reset_peak(self) -> bool:
        torch.cuda.reset_peak_memory_stats(self._device)
        return True

    def limit(self, nbytes: int | None) -> None:
        # At the limit the allocator gives back what it has cached and tries again, before it raises
        # torch.OutOfMemoryError.
        if nbytes is None:
            fraction = self._own_fraction
        else:
            _, total_bytes = torch.cuda.mem_get_info(self._device)
            fraction = min(self._own_fraction, nbytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(fraction, self._device)

    def _copy(
        self, stream: torch.cuda.Stream, source: torch.Tensor, target: torch.Tensor, on_device: torch.Tensor
    ) -> Event:
        # Also before a copy in: the target's memory may still be in use by work queued earlier, under
        # another tensor's name.
        owner = torch.cuda.current_stream(self._device)
        stream.wait_stream(owner)
        # Blocking: whoever waits sleeps, for the processor is needed by the threads that move bytes to disk.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event.record(stream)
        copy = _CudaEvent(event, self._device, owner, on_device)
        self._under_way.append(copy)
        while self._under_way and self._under_way[0].forgotten():
            self._under_way.popleft()
        return copy

    def _check(self, error: object, what: str, slab: Slab) -> None:
        # The runtime's error is an enum whose value 0 is success.
        number = int(getattr(error, "value", error))  # type: ignore[call-overload]
        if number != 0:
            raise OffloadError(
                f"CUDA cannot {what} a slab of {slab.nbytes} bytes (error {number}): lower the staging "
                "memory, or raise the limit of locked memory (ulimit -l)"
            )


class _DoneEvent:
    def wait(self) -> None:
        """The copy is over."""

    def synchronize(self) -> None:
        """The copy is over."""

    def done(self) -> bool:
        return True


_DONE = _DoneEvent()


class _CudaEvent:
    """A copy that holds its tensor as long as the tensor's memory must not be used otherwise."""

    def __init__(
        self,
        event: torch.cuda.Event,
        device: torch.device,
        owner: torch.cuda.Stream,
        tensor: torch.Tensor,
    ) -> None:
        self._event = event
        self._device = device
        self._owner = owner
        self._held: torch.Tensor | None = tensor

    def wait(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._event)
        if stream == self._owner:
            self._held = None

    def synchronize(self) -> None:
        self._event.synchronize()
        self._held = None

    def done(self) -> bool:
        over = bool(self._event.query())  # type: ignore[no-untyped-call]
        if over:
            self._held = None
        return over

    def forgotten(self) -> bool:
        """Whether nothing is held any more."""
        return self._held is None or self.done()


def make_device(name: str) -> Device:
    """The device of this name: ``cpu``, ``cuda`` or ``cuda:N``. Raises OffloadError."""
    if name == "cpu":
        return CpuDevice()
    if torch.device(name).type != "cuda":
        raise OffloadError(f"device {name!r} is not known: use cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise OffloadError(f"device {name!r} was asked for, and this torch sees no CUDA device: use cpu")
    return CudaDevice(name)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _bytes_of(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as 1-D uint8, checked against the other side of the copy."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"only contiguous tensors are copied, got strides {tensor.stride()} for {tuple(tensor.shape)}"
        )
    flat = tensor.detach().view(-1).view(torch.uint8)
    if other.dtype != torch.uint8 or flat.shape != other.shape:
        raise ValueError(
            f"cannot copy between {flat.numel()} bytes and {other.dtype} of shape {tuple(other.shape)}"
        )
    return flat
