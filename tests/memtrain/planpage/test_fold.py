from __future__ import annotations

from memtrain.planpage.fold import compress_names, fold_activations, fold_states
from tests.memtrain.planpage.hand_plan import FOUR


def test_names_are_compressed() -> None:
    names = [f"model.layers.{i}" for i in (0, 1, 2, 5, 7, 8)]
    assert compress_names(["prologue", *names, "epilogue"]) == "prologue, layers 0-2, 5, 7-8, epilogue"


def test_blocks_that_do_the_same_are_one_line() -> None:
    first, last = fold_activations(FOUR)
    assert (first.blocks, first.count) == ("layers 0-2", 3)
    assert first.text == "X and A swap to host; O recompute 9 of 16, swap to nvme 3-5, keep 2-4"
    assert dict(first.actions)["A"] == "swap to host"
    assert (last.blocks, last.text) == ("layers 3", "X and A stay in slot; O keep")


def test_state_is_one_line_too() -> None:
    first, last = fold_states(FOUR)
    assert first.text == (
        "weights device; gradients host; optimizer host 3 of 4, nvme 1; "
        "updated by the CPU before the next forward"
    )
    assert (last.blocks, last.text) == (
        "layers 3, epilogue",
        "weights and optimizer device; updated on the device in backward",
    )


def test_updates_have_a_column_of_their_own() -> None:
    first, last = fold_states(FOUR)
    assert dict(first.actions)["updated"] == "by the CPU before the next forward"
    assert list(dict(last.actions)) == ["weights", "optimizer", "updated"]
