"""Weights on tiers, brought unit by unit to where forward, backward and updates use them.

ZeRO-Infinity (Rajbhandari et al. 2021) and its kin gather weights by hooks around modules and release them
behind; Harmony and MegaTrain stream them by layers. Here, too, the forward of a block, and of any module
outside the blocks that owns streamed weights, has them in a window (``weight_windows.py``) while it runs.
Two things differ:

- Autograd is never given memory of a window. What it saves of a weight (``weight.t()``) is replaced by a
  description, and brought back when backward asks for it. So a graph holds no weights, whatever its shape:
  blocks called twice, several graphs, recomputation, ``retain_graph`` need no rules of their own.
- Nothing is released at the end of a block. A unit stays until its window is wanted by another one, and the
  unit that was used longest ago leaves first; the last blocks of a forward pass are still there when backward
  begins.

Units are read ahead in the direction in which they are used, as far as there are windows. Outside the forward
of their modules weights may be used inside ``hold`` alone; elsewhere any use raises ``WeightAwayError``,
whether or not a window happens to have them.

Parameters of fewer than ``SMALL`` elements stay in memory, as their gradients and state do.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils.hooks import RemovableHandle

from memtrain.offload import away
from memtrain.offload.coded import CodedExtent
from memtrain.offload.engine import Engine
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.extents import Extent
from memtrain.offload.optimizer_state import Keeper
from memtrain.offload.saved_weights import saving_weights
from memtrain.offload.shards import SMALL, Unit
from memtrain.offload.slab import HighWater
from memtrain.offload.store import Store
from memtrain.offload.weight_units import StreamedUnit, StreamedWeight, make_unit, own_parameters
from memtrain.offload.weight_users import WeightUsers
from memtrain.offload.weight_windows import WindowPool, WindowStatistics
from memtrain.offload.window_classes import classes_for
from memtrain.planner.actions import Tier
from memtrain.planner.plan import WindowClass


class _Pass(threading.local):
    """The forward pass of a thread: of several micro-batches under way each has one of its own."""

    brought: ExitStack | None = None
    """What it has brought for the model's own code."""


