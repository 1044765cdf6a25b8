"""What an optimizer keeps between steps: moments (formats), hidden bits of weights (masters); random bits."""

from memtrain.optim.storage.formats import StateFormat, state_format
from memtrain.optim.storage.masters import MasterFormat, master_format
from memtrain.optim.storage.random import RandomKey, random_bits, stochastic_round

__all__ = [
    "MasterFormat",
    "RandomKey",
    "StateFormat",
    "master_format",
    "random_bits",
    "state_format",
    "stochastic_round",
]
