"""Treatments that change a model's gradients a little and its saved bytes a lot; what they combine with.

Each is applied to a model and undone by the handle that this returns. Forward passes stay exact.

==============  ======================  ====================  ======================  ======================
.               int8, int4 of saved     few-bit activation    CompAct                 WTA-CRS
==============  ======================  ====================  ======================  ======================
exact           forward                 forward               forward, dx, bias       forward, dx, bias
checkpoint      inside: steps aside;    the same bins in the  the same seed in the    the same draws (the
                around: encodes the     second run            second run              checkpoint restores
                input that it saves                                                   the generator)
accumulation    ordinary gradients      ordinary gradients    fp32 sum; a refresh     ordinary gradients
                                                              while pending raises
tied weights    never encoded           has none              one R for all uses, of  ordinary gradients;
                                                              one input or raises;    with an untreated use
                                                              with an untreated use   refused when applied
                                                              refused when applied
frozen weights  never encoded           has none              left alone: they save   left alone: they save
                                                              nothing                 nothing
autocast        copies of weights stay  bins of the input in  z in autocast's dtype   rows in autocast's
                                        its own dtype                                 dtype
GradScaler      what is not finite      ordinary gradients    ``densify_grads``       ordinary gradients;
                comes back as NaN                             before ``unscale_``;    norms that are not
                                                              fed: by                 finite are not learnt
                                                              ``SmallGradients``
optimizers      any                     any                   fed: the grid's, with   any
                                                              residual none;
                                                              ``densify_grads``:
                                                              any; else its step
                                                              raises
processes       ordinary gradients      ordinary gradients    one; ``densify_grads``  ordinary gradients
                                                              before an all-reduce
double          raises                  raises                raises                  raises
backward
other saved-    around it: they keep    fine                  fine                    fine
tensor hooks    the codes; inside:
                theirs count
torch.compile   around the graph: what  inside the graph      graph break with        graph break with
                that saves is encoded                         reason; fullgraph       reason; fullgraph
                                                              raises                  raises
==============  ======================  ====================  ======================  ======================

*fed*: ``compact_gradients.feed_compact``. A linear layer's int8 input (``int8_linear.py``) is as WTA-CRS in
this table, its checkpoint without random numbers. Policies (``lossy_treatments.py``) do not look at other
uses of a weight: there a treated and an untreated one add up, and two inputs of one CompAct weight raise.

They add up: few-bit, CompAct and WTA-CRS save less, and a ``SavedTensorCompressor`` encodes what they and the
rest of the block still save. Few-bit codes are integers and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.optim.autograd.fewbit import DEFAULT_BITS, Activation, FewBitActivation, derivative_of
from memtrain.optim.autograd.fewbit_tables import RANGE, Histogram
from memtrain.optim.autograd.group_codec import GroupCodec
from memtrain.optim.autograd.quantized_saved import Attachment, SavedTensorCompressor

_TORCH_ACTIVATIONS = (nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.SELU, nn.ELU, nn.CELU)
_HF_ACTIVATIONS = frozenset(
    "GELUActivation GELUTanh NewGELUActivation FastGELUActivation QuickGELUActivation AccurateGELUActivation "
    "SiLUActivation MishActivation ReLUSquaredActivation".split()
)
"""Of ``transformers.activations``. Those that save their output (sigmoid, tanh, ReLU) are absent: the layer
behind saves it too, so bits would come on top."""


class UnsupportedActivationError(ValueError):
    """Few-bit backward would save nothing here, or is not possible."""


class CompressedBlocks:
    """What ``compress_blocks`` attached, and the way back."""

    def __init__(self, compressor: SavedTensorCompressor, attachments: list[Attachment]) -> None:
        self.compressor = compressor
        self._attachments = attachments

    def undo(self) -> None:
        """Take the hooks off. Twice is harmless."""
        for attachment in self._attachments:
            attachment.remove()


def compress_blocks(
    model: nn.Module, codec: GroupCodec | None = None, *, blocks: Iterable[nn.Module] | None = None
) -> CompressedBlocks:
    """Encode what the blocks of ``model`` save for backward.

    Args:
        codec: None: int8.
        blocks: None: the members of the model's longest ``nn.ModuleList``. The head and the loss do not
            belong to them: an error in a log-probability is an error in every gradient.

    Raises:
        ValueError: there is no block.
    """
    chosen = list(_longest_list(model) if blocks is None else blocks)
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.ModuleList of blocks: name them (blocks=...)"
        )
    compressor = SavedTensorCompressor(codec)
    return CompressedBlocks(compressor, [compressor.attach(block) for block in chosen])


def _longest_list(model: nn.Module) -> nn.ModuleList:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


class FewBitHandle:
    """Which activations ``apply_fewbit`` replaced, and the way back."""

    def __init__(self, replaced: dict[str, tuple[nn.Module, str, nn.Module]]) -> None:
        self._replaced = replaced

    @property
    def names(self) -> list[str]:
        """Of the activations."""
        return list(self._replaced)

    def undo(self) -> None:
        """Put the model's own activations back. Twice is harmless."""
        for parent, attribute, original in self._replaced.values():
            setattr(parent, attribute, original)