class ParameterStreamer:
    """Streams the weights of some units of a model.

    Args:
        model: its root, whose forward a training step calls.
        blocks: ``(name, module)`` in forward order: modules that run one after the other, each of which has
            all its weights in memory while it runs, but for its ``tiles``.
        units: every parameter, in forward order of the units.
        tiers: by unit, where its weights live; the device's, or none: in memory, as ever.
        engine: the stores of the tiers.
        slots: how many units' weights are in memory at once. With 2, one is read ahead; each more is another
            one read ahead, and more of the last blocks are still there for backward. Each is as large as the
            largest unit. Or windows of several sizes, as a plan has them (``window_classes.py``). None: the
            fewest of one size that the model can do with.
        placed: extents of parameters, by name, whose bytes are on the tier already (``allocate_weight``),
            coded as the engine codes weights there; such a parameter is away (``away.born_away``), or on the
            meta device still.
        borrowed: units before the blocks whose weights are used behind them too, by no module of their own: a
            table that the model multiplies with.
        tiles: modules, in blocks and elsewhere, each of which has a unit of its own that is there while its
            own forward runs, and not while its block's does: for what is too large to be in memory at once.
        reading: what reads happen in, each when its unit is used and never before, so that what runs
            otherwise can be timed; None reads ahead.

    Raises:
        PlanMismatchError: too few slots for modules that use several units at once, windows of sizes that are
            not this model's, a parameter that cannot be streamed, a unit that does not exist.
        TierFullError: no room for the weights.
        OffloadError: the tier failed, or the device refuses the memory.

        The model has its weights then, as before.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        units: Sequence[Unit],
        *,
        tiers: Mapping[str, Tier],
        engine: Engine,
        slots: int | Sequence[WindowClass] | None,
        placed: Mapping[str, Extent | CodedExtent] | None = None,
        borrowed: Collection[str] = (),
        tiles: Collection[nn.Module] = (),
        reading: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._model = model
        self._reading = reading
        self._blocks = [module for _, module in blocks]
        self._names = [name for name, _ in units]
        self._originals: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        self._pass = _Pass()
        self._hook: RemovableHandle | None = None
        self._closed = False
        self._at = 0
        """Where in the schedule the pass is."""
        self._latest: StreamedUnit | None = None
        """What was used last, and whether everything that follows it has been asked for."""
        self._asked = False
        self._made_anew: set[StreamedUnit] = set()
        """What pending updates write all of before its next use, and do not read."""
        placed = dict(placed or {})
        with ExitStack() as undo:
            self._units = self._make_units(units, tiers, engine, placed, undo)
            self._users = WeightUsers(
                model, self._blocks, self._names, self._units, [name for name, _ in blocks], borrowed, tiles
            )
            self._schedule = [*self._units.values()]
            self._schedule += [u for u in self._users.after_blocks if u is not self._schedule[-1]]
            streamed = list(self._units.values())
            classes = classes_for(streamed, slots, self._users.together)
            self._pool = WindowPool(streamed, classes, engine.device)
            undo.callback(self._pool.close)
            fresh = [unit for unit in self._units.values() if unit.weights[0].name not in placed]
            undo.callback(self._bring_home, fresh)
            for unit in self._units.values():
                for weight in unit.weights:
                    if weight.parameter.is_meta:
                        away.born_away(weight.parameter, engine.device.place, weight.where)
                    weight.empty = away.without_bytes(weight.parameter)
                if unit in fresh:
                    self._send_out(unit)
                for weight in unit.weights:
                    away.forbid(weight.parameter, weight.where)
            self._pool.flush()
            self._made = undo.pop_all()
        for unit in self._units.values():
            for weight in unit.weights:
                if weight.name in placed:  # the caller's until here
                    self._made.callback(weight.free, unit.store)

    # making -----------------------------------------------------------------------------------

    def _make_units(
        self,
        units: Sequence[Unit],
        tiers: Mapping[str, Tier],
        engine: Engine,
        placed: Mapping[str, Extent | CodedExtent],
        undo: ExitStack,
    ) -> dict[str, StreamedUnit]:
        unknown = [name for name in tiers if name not in self._names]
        if unknown:
            raise PlanMismatchError(
                f"a tier is given for the weights of {unknown[0]!r}, which is no unit: there are "
                f"{', '.join(self._names)}"
            )
        made = {
            name: make_unit(name, members, engine.weight_store(tiers[name]), placed, undo)
            for name, members in own_parameters(units).items()
            if members and tiers.get(name, Tier.DEVICE) is not Tier.DEVICE
        }
        if not made:
            raise PlanMismatchError(
                f"no parameter of at least {SMALL} elements is in a unit whose weights are to be streamed: "
                "do without, or name other units"
            )
        return made

    def _send_out(self, unit: StreamedUnit) -> None:
        """Write the unit's weights to their extents through a window."""
        # Held here until their bytes are in the window: the parameters' data are views of it at once.
        sources = [weight.parameter.detach() for weight in unit.weights]
        self._pool.use(unit, read=False)
        for weight, source in zip(unit.weights, sources, strict=True):
            assert weight.present is not None
            weight.present.copy_(source)
        self._pool.send(unit)

    # the model --------------------------------------------------------------------------------

    def install(self) -> None:
        """Have the weights brought by the forward of the modules that use them."""
        self._wrap(self._model, self._run_model, self._users.of(self._model))
        for module, units in self._users.outside_blocks():
            self._wrap(module, self._run, units)
        for module in self._blocks:
            self._wrap(module, self._run, self._users.of(module))
        self._hook = self._blocks[-1].register_forward_hook(self._behind_blocks)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """As ``install``, for what runs inside."""
        self.install()
        try:
            yield
        finally:
            self._unwrap()

    def _wrap(self, module: nn.Module, run: Callable[..., Any], units: list[StreamedUnit]) -> None:
        original = module.__dict__.get("forward")
        wrapped = functools.partial(run, units, original or module.forward)
        self._originals.append((module, original))
        module.forward = functools.update_wrapper(wrapped, module.forward)

    def _run(
        self, units: list[StreamedUnit], forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        with self._using(units):
            return forward(*args, **kwargs)

    def _behind_blocks(self, *_: Any) -> None:
        """The last block is over: the model's own code may use what comes behind it without calling its
        module."""
        if self._pass.brought is not None:
            self._pass.brought.enter_context(self._pool.using(self._users.after_blocks, self._bring))

    def _run_model(
        self, units: list[StreamedUnit], forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        before = self._pass.brought
        with ExitStack() as brought:
            self._at, self._pass.brought = 0, brought
            brought.callback(setattr, self._pass, "brought", before)
            brought.enter_context(self._using(units))
            return forward(*args, **kwargs)

    def remove(self) -> None:
        """Make the model what it was: its own forwards, weights in memory of their own. May be called twice.

        Raises:
            OffloadError: a weight could not be read back. Its unit, and those behind it, are on the tier
                still, and the call may be repeated.
        """
        self._unwrap()
        if not self._closed:
            self._bring_home(list(self._units.values()))
            self._closed = True
            self._made.close()

    def close(self) -> None:
        """Give windows and tier back without bringing the weights home: any use of them raises from now on.
        For a model that is done with, and need not fit into memory. May be called twice."""
        self._unwrap()
        if not self._closed:
            self._closed = True
            for unit in self._units.values():
                for weight in unit.weights:
                    away.forbid(
                        weight.parameter, f"{weight.name}, which are gone: what streamed them is closed"
                    )
            self._made.close()

    def release(self) -> dict[str, Extent | CodedExtent]:
        """Leave the weights on their tiers, and give the windows back: for another streamer of the model,
        which takes the extents as ``placed``, with the codec that this one had. Until then any use of the
        weights raises.

        Returns:
            The extents by parameter; the caller's from now on.

        Raises:
            OffloadError: a change could not be written: the model has its own forwards again, weights are
                where they were, and the call may be repeated.
        """
        self._unwrap()
        self.flush()
        # After what was written last, for a snapshot may have it elsewhere.
        extents = {weight.name: weight.extent for unit in self._units.values() for weight in unit.weights}
        self._closed = True
        self._made.pop_all()
        self._pool.close()
        return extents

    def _unwrap(self) -> None:
        for module, original in reversed(self._originals):
            if original is None:
                del module.forward
            else:
                module.forward = original
        self._originals.clear()
        if self._hook is not None:
            self._hook.remove()

    def _bring_home(self, units: Sequence[StreamedUnit]) -> None:
        """Give their parameters bytes in memory of their own.

        What is in a window comes first, which needs no tier: then nothing has to be written to make room, and
        a tier that is full or cannot write keeps nobody's weights. What somebody has a view of comes last, so
        that its window is nobody else's.
        """
        if self._closed:
            return
        for unit in sorted(units, key=lambda unit: (unit.viewed, not unit.ready, unit.window is None)):
            if not unit.ready and not away.is_away(unit.weights[0].parameter):
                continue  # never sent out, or home already
            self._pool.use(unit)
            homes = [weight.present.clone() for weight in unit.weights if weight.present is not None]
            self._pool.drop(unit)
            for weight, home in zip(unit.weights, homes, strict=True):
                away.put(weight.parameter, home)
                away.permit(weight.parameter)

    # weights ----------------------------------------------------------------------------------

    @property
    def streamed(self) -> tuple[str, ...]:
        """The units whose weights are on a tier, in forward order."""
        return tuple(self._units)

    @property
    def windows(self) -> tuple[WindowClass, ...]:
        """Sizes of windows, and how many there are of each, the smallest first: the largest unit that takes
        turns in them, in whole pages per parameter."""
        return self._pool.classes

    @property
    def keeper(self) -> Keeper | None:
        """Who still needs what changed weights are about to overwrite on their tiers."""
        return self._pool.writes.keeper

    @keeper.setter
    def keeper(self, keeper: Keeper | None) -> None:
        self._pool.writes.keeper = keeper

    def extents(self) -> dict[StreamedWeight, tuple[Store, Extent]]:
        """Where each streamed weight's latest generation on its tier is."""
        return {
            weight: (unit.store, weight.extent) for unit in self._units.values() for weight in unit.weights
        }

    def unit_of(self, parameter: Tensor) -> str | None:
        """The unit of a streamed weight; None for any other tensor."""
        unit = self._users.unit_of(parameter)
        return None if unit is None else unit.name

    def weight_at(self, tensor: Tensor) -> nn.Parameter | None:
        """The streamed weight in whose memory ``tensor`` lies, while its unit is in a window."""
        found = self._pool.find(tensor.data_ptr())
        return None if found is None else found[1].parameter

    def fill_windows(self) -> int:
        """Send every unit away, and have all memory of the windows resident. Its bytes.

        A unit that is in use, or of which somebody has a view, stays where it is.

        Raises:
            OffloadError: a change could not be written.
        """
        for unit in self._units.values():
            if not unit.users and not unit.viewed:
                self._pool.turn_out(unit)
        return self._pool.fill()

    def statistics(self) -> WindowStatistics:
        """What has been moved, and how many windows that took, so far."""
        return self._pool.statistics()

    def high_water(self) -> tuple[HighWater, ...]:
        """The most that was used of the windows of each size, so far."""
        return self._pool.high_water()

    def fetch(self, unit: str) -> None:
        """Have the unit in a window, and start reading what comes behind it. It may leave again at any time:
        ``hold`` it to use it."""
        found = self._find(unit)
        if found is not None:
            self._bring(found)

    def hold(self, unit: str) -> AbstractContextManager[None]:
        """The unit's weights may be used inside, and changed in place; changes are written back later.

        What is changed behind the back of autograd, in ``parameter.data`` or by address, needs
        ``mark_dirty``. Several units at once take as many slots of their sizes.
        """
        found = self._find(unit)
        return nullcontext() if found is None else self._using([found])

    @contextmanager
    def updating(self, unit: str, replaced: Collection[str]) -> Iterator[None]:
        """As ``hold``, for an update.

        Args:
            replaced: parameters of which every byte is written inside, and none is read. Where those are all
                that is streamed of the unit, nothing is read from the tier. If the update then fails, the
                tier keeps what it had.
        """
        found = self._find(unit)
        if found is None or not any(weight.parameter.requires_grad for weight in found.weights):
            yield  # what is updated of a frozen unit is small, and in memory
            return
        self._made_anew.discard(found)
        blind = found.window is None and _is_made_anew(found, replaced)
        bring = (lambda each: self._pool.use(each, read=False)) if blind else self._bring
        try:
            with self._pool.using([found], bring):
                self._pool.settle(found)
                yield
        except BaseException:
            if blind:
                self._pool.drop(found)
            raise
        self._pool.send(found)

    def await_updating(self, units: Collection[str], replaced: Collection[str]) -> None:
        """``updating`` of these units, with these ``replaced``, comes before their next use: what it would
        not read is not read ahead either."""
        found = (self._find(unit) for unit in units)
        self._made_anew = {unit for unit in found if unit is not None and _is_made_anew(unit, replaced)}

    def mark_dirty(self, unit: str) -> None:
        """All weights of the unit are written back before it leaves, and masters of them follow, where they
        are whole (``lower_halves``). Changes in place that autograd counts (``parameter._version``) need no
        mark.

        Raises:
            OffloadError: the unit is not held.
        """
        found = self._find(unit)
        if found is None:
            return
        if not found.users:
            raise OffloadError(f"unit {unit} is not held: mark it inside streamer.hold({unit!r})")
        self._pool.mark(found)
        increment_version([weight.parameter for weight in found.weights])  # or a master would write over it

    def flush(self) -> None:
        """Every change is on its tier when this returns.

        Raises:
            OffloadError: a write failed; the weights are in memory still, and the call may be repeated.
        """
        self._pool.flush()

    # coming and going -------------------------------------------------------------------------

    def _find(self, unit: str) -> StreamedUnit | None:
        """None where the unit's weights are in memory. Raises PlanMismatchError for a unit that is none."""
        if unit not in self._names:
            raise PlanMismatchError(f"there is no unit {unit!r}: there are {', '.join(self._names)}")
        if self._closed:
            return None
        return self._units.get(unit)

    @contextmanager
    def _using(self, units: Sequence[StreamedUnit]) -> Iterator[None]:
        with self._pool.using(units, self._bring), saving_weights(self, self._pool.find, self._recall):
            yield

    def _recall(self, unit: StreamedUnit, weight: StreamedWeight) -> Tensor:
        """For backward. A graph outlives ``remove``: the weights are home then."""
        if self._closed:
            return weight.parameter.detach()
        with self._pool.lock:
            self._bring(unit)
            assert weight.present is not None
            return weight.present

    def _bring(self, unit: StreamedUnit) -> None:
        """Have the unit in a window; send away what has changed elsewhere, and read ahead."""
        with self._pool.lock:
            with nullcontext() if self._reading is None else self._reading():
                self._pool.use(unit)
            if unit is not self._latest:
                self._latest, self._asked = unit, False
                self._pool.send_idle(unit)
            if self._reading is None and not self._asked:
                self._asked = self._pool.prefetch(self._following(unit), keep=[unit])

    def _following(self, unit: StreamedUnit) -> list[StreamedUnit]:
        """What is used after ``unit``: as many units as there may be windows for, and of each size no more
        than there are of that. What an update makes anew before its use is left out, but its window is not
        given to another one."""
        classes = self._pool.classes
        count = sum(each.slots for each in classes) - 1
        places = [place for place, each in enumerate(self._schedule) if each is unit]
        if torch._C._current_graph_task_id() == -1:  # no backward pass runs
            self._at = next((place for place in places if place >= self._at), places[0])
            coming = self._schedule[self._at + 1 : self._at + 1 + count]
        else:
            self._at = next((place for place in reversed(places) if place <= self._at), places[-1])
            coming = self._schedule[max(0, self._at - count) : self._at][::-1]
        room = {each.slot_bytes: each.slots for each in classes}
        room[unit.window_bytes] -= 1
        found = []
        for each in coming:
            if room[each.window_bytes]:
                room[each.window_bytes] -= 1
                if each not in self._made_anew:
                    found.append(each)
        return found


def _is_made_anew(unit: StreamedUnit, replaced: Collection[str]) -> bool:
    return all(weight.name in replaced for weight in unit.weights)
