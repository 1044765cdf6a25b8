"""The mathematics of training in less memory: optimizers, autograd functions that keep less, and kernels."""

from memtrain.optim.grid import GridOptimizer, NonFiniteGradientWarning
from memtrain.optim.named import FRUGAL, AdamW, AdamW8bit, Apollo, ApolloMini, Fira, GaLore, NaturalGaLore
from memtrain.optim.projection import ProjectionError
from memtrain.optim.roles import ParameterRole, Role, classify, param_groups, role_table
from memtrain.optim.small_gradients import SmallGradients
from memtrain.optim.two_pass import TwoPassClipping

__all__ = [
    "FRUGAL",
    "AdamW",
    "AdamW8bit",
    "Apollo",
    "ApolloMini",
    "Fira",
    "GaLore",
    "GridOptimizer",
    "NaturalGaLore",
    "NonFiniteGradientWarning",
    "ParameterRole",
    "ProjectionError",
    "Role",
    "SmallGradients",
    "TwoPassClipping",
    "classify",
    "param_groups",
    "role_table",
]
