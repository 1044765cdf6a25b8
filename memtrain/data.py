"""Text to token files, and token files to batches whose order depends on the seed and the step alone.

    python -m memtrain.data --tokenizer data/models/smollm2-135m --output data/corpora/torch-sources

builds a corpus of real code, with held-out files, from the Python sources of the installed torch. It runs
in a process of its own, so that training never pays for a tokenizer: a token file is a plain array of
little-endian integers beside a ``meta.json``, mapped into memory and read window by window.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

META_VERSION = 1
_TRAIN_TEXT_BYTES = 4_000_000
"""4 MB of code are 1.2 million tokens of SmolLM2's vocabulary: forty times what the main recipe reads,
and tokenised in a few seconds."""
_HELDOUT_TEXT_BYTES = 200_000
_HELDOUT_ONE_IN = 20


class DataError(ValueError):
    """A corpus that cannot be used; the message names the file and the remedy."""


class Tokens:
    """A sequence of tokens on disk.

    Args:
        path: ``<split>.bin`` beside its ``meta.json``, or ``.txt``, whose bytes are the tokens.

    Raises:
        DataError: missing, damaged or of another version.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError(
                f"no token file at {path.resolve()}; `make data` builds the corpora of the recipes"
            )
        self.path = path
        dtype, self.vocabulary_size, count = np.dtype("u1"), 256, path.stat().st_size
        if path.suffix != ".txt":
            dtype, self.vocabulary_size, count = _read_meta(path)
        if path.stat().st_size != count * dtype.itemsize:
            raise DataError(
                f"{path} holds {path.stat().st_size} bytes where its meta.json says {count} tokens of "
                f"{dtype.itemsize} bytes: delete the folder and build the corpus again"
            )
        self.ids: np.ndarray[Any, Any] = np.memmap(path, dtype=dtype, mode="r", shape=(count,))

    def __len__(self) -> int:
        return len(self.ids)


def _read_meta(path: Path) -> tuple[np.dtype[Any], int, int]:
    """dtype, vocabulary size and number of tokens of ``path``."""
    meta_path = path.parent / "meta.json"
    try:
        meta = json.loads(meta_path.read_text())
        if meta["version"] != META_VERSION:
            raise DataError(
                f"{meta_path} has version {meta['version']!r}, this memtrain reads {META_VERSION}"
            )
        return np.dtype(meta["dtype"]), int(meta["vocabulary_size"]), int(meta["splits"][path.stem]["tokens"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} needs a meta.json that describes it: {error!r}") from error


class Windows:
    """Batches of non-overlapping windows of a token sequence, in an order drawn from the seed.

    ``batch(index)`` is a function of the index alone, so a run resumes anywhere without replaying.
    Every pass over the data has an order of its own; what is left of the last window is not used.
    """

    def __init__(self, tokens: Tokens, *, sequence_length: int, batch_size: int, seed: int | None) -> None:
        """``seed`` None takes the windows as they lie."""
        self.tokens, self.sequence_length, self.batch_size, self.seed = (
            tokens,
            sequence_length,
            batch_size,
            seed,
        )
        self.windows = len(tokens) // sequence_length
        if self.windows < batch_size:
            raise DataError(
                f"{tokens.path} has {len(tokens)} tokens, {self.windows} windows of {sequence_length}; "
                f"a batch needs {batch_size}: shorten data.sequence_length or build a larger corpus"
            )

    @property
    def batches_per_pass(self) -> int:
        """Batches in one pass over the data."""
        return self.windows // self.batch_size

    def batch(self, index: int) -> np.ndarray[Any, Any]:
        """Token ids of batch ``index``, int64, of shape (batch_size, sequence_length)."""
        epoch, place = divmod(index, self.batches_per_pass)
        rows = self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        length = self.sequence_length
        return np.stack([self.tokens.ids[row * length : (row + 1) * length] for row in rows]).astype(np.int64)

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        if self.seed is None:
            return np.arange(self.windows)
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.windows)


