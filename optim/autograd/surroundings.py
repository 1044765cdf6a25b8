"""What a forward pass depends on beside its arguments: random numbers and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


class Surroundings:
    """Generators and autocast as they are now, to be entered again in backward.

    Args:
        device: the one that is computed on; the CPU's generator is part of it always.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._random = _random_state(device)
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", device.type}
        }

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The same inside; the present ones again afterwards."""
        now = _random_state(self._device)
        _set_random_state(self._device, self._random)
        try:
            with contextlib.ExitStack() as stack:
                for kind, (enabled, dtype) in self._autocast.items():
                    stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype))
                yield
        finally:
            _set_random_state(self._device, now)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
