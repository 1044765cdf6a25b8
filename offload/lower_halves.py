"""Masters of which records hold the lower half: the upper one is the bf16 weight's, which is there anyway.

State of such a parameter is 2 + 4 + 4 bytes an element instead of 4 + 4 + 4, and the bits of every step are
the same (``optim/storage/lower_half.py``). What it costs is freedom: a lower half means nothing beside a
weight that somebody else has written. Digests of the weights, a piece each, say whether that has happened;
then whatever would join the two raises ``WeightsWrittenError``. Weights that were swapped out and back in are
as they were.

A whole master follows its weight where that is not its rounding any more, element by element. No lower half
can: every one of them belongs to every weight, so nothing that is stored tells the elements that were written
from those that were not. Hence the error, and ``restart`` where somebody says that the weights count.

Which parameters: those that ``torch.optim.AdamW(fused=True)`` steps in one pass on a CPU, of ``SMALL``
elements at least. Settings that change later (a learning rate of 0, ``amsgrad``) are served all the same, a
slice at a time, by the optimizer's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import xxhash
from torch import Tensor

from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.shards import SMALL, FlatIndex, Piece
from memtrain.optim.kernels import fused_adamw
from memtrain.optim.storage import lower_half

LOWER_KEY = "master_lower"
"""State key of the lower halves in records and checkpoints. Whoever asks for state sees ``MASTER_KEY``."""
SECOND_KEY = "exp_avg_sq"
"""State whose sign says of a tie from which side the weight was rounded."""
SLICE_ELEMENTS = 1 << 17
"""Masters that are whole at one time: half a MiB, on nobody's bill. A multiple of every vector's width."""


class WeightsWrittenError(OffloadError):
    """A bf16 weight is not what the last update made of its master, of which only the lower half is kept."""


def keeps_lower_half(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether a record holds the lower half of this parameter's master, where it has one and may be cut."""
    return (
        parameter.dtype == torch.bfloat16
        and parameter.device.type == "cpu"
        and parameter.numel() >= SMALL
        and fused_adamw.refusal(optimizer, dict(group)) is None
    )


def slices(elements: int) -> Iterator[slice]:
    """Of a flat tensor."""
    return (slice(start, start + SLICE_ELEMENTS) for start in range(0, elements, SLICE_ELEMENTS))


def digest(weight: Tensor) -> bytes:
    """Of a contiguous tensor's bytes."""
    return xxhash.xxh3_128_digest(weight.view(-1).view(torch.uint8).numpy())


class LowerHalves:
    """What joins lower halves in records to the weights beside them, and keeps the two together.

    Args:
        names: parameters with such masters.
        index: where they lie.
        hold: has the weights of a parameter in memory for as long as the context lasts.
        always_there: whether a parameter's weights are in memory at any time.
    """

    def __init__(
        self,
        names: frozenset[str],
        index: FlatIndex,
        *,
        hold: Callable[[str], AbstractContextManager[Any]],
        always_there: Callable[[str], bool],
    ) -> None:
        self.names = names
        self._index, self._hold, self._always_there = index, hold, always_there
        self._digests: dict[Piece, bytes] = {}
        """Of each piece's weights, when its lower half was made."""

    def hold(self, name: str) -> AbstractContextManager[Any]:
        """The parameter's weights are in memory inside."""
        return self._hold(name)

    def note(self, piece: Piece) -> None:
        """The piece's lower half belongs to its weights as they are now."""
        self._digests[piece] = digest(piece.weight())

    def forget(self, piece: Piece) -> None:
        """Nobody knows which weights the piece's lower half belongs to: to none, until it is made anew."""
        self._digests.pop(piece, None)

    def is_written(self, piece: Piece) -> bool:
        """Whether the weights, which are in memory, are not those of ``note``."""
        return digest(piece.weight()) != self._digests.get(piece)

    def check_piece(self, piece: Piece) -> None:
        """Raises WeightsWrittenError where ``is_written``."""
        if self.is_written(piece):
            raise WeightsWrittenError(
                f"elements {piece.start} to {piece.stop} of {piece.name} were written since the last update, "
                f"which keeps no more of their fp32 masters than the lower 16 bits: what they were before "
                f"cannot be told any more, so no master follows by itself. Where no update had begun, call "
                f"weights_written() of the session's optimizer, and the masters of {piece.name} are its "
                f"weights as they are now; or restore the weights (weights before state). Else restore a "
                f"checkpoint. Where a loop writes weights between steps, pass split_masters=False to "
                f"prepare() or OptimizerConfig, which keeps whole masters"
            )

    def restart(self, piece: Piece, stored: Mapping[str, Tensor]) -> None:
        """The piece's master is its weight, which is in memory, from now on."""
        stored[LOWER_KEY].zero_()
        stored[SECOND_KEY].abs_()
        self.note(piece)

    def check(
        self,
        names: Iterable[str],
        versions: Mapping[str, int],
        *,
        initialised: Collection[str],
        thorough: bool,
    ) -> None:
        """``check_piece`` of all whose ``parameter._version`` is not the noted one; ``thorough``: and of all
        that are in memory anyway, for writing to ``parameter.data`` counts no version."""
        for name in names:
            if name not in self.names or name not in initialised:
                continue
            same = self._index.parameters[name]._version == versions.get(name)
            if same and not (thorough and self._always_there(name)):
                continue
            with self.hold(name):
                for _, piece in self._index.pieces[name]:
                    self.check_piece(piece)

    def read_master(self, piece: Piece, stored: Mapping[str, Tensor], into: Tensor) -> None:
        """Join a piece of a master to ``into``: fp32, of the piece's shape, contiguous. The weights are in
        memory. Raises as ``check_piece``."""
        self.check_piece(piece)
        flat, weight = into.view(-1), piece.weight().view(-1)
        lower, second = stored[LOWER_KEY].view(-1), stored[SECOND_KEY].view(-1)
        for part in slices(piece.elements):
            flat[part].copy_(lower_half.unpack(weight[part], lower[part], second[part]))

    def write_master(self, piece: Piece, stored: Mapping[str, Tensor], master: Tensor) -> None:
        """Store a piece of a master; where the weight, which is in memory, is not its rounding, that of the
        weight."""
        flat, weight = master.reshape(-1), piece.weight().view(-1)
        lower, second = stored[LOWER_KEY].view(-1), stored[SECOND_KEY].view(-1)
        for part in slices(piece.elements):
            second[part].abs_()  # whatever the signs said before
            lower_half.pack(followed(flat[part].float(), weight[part]), lower[part], second[part])
        self.note(piece)


