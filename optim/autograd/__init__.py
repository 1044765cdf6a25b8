"""Autograd functions that keep less, and how they are put on a model.

Functions: ``norms``, ``recomputed`` (linear layers), ``swiglu``, ``tiled``, ``chunked_attention``,
``chunked_loss``. Models: ``apply_to`` and ``revert`` by a ``Policy``; ``install_chunked_loss``.
"""

from memtrain.optim.autograd.apply import EXACT, Applied, Policy, Rule, apply_to, revert
from memtrain.optim.autograd.causal_lm import ChunkedLossHandle, UnsupportedHeadError, install_chunked_loss
from memtrain.optim.autograd.chunked_attention import chunked_attention
from memtrain.optim.autograd.chunked_loss import chunked_cross_entropy
from memtrain.optim.autograd.norms import NormLinear, RMSNormForm, layer_norm, rms_norm
from memtrain.optim.autograd.recomputed import linear
from memtrain.optim.autograd.saved_bytes import SavedBytes
from memtrain.optim.autograd.swiglu import activation_linear, gated_linear
from memtrain.optim.autograd.tiled import tiled
from memtrain.optim.autograd.tiled_linear import TiledEmbedding, TiledLinear
from memtrain.optim.autograd.tiled_loss import tiled_cross_entropy
from memtrain.optim.autograd.treatments import NotServedError, Offer, register_treatment

__all__ = [
    "EXACT",
    "Applied",
    "ChunkedLossHandle",
    "NormLinear",
    "NotServedError",
    "Offer",
    "Policy",
    "RMSNormForm",
    "Rule",
    "SavedBytes",
    "TiledEmbedding",
    "TiledLinear",
    "UnsupportedHeadError",
    "activation_linear",
    "apply_to",
    "chunked_attention",
    "chunked_cross_entropy",
    "gated_linear",
    "install_chunked_loss",
    "layer_norm",
    "linear",
    "register_treatment",
    "revert",
    "rms_norm",
    "tiled",
    "tiled_cross_entropy",
]
