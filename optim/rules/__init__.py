"""Inner rules: what Adam, Adafactor, Adam-mini, Lion and momentum do with a gradient of any shape."""

from memtrain.optim.rules.adafactor import Adafactor
from memtrain.optim.rules.adam import Adam, AdamMini
from memtrain.optim.rules.base import Moments, MomentSpec, Rule
from memtrain.optim.rules.momentum import Lion, Momentum
from memtrain.optim.rules.natural import Natural

__all__ = ["Adafactor", "Adam", "AdamMini", "Lion", "MomentSpec", "Moments", "Momentum", "Natural", "Rule"]
