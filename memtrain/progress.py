"""What a run shows while it runs: a bar on a terminal, a line every few steps elsewhere, and a file of
metrics whose keys carry their units.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from memtrain.planner.units import GiB
from memtrain.runfiles import writing

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimizer step."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the micro-batches."""
    learning_rate: float
    gradient_norm: float | None
    """Before clipping; None where nothing asked for it."""
    seconds: float
    tokens: int
    memory_now_bytes: int
    memory_peak_bytes: int

    def metrics(self) -> dict[str, int | float | str | None]:
        """The line of ``metrics.jsonl``. JSON has no NaN: such values are written as strings."""
        values: dict[str, int | float | None] = {
            "step": self.step,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "time/step(s)": round(self.seconds, 4),
            "throughput(tokens/s)": round(self.tokens / self.seconds, 2),
            "memory/now(GiB)": round(self.memory_now_bytes / GiB, 4),
            "memory/peak(GiB)": round(self.memory_peak_bytes / GiB, 4),
        }
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }

    def text(self, budget_bytes: int) -> str:
        """``loss 2.1234  412 tokens/s  1.05 GiB now, 1.13 peak of 1.20``."""
        return (
            f"loss {self.loss:.4f}  {self.tokens / self.seconds:.0f} tokens/s  "
            f"{self.memory_now_bytes / GiB:.2f} GiB now, {self.memory_peak_bytes / GiB:.2f} peak "
            f"of {budget_bytes / GiB:.2f}"
        )


class ProgressDisplay:
    """Shows and writes down every step. Only rank 0 has one.

    Args:
        metrics_path: one JSON line a step, written at once. A resumed run keeps the lines of the steps
            before it; those of steps that it will do again are dropped.
        total_steps: of the whole run; done_steps: before this process (a resumed run).
        stream: a bar when it is a terminal.

    Raises:
        RunFileError: the file of metrics cannot be written; also from ``show`` and at the end.
    """

    def __init__(
        self,
        metrics_path: Path,
        *,
        total_steps: int,
        done_steps: int,
        budget_bytes: int,
        log_every: int,
        stream: TextIO | None = None,
    ) -> None:
        self.total_steps, self.budget_bytes, self.log_every = total_steps, budget_bytes, log_every
        self._stream = sys.stdout if stream is None else stream
        kept = _lines_until(metrics_path, done_steps)
        self._path = metrics_path
        with ExitStack() as undo, writing(metrics_path):
            self._file = metrics_path.open("w", buffering=1)
            undo.callback(self._abandon)
            self._file.writelines(kept)
            undo.pop_all()
        self._bar: Progress | None = None
        if self._stream.isatty():
            self._bar = _make_bar(self._stream)
            self._task = self._bar.add_task("", total=total_steps, completed=done_steps)

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if error is None:
            with writing(self._path):
                self._file.close()
        else:
            self._abandon()

    def _abandon(self) -> None:
        """Close after an error: what a full disk refused once it would refuse again, over the first error."""
        with suppress(OSError):
            self._file.close()

    def show(self, record: StepRecord) -> None:
        """A step is done. Raises RunFileError where its line cannot be written."""
        with writing(self._path):
            self._file.write(json.dumps(record.metrics(), allow_nan=False) + "\n")
        text = record.text(self.budget_bytes)
        if self._bar is not None:
            self._bar.update(self._task, completed=record.step, description=text)
        elif record.step % self.log_every == 0 or record.step == self.total_steps:
            print(f"step {record.step}/{self.total_steps}  {text}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """A line between steps: an evaluation, a checkpoint."""
        if self._bar is not None:
            self._bar.print(text)
        else:
            print(text, file=self._stream, flush=True)


def _lines_until(path: Path, step: int) -> list[str]:
    """Lines of a metrics file up to ``step``; a last line that a crash cut short is not among them."""
    if step == 0 or not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("}\n")]
    return [line for line in lines if json.loads(line)["step"] <= step]


def _make_bar(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=Console(file=stream),
    )
