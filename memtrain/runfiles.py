"""The files of a run (metrics, recipe, plan, summary), and what is said when one cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunFileError(RuntimeError):
    """A file of the run cannot be written: names the file, the operating system's error and the remedy.

    Attributes:
        errno: the operating system's number.
    """

    def __init__(self, message: str, errno: int | None) -> None:
        super().__init__(message)
        self.errno = errno


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is done inside writes ``path``, a file or folder of the run. Raises RunFileError."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise RunFileError(
            f"{path} cannot be written: {reason} (errno {error.errno}). Free room on its disk or set another "
            "output.directory; checkpoints that were complete are intact, and the same command takes up the "
            "last one",
            error.errno,
        ) from error


def write_text(path: Path, text: str) -> None:
    """The file ``path``. Raises RunFileError."""
    with writing(path):
        path.write_text(text)


def replace_text(path: Path, text: str) -> None:
    """The file ``path``, whole or not at all: half a plan would be a wrong one. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def make_folder(path: Path) -> None:
    """The folder ``path`` and those above it, where they are not there. Raises RunFileError."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write_documents(directory: Path, **documents: str) -> None:
    """Each as ``<name>.json`` of the folder, which is made where it is missing. Raises RunFileError."""
    make_folder(directory)
    for name, text in documents.items():
        write_text(directory / f"{name}.json", text + "\n")
