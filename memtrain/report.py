"""What a run says about itself: the plan before it, the prediction beside the measurement after it.

Plain text in columns, the same on a terminal and in a log file. The training process prints with this
module, so it imports nothing that costs memory; the pictures are drawn elsewhere (``memtrain.page``).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memtrain.endurance import Written, endurance_facts, written_rows
from memtrain.planner.actions import Action, BlockDecision, Tier
from memtrain.planner.block_choices import RULED_OUT
from memtrain.planner.block_parts import is_cut, largest_difference
from memtrain.planner.checkpoint_interval import SnapshotOutcome
from memtrain.planner.plan import Plan, describe_windows
from memtrain.planner.profile import BlockForm, ModelProfile
from memtrain.planner.units import GiB, MiB, format_gib

if TYPE_CHECKING:
    from memtrain.offload.slab import HighWater


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, the first flush left and the others flush right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        aligned = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *aligned]).rstrip())
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def bill_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Header and rows of category by tier in GiB, with the predicted peak and the budget beneath.

    Lines of a bill that share category and tier are added up. The peak of a tier is predicted by
    simulation and need not be the sum of the lines above it where they peak at different times.
    """
    tiers = [tier for tier in Tier if tier in dict(plan.capacities) or plan.peak(tier)]
    sizes: dict[str, dict[Tier, int]] = {}
    for line in plan.bill:
        row = sizes.setdefault(line.category, {})
        row[line.tier] = row.get(line.tier, 0) + line.size_bytes
    header = ["GiB", *[tier.value for tier in tiers]]
    rows = [[name, *[_gib(row.get(tier)) for tier in tiers]] for name, row in sizes.items()]
    rows.append(["predicted peak", *[_gib(plan.peak(tier)) for tier in tiers]])
    rows.append(["budget", *[_gib(dict(plan.capacities).get(tier)) for tier in tiers]])
    return header, rows


def plan_text(plan: Plan) -> str:
    """The plan for people: bytes by category and tier, actions, predicted time and how good it is."""
    name, *facts = plan_facts(plan)
    return "\n".join([name, table(*bill_rows(plan)), *facts])


def plan_facts(plan: Plan) -> list[str]:
    """What is to be said of a plan beside the table of its bytes; the first line names it."""
    status = plan.status if plan.status != "gap" else f"within {plan.gap:.1%} of the best"
    actions = ", ".join(f"{count} x {action}" for action, count in sorted(plan.action_counts().items()))
    return [
        f"plan {plan.digest[:12]}: {status} ({plan.solver})",
        f"blocks: {actions}",
        f"optimizer: {_optimizer_text(plan)}",
        *_weight_facts(plan),
        f"predicted: {plan.step_seconds:.2f} s a step (lower bound {plan.lower_bound_seconds:.2f} s), "
        f"{format_gib(plan.bytes_moved_per_step)} moved a step",
    ]


def recompute_facts(plan: Plan, profile: ModelProfile, seen: Mapping[str, float] | None = None) -> list[str]:
    """What is computed again of some tokens or nearly for free, a line for each kind, and how exactly.

    Args:
        plan, profile: one was made from the other.
        seen: largest differences that the run itself found (``TokenProbe.difference``), by block. A profile
            looks at one block of a kind and one batch; other weights and other rows may give others.
    """
    seen = seen or {}
    counts: Counter[str] = Counter()
    for block, decision in zip(profile.blocks, plan.blocks, strict=True):
        if is_cut(decision) and block.prefixes is not None:
            tokens = block.prefixes.tokens
            difference = max(largest_difference(block, decision), seen.get(block.name, 0.0))
            counts[_prefix_text(decision, tokens, difference)] += 1
        elif decision.action is Action.RECOMPUTE_NEARLY_FREE and block.nearly_free is not None:
            stored, saved = block.nearly_free.stored_bytes, block.saved_bytes
            sizes = (
                f"{stored / MiB:.1f} MiB of outputs of products and attention ({saved / MiB:.1f} MiB saved)"
            )
            counts[f"{{}} computed again from {sizes}; bit-equal"] += 1
    return [text.format(_blocks(n)) for text, n in counts.items()]


