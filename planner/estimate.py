"""What one training step of a model needs, tensor by tensor, without having run it.

The records here are filled by ``planner.tracing``, which runs a model on fake tensors: sizes are those of the
real run, and no byte is allocated. They hold no tensors, are written as canonical JSON, and say of every
number where it comes from.

Unlike ``ModelProfile``, which a real step is measured into, an estimate has no seconds. It has what seconds
can be worked out from (operations, FLOPs, bytes read and written) and what a finer plan needs: each saved
tensor by itself, with its class and its token axis, and the lifetime of every buffer, operation by operation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from memtrain.planner.canonical import canonical_json, check_version, plain, reading, short_digest
from memtrain.planner.optimizer_bytes import OptimizerRule, ParameterSpec, StateBytes, state_bytes

ESTIMATE_VERSION = 2


class TensorClass(str, Enum):
    """What a saved tensor is in its block; tensors of one class are interchangeable token by token."""

    BLOCK_INPUT = "block_input"
    NORM_INTERNAL = "norm_internal"
    """Inside a norm: its fp32 input, the normalised value before the scale, mean, reciprocal deviation."""
    NORM_OUTPUT = "norm_output"
    QKV = "qkv"
    """Queries, keys and values as the attention kernel is given them."""
    ATTENTION_OUTPUT = "attention_output"
    """With what its kernel needs to go backward: log-sum-exp, random state."""
    ATTENTION_WEIGHTS = "attention_weights"
    """Tokens by tokens, where attention is not fused."""
    MASK = "mask"
    """A mask that the block makes for itself; masks that blocks share are not saved by a block."""
    MLP_GATE = "mlp_gate"
    """The activation function's input in a gated MLP; with ``up`` where one product gives both."""
    MLP_UP = "mlp_up"
    """What the gate multiplies; without a gate, the activation function's input."""
    MLP_ACTIVATION = "mlp_activation"
    MLP_PRODUCT = "mlp_product"
    ROUTING = "routing"
    """A router's scores and choices, and the order of tokens that follows: never computed again."""
    LOSS = "loss"
    """Logits, and what else the loss saves."""
    OTHER = "other"


