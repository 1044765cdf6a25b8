"""The stores of a session by tier, and the device they serve."""

from __future__ import annotations

from collections.abc import Mapping

from memtrain.offload.device import Device, make_device
from memtrain.offload.errors import OffloadError
from memtrain.offload.tiers import MemoryStore, NvmeStore, Statistics, Store
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget


class Engine:
    """Owns the stores: closing it closes them."""

    def __init__(self, stores: Mapping[Tier, Store], device: Device) -> None:
        for tier, store in stores.items():
            if store.tier is not tier:
                raise ValueError(f"the store given for {tier.value} serves {store.tier.value}")
        self._stores = dict(stores)
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

    def statistics(self) -> dict[Tier, Statistics]:
        """Bytes and seconds by tier and direction, so far."""
        return {tier: store.statistics() for tier, store in self._stores.items()}

    def close(self) -> None:
        """Wait for the device's copies, then close every store, also when one fails. May be called twice."""
        errors: list[OffloadError] = []
        self.device.synchronize()
        for store in self._stores.values():
            try:
                store.close()
            except OffloadError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_engine(budget: Budget, device: str = "cpu", nvme_bytes: int | None = None) -> Engine:
    """Build the stores that a budget allows; every byte of them is reserved, or this raises.

    Args:
        budget: tiers with no bytes get no store.
        device: ``cpu``, ``cuda`` or ``cuda:N``. On ``cpu`` the host tier is the device's own memory.
        nvme_bytes: reserve only this much of the swap directory (what the plan uses), at most the budget's.

    Raises:
        SwapDirectoryError, TierFullError, PlacementError: a tier cannot serve.
        ValueError: ``nvme_bytes`` is above the budget, or a host budget was given on a CPU.
    """
    if device == "cpu" and budget.host_bytes:
        raise ValueError("budget.host: on a CPU the device is the host; raise budget.device instead")
    if nvme_bytes is not None and not 0 <= nvme_bytes <= budget.nvme_bytes:
        raise ValueError(f"nvme_bytes must be within budget.nvme, 0 to {budget.nvme_bytes}, got {nvme_bytes}")
    engine = Engine({}, make_device(device))
    try:
        if budget.host_bytes:
            engine._stores[Tier.HOST] = MemoryStore(Tier.HOST, budget.host_bytes)
        if budget.cxl_bytes:
            engine._stores[Tier.CXL] = MemoryStore(Tier.CXL, budget.cxl_bytes, budget.cxl_node)
        size = budget.nvme_bytes if nvme_bytes is None else nvme_bytes
        if budget.nvme_directory is not None and size:
            engine._stores[Tier.NVME] = NvmeStore(budget.nvme_directory, size)
    except BaseException:
        engine.close()
        raise
    return engine
