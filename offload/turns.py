"""Threads of which one runs at a time, in an order that does not depend on the clock.

Each participant stops where the work says (``Turns.reach``), with the place that it has reached; whoever has
the least place runs next. One who fails ends it for all: the others are woken in turn, each with
``StoppedError`` where it stands, so that what they hold is given back one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

_Result = TypeVar("_Result")
_SIGNAL_SECONDS = 0.5
"""How long a Ctrl-C may go unnoticed."""
Place = tuple[int, ...]
"""Compared as tuples are; no two participants are at the same one."""


class StoppedError(BaseException):
    """Raised where a participant waits for a turn that will not come. No error of its own: nobody handles it,
    and nobody sees it."""


class Turns(Generic[_Result]):
    """Participants, each at work in a thread of its own. Used once.

    Args:
        work: for each participant what it does, calling ``reach`` with its number where it stops.
        name: of the threads.
    """

    def __init__(self, work: Sequence[Callable[[], _Result]], name: str) -> None:
        self._work = list(work)
        self._changed = threading.Condition()
        self._waiting: dict[int, Place] = {number: (0, number) for number in range(len(work))}
        self._running: int | None = None
        self._stopped = False
        self._failure: BaseException | None = None
        self._results: dict[int, _Result] = {}
        self._threads = [
            threading.Thread(target=self._take_part, args=(number,), name=f"{name} {number}")
            for number in range(len(work))
        ]

    def run(self) -> list[_Result]:
        """What each participant returned, when all have. No thread is left when this returns or raises.

        Raises:
            BaseException: the first that a participant raised, as it raised it; or what interrupted this
                wait, once those who were at work have reached their next turn.
        """
        started: list[threading.Thread] = []
        try:
            for thread in self._threads:
                thread.start()
                started.append(thread)
            with self._changed:
                while self._failure is None and len(self._results) < len(self._work):
                    # Not for ever: a signal between the interpreter's look and the wait would be noticed by
                    # nobody before somebody's next turn, and whoever is at work may wait for that one.
                    self._changed.wait(_SIGNAL_SECONDS)
        finally:
            for number in range(len(started), len(self._threads)):  # nobody waits for one who never came
                self._waiting.pop(number, None)
            self._stop()
            self._join(started)
        if self._failure is not None:
            try:
                raise self._failure
            finally:
                self._failure = None  # its traceback holds this frame
        return [self._results[number] for number in range(len(self._work))]

    def reach(self, number: int, place: Place) -> None:
        """Participant ``number`` goes on from ``place`` when that is the least of all.

        Raises:
            StoppedError: another one has failed.
        """
        with self._changed:
            self._running = None
            self._waiting[number] = place
            self._changed.notify_all()
            self._await_turn(number)

    def _await_turn(self, number: int) -> None:
        while not (self._running is None and min(self._waiting, key=self._waiting.__getitem__) == number):
            self._changed.wait()
        del self._waiting[number]
        self._running = number
        if self._stopped:
            raise StoppedError

    def _take_part(self, number: int) -> None:
        try:
            with self._changed:
                self._await_turn(number)
            result = self._work[number]()
            with self._changed:
                self._results[number] = result
        except StoppedError:
            pass
        except BaseException as error:
            with self._changed:
                self._stopped = True
                if self._failure is None:
                    self._failure = error
        finally:
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _join(self, threads: Sequence[threading.Thread]) -> None:
        """Each ends at its next turn at the latest; a second Ctrl-C does not leave it behind."""
        for thread in threads:
            while thread.is_alive():
                with suppress(KeyboardInterrupt):
                    thread.join()