def is_heldout(name: str) -> bool:
    """Whether the file called ``name`` belongs to the held-out part: by a hash of its name, for good."""
    return int.from_bytes(_hash(name)[:4], "big") % _HELDOUT_ONE_IN == 0


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def source_files(package: str) -> list[tuple[str, Path]]:
    """Python files of an installed package, which is not imported: (name, path), in hash order.

    Hash order makes the first few megabytes a sample of the whole package instead of its first folder.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package} is not installed; it is the source of the corpus")
    root = Path(spec.submodule_search_locations[0])
    files = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
    return sorted(files, key=lambda item: _hash(item[0]))


def _read_texts(files: list[tuple[str, Path]], heldout: bool, limit_bytes: int) -> Iterator[str]:
    """Texts of one split, until ``limit_bytes`` of UTF-8 are reached."""
    taken = 0
    for name, path in files:
        if is_heldout(name) is heldout and taken < limit_bytes:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text.strip():
                taken += len(text.encode())
                yield text


def build_corpus(tokenizer_folder: Path, output: Path, package: str = "torch") -> dict[str, Any]:
    """Tokenise the sources of ``package`` into ``output`` and return the meta data; done already, only that.

    The folder appears under its name when it is complete.

    Raises:
        DataError: no tokenizer, or no package.
    """
    tokenizer_file = tokenizer_folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise DataError(f"no tokenizer at {tokenizer_file}; `make data` fetches the model first")
    wanted = {
        "version": META_VERSION,
        "source": f"{package} {importlib.metadata.version(package)}, Python files by the hash of their names",
        "tokenizer_sha256": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        "train_text_bytes": _TRAIN_TEXT_BYTES,
        "heldout_text_bytes": _HELDOUT_TEXT_BYTES,
    }
    present = _present_meta(output)
    if all(present.get(key) == value for key, value in wanted.items()):
        return present
    with complete_folder(output) as folder:
        meta = {**wanted, **_tokenise(tokenizer_folder, package, folder)}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True) + "\n")
    return meta


@contextmanager
def complete_folder(output: Path) -> Iterator[Path]:
    """A temporary folder that takes the name ``output`` when the block ends well, and is gone otherwise."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        yield folder
        folder.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _present_meta(output: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((output / "meta.json").read_text()))
    except (OSError, ValueError):
        return {}


def _tokenise(tokenizer_folder: Path, package: str, output: Path) -> dict[str, Any]:
    """Write the splits; each file's text ends with the end-of-text token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    end = _end_of_text(tokenizer_folder, tokenizer)
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    dtype = np.dtype("<u2" if size <= 1 << 16 else "<u4")
    files = source_files(package)
    splits = {}
    for split, limit_bytes in (("train", _TRAIN_TEXT_BYTES), ("heldout", _HELDOUT_TEXT_BYTES)):
        texts = list(_read_texts(files, split == "heldout", limit_bytes))
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        ids = np.concatenate([np.array([*one.ids, end], dtype=dtype) for one in encoded])
        (output / f"{split}.bin").write_bytes(ids.tobytes())
        splits[split] = {
            "files": len(texts),
            "tokens": len(ids),
            "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        }
    return {"dtype": dtype.str, "vocabulary_size": size, "splits": splits}


def _end_of_text(tokenizer_folder: Path, tokenizer: Any) -> int:
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    token = config.get("eos_token")
    text = token["content"] if isinstance(token, dict) else token
    number = None if text is None else tokenizer.token_to_id(text)
    if number is None:
        raise DataError(f"{tokenizer_folder}/tokenizer_config.json names no end-of-text token (eos_token)")
    return int(number)


def main(arguments: list[str] | None = None) -> int:
    """``python -m memtrain.data``."""
    parser = argparse.ArgumentParser(description="Tokenise the Python sources of an installed package.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.bin and heldout.bin")
    parser.add_argument("--package", default="torch", help="installed package whose sources are the text")
    options = parser.parse_args(arguments)
    try:
        meta = build_corpus(options.tokenizer, options.output, options.package)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, facts in meta["splits"].items():
        print(f"{options.output / (split + '.bin')}: {facts['tokens']:,} tokens of {facts['files']} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
