"""A model without weights: from a preset, a folder, a ``config.json`` or a configuration, on fake tensors.

Nothing is downloaded. The model is the one that transformers would train, with the decisions it takes by
looking at values taken for it: a batch holds one unpadded sequence in every row, so that no mask is made
where the attention kernel's own causal flag will do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memtrain.planner.model_presets import PRESETS
from memtrain.planner.tracing.attention import FORMULA_KERNELS, AttentionKernelError, FormulaAttention

TRACED_ATTENTION = ("default", "sdpa", "math", "eager")
"""``default``: what transformers chooses for the model; ``sdpa``: the CPU's flash kernel where it can;
``math``: SDPA without fusion; ``eager``: the model's own matrix products."""
_WINDOWED = "memtrain_windowed"


class UnknownModelError(ValueError):
    """No configuration can be had from what the user named."""


def read_config(source: str | Path | Mapping[str, Any] | Any) -> Any:
    """The transformers configuration that ``source`` stands for.

    Args:
        source: a preset's name, a folder with a ``config.json``, such a file, its contents, or a
            configuration object, which is returned as it is.

    Raises:
        UnknownModelError: no preset, file or model type of this name.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(source, PretrainedConfig):
        return source
    fields = dict(source) if isinstance(source, Mapping) else _fields(source)
    model_type = fields.pop("model_type", None)
    if not model_type:
        raise UnknownModelError(f"{source}: the configuration names no model_type")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise UnknownModelError(f"this transformers knows no model_type {model_type!r}") from error


def _fields(source: str | Path) -> dict[str, Any]:
    if str(source) in PRESETS:
        return dict(PRESETS[str(source)])
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UnknownModelError(
            f"{source} is neither a preset ({', '.join(PRESETS)}) nor a config.json or a folder with one"
        )
    fields: dict[str, Any] = json.loads(path.read_text())
    return fields


def build(config: Any, dtype: torch.dtype, attention: str) -> nn.Module:
    """The causal language model of ``config``, in training mode, without a key-value cache.

    Must be called under a fake tensor mode. Raises AttentionKernelError: it cannot have this ``attention``.
    """
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    options: dict[str, Any] = {}
    if attention == "flash":
        AttentionInterface.register(_WINDOWED, _flash_with_windows)
        options["attn_implementation"] = _WINDOWED
    elif attention != "default":
        options["attn_implementation"] = "eager" if attention == "eager" else "sdpa"
    try:
        with no_init_weights():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)  # type: ignore[no-untyped-call]
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error):
            raise
        raise AttentionKernelError(
            f"{config.model_type} has no attention through F.scaled_dot_product_attention in transformers: "
            "choose eager, or flash in bfloat16"
        ) from error
    except KeyError as error:
        if error.args != (_WINDOWED,):
            raise
        raise AttentionKernelError(
            f"{config.model_type} has a list of attention classes of its own: choose eager"
        ) from error
    model.tie_weights()  # which goes together with initialisation
    model.config.use_cache = False
    trained: nn.Module = model.train()
    return trained


def token_batch(batch: int, sequence: int) -> dict[str, Tensor]:
    """Input ids and labels, int64 ``[batch, sequence]``."""
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids.clone()}


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Scaled dot product attention as ``name`` says, while a model runs.

    Raises:
        ValueError: unknown name.
        AttentionKernelError: nothing has asked for the kernel.
    """
    if name not in (*TRACED_ATTENTION, *FORMULA_KERNELS):
        raise ValueError(
            f"attention must be one of {', '.join((*TRACED_ATTENTION, *FORMULA_KERNELS))}, got {name!r}"
        )
    with ExitStack() as stack:
        formula = stack.enter_context(FormulaAttention(name)) if name in FORMULA_KERNELS else None
        if name == "math":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
    if formula and not formula.used:
        raise AttentionKernelError(
            f"the model never calls F.scaled_dot_product_attention, so {name} would change nothing: "
            "choose eager, which is what it runs"
        )


@contextmanager
def unpacked_rows() -> Iterator[None]:
    """transformers looks at position ids to find several sequences in a row; fake ones have no values."""
    masking_utils = sys.modules.get("transformers.masking_utils")
    if masking_utils is None:  # not a model of theirs
        yield
        return
    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name)
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, found)


def _flash_with_windows(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """As the flash-attn package, the kernel itself does windows and soft caps, and no mask is made."""
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output.transpose(1, 2).contiguous(), None
