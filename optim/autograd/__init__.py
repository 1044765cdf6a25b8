"""Autograd functions that keep less."""

from memtrain.optim.autograd.causal_lm import ChunkedLossHandle, UnsupportedHeadError, install_chunked_loss
from memtrain.optim.autograd.chunked_loss import chunked_cross_entropy

__all__ = ["ChunkedLossHandle", "UnsupportedHeadError", "chunked_cross_entropy", "install_chunked_loss"]
