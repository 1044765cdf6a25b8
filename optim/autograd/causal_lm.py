"""The chunked loss inside a Hugging Face causal LM, without knowing which one it is.

When labels are given, the model's own forward runs with an output projection that only remembers what it
was given; the loss is then computed from those hidden states and the projection's weight. What a model does
to its logits (Cohere's and Granite's scale, Gemma's soft-cap) is found in its config and then *measured*: at
installation the projection is made to return known logits, and the model must return what we believe it
makes of them, and the loss that we believe it takes. A model that does anything else is refused, with the
reason.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memtrain.optim.autograd.chunked_loss import DEFAULT_CHUNK_TOKENS, chunked_cross_entropy
from memtrain.optim.autograd.tiled_linear import TiledLinear
from memtrain.optim.autograd.tiled_loss import tiled_cross_entropy

_PROBE_TOKENS = 8
_PROBE_LOGITS_SPREAD = 20.0
"""Known logits are drawn with this deviation: wide enough that a soft-cap of 30 bends them."""


Head = nn.Linear | TiledLinear


class UnsupportedHeadError(ValueError):
    """The model's loss cannot be computed by chunks exactly as the model computes it."""


class _LogitMap(NamedTuple):
    """``soft_cap * tanh(scale * z / soft_cap)`` of the projection's output ``z``."""

    scale: float
    soft_cap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits.double() * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


class ChunkedLossHandle:
    """What ``install_chunked_loss`` changed, and the way back."""

    def __init__(self, model: nn.Module, installed: Callable[..., Any]) -> None:
        self._model = model
        self._before = model.__dict__.get("forward")
        self._installed: Callable[..., Any] | None = installed
        model.forward = installed

    def uninstall(self) -> None:
        """Give the model its own forward back. Doing it twice is harmless.

        Raises:
            RuntimeError: something else has replaced ``forward`` since; undo that first.
        """
        if self._installed is None:
            return
        if self._model.__dict__.get("forward") is not self._installed:
            raise RuntimeError(
                f"{type(self._model).__name__}.forward was replaced after the chunked loss was installed; "
                "undo that replacement first (with Accelerate: accelerator.unwrap_model)"
            )
        del self._model.forward
        if self._before is not None:
            self._model.forward = self._before
        self._installed = None


def install_chunked_loss(
    model: nn.Module,
    *,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    probing: AbstractContextManager[None] | None = None,
) -> ChunkedLossHandle:
    """Make ``model(..., labels=...)`` compute its loss by chunks of tokens.

    The output is of the model's own class, with ``loss`` and ``logits=None``. Without labels the model is
    what it was, so generation works. ``num_items_in_batch``, ``shift_labels`` and ``ignore_index`` mean what
    they mean to Hugging Face. Runs the model three times on eight tokens, in eval mode and without gradients,
    inside ``probing``: there weights must be in memory, those of the output embedding all the time.

    Raises:
        UnsupportedHeadError: names what the model or its loss does that this cannot do exactly.
    """
    head = _output_projection(model)
    original = model.forward
    signature = inspect.signature(original)
    if "labels" not in signature.parameters:
        raise UnsupportedHeadError(f"{type(model).__name__}.forward takes no labels, so it computes no loss")
    with probing or nullcontext(), _probing(model), torch.no_grad():
        logit_map = _measured_logit_map(model, head, original)
        installed = _chunked_forward(model, head, original, signature, logit_map, chunk_tokens)
        _compare_losses(model, head, original, installed)
    return ChunkedLossHandle(model, installed)


def _output_projection(model: nn.Module) -> Head:
    name = type(model).__name__
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        raise UnsupportedHeadError(f"{name} names no output embedding (get_output_embeddings)")
    if type(head) not in (nn.Linear, TiledLinear):
        raise UnsupportedHeadError(
            f"the output embedding of {name} is a {type(head).__name__}; only a torch.nn.Linear, or its "
            "tiles, is known to be hidden @ weight.T + bias (merge adapters, dequantise)"
        )
    if "forward" in head.__dict__ or head._forward_hooks:
        raise UnsupportedHeadError(f"the output embedding of {name} carries a hook, which would be passed by")
    _refuse_router_loss(getattr(getattr(model, "config", None), "output_router_logits", False))
    return head


def _refuse_router_loss(requested: Any) -> None:
    if requested:
        raise UnsupportedHeadError(
            "output_router_logits adds a router loss that the chunked loss does not compute; set it to False"
        )


def _chunked_forward(
    model: nn.Module,
    head: Head,
    original: Callable[..., Any],
    signature: inspect.Signature,
    logit_map: _LogitMap,
    chunk_tokens: int,
) -> Callable[..., Any]:
    extra_name = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        labels = bound.arguments.get("labels")
        if labels is None:
            return original(*args, **kwargs)
        options = {**bound.arguments, **bound.arguments.get(extra_name, {})}
        _refuse_router_loss(options.get("output_router_logits", False))
        bound.arguments["labels"] = None
        seen: list[Tensor] = []

        def remember(hidden: Tensor) -> Tensor:
            seen.append(hidden)
            return hidden.detach()[..., :1]

        with _standing_in(head, remember):
            output = original(*bound.args, **bound.kwargs)
        if isinstance(output, tuple) or not hasattr(output, "logits"):
            raise ValueError("the chunked loss returns the model's output class: drop return_dict=False")
        if len(seen) != 1:
            raise RuntimeError(f"the output embedding ran {len(seen)} times in one forward, not once")
        loss = _loss_of(head)(
            seen[0],
            labels=_shifted(labels, options),
            ignore_index=options.get("ignore_index", -100),
            num_items=options.get("num_items_in_batch"),
            chunk_tokens=chunk_tokens,
            soft_cap=logit_map.soft_cap,
            logit_scale=logit_map.scale,
        )
        return type(output)(**{**output, "loss": loss, "logits": None})

    return forward


