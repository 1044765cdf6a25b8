"""Bases that follow from a seed alone: no gradient, no communication, and nothing stored but the key.

``gaussian`` with entries N(0, 1/r) and ``rademacher`` with entries +-1/sqrt(r) satisfy ``E[P P^T] = I``: the
way down and up is unbiased, but it is not a projection, and what it leaves over is not orthogonal to it.
``semi_orthogonal`` is the Q of a Gaussian matrix; because making it again would be a QR decomposition a step,
its basis is stored. The other two are made again from their key whenever they are used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memtrain.optim.projection.base import Stored
from memtrain.optim.projection.config import Projection
from memtrain.optim.projection.draw import normal, rademacher
from memtrain.optim.projection.matrix import LEFT, MatrixProjector
from memtrain.optim.projection.workspace import Workspace, draw_bytes, qr_library_bytes
from memtrain.optim.storage import RandomKey, random_bits

SEED = "seed"
KEY_WORDS = 3
"""seed, parameter, step"""
LEFT_STREAM, RIGHT_STREAM, CHOICE_STREAM = 1, 2, 3
"""Streams of the key that projections draw from; 0 rounds the weight, those from 16 round moments."""


class RandomProjector(MatrixProjector):
    """``gaussian``, ``rademacher`` or ``semi_orthogonal``."""

    needs_gradient = False

    def __init__(self, projection: Projection, shape: torch.Size) -> None:
        super().__init__(projection, shape)
        self.orthonormal = self.kind == "semi_orthogonal"

    def empty(self, device: torch.device | str) -> Stored:
        """The words of a key on the CPU, or a zero basis."""
        if not self.orthonormal:
            return {SEED: torch.zeros(KEY_WORDS, dtype=torch.int64, device="cpu")}
        return {
            side: torch.zeros(self.basis_shape(side), dtype=self.basis_dtype, device=device)
            for side in self.sides
        }

    def refresh_(self, stored: Stored, gradient: Tensor | None, *, key: RandomKey) -> None:
        """See :class:`Projector`."""
        if not self.orthonormal:
            write_key_(stored[SEED], key)
            return
        for side in self.sides:
            basis = stored[side]
            draw = _of_side(key, side)
            # Unnamed, so that it is freed before the other side's is drawn.
            basis.copy_(torch.linalg.qr(gaussian(draw, tuple(basis.shape), basis.device)).Q)

    def open(self, stored: Stored, device: torch.device) -> Stored:
        """The basis, made from its key where it is not stored."""
        if self.orthonormal:
            return stored
        key = read_key(stored[SEED])
        draw = normal if self.kind == "gaussian" else rademacher
        scale = 1 / math.sqrt(self.rank)
        return {
            side: draw(
                _of_side(key, side), self.basis_shape(side), device, scale=scale, dtype=self.basis_dtype
            )
            for side in self.sides
        }

    def size_bytes(self) -> int:
        """See :class:`Projector`."""
        return self.basis_bytes() if self.orthonormal else KEY_WORDS * torch.int64.itemsize

    def refresh_workspace(self, gradient_dtype: torch.dtype, *, first: bool = False) -> Workspace:
        """See :class:`Projector`."""
        if not self.orthonormal:
            return Workspace(tensor_bytes=KEY_WORDS * torch.int64.itemsize)
        d, r, batch = max(self.dimensions[side] for side in self.sides), self.rank, math.prod(self.batch)
        # While drawing; in the decomposition, its argument, Q and R.
        decomposing = (2 * d * r + r * r) * batch * torch.float32.itemsize
        return Workspace(
            tensor_bytes=max(draw_bytes(d * r * batch), decomposing), library_bytes=qr_library_bytes(d, r)
        )


def gaussian(key: RandomKey, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal numbers in fp32, by Box and Muller, two from each pair of words."""
    count = math.prod(shape)
    pairs = -(-count // 2)
    radius, angle = random_bits(key, 2 * pairs, device).view(2, pairs)
    # The upper 24 bits, so that every fp32 is exact; (0, 1] under the logarithm.
    uniform = ((radius >> 8) & 0xFFFFFF).float().add_(1).mul_(2.0**-24)
    radius_of = uniform.log_().mul_(-2).sqrt_()
    turn = ((angle >> 8) & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    normal = torch.cat((radius_of * turn.cos(), radius_of * turn.sin()))
    return normal[:count].reshape(shape)


def write_key_(words: Tensor, key: RandomKey) -> None:
    """Into int64 ``[3]``; the stream is the projector's own affair."""
    words.copy_(torch.tensor([key.seed, key.parameter, key.step], device="cpu"))


def read_key(words: Tensor) -> RandomKey:
    """What :func:`write_key_` wrote."""
    seed, parameter, step = words.tolist()
    return RandomKey(seed=seed, parameter=parameter, step=step)


def _of_side(key: RandomKey, side: str) -> RandomKey:
    return key.fold(LEFT_STREAM if side == LEFT else RIGHT_STREAM)
