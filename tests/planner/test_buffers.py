"""Buffers and their files: round trips, and errors that name line, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.planner.buffers import Buffer, BufferFileError, read_csv, write_csv
from tests.planner.packings import Span, named, spans

TWO = (Buffer("b1", 0, 3, 4), Buffer("b2", 3, 9, 2))


@pytest.mark.parametrize(
    ("start", "end", "size", "message"),
    [
        (3, 3, 1, "'x' lives from 3 to 3: end must be above start"),
        (0, 1, 0, "'x' has 0 bytes: leave out what is empty"),
        (0, 1, -8, "'x' has -8 bytes"),
    ],
)
def test_a_buffer_lives_and_has_bytes(start: int, end: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Buffer("x", start, end, size)


def test_the_form_is_minimallocs(tmp_path: Path) -> None:
    file = tmp_path / "two.csv"
    write_csv(file, TWO)
    assert file.read_text() == "id,lower,upper,size\nb1,0,3,4\nb2,3,9,2\n"
    write_csv(file, TWO, {"b2": 0, "b1": 4})
    assert file.read_text() == "id,lower,upper,size,offset\nb1,0,3,4,4\nb2,3,9,2,0\n"


def test_columns_in_any_order(tmp_path: Path) -> None:
    file = tmp_path / "two.csv"
    file.write_text("size, upper,id,offset,lower\n4,3,b1,0,0\n2,9,b2,0,3\n")
    read = read_csv(file)
    assert read.buffers == TWO
    assert read.offsets == {"b1": 0, "b2": 0}


@given(items=spans(8), offset=st.one_of(st.none(), st.integers(0, 1 << 50)))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, items: list[Span], offset: int | None) -> None:
    file = tmp_path_factory.mktemp("csv") / "round.csv"
    buffers = [Buffer(f'{b.name}, "{i}"', b.start, b.end, b.size) for i, b in enumerate(named(items))]
    offsets = {} if offset is None else {b.name: offset + i for i, b in enumerate(buffers)}
    write_csv(file, buffers, offsets or None)
    read = read_csv(file)
    assert read.buffers == tuple(buffers)
    assert read.offsets == offsets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: no column 'id' in ''; the first line must name id,lower,upper,size"),
        ("id,lower,size\n", r"line 1: no column 'upper' in 'id,lower,size'"),
        ("id,lower,upper,size,alignment\n", r"line 1: cannot honour the columns .*alignment"),
        ("id,lower,upper,size,size\n", r"line 1: cannot honour the columns .*size,size"),
        ("id,lower,upper,size\na,0,1,1\na,0,1\n", r"line 3: 3 values under 4 columns"),
        ("id,lower,upper,size\na,0,1,1,7\n", r"line 2: 5 values under 4 columns"),
        ("id,lower,upper,size\na,0,1.5,1\n", r"line 2: upper is '1\.5'; write a whole number"),
        ("id,lower,upper,size,offset\na,0,1,1,\n", r"line 2: offset is ''; write a whole number"),
        ("id,lower,upper,size\na,0,1,1\na,1,2,1\n", r"line 3: id 'a' stands on an earlier line"),
        ("id,lower,upper,size\na,2,1,1\n", r"line 2: buffer 'a' lives from 2 to 1: end must be above"),
        ("id,lower,upper,size\na,0,1,0\n", r"line 2: buffer 'a' has 0 bytes"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(text)
    with pytest.raises(BufferFileError, match=r"bad\.csv, " + message):
        read_csv(file)


def test_a_missing_offset_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = tmp_path / "two.csv"
    with pytest.raises(ValueError, match=r"no offset for buffer 'b2' \(1 in all\)"):
        write_csv(file, TWO, {"b1": 0})
    assert not file.exists()
