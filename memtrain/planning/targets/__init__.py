"""What to run a plan with: files for the tools that exist, each with what the tool cannot do of the plan.

A target is exact where the tool has a knob for what was planned and says so where it has none. Nothing is
written that the tool would not read: the tests load every file with the tool's own classes.
"""

from memtrain.planning.targets.choose import targets
from memtrain.planning.targets.common import Context, Target

__all__ = ["Context", "Target", "targets"]
