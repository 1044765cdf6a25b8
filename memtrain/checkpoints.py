"""The checkpoints of a run: which to take up, when a recipe may take one up, how many to keep.

What a checkpoint holds is ``memtrain.offload.snapshot``'s business; here are only their names, and the part
of them that is the trainer's: ``progress.json``.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memtrain.offload.snapshot import latest_checkpoint, load_checkpoint, save_checkpoint
from memtrain.recipe import Recipe, RecipeError
from memtrain.runfiles import make_folder, writing

if TYPE_CHECKING:
    from memtrain.session import Session
    from memtrain.snapshots import RunSnapshots

_FOLDER = re.compile(r"step-\d{6,}")


class RunFinished(Exception):
    """The checkpoint that would be taken up is the run's last; the message says how to go on."""


class Checkpoints:
    """The folder ``checkpoint/`` of a run, with one folder ``step-<steps done>`` per checkpoint."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self.directory, self.recipe = directory, recipe
        self._ours: list[Path] = []
        """What this run may keep: what it took up and what it wrote, the oldest first."""

    def find_resume(self, held: Path | None = None) -> Path | None:
        """The checkpoint that the recipe asks to take up, or None to start anew. Nothing is loaded yet.

        Args:
            held: a snapshot in memory; ``auto`` takes it where it is further than what is on disk.

        Raises:
            RecipeError: the folder named holds no checkpoint; ``auto`` found one of a run that computes
                something else; or it went further than ``training.steps``.
            RunFinished: all the steps asked for are done.
        """
        resume = self.recipe.checkpoint.resume
        if resume == "never":
            return None
        folder = _further(latest_checkpoint(self.directory), held) if resume == "auto" else Path(resume)
        if folder is None:
            return None
        try:
            progress = json.loads((folder / "progress.json").read_text())
            steps, digest = int(progress["steps_done"]), progress["recipe_digest"]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise RecipeError(
                f"{folder} is not a checkpoint of a run ({error!r}): checkpoint.resume takes auto, never or "
                "the folder of one"
            ) from error
        if resume == "auto" and digest != self.recipe.digest:
            raise RecipeError(
                f"{folder} belongs to a run whose model, data, training, optimizer, schedule or lossy forms "
                f"differ: set checkpoint.resume=never to start anew, checkpoint.resume={folder} to take it "
                "up nevertheless, or another output.directory"
            )
        if steps > self.recipe.training.steps:
            raise RecipeError(
                f"{folder} is {steps} steps far, training.steps is {self.recipe.training.steps}: raise it"
            )
        if steps == self.recipe.training.steps:
            raise RunFinished(f"all {steps} steps are done: {folder}\nto train anew: checkpoint.resume=never")
        return folder

    def load(self, folder: Path, session: Session) -> int:
        """Put ``folder``, from ``find_resume``, into the session; the steps done. Raises OffloadError."""
        progress = load_checkpoint(folder, session)
        self._ours = [folder] if folder.parent == self.directory else []
        return int(progress["steps_done"])

    def save(self, session: Session, steps_done: int) -> Path:
        """Write ``step-<steps_done>``, then delete all but this run's newest ``checkpoint.keep``.

        A run that starts anew in the directory of another leaves the other's checkpoints alone until its
        own first one is complete. Raises OffloadError and RunFileError.
        """
        make_folder(self.directory)
        folder = self._folder(steps_done)
        save_checkpoint(folder, session, progress=self.progress(steps_done))
        self._keep(folder)
        return folder

    def begin(self, snapshots: RunSnapshots, steps_done: int) -> None:
        """As ``save``, while training goes on. Raises OffloadError and RunFileError, the latter later."""
        make_folder(self.directory)
        folder = self._folder(steps_done)
        snapshots.save(folder, progress=self.progress(steps_done), published=lambda: self._keep(folder))

    def progress(self, steps_done: int) -> dict[str, Any]:
        """The trainer's part of a checkpoint."""
        return {"steps_done": steps_done, "recipe_digest": self.recipe.digest}

    def _folder(self, steps_done: int) -> Path:
        return self.directory / f"step-{steps_done:06d}"

    def _keep(self, folder: Path) -> None:
        """``folder`` is complete: delete what is now too old."""
        self._ours = [*(one for one in self._ours if one != folder), folder]
        self._ours = self._ours[-self.recipe.checkpoint.keep :]
        for other in self.directory.iterdir():
            if _FOLDER.fullmatch(other.name) and other not in self._ours:
                with writing(other):
                    shutil.rmtree(other)


def _further(one: Path | None, other: Path | None) -> Path | None:
    """The checkpoint with more steps done; ``one`` where they are equal."""
    if one is None or other is None:
        return one or other
    steps = [int(json.loads((path / "progress.json").read_text())["steps_done"]) for path in (one, other)]
    return one if steps[0] >= steps[1] else other
