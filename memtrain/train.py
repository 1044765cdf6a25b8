"""Train a recipe: the plan first, then an ordinary PyTorch loop, then prediction beside measurement.

    torchrun --standalone --nproc-per-node 1 -m memtrain.train RECIPE [section.key=value ...]

Exit codes: 0 trained, 1 a mistake in the command or the recipe, or a failure, 2 the budget cannot work.
"""

from __future__ import annotations

if __name__ == "__main__":
    from memtrain.malloc import restart_with_allocator

    restart_with_allocator()  # before torch is loaded, or it would be loaded twice

import argparse
import dataclasses
import math
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import torch

import memtrain
from memtrain.checkpoints import Checkpoints, RunFinished
from memtrain.coding import CodecError
from memtrain.data import DataError, Tokens, Windows
from memtrain.largest_layer import with_tiles_kept
from memtrain.memory import MemorySampler, PeakMeter
from memtrain.offload.errors import OffloadError
from memtrain.optim import ParameterRole, role_table
from memtrain.optim.autograd.causal_lm import UnsupportedHeadError
from memtrain.optim.kernels import native
from memtrain.optim.storage.lossless import MissingZstandardError
from memtrain.optimizer_sections import AdamWSection, GridSection
from memtrain.optimizers import make_optimizer, measured_state_bytes, predicted_state_bytes
from memtrain.planner import resident
from memtrain.planner.actions import Tier
from memtrain.planner.infeasible import overrun
from memtrain.planner.machine import Budget, BudgetError
from memtrain.planner.tracing.blocks import BlocksNotFoundError
from memtrain.planner.vertical import OrderError
from memtrain.progress import ProgressDisplay, StepRecord
from memtrain.recipe import Recipe, RecipeError, ScheduleSection, load_recipe
from memtrain.refusals import PrepareError
from memtrain.report import (
    Phase,
    Summary,
    form_facts,
    infeasible_text,
    plan_text,
    recompute_facts,
    summary_text,
)
from memtrain.runfiles import RunFileError, make_folder, write_text
from memtrain.session import Session
from memtrain.snapshots import RunSnapshots
from memtrain.sparse_tables import sparse_weights
from memtrain.streamed_models import StreamedModel
from memtrain.tiling import tiles_of, tiling_lines
from memtrain.weights import load_model, load_streamed

Batch = dict[str, torch.Tensor]
_REFUSALS = (
    RecipeError,
    DataError,
    RunFileError,
    BudgetError,
    OffloadError,
    PrepareError,
    BlocksNotFoundError,
    UnsupportedHeadError,
    CodecError,
    MissingZstandardError,
    OrderError,
)
"""What is told in one line; anything else is a fault of ours and shows where it came from."""


def learning_rate_factor(schedule: ScheduleSection, step: int, total_steps: int) -> float:
    """The learning rate of step ``step`` (from 0) as a fraction of the optimizer's: linear warm-up from
    1/(warmup+1), then constant, linear or half a cosine down to ``final_fraction`` at the last step.

    A function of the step alone, so a resumed run needs no schedule state.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return 1.0
    span = max(1, total_steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    remaining = 1 - progress if schedule.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.final_fraction + (1 - schedule.final_fraction) * remaining


def build_optimizer(
    recipe: Recipe, model: torch.nn.Module
) -> tuple[torch.optim.Optimizer, list[ParameterRole]]:
    """The recipe's optimizer over the trainable parameters, which holds no state yet, and for one of
    memtrain's own what is projected. Raises RecipeError: the model's parameters cannot have it."""
    section = recipe.optimizer
    if isinstance(section, GridSection):
        overrides = getattr(section, "overrides", None)
        try:
            return make_optimizer(section.name, model, overrides=overrides, **section.arguments())
        except ValueError as error:
            raise RecipeError(f"optimizer: {error}") from error
    by_rows = set(map(id, sparse_weights(model)))
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in by_rows]
    if isinstance(section, AdamWSection):
        adamw = torch.optim.AdamW(
            parameters,
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=section.fused,
        )
        return adamw, []
    sgd = torch.optim.SGD(
        parameters,
        lr=section.lr,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        fused=section.fused,
    )
    return sgd, []


def build_sparse_optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    """Of the model's tables by rows; None where the recipe has none."""
    if not recipe.model.sparse_tables:
        return None
    section = recipe.sparse_section
    return torch.optim.SparseAdam(
        sparse_weights(model), lr=section.lr or recipe.optimizer.lr, betas=section.betas, eps=section.eps
    )