class LifetimeKind(str, Enum):
    """Why a buffer exists."""

    INPUT = "input"
    OUTPUT = "output"
    SAVED = "saved"
    TRANSIENT = "transient"
    GRADIENT = "gradient"
    """Of a parameter; taken away as soon as it is produced."""
    SHARED = "shared"
    """Made before the blocks, which save it."""
    TIED_GRADIENT = "tied_gradient"
    """Of a parameter that prologue and epilogue share: it waits from the epilogue's backward, where it is
    produced, for the end of the prologue's, where it is added."""
    OUTPUT_GRADIENT = "output_gradient"
    INPUT_GRADIENT = "input_gradient"


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedTensor:
    """One storage that autograd keeps from forward to backward. Parameters and buffers are none."""

    tensor_class: TensorClass
    shape: tuple[int, ...]
    """As it was born; ``size_bytes`` is the size of its storage."""
    dtype: str
    size_bytes: int
    operator: str
    """That made it, such as ``aten::mm``; empty for the block's input."""
    module: str
    """In which it was made, relative to the block."""
    token_axis: int | None
    """The axis of ``shape`` along which tokens follow one another, of one row or of all (``batch`` x
    ``sequence``); None where there is none, or where tokens are in another order (experts)."""
    nearly_free: bool
    """It follows from ``recompute_from`` without a matrix product, an attention kernel or a random number."""
    recompute_from: tuple[int, ...] = ()
    """Indices of the saved tensors that a nearly free recompute reads; each may be nearly free itself."""
    recompute_from_input: bool = False
    """It reads the block's input as well, whether or not autograd saves that."""
    recompute_moved_bytes: int = 0
    """Read and written by a nearly free recompute."""
    source: str = "fake trace"

    def __post_init__(self) -> None:
        if self.size_bytes < 0:
            raise ValueError(f"{self.operator}: size_bytes must be >= 0, got {self.size_bytes}")
        if self.token_axis is not None and not 0 <= self.token_axis < len(self.shape):
            raise ValueError(f"{self.operator}: shape {self.shape} has no axis {self.token_axis}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lifetime:
    """A buffer, alive during the operations ``start <= i < end``, counted through forward and backward."""

    start: int
    end: int
    size_bytes: int
    kind: LifetimeKind
    saved: int | None = None
    """Its index among the saved tensors."""
    epilogue_end: int | None = None
    """Made before the blocks and referred to while they run, until this operation of the epilogue."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"a lifetime needs 0 <= start <= end, got {self.start} and {self.end}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One call of an operator that does work; views are none."""

    name: str
    module: str
    flops: int
    read_bytes: int
    """Operands, each once, at most the bytes of its storage."""
    written_bytes: int
    attention: bool = False
    """Part of attention proper, whose cost grows with the square of the tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedPart:
    """A class of blocks, or what stands before or after them: one forward and one backward."""

    name: str
    """Of the first block of the class; ``prologue`` or ``epilogue``."""
    fingerprint: str
    """Of everything that decides bytes and operations; blocks with one fingerprint share this record."""
    input_bytes: int
    output_bytes: int
    saved: tuple[SavedTensor, ...]
    operations: tuple[Operation, ...]
    forward_operations: int
    """How many of ``operations`` are forward's; the rest are backward's."""
    lifetimes: tuple[Lifetime, ...]
    attention_window: int | None = None
    """Tokens that a token attends to, from the configuration; None: all before it."""

    @property
    def saved_bytes(self) -> int:
        """Saved for backward, every storage once."""
        return sum(tensor.size_bytes for tensor in self.saved)

    @property
    def held_bytes(self) -> int:
        """Alive between forward and backward: ``saved_bytes``, and what is held in other ways."""
        return sum(t.size_bytes for t in self.lifetimes if t.start < self.forward_operations < t.end)

    @property
    def nearly_free_bytes(self) -> int:
        """Of ``saved_bytes``, what need not be kept."""
        return sum(tensor.size_bytes for tensor in self.saved if tensor.nearly_free)

    def class_bytes(self) -> dict[TensorClass, int]:
        """Saved bytes by class, in the order of first appearance."""
        found: dict[TensorClass, int] = {}
        for tensor in self.saved:
            found[tensor.tensor_class] = found.get(tensor.tensor_class, 0) + tensor.size_bytes
        return found

    def flops(self, *, backward: bool, attention: bool | None = None) -> int:
        """FLOPs of one pass; ``attention`` picks those of attention proper, or all others."""
        chosen = (
            self.operations[self.forward_operations :]
            if backward
            else self.operations[: self.forward_operations]
        )
        return sum(op.flops for op in chosen if attention is None or op.attention is attention)

    def load(self) -> list[int]:
        """Bytes alive during each operation: the least memory in which the lifetimes could be laid out."""
        change = [0] * (len(self.operations) + 1)
        for lifetime in self.lifetimes:
            change[lifetime.start] += lifetime.size_bytes
            change[lifetime.end] -= lifetime.size_bytes
        load, now = [], 0
        for step in change[:-1]:
            now += step
            load.append(now)
        return load

    @property
    def forward_peak_bytes(self) -> int:
        """Greatest load of forward, input and saved tensors included."""
        return max(self.load()[: self.forward_operations], default=0)

    @property
    def backward_peak_bytes(self) -> int:
        """Greatest load of backward, saved tensors and the gradient of the output included."""
        return max(self.load()[self.forward_operations :], default=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatedBlock:
    """One block of the model, and the class that describes it."""

    name: str
    part: int
    """Index into ``ModelEstimate.classes``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimatedUnit:
    """Parameters that are needed together; a tied one in the first unit alone."""

    name: str
    block: int | None
    parameters: tuple[ParameterSpec, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEstimate:
    """One micro-batch of one model."""

    model: str
    batch: int
    """Rows of the micro-batch."""
    sequence: int
    """Tokens in a row."""
    attention: str
    """The kernel that was traced or worked out."""
    classes: tuple[TracedPart, ...]
    blocks: tuple[EstimatedBlock, ...]
    prologue: TracedPart
    epilogue: TracedPart
    """From the last block's output to the loss."""
    shared: tuple[SavedTensor, ...]
    """What blocks are all given and save: masks, rotary tables. Once for the model, in no block's bytes."""
    units: tuple[EstimatedUnit, ...]
    buffer_bytes: int
    repeated_bytes: int = 0
    """Saved by two neighbours, such as a block's output that is the next one's input: counted twice above."""
    assumptions: tuple[str, ...] = ()
    """What was taken for granted, in words."""
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of numbers that are no saved tensor's: field, and where it comes from."""
    version: int = ESTIMATE_VERSION

    def __post_init__(self) -> None:
        for block in self.blocks:
            if not 0 <= block.part < len(self.classes):
                raise ValueError(f"{block.name}: there is no class {block.part} of {len(self.classes)}")

    def parts(self) -> Iterable[TracedPart]:
        """Prologue, every block, epilogue, in order."""
        yield self.prologue
        for block in self.blocks:
            yield self.classes[block.part]
        yield self.epilogue

    @property
    def saved_bytes(self) -> int:
        """Alive between the end of forward and the start of backward because autograd saved it."""
        apart = sum(part.saved_bytes for part in self.parts())
        return apart + sum(tensor.size_bytes for tensor in self.shared) - self.repeated_bytes

    def state(self, rule: OptimizerRule, *, master_weights: bool = False) -> StateBytes:
        """Weights, gradients and optimizer state of the whole model."""
        parameters = (parameter for unit in self.units for parameter in unit.parameters)
        return state_bytes(parameters, rule, master_weights=master_weights)

    def flops(self, *, backward: bool, attention: bool | None = None) -> int:
        """Of one micro-batch; as ``TracedPart.flops``."""
        return sum(part.flops(backward=backward, attention=attention) for part in self.parts())

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space."""
        return canonical_json(plain(self))

    @property
    def digest(self) -> str:
        """Hash of the canonical form."""
        return short_digest(plain(self))

    @classmethod
    def from_json(cls, text: str) -> ModelEstimate:
        """Read what ``to_json`` wrote. Raises ValueError on another version or unknown keys."""
        with reading("an estimate"):
            data: dict[str, Any] = json.loads(text)
            check_version(data, ESTIMATE_VERSION, "estimate")
            data["classes"] = tuple(_part(part) for part in data["classes"])
            data["prologue"], data["epilogue"] = _part(data["prologue"]), _part(data["epilogue"])
            data["blocks"] = tuple(EstimatedBlock(**block) for block in data["blocks"])
            data["shared"] = tuple(_saved(tensor) for tensor in data["shared"])
            data["units"] = tuple(_unit(unit) for unit in data["units"])
            data["assumptions"] = tuple(data["assumptions"])
            return cls(**data)


def _part(data: dict[str, Any]) -> TracedPart:
    saved = tuple(_saved(tensor) for tensor in data["saved"])
    operations = tuple(Operation(**operation) for operation in data["operations"])
    lifetimes = tuple(Lifetime(**{**life, "kind": LifetimeKind(life["kind"])}) for life in data["lifetimes"])
    return TracedPart(**{**data, "saved": saved, "operations": operations, "lifetimes": lifetimes})


def _saved(data: dict[str, Any]) -> SavedTensor:
    lists = {key: tuple(data[key]) for key in ("shape", "recompute_from")}
    return SavedTensor(**{**data, **lists, "tensor_class": TensorClass(data["tensor_class"])})


def _unit(data: dict[str, Any]) -> EstimatedUnit:
    parameters = tuple(ParameterSpec(**{**p, "shape": tuple(p["shape"])}) for p in data["parameters"])
    return EstimatedUnit(**{**data, "parameters": parameters})
