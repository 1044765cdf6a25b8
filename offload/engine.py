"""The stores of a session by tier, and the device they serve."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from memtrain.offload.codec import Codec, CodingStatistics
from memtrain.offload.coded import CodedStore
from memtrain.offload.device import Device, make_device
from memtrain.offload.errors import OffloadError
from memtrain.offload.tiers import MemoryStore, NvmeStore, Statistics, Store
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget


class Engine:
    """Owns the stores: closing it closes them.

    Args:
        codecs: how optimizer state is coded on its way to a tier, where it is.
        weight_codecs: the same of streamed weights.
        lent: tiers whose stores are somebody else's, and stay open.
    """

    def __init__(
        self,
        stores: Mapping[Tier, Store],
        device: Device,
        codecs: Mapping[Tier, Codec] | None = None,
        *,
        weight_codecs: Mapping[Tier, Codec] | None = None,
        lent: Collection[Tier] = (),
    ) -> None:
        for tier, store in stores.items():
            if store.tier is not tier:
                raise ValueError(f"the store given for {tier.value} serves {store.tier.value}")
        self._stores = dict(stores)
        self._codecs = dict(codecs or {})
        self._weight_codecs = dict(weight_codecs or {})
        self._coded: dict[Tier, CodedStore] = {}
        self._coded_weights: dict[Tier, CodedStore] = {}
        self._lent = frozenset(lent)
        self.device = device

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Tiers that have a store."""
        return tuple(self._stores)

    def store(self, tier: Tier) -> Store:
        """The store of ``tier``. Raises OffloadError naming the tier and those that exist."""
        try:
            return self._stores[tier]
        except KeyError:
            known = ", ".join(t.value for t in self._stores) or "none"
            raise OffloadError(
                f"there is no {tier.value} tier in this session (it has: {known}): give it a budget"
            ) from None

    def state_store(self, tier: Tier) -> Store | CodedStore:
        """Where optimizer state of ``tier`` goes: the store, or the one that codes for it. Raises as
        ``store``."""
        return self._coding(tier, self._codecs, self._coded)

    def weight_store(self, tier: Tier) -> Store | CodedStore:
        """Where streamed weights of ``tier`` go: the store, or the one that codes for it. Raises as
        ``store``."""
        return self._coding(tier, self._weight_codecs, self._coded_weights)

    def _coding(
        self, tier: Tier, codecs: Mapping[Tier, Codec], made: dict[Tier, CodedStore]
    ) -> Store | CodedStore:
        store = self.store(tier)
        if tier not in codecs:
            return store
        if tier not in made:
            made[tier] = CodedStore(store, codecs[tier])
        return made[tier]

    def coding_statistics(self) -> dict[Tier, CodingStatistics]:
        """What coding has done so far, by tier; tiers to which no coded state went are left out."""
        return {tier: store.statistics() for tier, store in self._coded.items()}

    def weight_coding_statistics(self) -> dict[Tier, CodingStatistics]:
        """The same of streamed weights."""
        return {tier: store.statistics() for tier, store in self._coded_weights.items()}

    def state_coding(self) -> list[tuple[Tier, str, CodingStatistics]]:
        """The same with the codec's name."""
        return [(tier, store.codec.name, store.statistics()) for tier, store in self._coded.items()]

    def weight_coding(self) -> list[tuple[Tier, str, CodingStatistics]]:
        """As ``state_coding``, of streamed weights."""
        return [(tier, store.codec.name, store.statistics()) for tier, store in self._coded_weights.items()]

    def statistics(self) -> dict[Tier, Statistics]:
        """Bytes and seconds by tier and direction, so far."""
        return {tier: store.statistics() for tier, store in self._stores.items()}

    def close(self) -> None:
        """Wait for the device's copies, then close every store, also when the device or a store fails; the
        first failure is raised. May be called twice."""
        errors: list[BaseException] = []
        own = (store for tier, store in self._stores.items() if tier not in self._lent)
        stores = (*self._coded.values(), *self._coded_weights.values(), *own)
        for close in (self.device.synchronize, *(store.close for store in stores)):
            try:
                close()
            except BaseException as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_engine(
    budget: Budget,
    device: str | Device = "cpu",
    nvme_bytes: int | None = None,
    host_bytes: int | None = None,
    codecs: Mapping[Tier, Codec] | None = None,
    lent: Mapping[Tier, Store] | None = None,
    *,
    weight_codecs: Mapping[Tier, Codec] | None = None,
) -> Engine:
    """Build the stores that a budget allows; every byte of them is reserved, or this raises.

    Args:
        budget: tiers with no bytes get no store.
        device: ``cpu``, ``cuda``, ``cuda:N``, or one that is open already. On ``cpu`` the host tier is the
            device's own memory.
        nvme_bytes: reserve only this much of the swap directory (what the plan uses), at most the budget's.
        host_bytes: the same of host memory, of which staging takes its part too.
        codecs, weight_codecs: as of ``Engine``.
        lent: stores that exist and stay open, in place of the budget's.

    Raises:
        SwapDirectoryError, TierFullError, PlacementError: a tier cannot serve.
        ValueError: a size is above the budget, or a host budget was given on a CPU.
    """
    opened = make_device(device) if isinstance(device, str) else device
    if opened.shares_memory and budget.host_bytes:
        raise ValueError("budget.host: on a CPU the device is the host; raise budget.device instead")
    for name, size, limit in (
        ("nvme", nvme_bytes, budget.nvme_bytes),
        ("host", host_bytes, budget.host_bytes),
    ):
        if size is not None and not 0 <= size <= limit:
            raise ValueError(f"{name}_bytes must be within budget.{name}, 0 to {limit}, got {size}")
    lent = lent or {}
    engine = Engine(lent, opened, codecs, weight_codecs=weight_codecs, lent=lent.keys())
    try:
        host = budget.host_bytes if host_bytes is None else host_bytes
        if host and Tier.HOST not in lent:
            engine._stores[Tier.HOST] = MemoryStore(Tier.HOST, host, budget.host_place)
        if budget.cxl_bytes and Tier.CXL not in lent:
            engine._stores[Tier.CXL] = MemoryStore(Tier.CXL, budget.cxl_bytes, budget.cxl_place)
        size = budget.nvme_bytes if nvme_bytes is None else nvme_bytes
        if budget.nvme_directory is not None and size and Tier.NVME not in lent:
            engine._stores[Tier.NVME] = NvmeStore(budget.nvme_directory, size)
        for store in engine._stores.values():
            store.neighbours = engine._stores
    except BaseException:
        engine.close()
        raise
    return engine
