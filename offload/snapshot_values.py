"""What of a checkpoint is no large tensor, as JSON: settings, counters, and the states of random generators.

JSON and no pickle: a checkpoint from elsewhere can then at worst be wrong. Floats keep every bit.
"""

from __future__ import annotations

import base64
import random
import sys
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.atomic import CheckpointError

_DTYPE = "torch_dtype"


def encode(value: Any, where: str) -> Any:
    """Numbers, text, None, lists, tuples, dictionaries, and tensors without dimensions, for JSON.

    Args:
        where: what the value is, for the message of the CheckpointError that anything else gets.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        return {_DTYPE: str(value.dtype).removeprefix("torch."), "value": value.item()}
    if isinstance(value, tuple):
        return {"tuple": [encode(item, where) for item in value]}
    if isinstance(value, list):
        return [encode(item, where) for item in value]
    if isinstance(value, dict):
        return {key: encode(item, where) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"the {where} is {value!r}, of a type that a checkpoint cannot hold: make it a number"
    )


def decode(value: Any) -> Any:
    """What ``encode`` was given."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_DTYPE, "value"}:
        return torch.tensor(value["value"], dtype=getattr(torch, value[_DTYPE]))
    if value.keys() == {"tuple"}:
        return tuple(decode(item) for item in value["tuple"])
    return {key: decode(item) for key, item in value.items()}


def rng_state() -> dict[str, Any]:
    """Of torch, Python, NumPy where it is loaded, and CUDA where there is one."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": _text(torch.get_rng_state())}
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    if torch.cuda.is_available():
        state["cuda"] = [_text(one) for one in torch.cuda.get_rng_state_all()]
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what ``rng_state`` gave; CUDA's only where there are as many devices."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    torch.set_rng_state(_bytes(state["torch"]))
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all([_bytes(one) for one in state["cuda"]])


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
