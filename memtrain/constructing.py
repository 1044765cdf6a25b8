"""Run a model's constructor without its weights in memory, and draw them one at a time.

A constructor creates parameters and fills them, often twice: a layer of torch draws its default values, then
the model's own initialisation draws over them, module after module. Only the last draw matters, but the
generator must go through all of them for the values to be those of the plain constructor. So the constructor
runs twice. The first run notes, for every parameter, which operators touch it, and computes none of them. The
second run computes them all; a parameter has memory from an operator that replaces all its values to the last
one that touches them before they are replaced again, or are final and handed on.

What the constructor computes beside parameters, such as rotary tables, is computed as ever, in both runs.
Parameters are known by their storage, so views, ``.data`` and in-place operators under any name work, and
values that are read (a norm for a normalised weight) are there. What cannot work is a constructor that takes
another course the second time: that is an error, by name.
"""

from __future__ import annotations

import mmap
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from memtrain.offload.errors import OffloadError

Put = Callable[[str, Tensor], None]
"""Takes the values of the parameter that is named; the tensor is another's when it has returned."""

_REPLACING = frozenset(
    f"aten::{name}_"
    for name in (
        "bernoulli cauchy copy exponential fill geometric log_normal normal random uniform zero".split()
    )
)
"""Operators that leave nothing of what their tensor held."""
_REMEDY = "construct the model as usual, save it with save_pretrained(), and stream it from its folder"


class ConstructionError(OffloadError):
    """A model cannot be constructed weight by weight; the message says which weight, why, and what to do."""


@dataclass(eq=False, slots=True)
class _Life:
    """What the constructor does with one parameter: creates it, and then these operators touch it."""

    events: list[tuple[str, bool]] = field(default_factory=list)
    """Operators by name, and whether each replaces all values."""
    name: str | None = None
    """In the finished model; None: it was replaced there, as a head is that is then tied."""

    def dies_after(self, event: int) -> bool:
        """Nobody sees the values that this event leaves."""
        after = self.events[event + 1 : event + 2]
        return after[0][1] if after else self.name is None

    def ends_with(self, event: int) -> bool:
        """The values are final."""
        return event + 1 == len(self.events)


