"""The checkpoints of a run: which to take up, when a recipe may take one up, how many to keep.

What a checkpoint holds is ``memtrain.offload.snapshot``'s business; here are only their names.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from memtrain.recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from memtrain.session import Session


class RunFinished(Exception):
    """The checkpoint that would be taken up is the run's last; the message says how to go on."""


class Checkpoints:
    """The folder ``checkpoint/`` of a run, with one folder ``step-<steps done>`` per checkpoint."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory, self.recipe = directory, recipe
        self._ours: list[Path] = []
        """What this run may keep: what it took up and what it wrote, the oldest first."""

    def find_resume(self) -> Path | None:
        """The checkpoint that the recipe asks to take up, or None to start anew.

        Raises:
            RecipeError: the folder named is not there.
            RunFinished: the output directory holds all the steps asked for.
        """
        from memtrain.offload.snapshot import latest_checkpoint

        resume = self.recipe.checkpoint.resume
        if resume == "never":
            return None
        if resume == "auto":
            latest = latest_checkpoint(self.directory)
            if latest is not None and latest.name == self._name(self.recipe.training.steps):
                raise RunFinished(
                    f"all {self.recipe.training.steps} steps are done: {latest}\n"
                    "to train anew: checkpoint.resume=never"
                )
            return latest
        if not Path(resume).is_dir():
            raise RecipeError(
                f"checkpoint.resume {resume!r} is not a folder; give auto, never or a checkpoint's folder"
            )
        return Path(resume)

    def load(self, folder: Path, session: Session) -> int:
        """Put ``folder`` into the session; the steps done.

        Raises:
            RecipeError: ``auto`` found a run that computes something else, or one that went further.
        """
        from memtrain.offload.snapshot import load_checkpoint

        progress = load_checkpoint(folder, session)
        if self.recipe.checkpoint.resume == "auto" and progress["recipe_digest"] != self.recipe.digest:
            raise RecipeError(
                f"{folder} belongs to a run whose model, data, training, optimizer or schedule differ: "
                f"set checkpoint.resume=never to start anew, checkpoint.resume={folder} to take it up "
                "nevertheless, or another output.directory"
            )
        steps = int(progress["steps_done"])
        if steps > self.recipe.training.steps:
            raise RecipeError(
                f"{folder} is {steps} steps far, training.steps is {self.recipe.training.steps}: raise it"
            )
        self._ours = [folder] if folder.parent == self.directory else []
        return steps

    def save(self, session: Session, steps_done: int) -> Path:
        """Write ``step-<steps_done>``, then delete all but this run's newest ``checkpoint.keep``.

        A run that starts anew in the directory of another leaves the other's checkpoints alone until its
        own first one is complete.
        """
        from memtrain.offload.snapshot import save_checkpoint

        folder = self.directory / self._name(steps_done)
        progress = {"steps_done": steps_done, "recipe_digest": self.recipe.digest}
        save_checkpoint(folder, session, progress=progress)
        self._ours = [*(one for one in self._ours if one != folder), folder][-self.recipe.checkpoint.keep :]
        for other in self.directory.glob("step-*"):
            if other not in self._ours:
                shutil.rmtree(other)
        return folder

    @staticmethod
    def _name(steps_done: int) -> str:
        return f"step-{steps_done:06d}"
