"""Runs a model so that nothing shows it afterwards: gradients, buffers, modes, hooks and random numbers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is as in training, without a key-value cache; gradients vanish as they are made."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.enable_grad())
        for parameter, _ in gradients:
            parameter.grad = None
            if parameter.requires_grad and parameter.is_leaf:
                stack.enter_context(_own_hooks_silent(parameter))
                stack.enter_context(gradient_hook(parameter, _drop))
        try:
            if not model.training:
                model.train()
            if config is not None and use_cache:
                config.use_cache = False
            yield
        finally:
            if config is not None and use_cache:
                config.use_cache = use_cache
            for module, training in modes:
                module.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def _own_hooks_silent(parameter: Tensor) -> Iterator[None]:
    """The user's hooks on a parameter, such as an optimizer in backward, would change weights."""
    found: Any = parameter
    before = found._backward_hooks, found._post_accumulate_grad_hooks
    # Empty dictionaries: None would leave the hooks after accumulation in force.
    found._backward_hooks, found._post_accumulate_grad_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        # The very dictionaries, to which the handles that remove the hooks refer.
        found._backward_hooks, found._post_accumulate_grad_hooks = before


def gradient_hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Call ``hook`` with ``parameter`` whenever a gradient has been added to it."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
