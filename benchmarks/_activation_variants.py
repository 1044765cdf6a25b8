"""Models and treatments of benchmarks/activations.py, and what one step of them costs.

A variant is a way to keep activations; ``treat`` puts it on a model. Lossy treatments are those of
``memtrain.optim.autograd.lossy`` and its neighbours.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from memtrain.optim.autograd.apply import apply_to

FEATURES, HIDDEN, HEADS = 512, 1376, 8
VOCABULARY = 8192
SEQUENCE = 1024
"""The longest of one layer. Eager saves 23,464 B a token in bf16 in a batch of two, by hand as well."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside that are still alive: whatever holds them, hooks included."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[weakref.ref[torch.UntypedStorage], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                reference = weakref.ref(storage, lambda gone: self._alive.pop(gone, None))
                self._alive[reference] = storage.nbytes()
        return out

    @property
    def total(self) -> int:
        """Now."""
        return sum(self._alive.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A module under test, a way to run it, and its parameters."""

    module: nn.Module
    forward: Callable[[], Tensor]
    """One forward; the result is scalar for a model, ``[batch, tokens, features]`` for a layer."""
    tokens: int

    def step(self) -> tuple[float, Tensor]:
        """Seconds of forward and backward, and what forward gave."""
        self.module.zero_grad()
        _drop_compressed(self.module)
        start = time.perf_counter()
        out = self.forward()
        out.backward(None if out.dim() == 0 else torch.ones_like(out))
        return time.perf_counter() - start, out.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Of the last step, in fp64."""
        named = self.module.named_parameters()
        return {name: p.grad.double() for name, p in named if p.grad is not None}

    def saved_bytes_per_token(self) -> float:
        """What is alive between forward and backward, without the result."""
        self.step()
        with LiveBytes() as live:
            out = self.forward()
        kept = live.total - out.untyped_storage().nbytes()
        del out
        return kept / self.tokens


def layer_job(dtype: torch.dtype, variant: str, *, shape: tuple[int, int], gated: bool = True) -> Job:
    """One layer on ``shape`` tokens: of Llama, or with LayerNorm and a GELU MLP of four times its width."""
    torch.manual_seed(0)
    if gated:
        config = _config(layers=1)
        layer, rotary = LlamaDecoderLayer(config, 0).to(dtype), LlamaRotaryEmbedding(config)
    else:
        config = _gelu_config()
        layer, rotary = GPTNeoXLayer(config, 0).to(dtype), GPTNeoXRotaryEmbedding(config)
    leaf = torch.randn(*shape, FEATURES).to(dtype).requires_grad_()
    places = torch.arange(shape[1])[None]

    def run(x: Tensor) -> Tensor:
        out: Tensor = layer(x, position_embeddings=rotary(x, places))
        return out

    if variant == "checkpointing":

        def forward() -> Tensor:
            out: Tensor = checkpoint(run, leaf * 1, use_reentrant=False)
            return out
    else:
        treat(variant, layer, blocks=[layer], example=lambda: run(leaf))

        def forward() -> Tensor:
            return run(leaf * 1)  # the input belongs to the layer before, which does not keep it

    return Job(module=layer, forward=forward, tokens=shape[0] * shape[1])


def model_job(dtype: torch.dtype, variant: str, *, batch: int, tokens: int, layers: int = 12) -> Job:
    """A Llama of 12 such layers with its loss."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(_config(layers=layers)).to(dtype).train()
    ids = torch.randint(VOCABULARY, (batch, tokens))
    if variant == "checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        treat(variant, model, blocks=list(model.model.layers), example=None)

    def forward() -> Tensor:
        torch.manual_seed(1)  # of draws, where a treatment draws
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    return Job(module=model, forward=forward, tokens=batch * tokens)


def _config(*, layers: int) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=FEATURES,
        intermediate_size=HIDDEN,
        num_attention_heads=HEADS,
        num_hidden_layers=layers,
        vocab_size=VOCABULARY,
    )
    config._attn_implementation = "sdpa"
    return config


def _gelu_config() -> Any:
    config = transformers.GPTNeoXConfig(
        hidden_size=FEATURES,
        intermediate_size=4 * FEATURES,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "sdpa"
    return config


def variants(*, gated: bool = True) -> list[str]:
    """Those that this checkout has. Few-bit activations save nothing in a gated MLP, and refuse it."""
    found = ["eager", "exact", "checkpointing"]
    if importlib.util.find_spec("memtrain.optim.autograd.lossy") is None:
        return found
    lossy = ["int8", "exact + int8", "exact + int4", "CompAct", "WTA-CRS"]
    return [*found, *lossy] if gated else [*found, "exact + int8", "few-bit"]


def treat(
    variant: str, module: nn.Module, *, blocks: list[nn.Module], example: Callable[[], Any] | None
) -> None:
    """Put a variant on. Gradients of CompAct are made dense by ``densify``."""
    if variant in ("exact", "exact + int8", "exact + int4"):
        apply_to(module, example=example)
    if variant in ("eager", "exact"):
        return
    from memtrain.optim.autograd.compact import apply_compact
    from memtrain.optim.autograd.group_codec import GroupCodec
    from memtrain.optim.autograd.lossy import apply_fewbit, compress_blocks
    from memtrain.optim.autograd.wtacrs import apply_wta

    if variant in ("int8", "exact + int8"):
        compress_blocks(module, blocks=blocks)
    elif variant == "exact + int4":
        compress_blocks(module, GroupCodec(bits=4), blocks=blocks)
    elif variant == "few-bit":
        apply_fewbit(module)
    elif variant == "CompAct":
        apply_compact(module, select=_inside_blocks)
    elif variant == "WTA-CRS":
        apply_wta(module, select=_inside_blocks)
    else:
        raise ValueError(f"unknown variant {variant!r}")


def _inside_blocks(name: str, _: nn.Module) -> bool:
    return "head" not in name


def _drop_compressed(module: nn.Module) -> None:
    """CompAct's gradients of the step before."""
    if "memtrain.optim.autograd.compact" in sys.modules:
        sys.modules["memtrain.optim.autograd.compact"].clear_compressed_grads(module.parameters())


def densify(job: Job) -> None:
    """CompAct's compressed gradients as ordinary ones, to be compared."""
    if "memtrain.optim.autograd.compact" in sys.modules:
        sys.modules["memtrain.optim.autograd.compact"].densify_grads(job.module.parameters())


def peak_bytes() -> int:
    """VmHWM: the most that this process has had in memory so far."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
