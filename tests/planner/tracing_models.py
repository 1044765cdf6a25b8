"""Small models of every kind, and what autograd really saves of them: the oracle of the fake traces."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ROWS, TOKENS = 2, 24
_SIZES = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "vocab_size": 97, "num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "llama", **_LLAMA, "num_key_value_heads": 4},
    "grouped": {"model_type": "llama", **_LLAMA},
    "window": {"model_type": "mistral", **_LLAMA, "sliding_window": 8},
    "biased": {"model_type": "qwen2", **_LLAMA},
    "mixed-windows": {"model_type": "gemma2", **_LLAMA, "sliding_window": 8, "head_dim": 16},
    "experts": {"model_type": "mixtral", **_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 97,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}


def real_model(
    config: dict[str, Any], dtype: torch.dtype, attention: str
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with weights, and a batch, as it would be trained."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = {} if attention == "default" else {"attn_implementation": attention.replace("math", "sdpa")}
    fields = dict(config)
    built = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(built, dtype=dtype, **options).train()
    model.config.use_cache = False
    ids = torch.randint(0, 97, (ROWS, TOKENS))
    return model, {"input_ids": ids, "labels": ids.clone()}


def kernel(attention: str) -> AbstractContextManager[Any]:
    """SDPA's choice for ``attention``."""
    return sdpa_kernel(SDPBackend.MATH) if attention == "math" else nullcontext()


def really_saved(model: nn.Module, forward: Callable[[], Tensor], batch: list[Tensor]) -> int:
    """Bytes of the unique storages that autograd packs, but parameters, buffers and the batch."""

    def key(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    outside = {key(t) for t in (*model.parameters(), *model.buffers(), *batch)}
    saved: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[key(tensor)] = tensor.untyped_storage().nbytes(), tensor  # held, so that no pointer returns
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for place, (size, _) in saved.items() if place not in outside)
