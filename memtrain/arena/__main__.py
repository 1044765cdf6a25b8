"""Compile the allocator now, as ``make setup`` does: ``python -m memtrain.arena``."""

from __future__ import annotations

import sys

from memtrain.arena import library
from memtrain.optim.kernels import native


def main() -> int:
    """Compile and load it; 1 where that fails, with the remedy."""
    try:
        print(library.load()._name)
    except native.FAILURES as error:
        print(
            f"the planned allocator was not compiled, and torch's own will be used; {native.remedy(error)}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
