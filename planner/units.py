"""Bytes and seconds as people write them, and back.

Inside memtrain a quantity of memory is an ``int`` number of bytes. ``GB`` is 1e9 and ``GiB`` is
2**30; what is printed is always GiB, so that a figure can be compared with what the kernel reports.
"""

from __future__ import annotations

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40
MOST_BYTES = (1 << 63) - 1
"""Offsets of files and tensors have 64 bits and a sign."""

_FACTORS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": KiB,
    "MIB": MiB,
    "GIB": GiB,
    "TIB": TiB,
}
_PATTERN = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")


def parse_bytes(text: str | int) -> int:
    """Read ``"1.2GiB"``, ``"40 GB"`` or a plain integer as a number of bytes.

    Raises:
        ValueError: the text is not a non-negative number followed by a known unit.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise ValueError(f"a size must be a string such as '1.2GiB' or an int, got {text!r}")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size cannot be negative, got {text}")
        return text
    match = _PATTERN.match(text)
    factor = _FACTORS.get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        units = ", ".join(("B", "KB", "KiB", "MB", "MiB", "GB", "GiB", "TB", "TiB"))
        raise ValueError(f"cannot read {text!r} as a size: write a number and one of {units}")
    size = float(match.group(1)) * factor
    if size > MOST_BYTES:
        raise ValueError(f"{text[:40]!r} is more than can be addressed, {MOST_BYTES >> 40} TiB: lower it")
    return round(size)


def parse_size(text: str, *, unit: str = "GiB") -> int:
    """As ``parse_bytes``, for a size that nobody gives in bytes: a number alone is refused, but for 0.

    Args:
        text: such as ``12GiB``.
        unit: to propose.

    Raises:
        ValueError: as ``parse_bytes``, or there is no unit.
    """
    size = parse_bytes(text)
    if size and not text.strip()[-1].isalpha():
        raise ValueError(f"{text.strip()} has no unit; say {text.strip()}{unit}")
    return size


def format_gib(size_bytes: int, digits: int = 3) -> str:
    """``1288490188`` -> ``"1.200 GiB"``."""
    return f"{size_bytes / GiB:.{digits}f} GiB"


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``value``."""
    return -(-value // multiple) * multiple
