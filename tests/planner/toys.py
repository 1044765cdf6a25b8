"""Small profiles and machines with round numbers, for tests that work figures out by hand."""

from __future__ import annotations

from typing import Any

from memtrain.planner.actions import Tier
from memtrain.planner.machine import Link, Machine
from memtrain.planner.profile import (
    BlockForm,
    BlockProfile,
    ModelProfile,
    NearlyFree,
    Prefixes,
    UnitProfile,
)
from memtrain.planner.units import MiB


def make_block(index: int = 0, **changes: Any) -> BlockProfile:
    """10 MiB saved, 1 MiB in, 1 MiB of attention; 10 ms forward of which 4 in attention, 20 ms backward."""
    fields: dict[str, Any] = {
        "name": f"layers.{index}",
        "input_bytes": MiB,
        "saved_bytes": 10 * MiB,
        "attention_bytes": MiB,
        "forward_seconds": 0.010,
        "backward_seconds": 0.020,
        "attention_seconds": 0.004,
        "forward_transient_bytes": 2 * MiB,
        "backward_transient_bytes": 4 * MiB,
    }
    return BlockProfile(**(fields | changes))


def make_nearly_free(**changes: Any) -> NearlyFree:
    """4 MiB of outputs of products in 8 tensors; 2 ms to compute the rest from them, 7 MiB in backward."""
    fields = {
        "stored_bytes": 4 * MiB,
        "stored_tensors": 8,
        "forward_seconds": 0.002,
        "backward_bytes": 7 * MiB,
    }
    return NearlyFree(**(fields | changes))


def make_form(**changes: Any) -> BlockForm:
    """Exact: 5 MiB saved in 11 tensors, 2 ms more in backward than the plain form; transients as there."""
    fields: dict[str, Any] = {
        "name": "exact",
        "saved_bytes": 5 * MiB,
        "saved_tensors": 11,
        "forward_seconds": 0.010,
        "backward_seconds": 0.022,
        "forward_transient_bytes": 2 * MiB,
        "backward_transient_bytes": 4 * MiB,
    }
    return BlockForm(**(fields | changes))


def make_prefixes(**changes: Any) -> Prefixes:
    """Rows of 8 tokens: prefixes of 2, 4 and 6, the last not exact; 1 ms more than their share."""
    fields: dict[str, Any] = {
        "tokens": 8,
        "lengths": (2, 4, 6),
        "differences": (0.0, 0.0, 1e-6),
        "overhead_seconds": 0.001,
        "cut_bytes": 10 * MiB,
        "whole_bytes": 0,
        "largest_bytes": 2 * MiB,
        "probe_bytes": 0,
        "witness_bytes": 0,
    }
    return Prefixes(**(fields | changes))


def make_profile(blocks: int = 3, *, trainable: bool = False, **changes: Any) -> ModelProfile:
    """100 MiB of libraries, 20 of weights; with ``trainable`` 1 of gradients and 6 of state a block."""
    parts = changes.pop("block_profiles", None) or tuple(make_block(i) for i in range(blocks))
    units = tuple(
        UnitProfile(
            name=block.name,
            block=index,
            weight_bytes=MiB,
            gradient_bytes=MiB if trainable else 0,
            state_bytes=6 * MiB if trainable else 0,
            update_seconds=0.001 if trainable else 0.0,
        )
        for index, block in enumerate(parts)
    )
    fields: dict[str, Any] = {
        "model": "toy",
        "batch": "1x8",
        "blocks": parts,
        "units": units,
        "micro_batches": 1,
        "baseline_bytes": 100 * MiB,
        "weight_bytes": 20 * MiB,
        "prologue_forward_seconds": 0.001,
        "prologue_backward_seconds": 0.002,
        "epilogue_forward_seconds": 0.003,
        "epilogue_backward_seconds": 0.004,
        "epilogue_saved_bytes": 0,
        "epilogue_peak_bytes": 3 * MiB,
        "state_bytes_per_element": 12.0,
        "gradient_bytes_per_element": 2.0,
    }
    return ModelProfile(**(fields | changes))


def make_machine(*tiers: Tier, device: str = "cpu", **changes: Any) -> Machine:
    """1 GiB/s in each direction of every tier, no contention, copies free unless said otherwise."""
    fields: dict[str, Any] = {
        "read_bytes_per_second": 1024 * MiB,
        "write_bytes_per_second": 1024 * MiB,
        "mixed_bytes_per_second": 2048 * MiB,
    }
    copy = changes.pop("dram_copy_bytes_per_second", 1e18)
    slowdown = changes.pop("arithmetic_slowdown", 1.0)
    links = tuple(Link(tier=tier, **(fields | changes)) for tier in tiers or (Tier.NVME,))
    return Machine(
        name="toy",
        device=device,
        cores=2,
        dram_copy_bytes_per_second=copy,
        links=links,
        arithmetic_slowdown=slowdown,
    )
