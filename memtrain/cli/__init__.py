"""The command line: ``memtrain run | ls | show | validate | doctor | profile``.

Nothing here imports torch until a command that needs it runs.
"""

from memtrain.cli.app import main

__all__ = ["main"]
