from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain import data
from memtrain.data import DataError, Tokens, Windows, build_corpus, complete_folder, is_heldout


@pytest.fixture
def text(tmp_path: Path) -> Tokens:
    path = tmp_path / "t.txt"
    path.write_bytes(bytes(range(100)))
    return Tokens(path)


def test_the_bytes_of_a_text_file_are_its_tokens(text: Tokens) -> None:
    assert (len(text), text.vocabulary_size) == (100, 256)
    assert text.ids[7] == 7


def test_windows_in_file_order(text: Tokens) -> None:
    windows = Windows(text, sequence_length=8, batch_size=2, seed=None)
    assert (windows.windows, windows.batches_per_pass) == (12, 6)  # 100 // 8, of which pairs
    batch = windows.batch(1)
    assert batch.dtype == np.int64
    assert batch.tolist() == [list(range(16, 24)), list(range(24, 32))]
    assert windows.batch(7).tolist() == batch.tolist()  # the second pass


@given(seed=st.integers(0, 2**31), batch_size=st.integers(1, 5), length=st.integers(1, 20))
def test_a_pass_takes_every_window_once(
    tmp_path_factory: pytest.TempPathFactory, seed: int, batch_size: int, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "hypothesis.txt"
    path.write_bytes(bytes(range(200)))
    windows = Windows(Tokens(path), sequence_length=length, batch_size=batch_size, seed=seed)
    rows = np.concatenate([windows.batch(i) for i in range(windows.batches_per_pass)])
    starts = rows[:, 0].tolist()
    assert len(set(starts)) == len(starts) == windows.batches_per_pass * batch_size
    assert set(starts) <= set(range(0, windows.windows * length, length))
    assert (rows - rows[:, :1] == np.arange(length)).all()


def test_a_batch_depends_on_its_index_and_the_seed_alone(text: Tokens) -> None:
    first = Windows(text, sequence_length=8, batch_size=1, seed=3)
    order = [first.batch(i)[0, 0] for i in range(24)]
    again = Windows(text, sequence_length=8, batch_size=1, seed=3)
    assert [again.batch(i)[0, 0] for i in reversed(range(24))] == order[::-1]
    assert order[:12] != order[12:]  # every pass has its own order
    other = Windows(text, sequence_length=8, batch_size=1, seed=4)
    assert [other.batch(i)[0, 0] for i in range(24)] != order


def test_too_little_text_is_told(text: Tokens) -> None:
    with pytest.raises(DataError, match="100 tokens, 1 windows of 64; a batch needs 2"):
        Windows(text, sequence_length=64, batch_size=2, seed=0)


def test_what_cannot_be_a_token_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no token file at .*make data"):
        Tokens(tmp_path / "train.bin")
    (tmp_path / "train.bin").write_bytes(b"\0" * 6)
    with pytest.raises(DataError, match=r"needs a meta\.json"):
        Tokens(tmp_path / "train.bin")
    meta = {"version": 1, "dtype": "<u2", "vocabulary_size": 9, "splits": {"train": {"tokens": 4}}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match=r"holds 6 bytes where its meta\.json says 4 tokens of 2 bytes"):
        Tokens(tmp_path / "train.bin")
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "version": 0}))
    with pytest.raises(DataError, match="version 0, this memtrain reads 1"):
        Tokens(tmp_path / "train.bin")


def make_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are words, with ids that can be told by hand."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<end>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<end>"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable package of 60 small files that must not be imported."""
    root = tmp_path / "site" / "corpus_package"
    root.mkdir(parents=True)
    for number in range(60):
        (root / f"m{number}.py").write_text(f"a b {'b ' * (number % 3)}")
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(root.parent))
    monkeypatch.setattr(data.importlib.metadata, "version", lambda name: f"{name}-9")
    return "corpus_package"


def test_a_corpus_is_built_once_and_the_same_everywhere(tmp_path: Path, package: str) -> None:
    make_tokenizer(tmp_path / "tok")
    meta = build_corpus(tmp_path / "tok", tmp_path / "one", package)
    build_corpus(tmp_path / "tok", tmp_path / "two", package)
    assert "corpus_package" not in sys.modules
    for name in ("train.bin", "heldout.bin", "meta.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    heldout = sum(is_heldout(f"m{n}.py") for n in range(60)) + is_heldout("__init__.py")
    assert meta["splits"]["heldout"]["files"] == heldout > 0
    assert meta["splits"]["train"]["files"] == 61 - heldout
    tokens = Tokens(tmp_path / "one" / "train.bin")
    assert (tokens.ids.dtype, tokens.vocabulary_size) == (np.uint16, 4)
    assert int((tokens.ids == 1).sum()) == 61 - heldout  # one end of text a file
    stamp = (tmp_path / "one").stat().st_mtime_ns
    assert build_corpus(tmp_path / "tok", tmp_path / "one", package) == meta
    assert (tmp_path / "one").stat().st_mtime_ns == stamp


def test_another_tokenizer_makes_another_corpus(tmp_path: Path, package: str) -> None:
    make_tokenizer(tmp_path / "tok")
    build_corpus(tmp_path / "tok", tmp_path / "one", package)
    text = (tmp_path / "tok" / "tokenizer.json").read_text()
    (tmp_path / "tok" / "tokenizer.json").write_text(text.replace('"b": 3', '"c": 3'))
    build_corpus(tmp_path / "tok", tmp_path / "one", package)
    assert 3 not in Tokens(tmp_path / "one" / "train.bin").ids


def test_the_command_line_of_the_corpus(
    tmp_path: Path, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tokenizer", str(tmp_path / "tok"), "--output", str(tmp_path / "o"), "--package"]
    assert data.main([*arguments, package]) == 1
    assert "no tokenizer at" in capsys.readouterr().err
    make_tokenizer(tmp_path / "tok")
    assert data.main([*arguments, "no_such_package_here"]) == 1
    assert not (tmp_path / "o").exists()
    assert data.main([*arguments, package]) == 0
    assert "train.bin" in capsys.readouterr().out


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "o"

    def fail() -> None:
        with complete_folder(output) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with complete_folder(output) as folder:
        (folder / "all").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    assert (output / "all").read_text() == "x"


def test_the_fallback_corpus_is_what_its_script_writes() -> None:
    root = Path(__file__).parents[2]
    sys.path.insert(0, str(root / "scripts"))
    try:
        import make_fallback_corpus as script
    finally:
        sys.path.pop(0)
    folder = root / "tests" / "data"
    assert script.text(1, script.TRAIN_BYTES) == (folder / "corpus_train.txt").read_text()
    assert script.text(2, script.HELDOUT_BYTES) == (folder / "corpus_heldout.txt").read_text()
