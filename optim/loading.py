"""Loading a state as it was saved.

``torch.optim.Optimizer.load_state_dict`` casts every floating tensor of a state to its parameter's dtype
(pytorch#43706), which rounds fp32 moments of bf16 parameters and breaks a resume. It leaves alone what it
does not know: tensors go through it in a wrapper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memtrain.optim.cell import Cell, State


class Verbatim:
    """A tensor that nobody converts on its way."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @staticmethod
    def wrap(state: dict[str, Any]) -> dict[str, Any]:
        """All tensors of one parameter's state."""
        return {k: Verbatim(v) if isinstance(v, Tensor) else v for k, v in state.items()}

    @staticmethod
    def unwrap(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Copies; to the parameter's device, except counters and keys, which stay on the CPU."""
        return {k: v._copy(k, device) if isinstance(v, Verbatim) else v for k, v in state.items()}

    def _copy(self, name: str, device: torch.device) -> Tensor:
        return self.tensor.detach().to("cpu" if on_cpu(name) else device, copy=True)


def on_cpu(name: str) -> bool:
    """Whether a tensor of the state lies on the CPU whatever its parameter's device."""
    return name in ("step", "projector.seed", "projector.start") or name.startswith("refresh.")


def check_state(name: str, state: dict[str, Any], cell: Cell, parameter: Tensor) -> None:
    """That a state is one that the cell keeps.

    Raises:
        ValueError: tensors are missing or too many, or have another shape or dtype.
    """
    expected: State = cell.empty_state(parameter.detach().to("meta"))
    if missing := expected.keys() ^ state.keys():
        raise ValueError(
            f"{name}: its state and its settings differ in {sorted(missing)}: a state goes on under the "
            "settings that it was made with"
        )
    for key, tensor in expected.items():
        if (tensor.shape, tensor.dtype) != (state[key].shape, state[key].dtype):
            raise ValueError(
                f"{name}: state {key!r} is {tuple(state[key].shape)} {state[key].dtype}, and "
                f"{tuple(tensor.shape)} {tensor.dtype} is expected: the state belongs to another model or to "
                "other settings"
            )
