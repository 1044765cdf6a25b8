"""Canonical JSON and its hash: the same content gives the same bytes, whenever and wherever it is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any, Protocol, TypeVar

SHORT_DIGITS = 16
"""Of a hash that tells documents apart which are not signed by it: 64 bits."""


def plain(value: Any, *, digits: int | None = None) -> Any:
    """``value`` in JSON's own types: dataclasses as objects, sequences as lists, enums as their values.

    Args:
        value: of dataclasses, sequences, enums, numbers and text.
        digits: behind the point, to which floats are rounded; None leaves them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), digits=digits) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [plain(item, digits=digits) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and digits is not None:
        return round(value, digits)
    return value


def canonical_json(data: Any) -> str:
    """Sorted keys and no white space. Raises ValueError for what is no number."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(data: Any) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal."""
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def short_digest(data: Any) -> str:
    """The first ``SHORT_DIGITS`` digits of ``digest``."""
    return digest(data)[:SHORT_DIGITS]


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Missing and unknown keys, values of other kinds and text that is no JSON become ``ValueError: not WHAT:
    ...``."""
    try:
        yield
    except (AttributeError, KeyError, RecursionError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not {what}: {error!r}") from error


class Signed(Protocol):
    """What is written down with a hash of itself."""

    @property
    def digest(self) -> str:
        """Hash of all but the provenance."""
        ...

    @property
    def provenance(self) -> dict[str, Any]:
        """What differs between runs that decide the same: beside the content, not hashed."""
        ...


_Signed = TypeVar("_Signed", bound=Signed)


def signed_plan(plan: Signed, content: dict[str, Any]) -> str:
    """Canonical JSON of the ``content`` of ``plan``, its hash, and its provenance."""
    return canonical_json({"plan": content, "hash": plan.digest, "provenance": plan.provenance})


def read_signed_plan(text: str, version: int, make: Callable[[dict[str, Any]], _Signed]) -> _Signed:
    """What ``make`` makes of the content of a plan that ``signed_plan`` wrote, and of its provenance.

    Raises:
        ValueError: not a plan, another version, unknown keys, or a hash that does not match.
    """
    with reading("a plan"):
        document = json.loads(text)
        data = dict(document["plan"])
        check_version(data, version, "plan")
        found = make({**data, "provenance": dict(document.get("provenance", {}))})
        said = document.get("hash")
    if found.digest != said:
        raise ValueError(
            f"the plan's hash is {found.digest}, the document says {said}: it was edited or damaged"
        )
    return found


def check_version(data: Mapping[str, Any], version: int, what: str) -> None:
    """Raises ValueError where ``data`` was written by another version of the format."""
    if data.get("version") != version:
        raise ValueError(f"{what} version {data.get('version')!r}, this memtrain reads {version}")
