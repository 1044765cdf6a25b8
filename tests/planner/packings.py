"""Instances for the tests of packing, and the optimum of tiny ones by brute force."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from memtrain.planner.buffers import Buffer

Span = tuple[int, int, int]
"""Start, end, size."""


def spans(most: int, *, times: int = 6, sizes: int = 6) -> st.SearchStrategy[list[Span]]:
    """Up to ``most`` lifetimes with sizes."""
    span = st.tuples(st.integers(0, times - 1), st.integers(1, times), st.integers(1, sizes))
    return st.lists(span.map(lambda s: (s[0], s[0] + s[1], s[2])), min_size=1, max_size=most)


def named(items: Sequence[Span]) -> list[Buffer]:
    """Buffers b0, b1, ..."""
    return [Buffer(f"b{i}", *span) for i, span in enumerate(items)]


def lowest(items: Sequence[Span]) -> int:
    """The optimum: every order of rising offsets is tried, each buffer on top of those below it."""
    best = sum(size for _, _, size in items)

    def stack(left: frozenset[int], placed: tuple[tuple[Span, int], ...], last: int, height: int) -> None:
        nonlocal best
        if not left:
            best = min(best, height)
            return
        for i in left:
            start, end, size = items[i]
            offset = max((top for (s, e, _), top in placed if s < end and start < e), default=0)
            if offset >= last and max(height, offset + size) < best:
                stack(left - {i}, (*placed, (items[i], offset + size)), offset, max(height, offset + size))

    stack(frozenset(range(len(items))), (), 0, 0)
    return best


def load(items: Sequence[Span]) -> int:
    """The most that lives at one moment, moment by moment."""
    moments = range(min(s for s, _, _ in items), max(e for _, e, _ in items))
    return max(sum(size for s, e, size in items if s <= moment < e) for moment in moments)
