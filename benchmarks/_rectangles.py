"""Address instances whose optimum is known: a rectangle cut in two again and again, with nothing left over.

The pieces are buffers, width is time and height is bytes; they fill the rectangle, so its height is the load
and the optimum.
"""

from __future__ import annotations

import random

from memtrain.planner.buffers import Buffer


def cut_rectangle(count: int, seed: int, width: int, height: int) -> list[Buffer]:
    """``count`` pieces of ``width`` moments times ``height`` bytes in random order; large ones are cut more
    often. ``count`` must be at most ``width * height``.
    """
    chance = random.Random(seed)
    pieces = [(0, width, 0, height)]
    while len(pieces) < count:
        areas = [(right - left) * (top - low) for left, right, low, top in pieces]
        left, right, low, top = pieces.pop(chance.choices(range(len(pieces)), areas)[0])
        across = chance.random() < 0.5
        if right - left > 1 and (across or top - low == 1):
            middle = chance.randrange(left + 1, right)
            pieces += [(left, middle, low, top), (middle, right, low, top)]
        elif top - low > 1:
            middle = chance.randrange(low + 1, top)
            pieces += [(left, right, low, middle), (left, right, middle, top)]
        else:
            pieces.append((left, right, low, top))
    chance.shuffle(pieces)
    return [Buffer(f"b{i}", left, right, top - low) for i, (left, right, low, top) in enumerate(pieces)]
