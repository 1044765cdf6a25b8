"""Files written in any order: whole, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import xxhash

from memtrain.offload.atomic import CorruptCheckpointError
from memtrain.offload.placed import WINDOW_BYTES, PlacedFile, byte_views, settle_window


def place(path: Path, size_bytes: int) -> PlacedFile:
    return PlacedFile("a", os.open(path / "a", os.O_RDWR | os.O_CREAT), size_bytes)


def close(file: PlacedFile) -> dict[str, object]:
    return file.close(memoryview(bytearray(7)))


def test_any_order(tmp_path: Path) -> None:
    file = place(tmp_path, 30)
    assert (tmp_path / "a").stat().st_size == 30  # reserved at once
    data = bytes(range(30))
    for start, stop in ((20, 30), (0, 3), (3, 20)):
        file.write(data[start:stop], start)
    file.write(b"", 5)
    assert close(file) == {"size_bytes": 30, "xxh3_64": xxhash.xxh3_64_hexdigest(data)}
    assert (tmp_path / "a").read_bytes() == data
    file.abandon()


def test_an_empty_file(tmp_path: Path) -> None:
    assert close(place(tmp_path, 0)) == {"size_bytes": 0, "xxh3_64": xxhash.xxh3_64_hexdigest(b"")}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(0, 10), (20, 30)], "not written between 10 and 20"),
        ([(0, 10)], "not written between 10 and 30"),
        ([(5, 30)], "not written between 0 and 5"),
        ([(0, 20), (10, 30)], "not written between 20 and 10"),
    ],
)
def test_gaps_and_overlaps_are_refused(parts: list[tuple[int, int]], message: str, tmp_path: Path) -> None:
    """Also under ``python -O``: a file with a hole would have a right checksum."""
    file = place(tmp_path, 30)
    for start, stop in parts:
        file.write(bytes(stop - start), start)
    with pytest.raises(CorruptCheckpointError, match=message):
        close(file)


def test_a_disk_that_is_cut_short(tmp_path: Path) -> None:
    file = place(tmp_path, 30)
    file.write(bytes(30), 0)
    os.truncate(tmp_path / "a", 20)
    with pytest.raises(CorruptCheckpointError, match="a ends at byte 20 of 30"):
        close(file)


def test_no_more_than_a_window_is_on_its_way(tmp_path: Path) -> None:
    file = place(tmp_path, WINDOW_BYTES)
    file.write(bytes(WINDOW_BYTES - 1), 0)
    settle_window([file])
    assert file.unsettled_bytes == WINDOW_BYTES - 1
    file.write(b"1", WINDOW_BYTES - 1)
    settle_window([file])
    assert file.unsettled_bytes == 0
    file.abandon()


def test_bytes_of_tensors() -> None:
    tensor = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    for one in (tensor, tensor.t(), torch.tensor(3.0), torch.empty(0)):
        found = list(byte_views(one, 6))
        expected = one.contiguous().view(-1).view(torch.uint8)
        assert b"".join(bytes(data) for _, data in found) == bytes(expected.numpy())
        assert [start for start, _ in found] == list(range(0, expected.numel(), 6 if one.dim() == 2 else 4))
    start = next(iter(byte_views(tensor, 100)))[1].ctypes.data
    assert start == tensor.data_ptr()  # what lies in memory in order is not copied
