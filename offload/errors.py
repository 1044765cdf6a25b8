"""What can go wrong while bytes move, each with its own type, and each saying what to do."""

from __future__ import annotations


class OffloadError(RuntimeError):
    """Base of every error of the offload engines."""


class TierFullError(OffloadError):
    """A tier has no room: names the tensor, the tier, the bytes wanted and the bytes free."""


class TierIOError(OffloadError):
    """The operating system refused or cut short a transfer: names tensor, tier, offset and errno.

    Attributes:
        errno: the operating system's number, or None where a transfer simply ended short.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class CorruptExtentError(OffloadError):
    """What was read is not what was written: checksum, generation or identity differ."""


class SwapDirectoryError(OffloadError):
    """The swap directory cannot serve: missing, not writable, on tmpfs, without direct I/O, too small."""


class PlacementError(OffloadError):
    """Memory could not be placed on the NUMA nodes that were asked for."""


class NodeFullError(PlacementError):
    """A NUMA node has too little free memory: names the node, the bytes wanted and the bytes free."""


class UnsupportedPolicyError(PlacementError):
    """The kernel does not know a policy: names it, the kernel and the first version that does."""


class PlanMismatchError(OffloadError):
    """The plan was made for another model, another batch shape or another optimizer."""


class SavedTensorModifiedError(OffloadError):
    """A tensor that backward needs was changed in place after forward had saved it."""


class UnsupportedGradientOperation(OffloadError):
    """An operation on an offloaded gradient that cannot be done exactly without its bytes."""


class ExtentStateError(OffloadError):
    """An extent was used against its state: never written, freed, of another store, or a chunk was cut."""


class StagingError(OffloadError):
    """A staging slot was asked for that can never become free, or is larger than a slot."""


class TokenRangeError(PlanMismatchError):
    """A block's tokens cannot be treated apart: names the block, the tensor and the remedy."""


class RandomDrawsError(OffloadError):
    """A micro-batch drew more or fewer random numbers than its like did: names where, and the remedy."""


class WeightAwayError(OffloadError):
    """A weight was used while its bytes are on a tier: names parameter, tier and what to do."""


class WeightWindowError(OffloadError):
    """Every window for streamed weights is in use: names who uses them and what to do."""
