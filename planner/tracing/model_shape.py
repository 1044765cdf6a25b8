"""``ModelShape`` of a Hugging Face configuration: what parallel degrees have to divide.

Configurations call one thing by many names. transformers' own aliases know layers, hidden size and heads
(GPT-2's ``n_layer``, ``n_embd``, ``n_head``); the names below know the rest. What cannot be said
with one number for all layers is refused rather than guessed: degrees would divide the wrong thing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memtrain.planner.parallel import ModelShape
from memtrain.planner.tracing.fake_model import read_config

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
_EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size")
_MLP_WIDTH = ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")
_DEFAULT_EXPANSION = 4
"""Of the hidden size, where the width is None: transformers' rule for GPT-2 and its kin."""


class ModelShapeError(ValueError):
    """A configuration from which the sizes of a decoder cannot be read."""


def model_shape(source: str | Path | Mapping[str, Any] | Any) -> ModelShape:
    """The sizes of the decoder that ``source`` describes (text part, if it has several).

    Args:
        source: as ``fake_model.read_config``: preset, folder, ``config.json``, its contents, or the object.

    Raises:
        UnknownModelError: no such configuration.
        ModelShapeError: it lacks a size, has one that differs from layer to layer, or its keys and values
            have heads of different sizes (multi-head latent attention).
    """
    config = read_config(source).get_text_config()
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_size = _size(config, "head_dim", default=hidden // heads)
    if _attribute(config, "kv_lora_rank") or _size(config, "v_head_dim", default=head_size) != head_size:
        raise ModelShapeError(
            f"{config.model_type}: heads of keys and of values differ in size, as in multi-head latent "
            "attention, and parallel degrees are worked out for one size"
        )
    experts = expert_count(config)
    return ModelShape(
        layers=_size(config, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        key_value_heads=_key_value_heads(config, heads),
        head_size=head_size,
        intermediate=_intermediate(config, hidden, experts),
        experts=experts,
        experts_per_token=_size(config, *_EXPERTS_PER_TOKEN) if experts else 0,
    )


def expert_count(config: Any) -> int:
    """Routed experts of each layer that has any; 0 for a dense model."""
    return _size(config.get_text_config(), *_EXPERTS, default=0)


def _key_value_heads(config: Any, heads: int) -> int:
    # Falcon's newer decoders keep the flag and do not heed it.
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return _size(config, "num_key_value_heads", "num_kv_heads", default=heads)


def _intermediate(config: Any, hidden: int, experts: int) -> int:
    names = _EXPERT_WIDTH if experts else _MLP_WIDTH
    left_open = any(hasattr(config, name) for name in names)
    return _size(config, *names, default=_DEFAULT_EXPANSION * hidden if left_open else None)


def _size(config: Any, *names: str, default: int | None = None) -> int:
    """The first of ``names`` that the configuration gives."""
    for name in names:
        found = _attribute(config, name)
        if found is None:
            continue
        if not isinstance(found, int):
            raise ModelShapeError(
                f"{config.model_type}: {name} is {found!r}, and one number for all layers is needed"
            )
        return found
    if default is None:
        raise ModelShapeError(f"{config.model_type}: the configuration gives no {' or '.join(names)}")
    return default


def _attribute(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError as error:  # transformers refuses a global value where layers differ
        raise ModelShapeError(f"{config.model_type}: {name} differs from layer to layer") from error