def form_facts(plan: Plan, profile: ModelProfile) -> list[str]:
    """Which form the blocks have and what it saves, a line for each kind; and which forms none could have.

    Args:
        plan, profile: one was made from the other.
    """
    counts: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    for block, decision in zip(profile.blocks, plan.blocks, strict=True):
        form = block.in_form(decision.form)
        if isinstance(form, BlockForm):
            extra = form.forward_seconds + form.backward_seconds
            extra -= block.forward_seconds + block.backward_seconds
            exact = f"gradients off by {form.error:.1e}" if form.error else "bit-equal at the sample batch"
            counts[
                f"{{}} in {form.name} form: {form.saved_bytes / MiB:.1f} MiB saved instead of "
                f"{block.saved_bytes / MiB:.1f} MiB, {1000 * extra:+.1f} ms each; {exact}"
            ] += 1
        missing.update(
            f"{{}} cannot have form {name}: {reason}"
            for name, reason in block.missing_forms
            if reason != RULED_OUT
        )
    lines = [text.format(_blocks(n)) for text, n in (counts + missing).items()]
    if plan.error:
        limit = "not limited" if plan.error_budget is None else f"budget {plan.error_budget:.2g}"
        lines.append(f"lossy forms: mean error of gradients {plan.error:.2g} over all saved bytes ({limit})")
    return lines


def staging_lines(marks: Sequence[HighWater]) -> list[str]:
    """A line for each class of staging memory: what there is, and the most that was used of it.

    Slots that were never held, or never filled, are memory that the plan could have done without: it reserves
    for the largest block, gradient and shard.
    """
    return [
        f"staging {mark.name}: {mark.slots_held} of {mark.slots} slots held at once, "
        f"{mark.bytes_used / MiB:.2f} of {mark.slot_bytes / MiB:.2f} MiB of a slot used, "
        f"{mark.size_bytes / MiB:.2f} MiB in all"
        for mark in marks
    ]


def own_step_lines(refused: Mapping[str, int]) -> list[str]:
    """A line for each reason why parameters are stepped by the optimizer's own code, which passes over
    gradient, state and weight several times: by reason their number."""
    return [
        f"update of {count} parameter{'s' * (count > 1)} by the optimizer's own code instead of in one pass: "
        f"{reason}"
        for reason, count in refused.items()
    ]


def _blocks(count: int) -> str:
    return f"{count} block" + "s" * (count > 1)


def _prefix_text(decision: BlockDecision, tokens: int, difference: float) -> str:
    """The probe's answer for one block; the number of blocks goes where the braces are."""
    again, attended = decision.recomputed_tokens, decision.attention_tokens
    parts = [f"first {again} of {tokens} tokens"] if again is not None else []
    parts += [f"attention of the first {attended} of {tokens} tokens"] if attended else []
    exact = "yes"
    if difference:
        exact = f"no, largest difference {difference:.0e} of a tensor's largest entry"
    return f"{' and '.join(parts)} of {{}} computed again; bit-equal on this machine: {exact}"


def _optimizer_text(plan: Plan) -> str:
    counts: dict[str, int] = {}
    for state in plan.states:
        where = f"gradients on {state.gradient_tier.value}, state on {state.optimizer_tier.value}"
        counts[where] = counts.get(where, 0) + 1
    parts = [f"{count} units with {where}" for where, count in counts.items()]
    order = f"; {plan.micro_batch_order.value} micro-batches" if plan.held_passes > 1 else ""
    return "; ".join([*parts, f"update {plan.update_schedule.value}"]) + order


def _weight_facts(plan: Plan) -> list[str]:
    """Where weights are that take turns on the device; nothing where all of them stay."""
    away = Counter(s.weight_tier.value for s in plan.states if s.weight_tier is not Tier.DEVICE)
    if not away:
        return []
    coded = {each.tier.value: f" coded ({each.codec})" for each in plan.staging.coded_weights}
    places = " and ".join(f"{count} on {tier}{coded.get(tier, '')}" for tier, count in away.items())
    windows = describe_windows(plan.staging.weight_windows)
    return [f"weights: of {len(plan.states)} units {places}, through {windows}"]