def pick_device(choice: str) -> torch.device:
    """``auto`` is this process's GPU where there is one. Raises RecipeError when cuda is asked in vain."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise RecipeError("training.device is cuda, but torch finds no CUDA device; use auto or cpu")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


class Trainer:
    """One run of one recipe in this process.

    Raises, from the constructor: RecipeError, DataError and BudgetError for what the recipe asks and cannot
    have, ``memtrain.InfeasibleError`` when no plan fits the budget, OffloadError when a tier cannot serve. At
    any time: RunFileError when a file of the run cannot be written.
    """

    def __init__(self, recipe: Recipe, sampler: MemorySampler) -> None:
        self.recipe, self.sampler, self.peaks = recipe, sampler, PeakMeter()
        self.phases: list[Phase] = []
        self.streamed: StreamedModel | None = None
        self.output = recipe.output_directory
        self.checkpoints = Checkpoints(self.output / "checkpoint", recipe)
        self.snapshots = RunSnapshots(recipe.checkpoint, self.output)
        self._sessions = ExitStack()
        try:
            self._begin()
        except BaseException as error:
            self.close(finished=isinstance(error, RunFinished))
            raise

    def _begin(self) -> None:
        recipe = self.recipe
        resume_from = self.checkpoints.find_resume(self.snapshots.find_held())
        self._prepare_output()
        training = recipe.training
        torch.manual_seed(training.seed)
        if training.threads is not None:
            torch.set_num_threads(training.threads)
        self.device = pick_device(training.device)
        if self.device.type == "cpu" and isinstance(recipe.optimizer, GridSection):
            native.compile_missing()  # before the model takes memory that a compiler would need beside it
        train, heldout = Tokens(recipe.data.train), Tokens(recipe.data.heldout)
        shape = {
            "sequence_length": recipe.data.sequence_length,
            "batch_size": training.micro_batch_size,
        }
        self.train_windows = Windows(train, seed=training.seed, **shape)
        self.heldout_windows = Windows(heldout, seed=None, **shape)
        with self._phase("load"):
            resident.drop_library_pages()  # what importing mapped would stand beside the model at the peak
            model = self._load()
        _check_vocabulary(model, train, heldout)
        with self._phase("plan"):
            self.session = self._make_session(model)
            self._sessions.callback(self.session.close)
        self.done_steps = 0
        if resume_from is not None:
            self.done_steps = self.checkpoints.load(resume_from, self.session)
            print(f"resumed after step {self.done_steps} from {resume_from}", flush=True)
        for line in self.snapshots.attach(self.session, self.sampler.now_seconds()):
            print(line, flush=True)
        self._refuse_overrun()

    def _load(self) -> torch.nn.Module:
        recipe = self.recipe
        if not recipe.model.streamed:
            return load_model(recipe.model, self.device)
        self.streamed = load_streamed(
            recipe.model, self.device, recipe.memory_budget(), recipe.tiers.weight_codecs()
        )
        self._sessions.callback(self.streamed.close)
        if self.streamed.unexpected:
            print(f"not used of the files: {', '.join(self.streamed.unexpected)}", flush=True)
        for line in (*tiling_lines(self.streamed.model), *self.streamed.cuts.lines()):
            print(line, flush=True)
        return self.streamed.model

    def close(self, *, finished: bool) -> None:
        """End snapshots and session, and give tiers and memory back. Raises OffloadError of a snapshot that
        failed, where the run is ``finished``; else an error is on its way already."""
        with self._sessions:
            try:
                self.snapshots.close(finished=finished)
            except OffloadError:
                if finished:
                    raise

    def _make_session(self, model: torch.nn.Module) -> Session:
        recipe, training = self.recipe, self.recipe.training
        optimizer, roles = build_optimizer(recipe, model)
        if roles:
            print(role_table(roles), flush=True)
        halved = None if tiles_of(model) else optimizer  # a tile's master is whole
        self.predicted_optimizer_bytes = predicted_state_bytes(recipe.optimizer, model, roles, halved)
        return memtrain.prepare(
            model,
            optimizer,
            self._batch(self.train_windows, 0),
            budget=self._plan_budget(),
            sparse_optimizer=build_sparse_optimizer(recipe, model),
            micro_batches=training.accumulation,
            master_weights=recipe.optimizer.master_weights,
            nonfinite=training.nonfinite,
            options=recipe.planner_options(),
            chunked_loss=training.chunked_loss,
            codecs=recipe.tiers.codecs(),
            weight_codecs=recipe.tiers.weight_codecs(),
            directory=self.output,
            reached_bytes=self.peaks.whole_bytes() if self.device.type == "cpu" else 0,
            spare_state_bytes=self.snapshots.spare_bytes,
            allocator=training.allocator,
        )

    def _plan_budget(self) -> Budget:
        """The recipe's, less what snapshots take of the memory that staging is in."""
        budget, kept = self.recipe.memory_budget(), self.snapshots.memory_bytes
        if self.device.type == "cpu":
            return dataclasses.replace(budget, device=max(1, budget.device_bytes - kept))
        return dataclasses.replace(budget, host=max(0, budget.host_bytes - kept))

    def _refuse_overrun(self) -> None:
        """The budget covers installing the plan and taking up a checkpoint too, which no plan foresees."""
        reached = self._process_peak_bytes()
        if reached > self.recipe.memory_budget().device_bytes:
            refused = overrun(self.session.plan, reached)
            raise memtrain.InfeasibleError(with_tiles_kept(refused, self.session.model))

    def _process_peak_bytes(self) -> int:
        """The most of what the device's budget covers: on a CPU all of this process, from its start."""
        reached = int(self.session.measure()["process_peak_bytes"])
        return max(reached, self.peaks.whole_bytes()) if self.device.type == "cpu" else reached

    def run(self) -> Summary:
        """Evaluate, train, evaluate, save."""
        session, recipe = self.session, self.recipe
        print(
            "\n".join(
                [
                    plan_text(session.plan),
                    *form_facts(session.plan, session.profile),
                    *recompute_facts(session.plan, session.profile),
                ]
            ),
            flush=True,
        )
        with ProgressDisplay(
            self.output / "metrics.jsonl",
            total_steps=recipe.training.steps,
            done_steps=self.done_steps,
            budget_bytes=recipe.memory_budget().device_bytes,
            log_every=recipe.training.log_every,
        ) as display:
            before = self.evaluate()
            display.note(f"held-out loss before: {before:.4f}")
            seconds, peak_bytes = self._steps(display)
            step_seconds = statistics.median(seconds[1:] or seconds or [0.0])
            self.snapshots.wait()
            planned = [] if session.passes is None else session.passes.lines()
            for line in [*planned, *session.coding_lines(), *self.snapshots.lines(step_seconds)]:
                display.note(line)
            after = self.evaluate()
            display.note(f"held-out loss after: {after:.4f}")
            with self._phase("save"):
                saved = self.checkpoints.save(session, recipe.training.steps)
        tokens = recipe.training.accumulation * self._tokens_per_batch()
        return Summary(
            name=recipe.name,
            device=str(self.device),
            steps=len(seconds),
            budget_bytes=recipe.memory_budget().device_bytes,
            predicted_peak_bytes=session.plan.peak(Tier.DEVICE),
            measured_peak_bytes=peak_bytes,
            process_peak_bytes=max(peak_bytes, self._process_peak_bytes()),
            predicted_optimizer_bytes=self.predicted_optimizer_bytes,
            measured_optimizer_bytes=measured_state_bytes(session.optimizer),
            predicted_step_seconds=session.plan.step_seconds,
            measured_step_seconds=step_seconds,
            tokens_per_second=tokens / step_seconds if step_seconds else 0.0,
            heldout_loss_before=before,
            heldout_loss_after=after,
            checkpoint=str(saved),
            phases=tuple(self.phases),
            written=session.writes.per_step(),
            process_written_bytes_per_step=session.writes.process_bytes_per_step(),
            endurance_bytes=recipe.tiers.nvme.endurance_bytes,
            snapshots=self.snapshots.outcome(step_seconds),
        )

    def evaluate(self) -> float:
        """Mean loss over the first held-out batches."""
        model = self.session.model
        batches = min(self.recipe.evaluation.batches, self.heldout_windows.batches_per_pass)
        model.eval()
        with self._phase("evaluate"), torch.no_grad():
            losses = [float(model(**self._batch(self.heldout_windows, i)).loss) for i in range(batches)]
        model.train()
        return math.fsum(losses) / batches

    def _steps(self, display: ProgressDisplay) -> tuple[list[float], int]:
        """Train what is left; seconds of each step, and the device's peak while they ran."""
        recipe, seconds = self.recipe, []
        self._start_peak()
        started = self.sampler.now_seconds()
        peak_bytes = 0
        for step in range(self.done_steps, recipe.training.steps):
            beside = self.snapshots.busy
            record = self._step(step)
            seconds.append(record.seconds)
            self.snapshots.note_step(record.seconds, beside)
            display.show(record)
            peak_bytes = max(peak_bytes, self.session.device_peak_bytes())
            self._take_snapshot(step)
            if _due(recipe.evaluation.every, step, recipe.training.steps):
                display.note(f"held-out loss after step {step + 1}: {self.evaluate():.4f}")
            self._start_peak()
        self.phases.append(Phase(name="train", start_seconds=started, end_seconds=self.sampler.now_seconds()))
        return seconds, peak_bytes

    def _take_snapshot(self, step: int) -> None:
        """On disk or, between those, in memory, where one is due after step ``step``."""
        section, last = self.recipe.checkpoint, self.recipe.training.steps
        if _due(section.every, step, last):
            if section.asynchronous:
                self.checkpoints.begin(self.snapshots, step + 1)
            else:
                self.snapshots.wait()
                self.checkpoints.save(self.session, step + 1)
        elif _due(section.hold_every, step, last):
            self.snapshots.hold(f"step-{step + 1:06d}", progress=self.checkpoints.progress(step + 1))

    def _step(self, step: int) -> StepRecord:
        """One optimizer step over ``accumulation`` micro-batches."""
        training, optimizer = self.recipe.training, self.session.optimizer
        factor = learning_rate_factor(self.recipe.schedule, step, training.steps)
        rate = self.recipe.optimizer.lr * factor
        start = time.perf_counter()
        for group in optimizer.param_groups:  # before backward, in which weights may be updated
            group["lr"] = rate
        if (lazy := self.session.sparse_optimizer) is not None:
            for group in lazy.param_groups:
                group["lr"] = (self.recipe.sparse_section.lr or self.recipe.optimizer.lr) * factor
        first = step * training.accumulation
        losses = self.session.accumulate(
            self._batch(self.train_windows, first + micro) for micro in range(training.accumulation)
        )
        norm = None
        if training.max_grad_norm is not None:
            norm = float(optimizer.clip_grad_norm_(training.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad()
        mean_loss = math.fsum(float(loss) for loss in losses) / len(losses)
        return StepRecord(
            step=step + 1,
            loss=mean_loss,
            learning_rate=rate,
            gradient_norm=norm,
            seconds=time.perf_counter() - start,
            tokens=training.accumulation * self._tokens_per_batch(),
            memory_now_bytes=self.session.device_used_bytes(),
            memory_peak_bytes=self.session.device_peak_bytes(),
        )

    def _tokens_per_batch(self) -> int:
        return self.recipe.training.micro_batch_size * self.recipe.data.sequence_length

    def _batch(self, windows: Windows, index: int) -> Batch:
        ids = torch.from_numpy(windows.batch(index)).to(self.device)
        return {"input_ids": ids, "labels": ids}

    def _start_peak(self) -> None:
        self.peaks.start_phase()  # first: on a CPU both are the kernel's one mark
        self.session.engine.device.reset_peak()

    def _phase(self, name: str) -> _PhaseTimer:
        return _PhaseTimer(self, name)

    def _prepare_output(self) -> None:
        make_folder(self.output)
        if self.recipe.budget.swap_is_ours:
            make_folder(self.output / "swap")
        write_text(self.output / "recipe.yaml", self.recipe.to_yaml())


class _PhaseTimer:
    """Notes when a phase of the run begins and ends."""

    def __init__(self, trainer: Trainer, name: str) -> None:
        self._trainer, self._name = trainer, name

    def __enter__(self) -> None:
        self._trainer.peaks.start_phase()
        self._start = self._trainer.sampler.now_seconds()

    def __exit__(self, *exception: object) -> None:
        end = self._trainer.sampler.now_seconds()
        self._trainer.phases.append(Phase(name=self._name, start_seconds=self._start, end_seconds=end))


def _due(every: int | None, step: int, total_steps: int) -> bool:
    """After step ``step`` (from 0)? The last step has an evaluation and a checkpoint of its own."""
    return every is not None and (step + 1) % every == 0 and step + 1 < total_steps


def _check_vocabulary(model: Any, *corpora: Tokens) -> None:
    size = model.get_input_embeddings().num_embeddings
    for tokens in corpora:
        if tokens.vocabulary_size > size:
            raise DataError(
                f"{tokens.path} has a vocabulary of {tokens.vocabulary_size}, the model's embedding {size}: "
                "build the corpus with the model's own tokenizer"
            )


def train(recipe: Recipe) -> Summary:
    """Run ``recipe`` and write its output directory. Errors as for ``Trainer``."""
    with MemorySampler() as sampler:
        trainer = Trainer(recipe, sampler)
        try:
            summary = trainer.run()
        except BaseException:
            trainer.close(finished=False)
            raise
        trainer.close(finished=True)
    output = recipe.output_directory
    write_text(output / "summary.json", summary.to_json())
    rows = zip(sampler.seconds, sampler.resident_bytes, strict=True)
    lines = [f"{seconds:.3f},{size_bytes}" for seconds, size_bytes in rows]
    write_text(output / "memory.csv", "\n".join(["seconds,resident_bytes", *lines]) + "\n")
    return summary


def _draw(output: Path) -> None:
    """Draw report.html and memory.png in a process of their own: this one's memory is what they show."""
    result = subprocess.run([sys.executable, "-m", "memtrain.page", str(output)], check=False)
    if result.returncode:
        print(f"the report could not be drawn; again: python -m memtrain.page {output}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Usage errors exit with 1: 2 is for a budget that cannot work."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"{self.prog}: error: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _Parser(prog="memtrain.train", description="Train a recipe inside a memory budget.")
    parser.add_argument("recipe", type=Path, help="YAML file, such as recipes/tiny_llama_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RecipeError(
                f"memtrain.train runs in one process, WORLD_SIZE is {os.environ['WORLD_SIZE']}: "
                "start it with --nproc-per-node 1"
            )
        recipe = load_recipe(options.recipe, options.overrides)
        summary = train(recipe)
    except _REFUSALS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RunFinished as finished:
        print(finished)
        return 0
    except memtrain.InfeasibleError as error:
        print(infeasible_text(error.plan), file=sys.stderr)
        return 2
    print(summary_text(summary), flush=True)
    _draw(recipe.output_directory)
    return 0


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    sys.exit(record(main)())
