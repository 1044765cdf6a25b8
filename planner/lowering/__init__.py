"""From a job to the problem that ``ranges`` solves: bytes and seconds of one GPU, with every degree applied.

``tensors`` gives a block's classes of saved tensors and its transients, ``seconds`` what operations and
messages take, ``states`` what parameters need, ``places`` the machine; ``problem.problem_of`` joins them.
``step_messages`` is what a step takes beside the problem.
"""

from memtrain.planner.lowering.problem import problem_of

__all__ = ["problem_of"]
