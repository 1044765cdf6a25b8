"""Recompute one block in backward: nothing saved but its input (and, if asked, attention outputs).

The forward pass builds the ordinary graph, except that every saved tensor is a *hole*. The first hole
that backward looks into runs the block's forward again, with the same input, RNG and autocast, and
fills all holes; the second graph is thrown away. Because the graph that backward walks is the one of
the first forward, hooks and gradients fire exactly as without recomputation.

The scheme is that of torch's non-reentrant checkpoint; ours differs in that the input and the results of
costly operators may have left the device, that the second forward may be one of the first tokens alone
(``token_cut.py``), and that anything which would make the second forward differ from the first raises instead
of training on.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from memtrain.offload.errors import OffloadError, TokenRangeError
from memtrain.offload.refusals import differs
from memtrain.offload.results import Pack, ResultTape
from memtrain.offload.surroundings import Surroundings
from memtrain.offload.token_cut import TokenCut
from memtrain.offload.token_rows import SavedRows, Unpack
from memtrain.offload.unmoved import Unmoved


class _Complete(Exception):
    """All holes are filled; what is left of the second forward is not needed."""


class _Hole:
    """Stands for a saved tensor; carries it once it has been computed again."""

    __slots__ = ("__weakref__", "_computed", "_rows", "frame")

    def __init__(self, frame: RecomputeFrame, rows: SavedRows | None) -> None:
        self.frame = frame
        self._rows = rows
        self._computed: Unmoved | None = None

    @property
    def is_filled(self) -> bool:
        return self._computed is not None if self._rows is None else self._rows.is_there

    def fill(self, tensor: torch.Tensor) -> None:
        """With its version: what is changed in place after that is refused, as plain PyTorch does."""
        if self._rows is None:
            self._computed = Unmoved.of(tensor)
        elif not self._rows.is_there:
            self._rows.first_rows = Unmoved.of(tensor)

    def take(self, unpack: Unpack) -> torch.Tensor:
        """Taken out: a graph that is walked twice must not hold the memory of every block in between."""
        if self._rows is not None:
            return self._rows.take(unpack)
        computed, self._computed = self._computed, None
        assert computed is not None
        return computed.get()


class RecomputeFrame:
    """One block in one forward pass whose saved tensors are computed again in backward.

    Args:
        name: of the block, for errors.
        function: the block's forward.
        args, kwargs: what it was called with; the first tensor of ``args`` is the block's input.
        is_fixed: whether a tensor is a parameter or buffer, which is saved as it is.
        pack_input: how the input leaves the device; None keeps it there, by reference.
        unpack: brings back what the packs sent away.
        tape: stores results of costly operators; None: they are computed again.
        cut: stores what is not computed again; None: everything is.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_fixed: Callable[[torch.Tensor], bool],
        pack_input: Pack | None,
        unpack: Unpack,
        tape: ResultTape | None = None,
        cut: TokenCut | None = None,
    ) -> None:
        self.name = name
        self._function = function
        self._is_fixed = is_fixed
        self._unpack = unpack
        self._tape = tape
        self._cut = cut
        self._holes: list[weakref.ref[_Hole]] = []
        self._walks = 0
        """How often the second forward has run."""
        self._expected: list[tuple[torch.Size | None, torch.dtype]] = []
        """What the second forward will save; None for a shape that does not matter."""
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        self._surroundings = Surroundings(tensors[0].device if tensors else torch.device("cpu"))
        self._call: tuple[Any, Any] | None = (args, kwargs)
        self._needs_grad: dict[int, bool] = {}
        for index, leaf in enumerate(self._leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            pack = pack_input if not self._needs_grad and pack_input is not None else Unmoved.of
            self._needs_grad[index] = leaf.requires_grad
            leaf = leaf.detach()
            self._leaves[index] = pack(leaf if cut is None else cut.argument(index, leaf))

    def forward(self) -> Any:
        """Run the block, saving nothing that is computed again. Called once."""
        assert self._call is not None
        (args, kwargs), self._call = self._call, None
        recording = contextlib.nullcontext() if self._tape is None else self._tape.recording()

        def dig(tensor: torch.Tensor) -> Any:
            return self._dig(tensor)

        dig.before_weights = self.begin_walk  # type: ignore[attr-defined]  # saved_weights.py asks
        with torch.autograd.graph.saved_tensors_hooks(dig, self._look_into), recording:
            output = self._function(*args, **kwargs)
        if self._cut is not None:
            self._cut.seal()
            if not self._cut.is_random and self._surroundings.random_numbers_drawn:
                raise TokenRangeError(
                    f"{self.name}: drew random numbers, which it did not when its tokens were probed, and a "
                    "part of the tokens would draw others; plan without recomputed_tokens for it"
                )
        return output

    def _dig(self, tensor: torch.Tensor) -> Any:
        if self._is_fixed(tensor):
            return Unmoved.of(tensor)
        number = len(self._holes)
        shape: torch.Size | None = tensor.shape
        kept = None
        if self._cut is not None:
            kept = self._cut.store(number, tensor)
            shape = self._cut.shape_again(number, tensor.shape)
        hole = _Hole(self, kept if isinstance(kept, SavedRows) else None)
        self._holes.append(weakref.ref(hole))  # a hole that nobody takes is passed over
        self._expected.append((shape, tensor.dtype))
        return hole if kept is None or isinstance(kept, SavedRows) else kept

    def _look_into(self, saved: Any) -> torch.Tensor:
        if not isinstance(saved, _Hole):
            return self._unpack(saved)
        if not saved.is_filled:
            self.compute_again()
        return saved.take(self._unpack)

    def begin_walk(self, number: int) -> None:
        """Backward is about to bring a weight for its ``number``-th walk over the graph: run the second
        forward before, if it is still to come. Behind, it would lack the window that the weight is in.

        Raises:
            OffloadError: as ``compute_again``.
        """
        if self._walks < number and any(hole() is not None for hole in self._holes):
            self.compute_again()

    def compute_again(self) -> None:
        """Run the second forward and fill every hole that is still wanted. Backward does so by itself.

        Raises:
            OffloadError: it went another way than the first.
        """
        filled = 0

        def fill(tensor: torch.Tensor) -> Any:
            nonlocal filled
            if self._is_fixed(tensor):
                return tensor
            if filled == len(self._holes):
                raise differs(self.name, f"more than {len(self._holes)} tensors were saved")
            shape, dtype = self._expected[filled]
            if shape not in (None, tensor.shape) or dtype != tensor.dtype:
                raise differs(
                    self.name,
                    f"saved tensor {filled} should be {tuple(shape or ())} {dtype} and is "
                    f"{tuple(tensor.shape)} {tensor.dtype}",
                )
            if self._cut is not None:
                self._cut.check_again(filled, tensor)
            hole = self._holes[filled]()
            if hole is not None:
                hole.fill(tensor)
            filled += 1
            if filled == len(self._holes):
                raise _Complete
            return None

        def never(_: Any) -> torch.Tensor:
            raise OffloadError(f"{self.name}: backward was called inside a forward that is being recomputed")

        args, kwargs = self._inputs()
        replaying = contextlib.nullcontext() if self._tape is None else self._tape.replaying()
        drawing = contextlib.nullcontext() if self._cut is None else self._cut.drawing()
        with (
            self._surroundings.again(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(fill, never),
            replaying,
            drawing,
            contextlib.suppress(_Complete),
        ):
            self._function(*args, **kwargs)
        if filled < len(self._holes):
            raise differs(self.name, f"only {filled} of {len(self._holes)} tensors were saved")
        self._walks += 1

    def _inputs(self) -> tuple[Any, Any]:
        leaves = list(self._leaves)
        for index, needs_grad in self._needs_grad.items():
            tensor = self._unpack(leaves[index])
            leaves[index] = tensor.detach().requires_grad_(needs_grad)
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs
