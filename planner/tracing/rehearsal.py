"""What the tracer asks of the one that will carry the plan out: to carry a block out alone, in parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from memtrain.planner.profile import NearlyFree, Prefixes


class Rehearsal(Protocol):
    """Carries a block out as a plan might have it, alone: what does so in training says what that takes.

    A forward is given with its arguments, the hidden state the first tensor of them, in training mode.
    """

    def nearly_free(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> NearlyFree | None:
        """With outputs of products stored, and the rest computed again; None: nobody asks."""
        ...

    def prefixes(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        lengths: Callable[[int], tuple[int, ...]],
        largest_bytes: int,
    ) -> Prefixes | str:
        """With the first tokens alone computed again, as many as ``lengths`` says of all; or why not.
        ``largest_bytes`` are those of the largest storage that the block saves."""
        ...

    def forms(self, name: str) -> Mapping[str, Hashable]:
        """The forms beside the plain one that block ``name`` can be put in, and what each treats of it: tells
        blocks apart that are otherwise alike."""
        ...

    def missing_forms(self, name: str) -> Mapping[str, str]:
        """Of the forms that it cannot be put in the reason."""
        ...

    def in_form(self, name: str, form: str) -> AbstractContextManager[None]:
        """Puts it in one for a while."""
        ...
