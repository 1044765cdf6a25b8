"""What a forward pass depends on beside its arguments: random numbers and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class Surroundings:
    """RNG and autocast as they are now, to be entered again.

    Args:
        device: the one that is computed on; the CPU's random numbers are part of it always.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._device_types = ["cpu"] if device.type == "cpu" else ["cpu", device.type]
        self._random = random_states(device)
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self._device_types
        }
        self._cache = torch.is_autocast_cache_enabled()

    @property
    def random_numbers_drawn(self) -> bool:
        """Whether a generator has moved on since."""
        now = random_states(self._device)
        return not all(torch.equal(a, b) for a, b in zip(self._random, now, strict=True))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Same RNG and autocast inside; the present ones again afterwards."""
        now = random_states(self._device)
        set_random_states(self._device, self._random)
        try:
            with contextlib.ExitStack() as stack:
                for kind, (enabled, dtype) in self._autocast.items():
                    stack.enter_context(
                        torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self._cache)
                    )
                yield
        finally:
            set_random_states(self._device, now)


def random_states(device: torch.device) -> list[torch.Tensor]:
    """Of the CPU's generator and, beside a CUDA device, of its."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_states(device: torch.device, states: Sequence[torch.Tensor]) -> None:
    """Have the generators go on from ``states``."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
