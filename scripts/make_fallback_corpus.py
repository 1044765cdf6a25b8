"""Write the fallback corpus of the tests: plain English that a small model can learn something of.

    python scripts/make_fallback_corpus.py tests/data

Sentences are drawn from a small grammar by a generator of our own arithmetic, so the files are the same
everywhere and belong to nobody else. What can be learnt: spelling, agreement, sums, and the order of days.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

TRAIN_BYTES, HELDOUT_BYTES = 150_000, 20_000

ADJECTIVES = "small old quiet heavy bright narrow distant patient wooden silver early careful".split()
NOUNS = "river engine teacher window bridge sailor garden letter clock market mountain painter".split()
VERBS = "follows remembers carries watches repairs describes measures answers crosses paints".split()
PLACES = "near the harbour,behind the station,under the lamp,across the valley,in the library".split(",")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


class Draw:
    """A linear congruential generator (multiplier and increment of Knuth's MMIX)."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def below(self, limit: int) -> int:
        """A number in [0, limit)."""
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (self.state >> 33) % limit

    def one_of(self, words: Sequence[str]) -> str:
        """One of ``words``."""
        return words[self.below(len(words))]


def noun_phrase(draw: Draw) -> str:
    """``the old bridge``."""
    return f"the {draw.one_of(ADJECTIVES)} {draw.one_of(NOUNS)}"


def sentence(draw: Draw) -> str:
    """One of four kinds."""
    kind = draw.below(4)
    if kind == 0:
        first, second = draw.below(50), draw.below(50)
        return f"If you add {first} and {second} you get {first + second}."
    if kind == 1:
        day = draw.below(7)
        return f"The day after {DAYS[day]} is {DAYS[(day + 1) % 7]}."
    if kind == 2:
        return f"On {draw.one_of(DAYS)} {noun_phrase(draw)} {draw.one_of(VERBS)} {noun_phrase(draw)}."
    subject = noun_phrase(draw)
    return (
        f"{subject[0].upper()}{subject[1:]} {draw.one_of(VERBS)} {noun_phrase(draw)} {draw.one_of(PLACES)}."
    )


def text(seed: int, size_bytes: int) -> str:
    """Paragraphs of three to seven sentences, at least ``size_bytes`` of ASCII."""
    draw, paragraphs, length = Draw(seed), [], 0
    while length < size_bytes:
        paragraph = " ".join(sentence(draw) for _ in range(3 + draw.below(5)))
        paragraphs.append(paragraph)
        length += len(paragraph) + 2
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description="Write the fallback corpus.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "corpus_train.txt").write_text(text(1, TRAIN_BYTES))
    (folder / "corpus_heldout.txt").write_text(text(2, HELDOUT_BYTES))


if __name__ == "__main__":
    main()