class Blueprint:
    """A constructor that ran once, without computing a weight.

    Args:
        make: the constructor. It must do the same whenever the random generators are in the same state.

    Attributes:
        model: what it made. Its parameters have shapes, and no values worth reading.

    Raises:
        ConstructionError: parameters without a shape, on the meta device, or in each other's memory.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make
        run = _Run()
        with _generators_left_alone():
            self.model = run.construct(make)
        self._lives = run.lives

    def draw(self, put: Put) -> nn.Module:
        """Run the constructor again and hand on the values of every parameter when they are final.

        They are what the plain constructor would have drawn from the present state of the generators, which
        are as far on afterwards. In memory are only weights that the constructor has begun and not finished:
        one at a time in the models of transformers.

        Returns:
            The second model, whose parameters have no values either.

        Raises:
            ConstructionError: the constructor went another way than the first time.
        """
        return _Run(self._lives, put).construct(self._make)


class _Run(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One run of a constructor: the first, or with what it found the second."""

    def __init__(self, expected: list[_Life] | None = None, put: Put | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lives: list[_Life] = []
        self._expected, self._put = expected, put
        self._numbers: dict[int, int] = {}
        """Of parameters, by storage."""
        self._places: list[Tensor] = []
        """By number; they keep the storages, and with them their identity."""
        self._values: dict[int, Tensor] = {}
        self._nowhere = _Nowhere()

    def construct(self, make: Callable[[], nn.Module]) -> nn.Module:
        with _registered_by(self._register), self:
            model = make()
        self._name(model)
        if self._expected is not None and [life.events for life in self.lives] != [
            life.events for life in self._expected
        ]:
            raise ConstructionError(
                f"the constructor of {type(model).__name__} left out parameters or operators the second "
                f"time: {_REMEDY}"
            )
        return model

    def _name(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            number = self._number(parameter)
            if parameter.is_meta:
                raise ConstructionError(f"{name} was constructed on the meta device: {_REMEDY}")
            if number is None:  # its values were exchanged, by parameter.data = values
                if self._put is not None:
                    self._put(name, parameter.detach())
                parameter.data = self._nowhere.like(parameter)
            elif self.lives[number].name is not None:
                raise ConstructionError(
                    f"{self.lives[number].name} and {name} are two parameters in the same memory: {_REMEDY}"
                )
            else:
                self.lives[number].name = name

    def _number(self, value: Any) -> int | None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        return self._numbers.get(value.untyped_storage()._cdata)

    def _register(self, parameter: nn.Parameter) -> None:
        if isinstance(parameter, UninitializedParameter):
            raise ConstructionError(f"a parameter has no shape before the first forward: {_REMEDY}")
        if parameter.is_meta or self._number(parameter) is not None:
            return
        number, given = len(self.lives), parameter.detach()
        parameter.data = self._nowhere.like(parameter)
        self._numbers[parameter.untyped_storage()._cdata] = number
        self._places.append(parameter.detach())
        self.lives.append(_Life())
        self._note(number, "created", replaces=True)
        if self._expected is not None:
            self._values[number] = given
            self._settle(number)

    def _note(self, number: int, event: str, *, replaces: bool) -> None:
        events = self.lives[number].events
        events.append((event, replaces))
        if self._expected is None:
            return
        known = self._expected[number] if number < len(self._expected) else _Life()
        if known.events[len(events) - 1 : len(events)] != events[-1:]:
            what = known.name or f"parameter number {number + 1} of {len(self._expected)}"
            raise ConstructionError(
                f"the constructor did something else to {what} the second time "
                f"({event.removeprefix('aten::')}): {_REMEDY}"
            )

    def _settle(self, number: int) -> None:
        """Let go of values that nobody sees, and hand on final ones."""
        assert self._expected is not None
        assert self._put is not None
        life, event = self._expected[number], len(self.lives[number].events) - 1
        if life.dies_after(event):
            del self._values[number]
        elif life.ends_with(event):
            assert life.name is not None
            self._put(life.name, self._values.pop(number))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touched, writes = self._touched(func, args, kwargs)
        for number, replaces in touched.items():
            self._note(number, func._schema.name, replaces=replaces)
        if not touched:
            return func(*args, **kwargs)
        if self._expected is None:
            # Whoever reads gets zeros, from pages that take no memory until somebody writes.
            return args[0] if writes and self._number(args[0]) is not None else func(*args, **kwargs)
        for number in touched.keys() - self._values.keys():
            self._values[number] = torch.empty_like(self._places[number])
        stands_for: dict[int, Tensor] = {}

        def real(value: Any) -> Any:
            number = self._number(value)
            if number is None:
                return value
            storage = self._values[number].untyped_storage()
            view = torch.empty(0, dtype=value.dtype)
            view.set_(storage, value.storage_offset(), value.shape, value.stride())
            stands_for[id(view)] = value
            return view

        result = func(*tree_map(real, args), **tree_map(real, kwargs))
        for number in touched:
            self._settle(number)
        return tree_map(lambda value: stands_for.get(id(value), value), result)

    def _touched(self, func: Any, args: Any, kwargs: Any) -> tuple[dict[int, bool], bool]:
        """Parameters whose values an operator reads or writes, and which it replaces; whether it writes."""
        touched: dict[int, bool] = {}
        writes = False
        for place, argument in enumerate(func._schema.arguments):
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            written = argument.alias_info is not None and argument.alias_info.is_write
            for value in given if isinstance(given, (list, tuple)) else [given]:
                number = self._number(value)
                if number is None or (argument.alias_info is not None and not written):
                    continue  # a view: what is done to it will be seen
                whole = value.numel() == self._places[number].numel()
                replaces = written and whole and func._schema.name in _REPLACING
                touched[number] = touched.get(number, True) and replaces
                writes |= written
        return touched, writes


class _Nowhere:
    """Memory that is addressed and takes none: one range of zeros, in which all parameters lie."""

    def __init__(self) -> None:
        self._zeros = mmap.mmap(-1, mmap.PAGESIZE)

    def like(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor of the shape and dtype, in a storage of its own."""
        if tensor.nbytes > len(self._zeros):
            self._zeros = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        flat = torch.frombuffer(self._zeros, dtype=tensor.dtype, count=tensor.numel())
        return flat.view(tensor.shape)


@contextmanager
def _registered_by(register: Callable[[nn.Parameter], None]) -> Iterator[None]:
    """Every parameter that a module is given goes through ``register`` first."""
    original = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            register(param)
        original(self, name, param)

    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def _generators_left_alone() -> Iterator[None]:
    """Of torch (on the CPU), Python, and NumPy where it is loaded."""
    python, torchs = random.getstate(), torch.get_rng_state()
    numpy = sys.modules.get("numpy")
    numpys = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(torchs)
        if numpy is not None:
            numpy.random.set_state(numpys)