def _loss_of(head: Head) -> Callable[..., Tensor]:
    if isinstance(head, TiledLinear):
        return functools.partial(tiled_cross_entropy, head=head)
    return functools.partial(chunked_cross_entropy, weight=head.weight, bias=head.bias)


def _weight_of(head: Head) -> Tensor:
    """A weight of its device and dtype, perhaps not all of it."""
    return head.parts[0].weight if isinstance(head, TiledLinear) else head.weight


def _shifted(labels: Tensor, options: dict[str, Any]) -> Tensor:
    """Labels such that token ``t`` of the hidden states predicts label ``t``."""
    shifted: Tensor | None = options.get("shift_labels")
    if shifted is None:
        shifted = nn.functional.pad(labels, (0, 1), value=options.get("ignore_index", -100))[..., 1:]
    return shifted


class _StandIn:
    """In the place of a head's forward. Each thread has its own, for several forward passes of the model may
    be under way that take turns in threads of their own; whoever has none finds the head as it was."""

    def __init__(self, head: Head) -> None:
        self.before: Callable[..., Any] | None = head.__dict__.get("forward")
        self.users = 0
        self._forward = head.forward
        self._here = threading.local()

    def __call__(self, hidden: Tensor) -> Tensor:
        forward: Callable[[Tensor], Tensor] = self.mine or self._forward
        return forward(hidden)

    @property
    def mine(self) -> Callable[[Tensor], Tensor] | None:
        """This thread's."""
        return getattr(self._here, "forward", None)

    @mine.setter
    def mine(self, forward: Callable[[Tensor], Tensor] | None) -> None:
        self._here.forward = forward


@contextmanager
def _standing_in(head: Head, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    present = head.__dict__.get("forward")
    stand_in = present if isinstance(present, _StandIn) else _StandIn(head)
    head.__dict__["forward"] = stand_in
    outer, stand_in.mine = stand_in.mine, forward
    stand_in.users += 1
    try:
        yield
    finally:
        stand_in.mine = outer
        stand_in.users -= 1
        if not stand_in.users:
            del head.__dict__["forward"]
            if stand_in.before is not None:
                head.__dict__["forward"] = stand_in.before


@contextmanager
def _probing(model: nn.Module) -> Iterator[None]:
    """Eval mode, so that dropout is silent and no buffer learns; module by module restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _probe(head: Head) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(head.out_features, (1, _PROBE_TOKENS), generator=generator)
    return ids.to(_weight_of(head).device), generator


def _candidates(model: nn.Module) -> list[_LogitMap]:
    """Every map that the config's known names could mean; models disagree whether to multiply."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    named = [getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    factors = [float(v) for v in named if isinstance(v, (int, float)) and v]
    scales = [1.0, *factors, *(1 / factor for factor in factors)]
    cap = getattr(config, "final_logit_softcapping", None)
    return [_LogitMap(*pair) for pair in itertools.product(scales, [cap, None] if cap else [None])]


def _measured_logit_map(model: nn.Module, head: Head, original: Callable[..., Any]) -> _LogitMap:
    """Give the model known logits; see what it makes of them, and which loss it takes."""
    ids, generator = _probe(head)
    known = torch.randn(1, _PROBE_TOKENS, head.out_features, generator=generator) * _PROBE_LOGITS_SPREAD
    known = known.to(_weight_of(head).device, _weight_of(head).dtype)
    with _standing_in(head, lambda hidden: known.to(hidden.dtype)):
        output = original(input_ids=ids, labels=ids, return_dict=True)
    name, got = type(model).__name__, output.logits.double()
    if got.shape != known.shape:
        raise UnsupportedHeadError(f"{name} turns logits {tuple(known.shape)} into {tuple(got.shape)}")
    # Four roundings (scale, divide, tanh, multiply) in the model's dtype.
    allowed = 4 * torch.finfo(known.dtype).eps * max(1.0, float(got.abs().max()))
    candidates = _candidates(model)
    fitting = [c for c in candidates if float((c(known) - got).abs().max()) <= allowed]
    if not fitting:
        raise UnsupportedHeadError(
            f"{name} changes its logits between output embedding and loss in a way that its config does not "
            f"name (tried scale and soft-cap {[tuple(c) for c in candidates]})"
        )
    expected = nn.functional.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
    if not torch.allclose(output.loss.float(), expected, rtol=1e-5):
        raise UnsupportedHeadError(
            f"the loss of {name} is {output.loss.item():.6g} where the mean cross-entropy of the next token "
            f"is {expected.item():.6g}: it is another loss, or has other terms"
        )
    return fitting[0]


def _compare_losses(
    model: nn.Module, head: Head, original: Callable[..., Any], installed: Callable[..., Any]
) -> None:
    ids, _ = _probe(head)
    losses = (run(input_ids=ids, labels=ids, return_dict=True).loss for run in (original, installed))
    expected, got = (loss.item() for loss in losses)
    # Each logit is rounded in the weight's dtype, and products of other shapes sum in another order.
    allowed = 8 * torch.finfo(_weight_of(head).dtype).eps * max(1.0, abs(expected))
    if not abs(expected - got) <= allowed:
        raise UnsupportedHeadError(
            f"on {_PROBE_TOKENS} tokens {type(model).__name__} has loss {expected:.6g} and the chunked loss "
            f"{got:.6g}: the model computes its loss from something else"
        )
