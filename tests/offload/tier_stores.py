"""Stores on a small scale, and one whose disk fails on purpose."""

import torch

from memtrain.offload.errors import (
    SwapDirectoryError,
)
from memtrain.offload.io import FaultyBackend, ThreadPoolBackend
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import NvmeStore

U = 4096

CAPACITY = 64 * U


def filled(nbytes, seed=0):
    slab = Slab(max(nbytes, 1))
    generator = torch.Generator().manual_seed(seed)
    slab.buffer.copy_(torch.randint(0, 256, (slab.nbytes,), dtype=torch.uint8, generator=generator))
    return slab.buffer[:nbytes]


def refuse_direct(descriptor, where, *, new):
    raise SwapDirectoryError("no direct I/O here")


def faulty_nvme(tmp_path, plan=None, *, threads=2, **options):
    backend = FaultyBackend(ThreadPoolBackend(threads), plan, **options)
    return NvmeStore(tmp_path, CAPACITY, piece_bytes=2 * U, backend=backend), backend
