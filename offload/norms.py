"""The 2-norm of a gradient in fp32, without an fp32 copy of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

NORM_CHUNK_ELEMENTS = 1 << 22
"""16 MiB of fp32 at a time. ``vector_norm(dtype=float32)`` of a bf16 tensor converts all of it first: 108 MiB
for the 28 M elements of SmolLM2-135M's embedding, a tenth of that job's whole budget."""


def float_norm(gradient: Tensor) -> Tensor:
    """2-norm of ``gradient`` as fp32.

    Bit-equal to ``torch.linalg.vector_norm(gradient.float())`` up to ``NORM_CHUNK_ELEMENTS`` elements; beyond
    that the norm of the norms of chunks of that size, which is the same sum in another order.
    """
    flat = gradient.reshape(-1)
    norms = [
        torch.linalg.vector_norm(part, 2.0, dtype=torch.float32) for part in flat.split(NORM_CHUNK_ELEMENTS)
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), 2.0)
