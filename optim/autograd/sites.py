"""Places in a model where activations can be kept in less, found by structure and one forward.

A kind of site is a shape of module, not a name: a norm is a module with a vector of weights and no children,
a gated MLP three linear layers of which two widen and one narrows. What such a module computes is decided by
the treatment that wants to replace it (``treatments.py``), which compares its own result with what the module
gave in the probe, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROBE_TOKENS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One module and what it was seen doing."""

    kind: str
    """``norm``, ``linear`` (eats a norm's output), ``gated_mlp``, ``mlp`` or ``layer``."""
    name: str
    """Qualified, as in ``named_modules``."""
    module: nn.Module
    input: Tensor
    """Its first argument in the probe, ``[..., features]``."""
    output: Tensor | None
    """What it returned; None for a layer, which may return several tensors."""
    first_to_read: bool = True
    """Of a linear layer: whether it is the first of those that read this input."""

    @property
    def tokens(self) -> int:
        """Rows of the input."""
        return self.input.shape[:-1].numel()


def is_linear(module: nn.Module) -> bool:
    """Whether it is ``nn.Linear`` itself or GPT-2's Conv1D, whose weight is transposed; no subclass, which
    may compute anything."""
    kind = type(module)
    return kind is nn.Linear or (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is ``[in, out]``."""
    return type(module) is not nn.Linear


def features(module: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a linear layer."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    out, into = weight.shape
    return (out, into) if is_transposed(module) else (into, out)


def find_sites(model: nn.Module, example: Callable[[], Any] | None) -> list[Site]:
    """Run the model once, in eval mode and without gradients, and list its sites in the order of modules.

    Args:
        example: runs the model once; None: a Hugging Face model on eight tokens.

    Raises:
        ValueError: ``example`` is needed.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model is on the meta device, where nothing can be compared; load it first")
    run = example if example is not None else _token_example(model)
    kinds = {name: kind for name, module in model.named_modules() if (kind := _kind(module)) is not None}
    calls: dict[str, tuple[Tensor, Any]] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if given and name not in calls:
                calls[name] = (given[0], output)

        return hook

    handles = [
        module.register_forward_hook(remember(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name in kinds
    ]
    try:
        with quietly(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return list(_sites(model, kinds, calls))


def _sites(model: nn.Module, kinds: dict[str, str], calls: dict[str, tuple[Tensor, Any]]) -> Iterator[Site]:
    norm_outputs = {id(output) for name, (_, output) in calls.items() if kinds[name] == "norm"}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    read: set[int] = set()
    for name, module in model.named_modules():
        if name not in calls:
            continue
        kind, (given, output) = kinds[name], calls[name]
        if kind == "linear" and (module is head or id(given) not in norm_outputs):
            continue  # the head belongs to the loss (causal_lm.py)
        first = id(given) not in read
        if kind == "linear":
            read.add(id(given))
        yield Site(
            kind=kind,
            name=name,
            module=module,
            input=given,
            output=output if isinstance(output, Tensor) else None,
            first_to_read=first,
        )


def _kind(module: nn.Module) -> str | None:
    children = list(module.children())
    own = list(module.parameters(recurse=False))
    if is_linear(module):
        return "linear"
    if not children:
        return "norm" if own and own[0].dim() == 1 and all(p.shape == own[0].shape for p in own) else None
    linears = [features(child) for child in children if is_linear(child)]
    others = [child for child in children if not is_linear(child)]
    pointwise = not own and not any(True for child in others for _ in child.parameters())
    if pointwise and len(linears) == 3 and others and _widens_and_narrows(linears):
        return "gated_mlp"
    if pointwise and len(linears) == 2 and others and linears[0] == linears[1][::-1]:
        return "mlp"
    has_norm = any(_kind(child) == "norm" for child in children)
    return "layer" if has_norm and not any(isinstance(child, nn.ModuleList) for child in children) else None


def _widens_and_narrows(linears: list[tuple[int, int]]) -> bool:
    """Two of one shape, and one that leads back."""
    return any(linears[b] == linears[c] == linears[a][::-1] for a, b, c in ((0, 1, 2), (1, 0, 2), (2, 0, 1)))


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and the random numbers as they were; module by module restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(model)):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _devices(model: nn.Module) -> list[int]:
    found = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    return sorted(index for index in found if index is not None)


def _token_example(model: nn.Module) -> Callable[[], Any]:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embeddings, nn.Embedding):
        raise ValueError(
            f"{type(model).__name__} has no token embeddings to be tried with: pass example, a function "
            "that runs it once"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.num_embeddings, (1, PROBE_TOKENS), generator=generator)
    return lambda: model(input_ids=ids.to(embeddings.weight.device), use_cache=False)