def activation_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The activations of ``model`` that few-bit backward knows, gated or not; for ``collect_histograms``."""
    return {name: child for name, _, _, child in _activations(model)}


def apply_fewbit(
    model: nn.Module,
    bits: int = DEFAULT_BITS,
    *,
    inputs: Mapping[str, Histogram] | None = None,
    select: Callable[[str, nn.Module], bool] | None = None,
    gated: bool = False,
) -> FewBitHandle:
    """Replace activations by ones with few-bit backward. The forward pass stays the module's own.

    Args:
        bits: of each saved code.
        inputs: histograms of the activations' inputs, by name (``collect_histograms``), for tables that are
            best for them; an activation without one gets the table for any input.
        select: ``(name, module) -> bool``; None: all.
        gated: treat gated MLPs too. They then keep 6.4 bytes of bf16 per hidden feature (gate's bits, its
            activation, up, product) of eager's 8, where the exact recompute keeps 4.

    Raises:
        UnsupportedActivationError: nothing to replace, or a chosen activation belongs to a gated MLP.
        ValueError: an unbounded derivative (squared ReLU) without a histogram.
    """
    chosen = [entry for entry in _activations(model) if select is None or select(entry[0], entry[3])]
    if not chosen:
        raise UnsupportedActivationError(
            f"{type(model).__name__} has no activation module that few-bit backward is for "
            "(GELU, SiLU, squared ReLU, Mish, Softplus, ELU, SELU as a module of its own)"
        )
    for name, parent, _, _ in chosen:
        if is_gated(parent) and not gated:
            raise UnsupportedActivationError(
                f"{name} belongs to a gated MLP ({type(parent).__name__}), where few-bit gives "
                "nothing: the gate's product needs the activation's value, which follows from the saved "
                "gate. Recompute it (memtrain.optim.autograd.swiglu); encode gate and up (compress_blocks)"
            )
    given = {} if inputs is None else inputs
    tables: dict[Any, FewBitActivation] = {}
    made = []
    for name, parent, attribute, child in chosen:
        key = (type(child), child.extra_repr(), given.get(name))
        if key not in tables:
            activation = activation_of(child)
            tables[key] = FewBitActivation(activation, table=activation.table(bits, inputs=given.get(name)))
        made.append((name, parent, attribute, child, tables[key]))
    for _, parent, attribute, child, known in made:
        replacement = FewBitActivation(activation_of(child), table=known.table)
        setattr(parent, attribute, replacement.to(_device_of(parent)))
    return FewBitHandle({name: (parent, attribute, child) for name, parent, attribute, child, _ in made})


def activation_of(module: nn.Module) -> Activation:
    """An activation module as few-bit backward sees it: its own forward, its derivative by autograd."""
    points = torch.tensor([-2 * RANGE, -RANGE, RANGE, 2 * RANGE], dtype=torch.float64)
    derivative = derivative_of(module.forward)
    slopes = derivative(points)
    unbounded = bool((slopes[[0, 3]] - slopes[[1, 2]]).abs().max() > 0.01)
    return Activation(
        name=type(module).__name__, function=module.forward, derivative=derivative, unbounded=unbounded
    )


def is_gated(parent: nn.Module) -> bool:
    """Whether the weights of an MLP have the shapes of a gated one: three matrices of one size (gate, up,
    down), or one with twice the features of the other (gate and up in one)."""
    shapes = [tuple(sorted(shape)) for shape in _matrix_shapes(parent)]
    if any(shapes.count(shape) >= 3 for shape in shapes):
        return True
    pairs = [(a, b) for a in _matrix_shapes(parent) for b in _matrix_shapes(parent)]
    return any(
        a != b and (_doubled(a, b) or _doubled(a, b[::-1]))  # the weight may be [out, in] or [in, out]
        for a, b in pairs
    )


def _matrix_shapes(parent: nn.Module) -> list[tuple[int, int]]:
    weights = [getattr(child, "weight", None) for child in parent.children()]
    own = [
        parameter
        for parameter in parent._parameters.values()
        if parameter is not None and parameter.dim() == 3
    ]
    tensors = [weight for weight in weights if isinstance(weight, Tensor) and weight.dim() == 2]
    return [(int(tensor.shape[-2]), int(tensor.shape[-1])) for tensor in (*tensors, *own)]


def _doubled(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """``a`` is gate and up in one, [2f, d] or [d, 2f], and ``b`` [f, d] or [d, f]."""
    return (a[0] == 2 * b[0] and a[1] == b[1]) or (a[1] == 2 * b[1] and a[0] == b[0])


def is_activation(module: nn.Module) -> bool:
    """Whether few-bit backward is for modules of this class."""
    kind = type(module)
    of_hf = kind.__module__ == "transformers.activations" and kind.__name__ in _HF_ACTIVATIONS
    return of_hf or isinstance(module, _TORCH_ACTIVATIONS)


def _activations(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Name, parent, attribute and module of each; a module in two places comes twice."""
    for path, parent in model.named_modules(remove_duplicate=False):
        for attribute, child in parent.named_children():
            if is_activation(child):
                yield f"{path}.{attribute}" if path else attribute, parent, attribute, child


def _device_of(parent: nn.Module) -> torch.device:
    return next((parameter.device for parameter in parent.parameters()), torch.device("cpu"))
