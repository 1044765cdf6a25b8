"""Weights that are still to be updated must not be read: finish their unit's update first.

Under the AHEAD schedule ``optimizer.step()`` returns before the weights have changed. A unit's update is
finished by the forward of its block, or of any module that owns one of its parameters, and by whoever asks a
module for its parameters or its state dict, or loads one; each finishes no more than the units it is about to
see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from memtrain.offload.shards import Unit


class WeightGuard:
    """Installs itself on a model; ``remove`` takes every trace away.

    Args:
        model: its root.
        blocks: in forward order.
        units: which parameters are updated together, in forward order.
        ensure: finishes the update of the unit that is named.
        bypassing: modules that use weights of modules inside them without calling those: their own forward
            finishes the updates of all of these weights, and no hook is put on what is inside.
        tiles: modules whose weights their own forward alone uses: nobody finishes their updates before it.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        units: Sequence[Unit],
        ensure: Callable[[str], None],
        *,
        bypassing: Sequence[nn.Module] = (),
        tiles: Sequence[nn.Module] = (),
    ) -> None:
        self._ensure = ensure
        self._unit_of = {id(p): unit for unit, members in reversed(units) for _, p in members}
        self._hooks: list[Any] = []
        self._guarded: list[nn.Module] = []
        inner = {child for module in bypassing for child in module.modules() if child is not module}
        for module in model.modules():
            self._guard(module, recurse=module in bypassing, called=module not in inner)
        inside = {name for name, _ in blocks}
        inside |= {self._unit_of[id(p)] for tile in tiles for p in tile.parameters()}
        outside = [name for name, _ in units if name not in inside]
        before = [name for name in outside if name != "epilogue"]
        # A weight may be used without its module's forward (the chunked loss, F.linear with a table): units
        # before the blocks are ready when the model begins, those after them when the last block is done.
        self._hooks.append(model.register_forward_pre_hook(lambda *_: self._finish(before)))
        # Before anybody brings weights from a tier: those that the update makes anew need not be read then.
        named = {name for name, _ in units}
        for name, block in blocks:
            if name in named:
                self._hooks.append(block.register_forward_pre_hook(partial(self._finish_before, name)))
        self._hooks.append(
            blocks[-1][1].register_forward_hook(lambda *_: self._finish(outside), prepend=True)
        )

    def remove(self) -> None:
        """Give the model its own methods back."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module in self._guarded:
            module.__dict__.pop("named_parameters", None)
        self._guarded.clear()

    def _guard(self, module: nn.Module, *, recurse: bool, called: bool) -> None:
        own = module.named_parameters
        parameters = module.parameters(recurse=recurse)
        units = sorted({self._unit_of[id(p)] for p in parameters if id(p) in self._unit_of})

        def named_parameters(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            for name, parameter in own(*args, **kwargs):
                self._finish([self._unit_of[id(parameter)]] if id(parameter) in self._unit_of else [])
                yield name, parameter

        module.named_parameters = named_parameters  # type: ignore[method-assign]
        self._guarded.append(module)
        if units and called:
            self._hooks.append(module.register_forward_pre_hook(lambda *_: self._finish(units)))
        if units:
            self._hooks += [
                module.register_state_dict_pre_hook(lambda *_: self._finish(units)),  # type: ignore[no-untyped-call]
                module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                    lambda *_: self._finish(units)
                ),
            ]

    def _finish_before(self, unit: str, *_: Any) -> None:
        self._ensure(unit)

    def _finish(self, units: Iterable[str]) -> None:
        for unit in units:
            self._ensure(unit)
