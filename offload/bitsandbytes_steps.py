"""bitsandbytes' optimizers on stand-ins for parameters, and for pieces of them.

Their 8-bit states lie in blocks of 256 elements, so that pieces that begin with a block can be stepped alone.
Two things they decide by the tensor they are given: a small one has no quantised state, which a piece of a
large parameter must have; and a manager of the process's overrides settings of single parameters, by identity
or place, which a stand-in does not have.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.optimizer_probe import Original, UnsupportedOptimizerError, plain_step


def is_of_bitsandbytes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is one of theirs; imports nothing."""
    module = sys.modules.get("bitsandbytes.optim.optimizer")
    return module is not None and isinstance(optimizer, module.Optimizer8bit)


class BitsAndBytesSteps:
    """See ``optimizer_probe.StandIns``.

    Raises:
        UnsupportedOptimizerError: settings of single parameters are overridden.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._step = plain_step(optimizer)
        manager = optimizer.mng
        if manager.pid2config or manager.index2config or manager.module_weight_config_triple:
            raise UnsupportedOptimizerError(
                f"{type(optimizer).__name__}: bitsandbytes' GlobalOptimManager overrides settings of single "
                "parameters, which tensors that stand for them do not have: give those parameters to an "
                "optimizer of their own instead"
            )

    def count_step(self) -> None:
        """Steps are counted in the states."""

    def run(
        self,
        groups: list[dict[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        originals: Mapping[Tensor, Original],
    ) -> dict[Tensor, dict[str, Any]]:
        """One step over ``groups``; the state after it."""
        after: dict[Tensor, dict[str, Any]] = {}
        for group in groups:
            for member in group["params"]:
                whole, _ = originals.get(member, (member, 0))
                twin = self._twin(whole.numel())
                twin.param_groups = [{**group, "params": [member]}]
                twin.state = defaultdict(dict, {member: state[member]} if member in state else {})
                self._step(twin)
                after.update(twin.state)
        return after

    def _twin(self, elements: int) -> Any:
        """For a piece of a parameter of so many elements: it has the state that the parameter would have."""
        twin = object.__new__(type(self._optimizer))
        twin.__dict__.update(self._optimizer.__dict__)
        twin.initialized = True  # else it looks for overrides, and for states that are not where weights are
        twin.args = copy.copy(self._optimizer.args)
        if elements >= twin.args.min_8bit_size:
            twin.args.min_8bit_size = 0
        return twin