def infeasible_text(plan: Plan) -> str:
    """Why no plan fits: by how many bytes which tier is short, and what would help, cheapest first."""
    lines = ["the budget cannot work:"]
    for tier, short in plan.shortfall_bytes:
        limit = dict(plan.capacities).get(tier, 0)
        lines.append(f"  {tier.value}: short by {short:,} bytes ({format_gib(short)}) of {format_gib(limit)}")
    if plan.remedies:
        lines.append("what would help, the cheapest first:")
        lines += [f"  {number}. {remedy}" for number, remedy in enumerate(plan.remedies, start=1)]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A named stretch of the run, on the clock of the memory samples."""

    name: str
    start_seconds: float
    end_seconds: float


SUMMARY_VERSION = 3
"""1 had no ``version``, and at first nothing of the optimizer's bytes; 2 nothing of bytes written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What came of a run; ``summary.json``."""

    name: str
    device: str
    steps: int
    """Steps of this process, not those before a resume."""
    budget_bytes: int
    """Of the device."""
    predicted_peak_bytes: int
    measured_peak_bytes: int
    """Of the device while steps ran."""
    process_peak_bytes: int
    """Of the whole process, from its start: loading, profiling, evaluation and checkpoints too."""
    predicted_optimizer_bytes: int | None
    """Of the optimizer's state and masters, by formula from the parameters' shapes; None: an older run, which
    did not look."""
    measured_optimizer_bytes: int | None
    """Of the tensors of its state, on whatever tier; None likewise."""
    predicted_step_seconds: float
    measured_step_seconds: float
    """Median, without the first step."""
    tokens_per_second: float
    heldout_loss_before: float
    heldout_loss_after: float
    checkpoint: str
    phases: tuple[Phase, ...] = ()
    written: tuple[Written, ...] = ()
    """Per step, by tier and class of bytes. Empty where there was no second step, or nothing was written."""
    process_written_bytes_per_step: float | None = None
    """What the kernel counts of the whole process, checkpoints and logs too."""
    endurance_bytes: int | None = None
    """What may be written to the disk of the nvme tier in all, where the recipe says so."""
    snapshots: SnapshotOutcome | None = None
    """Of those that were written beside training; None where none was, and of older runs."""
    version: int = SUMMARY_VERSION

    def to_json(self) -> str:
        """For ``summary.json``."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Read what ``to_json`` wrote, now or in an earlier version: what a run did not measure then is None
        or empty.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no summary, or one of a later version.
        """
        data = json.loads(path.read_text())
        try:
            version = data.pop("version", 1)
            if version not in range(1, SUMMARY_VERSION + 1):
                raise ValueError(
                    f"{path} is a summary of version {version!r}, this memtrain reads 1 to "
                    f"{SUMMARY_VERSION}: use the memtrain that wrote it, or a later one"
                )
            if version == 1:
                data = {"predicted_optimizer_bytes": None, "measured_optimizer_bytes": None, **data}
            data["phases"] = tuple(Phase(**phase) for phase in data["phases"])
            data["written"] = tuple(Written(**one) for one in data.get("written", ()))
            if data.get("snapshots") is not None:
                data["snapshots"] = SnapshotOutcome(**data["snapshots"])
            return cls(**data)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a summary of a run: {error}") from error


def error_fraction(predicted: float, measured: float) -> float:
    """(predicted - measured) / measured; NaN where nothing was measured."""
    return (predicted - measured) / measured if measured else float("nan")


def comparison_rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of predicted against measured."""
    peak_error = error_fraction(summary.predicted_peak_bytes, summary.measured_peak_bytes)
    time_error = error_fraction(summary.predicted_step_seconds, summary.measured_step_seconds)
    rows = [
        [
            f"peak of {summary.device} (GiB)",
            _gib(summary.predicted_peak_bytes),
            _gib(summary.measured_peak_bytes),
            f"{peak_error:+.1%}",
        ],
        [
            "step time (s)",
            f"{summary.predicted_step_seconds:.2f}",
            f"{summary.measured_step_seconds:.2f}",
            f"{time_error:+.1%}",
        ],
    ]
    predicted, measured = summary.predicted_optimizer_bytes, summary.measured_optimizer_bytes
    if predicted is not None and measured is not None and (predicted or measured):
        error = f"{error_fraction(predicted, measured):+.1%}"
        rows.append(["optimizer state (bytes)", f"{predicted:,}", f"{measured:,}", error])
    return ["", "predicted", "measured", "error"], rows


def summary_text(summary: Summary) -> str:
    """The end of a run, for people."""
    over = summary.process_peak_bytes - summary.budget_bytes
    verdict = f"OVER by {over:,} bytes" if over > 0 else f"{format_gib(-over)} to spare"
    limit = format_gib(summary.budget_bytes)
    before, after = summary.heldout_loss_before, summary.heldout_loss_after
    change = after - before
    return "\n".join(
        [
            table(*comparison_rows(summary)),
            f"whole process: {format_gib(summary.process_peak_bytes)} of {limit}, {verdict}",
            f"held-out loss: {before:.4f} before, {after:.4f} after ({change:+.4f}); "
            f"{summary.tokens_per_second:.0f} tokens/s",
            f"checkpoint: {summary.checkpoint}",
            *([table(*written_rows(summary.written))] if summary.written else []),
            *wear_facts(summary),
        ]
    )


def wear_facts(summary: Summary) -> list[str]:
    """What the run's writing means for the disk."""
    return endurance_facts(
        summary.written,
        summary.measured_step_seconds,
        summary.endurance_bytes,
        summary.process_written_bytes_per_step,
    )


def _gib(size_bytes: int | None) -> str:
    return "-" if not size_bytes else f"{size_bytes / GiB:.3f}"
