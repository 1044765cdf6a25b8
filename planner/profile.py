"""What a plan must know of a model: bytes and seconds per block, per unit of state, and around them.

A profile is measured on the real model (``planner.trace``), loaded from JSON, or written by hand in a
test. It holds no tensors. All bytes are those of one micro-batch, all seconds of one micro-batch: what a part
takes when it runs alone (``ModelProfile.in_a_step`` gives what it takes among the others).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from memtrain.planner.actions import PLAIN, Tier
from memtrain.planner.canonical import canonical_json, check_version, plain, reading, short_digest

PROFILE_VERSION = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class NearlyFree:
    """A block that is computed again from the stored outputs of its matrix products and attention kernels."""

    stored_bytes: int
    """Those outputs, as far as anything that is computed again needs them; every storage once."""
    stored_tensors: int
    forward_seconds: float
    """The second forward, run alone."""
    backward_bytes: int
    """Peak while the block is computed again and its backward runs, without input and stored outputs, which
    lie in staging or are kept."""

    def __post_init__(self) -> None:
        _non_negative(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefixes:
    """A block of which the first tokens of each row may be computed again, and the others' tensors stored."""

    tokens: int
    """Of a row: as many equal parts have input, attention outputs, and saved tensors with a token axis."""
    lengths: tuple[int, ...]
    """Prefixes that may be computed again, each longer than the one before: those that were tried."""
    differences: tuple[float, ...]
    """For each of them the largest difference between what it gives and the first rows of the whole forward's
    tensors, in parts of the largest entry of its tensor; 0 where they are the same bit for bit."""
    overhead_seconds: float
    """What computing a prefix again takes beyond its share of the forward."""
    cut_bytes: int
    """Of the saved bytes those with a token axis: the rows behind a prefix are stored."""
    whole_bytes: int
    """Those without one that depend on all tokens: stored whole. What is left a prefix computes alike."""
    largest_bytes: int
    """Of the saved storages the largest: while it is joined its computed rows are there twice."""
    probe_bytes: int
    """Peak while a run looks at the block's tokens before the first forward, the block's input included: the
    largest over all prefixes."""
    witness_bytes: int
    """Rows kept in ordinary memory from forward to backward, to be compared with what is computed again."""
    attention_whole_bytes: int = 0
    """Of the outputs of attention kernels those without a token axis, such as a GPU kernel's random state:
    stored whole wherever outputs are stored."""

    def __post_init__(self) -> None:
        _non_negative(self)
        if list(self.lengths) != sorted({n for n in self.lengths if 0 < n < self.tokens}):
            raise ValueError(
                f"lengths must ascend between 1 and {self.tokens - 1} tokens, got {self.lengths}"
            )
        if len(self.differences) != len(self.lengths):
            raise ValueError(f"{len(self.lengths)} prefixes have {len(self.differences)} differences")

    @property
    def exact(self) -> tuple[int, ...]:
        """The prefixes whose tensors are the first rows of the whole forward's, bit for bit."""
        pairs = zip(self.lengths, self.differences, strict=True)
        return tuple(length for length, difference in pairs if difference == 0.0)

    def difference(self, length: int) -> float:
        """Of one prefix. Raises ValueError for one that was not tried."""
        return self.differences[self.lengths.index(length)]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockForm:
    """A block whose functions keep less for backward than the model's own (``memtrain.optim.autograd``).

    Its fields are those of ``BlockProfile``, measured with the treatments in place.
    """

    name: str
    saved_bytes: int
    saved_tensors: int
    forward_seconds: float
    backward_seconds: float
    forward_transient_bytes: int
    backward_transient_bytes: int
    error: float = 0.0
    """Of its gradients, relative to the plain form's: the norm of the difference over the norm, of the
    input's gradient or of the parameters', whichever is larger. 0: all have the plain form's bits."""

    def __post_init__(self) -> None:
        _non_negative(self)
        if not self.name or self.name == PLAIN:
            raise ValueError(f"a form beside the plain one needs a name of its own, got {self.name!r}")
        if not math.isfinite(self.error):
            raise ValueError(
                f"form {self.name}: error must be finite, got {self.error}; leave such a form out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockProfile:
    """One repeated layer of the model."""

    name: str
    """Qualified module name, such as ``model.layers.3``."""
    input_bytes: int
    """The block's input activation (its first tensor argument)."""
    saved_bytes: int
    """Bytes saved for backward: every unique storage once; parameters, buffers and arguments that
    other blocks share (masks, rotary tables) excluded."""
    attention_bytes: int
    """Outputs of the attention kernels among the saved bytes; 0 when the block has none."""
    forward_seconds: float
    backward_seconds: float
    attention_seconds: float
    """Part of ``forward_seconds`` spent in attention kernels."""
    forward_transient_bytes: int
    """Peak above (start of forward + saved_bytes) while the block's forward runs."""
    backward_transient_bytes: int
    """Peak above (start of backward, with the block's saved tensors present) while backward runs,
    gradients of the block's parameters included only as far as they are alive at once when each is
    dropped as soon as it is produced."""
    saved_tensors: int = 64
    """How many tensors make up ``saved_bytes``: each starts on a boundary of its own in a staging slot.
    A Llama block saves about 25; the default leaves room."""
    recomputable: bool = True
    reason: str = ""
    """Why the block may not be recomputed, when it may not."""
    nearly_free: NearlyFree | None = None
    """None: it was not measured, or the block may not be recomputed."""
    prefixes: Prefixes | None = None
    """None: all tokens are computed again or none."""
    prefix_reason: str = ""
    """Why no prefix may be computed again, where that was looked into."""
    forms: tuple[BlockForm, ...] = ()
    """Ways to run the block that save less, beside the plain one that the fields above describe."""
    missing_forms: tuple[tuple[str, str], ...] = ()
    """Name and reason of each form that was looked into and cannot be chosen."""

    def __post_init__(self) -> None:
        _non_negative(self)
        if self.attention_bytes > self.saved_bytes:
            raise ValueError(
                f"{self.name}: attention_bytes {self.attention_bytes} exceeds saved_bytes {self.saved_bytes}"
            )
        if self.prefixes is not None:
            self._check_rows(self.prefixes)
        names = [form.name for form in self.forms]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: forms {names} name one of them twice")

    def in_form(self, name: str) -> BlockProfile | BlockForm:
        """Bytes and seconds of the block as it runs under ``form`` of its decision.

        Raises:
            KeyError: it has no such form; lists those that there are.
        """
        if name == PLAIN:
            return self
        for form in self.forms:
            if form.name == name:
                return form
        raise KeyError(f"{self.name} has no form {name!r}; it has {[PLAIN, *(f.name for f in self.forms)]}")

    def _check_rows(self, prefixes: Prefixes) -> None:
        for name, size in (
            ("input_bytes", self.input_bytes),
            ("attention_bytes", self.attention_bytes - prefixes.attention_whole_bytes),
            ("prefixes.cut_bytes", prefixes.cut_bytes),
        ):
            if size < 0 or size % prefixes.tokens:
                raise ValueError(
                    f"{self.name}: {name} {size} has no {prefixes.tokens} equal rows, yet the block has "
                    "prefixes; one whose tensors cannot be cut between tokens has none"
                )
        if prefixes.cut_bytes + prefixes.whole_bytes > self.saved_bytes:
            raise ValueError(
                f"{self.name}: prefixes.cut_bytes {prefixes.cut_bytes} and whole_bytes "
                f"{prefixes.whole_bytes} exceed saved_bytes {self.saved_bytes}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterUpdate:
    """A parameter that is stepped whole, by an optimizer that says what it keeps for it."""

    elements: int
    record_bytes: int
    """Its state, master weights among it, on a tier and in an update slot: every tensor in whole pages."""
    gradient_bytes: int
    """Its gradient in an update slot: whole pages, twice them where it is widened there."""
    workspace_bytes: int
    """Temporaries of its step, outside the slot."""
    refresh_bytes: int = 0
    """Temporaries while its basis is renewed, of which there are one parameter's at a time."""

    def __post_init__(self) -> None:
        _non_negative(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitProfile:
    """Parameters that are needed together: one block's, or those before or after the blocks."""

    name: str
    """The block's name, or ``prologue`` / ``epilogue``."""
    block: int | None
    """Index of the block, None outside the blocks."""
    weight_bytes: int
    gradient_bytes: int
    """Trainable parameters only."""
    state_bytes: int
    """Optimizer state (moments, and master weights where the regime has them) that may leave memory."""
    movable_elements: int = 0
    """Of the parameters that ``gradient_bytes`` and ``state_bytes`` are of. 0 in a profile that was written
    by hand: then the bytes tell, as if all had the profile's bytes per element."""
    resident_state_bytes: int = 0
    """State and gradients too small to be worth moving; always in memory."""
    update_seconds: float = 0.0
    """Arithmetic of one optimizer step over this unit, with everything in memory."""
    parameters: tuple[str, ...] = ()
    """Qualified names, trainable or not; a tied parameter in the first unit alone. Empty in a profile that
    was written by hand: it can be planned for, but not installed."""
    updates: tuple[ParameterUpdate, ...] = ()
    """Of the parameters whose state may leave memory, in order; empty where an update may be cut, or the
    optimizer does not say what it keeps: then the profile's bytes per element count."""
    movable_weight_bytes: int = 0
    """Of ``weight_bytes`` what may leave the device: smaller parameters stay. 0: none of them."""
    weight_extent_bytes: int = 0
    """What may leave on a tier, or in a window of the device: every parameter in whole pages."""
    window_bytes: int = 0
    """Of ``weight_extent_bytes`` the most that is in a window at once, where the unit's weights come in
    tiles, one after the other, at every use anew; 0: all of it comes together."""
    least_window_bytes: int = 0
    """Of what then comes by itself (each tile, and all that is no tile) the least; 0: as much as the most."""
    written_extent_bytes: int = 0
    """Of those the parameters that an update changes; the others are never written again."""
    overwritten: bool = False
    """An update makes all of ``weight_extent_bytes`` anew from whole fp32 masters and need not read them."""
    borrows: tuple[str, ...] = ()
    """Units whose weights are used here too, for they hold a parameter that is tied to one of this unit's
    modules: a head that is the prologue's table."""

    def __post_init__(self) -> None:
        _non_negative(self)
        for name, most in (
            ("movable_weight_bytes", "weight_bytes"),
            ("movable_weight_bytes", "weight_extent_bytes"),
            ("written_extent_bytes", "weight_extent_bytes"),
            ("window_bytes", "weight_extent_bytes"),
            ("least_window_bytes", "window_bytes"),
        ):
            if getattr(self, name) > getattr(self, most):
                raise ValueError(
                    f"{self.name}: {name} {getattr(self, name)} is part of {most} {getattr(self, most)} and "
                    "cannot be more"
                )
        if self.weight_extent_bytes and not self.movable_weight_bytes:
            raise ValueError(
                f"{self.name}: weight_extent_bytes is {self.weight_extent_bytes} and movable_weight_bytes 0: "
                "what does not leave has no extent"
            )

    @property
    def tiled(self) -> bool:
        """Whether no window ever has all of its weights."""
        return 0 < self.window_bytes < self.weight_extent_bytes

    @property
    def largest_window_bytes(self) -> int:
        """What a window needs for it."""
        return self.window_bytes or self.weight_extent_bytes

    @property
    def smallest_window_bytes(self) -> int:
        """What the smallest window that it uses needs."""
        return self.least_window_bytes or self.largest_window_bytes

    @property
    def workspace_bytes(self) -> int:
        """The most that updating ``updates`` together takes outside of slots."""
        return sum(p.workspace_bytes for p in self.updates) + max(
            (p.refresh_bytes for p in self.updates), default=0
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TableProfile:
    """An embedding table whose weight and optimizer state lie on a tier, cut into groups of rows. It is in
    no unit: what is said of weights, gradients and state elsewhere does not count it."""

    name: str
    """Of its weight."""
    tier: Tier
    rows: int
    row_bytes: int
    """Of the weight."""
    weight_group_rows: int
    weight_group_bytes: int
    """In whole pages: what one row that is used moves."""
    state_group_rows: int
    state_group_bytes: int
    lookups: int
    """Tokens of a micro-batch: the most rows that it may use."""
    used_rows: int
    """Different ones among them in the sample batch."""
    slot_bytes: int
    """Staging, in the device's memory."""
    note_bytes: int
    """What is noted in memory of a group that was written."""
    workspace_bytes: int
    """Temporaries of its step."""
    update_seconds: float
    """Its step on the rows of all micro-batches, reading and writing included."""

    def __post_init__(self) -> None:
        _non_negative(self)
        for name in ("rows", "weight_group_rows", "state_group_rows"):
            if not getattr(self, name):
                raise ValueError(f"table {self.name}: {name} must be > 0")
        if self.used_rows > min(self.rows, self.lookups):
            raise ValueError(
                f"table {self.name}: {self.used_rows} rows are used by {self.lookups} lookups in {self.rows}"
            )
        if self.tier is Tier.DEVICE:
            raise ValueError(f"table {self.name} is on the device: then it is a weight as any other")


_Record = TypeVar(
    "_Record", NearlyFree, Prefixes, BlockForm, BlockProfile, UnitProfile, TableProfile, "ModelProfile"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProfile:
    """One training step of one model at one batch shape."""

    model: str
    batch: str
    """For people: shape and dtype of the sample batch."""
    blocks: tuple[BlockProfile, ...]
    units: tuple[UnitProfile, ...]
    """In the order in which forward needs them."""
    micro_batches: int
    """Forward-backward passes per optimizer step (gradient accumulation)."""
    baseline_bytes: int
    """Resident memory of the process without weights, activations or state: the libraries."""
    weight_bytes: int
    """Weights, resident."""
    prologue_forward_seconds: float
    prologue_backward_seconds: float
    epilogue_forward_seconds: float
    """From the last block's output to the loss."""
    epilogue_backward_seconds: float
    epilogue_saved_bytes: int
    """What stays alive from the loss's forward until its backward (final norm, precomputed gradients)."""
    epilogue_peak_bytes: int
    """Peak above the resting state while the part after the blocks runs forward or backward."""
    persistent_backward_bytes: int = 0
    """Gradients that outlive the epilogue and stay through the whole backward pass, such as the
    output projection's share of a tied embedding."""
    prologue_peak_bytes: int = 0
    boundary_bytes: int = 0
    """What a micro-batch holds of the device between two blocks at most, beside what blocks save: the hidden
    state or its gradient, and what the part before the blocks has made and the model's code refers to."""
    update_workspace_bytes_per_element: float = 0.0
    """Temporaries of the optimizer's arithmetic, per element of a shard (fused AdamW: 0)."""
    state_bytes_per_element: float = 0.0
    state_tensors: int = 0
    """How many tensors make up a parameter's state, master weights among them: in a record each fills pages
    of its own. 0 in a profile that was written by hand: then each has four bytes an element."""
    gradient_bytes_per_element: float = 0.0
    largest_gradient_bytes: int = 0
    elementwise: bool = True
    """The optimizer may be run on any cut of the flat index; otherwise parameter by parameter."""
    largest_parameter_elements: int = 0
    allocator_slack_bytes: int = 0
    """Freed memory that the allocator keeps (measured), part of what the process occupies."""
    parameter_object_bytes: int = 0
    """What a session's own objects take in the host's memory for each parameter (``bookkeeping``)."""
    shard_object_bytes: int = 0
    """The same for each shard of the optimizer's state."""
    tables: tuple[TableProfile, ...] = ()
    """Embeddings that are used by rows, in no unit."""
    prepare_peak_bytes: int = 0
    """The most that the job has occupied of the device until its model was measured: no plan can make a
    smaller budget work. 0: not known."""
    version: int = PROFILE_VERSION

    def __post_init__(self) -> None:
        _non_negative(self)
        if not self.blocks:
            raise ValueError(f"{self.model}: a profile needs at least one block")
        if self.micro_batches < 1:
            raise ValueError(f"{self.model}: micro_batches must be >= 1, got {self.micro_batches}")
        movable = sum(unit.movable_weight_bytes for unit in self.units)
        if movable > self.weight_bytes:
            raise ValueError(
                f"{self.model}: weights of {movable} bytes may leave the device, yet weight_bytes is "
                f"{self.weight_bytes}"
            )
        known = {unit.name for unit in self.units}
        for unit in self.units:
            if not known.issuperset(unit.borrows):
                raise ValueError(f"{unit.name} borrows of {unit.borrows}; units are {sorted(known)}")

    def in_a_step(self, slowdown: float) -> ModelProfile:
        """The profile a step is predicted from: every part's seconds times ``Machine.arithmetic_slowdown``.

        Its digest is another one: what is written down is the digest of the profile that was measured.
        """
        if slowdown == 1.0:
            return self
        return dataclasses.replace(
            _slowed(self, slowdown),
            blocks=tuple(_slowed_block(block, slowdown) for block in self.blocks),
            units=tuple(_slowed(unit, slowdown) for unit in self.units),
            tables=tuple(_slowed(table, slowdown) for table in self.tables),
        )

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space."""
        return canonical_json(plain(self))

    @classmethod
    def from_json(cls, text: str) -> ModelProfile:
        """Read what ``to_json`` wrote. Raises ValueError on another version or unknown keys."""
        with reading("a profile"):
            data: dict[str, Any] = json.loads(text)
            check_version(data, PROFILE_VERSION, "profile")
            data["blocks"] = tuple(_read_block(block) for block in data["blocks"])
            data["units"] = tuple(
                UnitProfile(
                    **{
                        **unit,
                        "parameters": tuple(unit["parameters"]),
                        "borrows": tuple(unit["borrows"]),
                        "updates": tuple(ParameterUpdate(**each) for each in unit["updates"]),
                    }
                )
                for unit in data["units"]
            )
            data["tables"] = tuple(TableProfile(**{**t, "tier": Tier(t["tier"])}) for t in data["tables"])
            return cls(**data)

    @property
    def digest(self) -> str:
        """Hash of the canonical form."""
        return short_digest(plain(self))


def _read_block(data: dict[str, Any]) -> BlockProfile:
    nearly_free, prefixes = data.get("nearly_free"), data.get("prefixes")
    if nearly_free is not None:
        data = {**data, "nearly_free": NearlyFree(**nearly_free)}
    if prefixes is not None:
        lengths = {name: tuple(prefixes[name]) for name in ("lengths", "differences")}
        data = {**data, "prefixes": Prefixes(**{**prefixes, **lengths})}
    forms = tuple(BlockForm(**form) for form in data["forms"])
    missing = tuple((name, reason) for name, reason in data["missing_forms"])
    data = {**data, "forms": forms, "missing_forms": missing}
    return BlockProfile(**data)


def _slowed_block(block: BlockProfile, slowdown: float) -> BlockProfile:
    return dataclasses.replace(
        _slowed(block, slowdown),
        nearly_free=block.nearly_free and _slowed(block.nearly_free, slowdown),
        prefixes=block.prefixes and _slowed(block.prefixes, slowdown),
        forms=tuple(_slowed(form, slowdown) for form in block.forms),
    )


def _slowed(record: _Record, slowdown: float) -> _Record:
    """``record`` with each of its own fields that is in seconds multiplied."""
    names = [field.name for field in dataclasses.fields(record) if field.name.endswith("seconds")]
    return dataclasses.replace(record, **{name: slowdown * getattr(record, name) for name in names})


def _non_negative(record: Any) -> None:
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
            raise ValueError(f"{type(record).__name__}.{field.name} must be >= 0, got {value}")
