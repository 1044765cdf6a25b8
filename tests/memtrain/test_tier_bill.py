"""What is billed to a tier against what is allocated there: never less, little more, and enough to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memtrain
from memtrain.offload.extents import reserved
from memtrain.offload.shards import FlatIndex, ShardLayout, StateSpec, StateTensor
from memtrain.optim.kernels import fused_adamw
from memtrain.planner.actions import Tier
from memtrain.planner.decisions import (
    PlannerOptions,
    gradient_extent_bytes,
    open_space,
    state_extent_bytes,
    update_slot_bytes,
)
from memtrain.planner.machine import Budget
from memtrain.planner.profile import UnitProfile
from tests.memtrain.sessions import MACHINE
from tests.memtrain.test_separate_memory import ByNorm, Net, tokens
from tests.planner.toys import make_machine, make_profile

PAGE = 4096
MOVED = {"gradient_tier": "nvme", "optimizer_tier": "nvme"}
SWAP = {"action": "swap", "saved_tier": "nvme"}
ATTENTION = {"action": "recompute_except_attention", "saved_tier": "nvme"}
NEARLY_FREE = {"action": "recompute_nearly_free", "saved_tier": "nvme"}
PREFIX = {"action": "recompute", "recomputed_tokens": 5}
PLANS: dict[str, dict[str, Any]] = {
    "swap": {"block": SWAP, "state": MOVED},
    "recompute": {"block": {"action": "recompute", "input_tier": "nvme"}, "state": MOVED},
    "attention and input": {"block": {**ATTENTION, "input_tier": "nvme"}, "state": MOVED},
    "attention": {"block": {**ATTENTION, "input_tier": "device"}, "state": MOVED},
    "nearly free": {"block": {**NEARLY_FREE, "input_tier": "nvme"}, "state": MOVED},
    "prefix": {"block": {**PREFIX, "rest_tier": "nvme", "input_tier": "nvme"}, "state": MOVED},
    "attention of a prefix": {"block": {**ATTENTION, "attention_tokens": 4}, "state": MOVED},
    "mixed": {
        "block": SWAP,
        "block.1": {"action": "keep"},
        "block.2": {**ATTENTION, "input_tier": "nvme"},
        "state": MOVED,
        "state.layers.1": {"gradient_tier": "nvme", "optimizer_tier": "device"},
        "state.layers.2": {"gradient_tier": "device", "optimizer_tier": "nvme"},
    },
    "gradients": {
        "block": {"action": "keep"},
        "state": {"gradient_tier": "nvme", "optimizer_tier": "device"},
    },
}


def build(kind: str) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16 if kind in ("master", "halves") else torch.float32)
    if kind == "by norm":
        return model, ByNorm(model.parameters(), lr=1e-2)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=kind == "halves")


def train(kind: str, force: dict[str, Any], nvme: str) -> tuple[memtrain.Session, int]:
    """Three steps of two micro-batches; the session, closed, and what it took of the tier at its peak."""
    model, optimizer = build(kind)
    with memtrain.prepare(
        model,
        optimizer,
        (tokens(0),),
        budget=memtrain.Budget(device="3GiB", nvme=nvme),
        micro_batches=2,
        master_weights=kind in ("master", "halves"),
        options=PlannerOptions(
            force=force,
            update_schedule="ahead" if MOVED in force.values() else "auto",
            exact_only=False,
        ),
        machine=MACHINE,
    ) as session:
        for step in range(3):
            for micro in range(2):
                (model(tokens(2 * step + micro)) / 2).backward()
            session.optimizer.step()
            session.optimizer.zero_grad()
        return session, session.engine.statistics()[Tier.NVME].peak_used_bytes


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("master", name) for name in PLANS),
        *((kind, "mixed") for kind in ("adamw", "by norm", "halves")),
        ("halves", "swap"),
    ],
)
def test_the_bill_covers_what_is_allocated_and_its_bytes_are_enough(
    tmp_path: Path, kind: str, name: str
) -> None:
    session, used = train(kind, PLANS[name], f"{tmp_path}:1GiB")
    assert bool(session.optimizer.layout.halves) is (kind == "halves" and fused_adamw.agrees())
    for unit in session.profile.units:  # in a record each tensor has its own bytes, and pages
        parts = {name for name in session.optimizer.index.parameters if name in unit.parameters}
        stored = [(shard, piece) for part in parts for shard, piece in session.optimizer.index.pieces[part]]
        specs = {shard: session.optimizer.layout.shards[shard].specs for shard, _ in stored}
        if kind != "by norm":
            assert unit.state_bytes == sum(
                piece.elements * tensor.dtype.itemsize
                for shard, piece in stored
                if not shard.small
                for tensor in specs[shard][piece.name].tensors
            )
    planned, profile = session.plan.peak(Tier.NVME), session.profile
    parameters = sum(len(unit.parameters) for unit in profile.units)
    # A page for each parameter's gradient and each tensor of its state, and two for a block.
    spare = PAGE * (parameters * (1 + profile.state_tensors) + 2 * len(profile.blocks))
    assert used <= planned <= used + spare
    again, used_again = train(kind, PLANS[name], f"{tmp_path}:{planned}B")
    assert again.plan.peak(Tier.NVME) == again.budget.nvme_bytes == planned
    assert used_again == used


def test_a_byte_less_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    session, _ = train("adamw", PLANS["swap"], f"{tmp_path}:1GiB")
    short = session.plan.peak(Tier.NVME) - 1
    with pytest.raises(memtrain.InfeasibleError, match="nvme by 1 bytes"):
        train("adamw", PLANS["swap"], f"{tmp_path}:{short}B")


NARROW = st.builds(
    StateTensor,
    key=st.uuids().map(str),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
    per=st.sampled_from([1, 1, 2, 128, 256]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 1_500_000), min_size=1, max_size=5),
    kept=st.lists(NARROW, min_size=1, max_size=3),
    elementwise=st.booleans(),
    data=st.data(),
)
def test_no_shapes_take_more_than_their_bill(
    sizes: list[int], kept: list[StateTensor], elementwise: bool, data: st.DataObject
) -> None:
    """Every cut of the flat index, also with state so narrow that pieces end within pages, and of which one
    element serves a block of the parameter's."""
    named = [
        (f"p{i}", torch.nn.Parameter(torch.empty(n, dtype=torch.bfloat16, device="meta")))
        for i, n in enumerate(sizes)
    ]
    large = [n for n in sizes if n >= 65536]
    state = {n: sum(tensor.bytes_for((n,)) for tensor in kept) for n in sizes}
    # As an optimizer says itself, whose last block may not be full, or as it is measured over full ones.
    full = sum(tensor.dtype.itemsize / tensor.per for tensor in kept)
    per_element = max([state[n] / n for n in large], default=full) if data.draw(st.booleans()) else full
    unit = UnitProfile(
        name="u",
        block=0,
        weight_bytes=0,
        gradient_bytes=2 * sum(large),
        state_bytes=round(sum(state[n] if per_element != full else full * n for n in large)),
        parameters=tuple(name for name, _ in named),
    )
    profile = make_profile(
        1,
        units=(unit,),
        state_bytes_per_element=per_element,
        gradient_bytes_per_element=2.0,
        state_tensors=len(kept),
        elementwise=elementwise,
        largest_parameter_elements=max(sizes),
    )
    budget, nothing = Budget(device="1GiB", nvme="/x:1GiB"), PlannerOptions()
    shards = open_space(profile, make_machine(), budget, nothing).shards
    shard_elements = data.draw(st.sampled_from(shards))
    index = FlatIndex([("u", named)], shard_elements, whole_parameters=not elementwise)
    specs: Any = {name: StateSpec(tensors=tuple(kept)) for name, _ in named}
    layouts = [
        ShardLayout(shard=shard, specs=specs, widened=frozenset())
        for shard in index.all_shards()
        if not shard.small
    ]
    records = sum(reserved(layout.record_bytes, PAGE) for layout in layouts)
    assert max([layout.slot_bytes for layout in layouts], default=0) <= update_slot_bytes(
        profile, shard_elements
    )
    gradients = sum(reserved(2 * n, PAGE) for n in large)
    assert records <= state_extent_bytes(profile, unit)
    assert gradients <= gradient_extent_bytes(profile, unit) <= gradients + PAGE * len(sizes)