def write_second(name: str, stored: Tensor, second: Tensor) -> None:
    """Store second moments under the signs that are there. Raises PlanMismatchError where one is negative."""
    flat, values = stored.view(-1), second.reshape(-1)
    for part in slices(flat.numel()):
        given = values[part].to(flat.dtype)
        if bool((given < 0).any()):
            raise PlanMismatchError(
                f"{SECOND_KEY} of {name} has numbers below zero, which no sum of squares is: load the state "
                f"of AdamW, or pass split_masters=False to prepare() or OptimizerConfig"
            )
        sides = flat[part].signbit()
        flat[part].copy_(given)
        lower_half.mark(flat[part], sides)


def followed(master: Tensor, weight: Tensor) -> Tensor:
    """The master, and where it is not rounded to its weight any more, the weight."""
    return torch.where(master.to(weight.dtype) == weight, master, weight.to(master.dtype))


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread inside: a team of OpenMP's that is called for each small operation waits
    by spinning for processors that a tier's threads have (35 s instead of 7 for 100 million masters)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


StepSlice = Callable[[Tensor, dict[str, Tensor]], Mapping[str, Any]]
"""Steps a flat fp32 master that has its gradient, with its state; the state after it, tensors in place."""


def step_in_slices(
    piece: Piece,
    stored: Mapping[str, Tensor],
    gradient: Tensor,
    clips: Collection[Tensor],
    step: StepSlice,
    *,
    first: bool,
) -> Mapping[str, Any]:
    """Step a piece by the optimizer's own code, with a slice of its master at a time. State after the last.

    Args:
        stored: the record's tensors of the piece.
        gradient: as ``torch`` has it, narrow, not clipped; only read.
        first: there is no state yet, and masters begin as the weights.

    Raises:
        OffloadError: second moments fell below zero: settings that no AdamW has.
    """
    moments = {key: value.view(-1) for key, value in stored.items() if key != LOWER_KEY}
    weights, lower, given = piece.weight().view(-1), stored[LOWER_KEY].view(-1), gradient.view(-1)
    after: Mapping[str, Any] = {}
    for part in slices(piece.elements):
        state = {key: value[part] for key, value in moments.items()}
        if first:
            master = weights[part].float()
        else:
            master = lower_half.unpack(weights[part], lower[part], state[SECOND_KEY])
            state[SECOND_KEY].abs_()
        master.grad = given[part].float()
        for factor in clips:
            master.grad.mul_(factor)
        after = step(master, state)
        weights[part].copy_(master)
        try:
            lower_half.pack(master.detach(), lower[part], state[SECOND_KEY])
        except ValueError as error:
            raise OffloadError(
                f"{piece.name}: {error}. Keep betas between 0 and 1, or pass split_masters=False to "
                f"prepare() or OptimizerConfig"
            ) from error
    return after
