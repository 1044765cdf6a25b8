"""Saved tensors of few distinct values, as a table and places: what it saves, what it costs, and where.

Three parts, each against the same arithmetic without it:
- tensors of several kinds through the codec alone: bytes, and GB/s of encoding, of decoding, and of finding
  that there are too many values (plain bytes);
- whole blocks (a Llama block plain and in exact form, an MLP with ReLU, one with dropout, one whose
  activation is rounded to 8 bits) forward and backward: saved bytes, storages coded and left, seconds;
- the soft palette of a bf16 weight (DKM), whose attention maps have equal rows (eDKM): saved bytes, seconds.

Gradients are compared bit by bit. Runs of the two sides take turns; medians of ratios count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from _harness import BenchmarkError, publish, spread, table
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.optim.autograd import EXACT, SavedBytes, apply_to
from memtrain.optim.autograd.quantized_saved import SavedTensorCompressor
from memtrain.optim.autograd.soft_palette import initial_centroids, soft_palette
from memtrain.optim.autograd.unique_codec import UniqueCodec
from memtrain.optim.autograd.unique_rows import UniqueRows


def tensor_kinds(numel: int) -> dict[str, Tensor]:
    """What might be saved."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(numel, generator=generator)
    return {
        "mask, bool": normal > 0.3,
        "dropout mask, fp32": (normal > 0.3).float() / 0.62,
        "token ids, int64": torch.randint(0, 49_152, (numel,), generator=generator),
        "weight of 16 values, bf16": torch.linspace(-1, 1, 16).bfloat16()[normal.mul(4).long().remainder(16)],
        "rounded to 8 bits, bf16": (normal * 40).round().clamp(-127, 127).mul(1 / 40).bfloat16(),
        "bf16 numbers in fp32": normal.bfloat16().float(),
        "ReLU's output, bf16": normal.relu().bfloat16(),
        "normal, bf16": normal.bfloat16(),
        "normal, fp32": normal,
    }


def codec_rows(numel: int, rounds: int) -> dict[str, dict[str, float]]:
    """By kind: bytes by plain ones, and GB/s both ways."""
    codec, found = UniqueCodec(), {}
    for kind, values in tensor_kinds(numel).items():
        encode, decode, encoded = [], [], None
        for _ in range(rounds + 1):
            start = time.perf_counter()
            encoded = codec.encode(values)
            encode.append(time.perf_counter() - start)
            if encoded is not None:
                start = time.perf_counter()
                again = codec.decode(encoded, values.shape, values.dtype)
                decode.append(time.perf_counter() - start)
                if not torch.equal(again.view(torch.uint8), values.view(torch.uint8)):
                    raise BenchmarkError(f"{kind}: came back changed")
        rate = values.nbytes / 1e9
        found[kind] = {
            "ratio": 1.0 if encoded is None else sum(part.nbytes for part in encoded) / values.nbytes,
            "encode_gb_per_second": rate / spread(encode[1:])["median"],
            "decode_gb_per_second": rate / spread(decode[1:])["median"] if decode else float("nan"),
        }
    return found


class MLP(nn.Module):
    """Two layers and what is between them."""

    def __init__(self, width: int, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def _eight_bits(x: Tensor) -> Tensor:
    """Straight through: what the next layer saves has 255 values."""
    scale = x.detach().abs().max() / 127
    return x + ((x / scale).round() * scale - x).detach()


def blocks(width: int) -> dict[str, nn.Module]:
    """bf16 blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=1, use_cache=False,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=256,
    )  # fmt: skip
    made: dict[str, nn.Module] = {"Llama block": LlamaForCausalLM(config).bfloat16()}
    treated = LlamaForCausalLM(config).bfloat16()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    apply_to(treated, EXACT, example=lambda: treated(input_ids=ids))
    made["Llama block, exact form"] = treated
    made["MLP, ReLU"] = MLP(width, F.relu).bfloat16()
    made["MLP, ReLU and dropout"] = MLP(width, lambda x: F.dropout(F.relu(x), 0.1)).bfloat16()
    made["MLP, 8-bit activation"] = MLP(width, _eight_bits).bfloat16()
    return made


def block_rows(width: int, tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """By block: saved bytes and seconds with the codec by those without."""
    found = {}
    for name, block in blocks(width).items():
        hooked = block.model.layers[0] if hasattr(block, "model") else block
        if hasattr(block, "model"):
            ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(1))
            run = lambda block=block, ids=ids: block.model(input_ids=ids).last_hidden_state  # noqa: E731
        else:
            x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).bfloat16()
            run = lambda block=block, x=x: block(x.requires_grad_())  # noqa: E731
        parameters = [p for p in block.parameters() if p.requires_grad]

        def step(run: Any = run, parameters: Any = parameters) -> tuple[float, list[Tensor | None]]:
            torch.manual_seed(2)
            start = time.perf_counter()
            y = run()
            grads = torch.autograd.grad(y.float().square().sum(), parameters, allow_unused=True)
            return time.perf_counter() - start, list(grads)

        with SavedBytes(block.parameters()) as plain_saved:
            y = run()
        del y
        ratios = []
        compressor = SavedTensorCompressor(UniqueCodec())
        for number in range(rounds + 1):
            plain_seconds, plain = step()
            attachment = compressor.attach(hooked)
            seconds, coded = step()
            attachment.remove()
            pairs = zip(plain, coded, strict=True)
            if any(a is not None and b is not None and not torch.equal(a, b) for a, b in pairs):
                raise BenchmarkError(f"{name}: gradients differ")
            if number:
                ratios.append(seconds / plain_seconds)
        counts = compressor.counts
        saved = (counts.plain_bytes - counts.encoded_bytes) / (rounds + 1)
        found[name] = {
            "saved_bytes_ratio": 1 - saved / plain_saved.total_bytes,
            "coded": counts.encoded / (rounds + 1),
            "left": counts.left / (rounds + 1),
            "seconds_ratio": spread(ratios)["median"],
        }
    return found


def palette_row(elements: int, centroids: int, iterations: int, rounds: int) -> dict[str, float]:
    """DKM of one bf16 weight, with rows as they are and as a table."""
    weight = (
        (0.02 * torch.randn(elements, generator=torch.Generator().manual_seed(1))).bfloat16().requires_grad_()
    )
    start_values = initial_centroids(weight, centroids)

    def step(unique: bool) -> tuple[float, Tensor]:
        start = time.perf_counter()
        soft, _ = soft_palette(weight, start_values, temperature=2e-3, iterations=iterations, unique=unique)
        (gradient,) = torch.autograd.grad(soft.float().square().sum(), weight)
        return time.perf_counter() - start, gradient

    with SavedBytes([weight]) as plain:
        soft, _ = soft_palette(weight, start_values, temperature=2e-3, iterations=iterations, unique=False)
    del soft
    with UniqueRows(weight) as rows:
        soft, _ = soft_palette(weight, start_values, temperature=2e-3, iterations=iterations, unique=False)
    del soft
    saved = plain.total_bytes - rows.counts.plain_bytes + rows.counts.coded_bytes + rows.places_bytes
    ratios = []
    for number in range(rounds + 1):
        plain_seconds, expected = step(unique=False)
        seconds, found = step(unique=True)
        if not torch.equal(expected, found):
            raise BenchmarkError("the palette's gradients differ")
        if number:
            ratios.append(seconds / plain_seconds)
    return {
        "distinct_values": rows.values,
        "plain_saved_bytes": plain.total_bytes,
        "unique_saved_bytes": saved,
        "times_less": plain.total_bytes / saved,
        "tables_left": rows.counts.left,
        "seconds_ratio": spread(ratios)["median"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--numel", type=int, default=1 << 23, help="of a tensor for the codec alone")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--weight", type=int, default=576 * 1536, help="elements of the clustered weight")
    parser.add_argument("--centroids", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=4, help="of k-means")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    codec = codec_rows(args.numel, args.rounds)
    whole = block_rows(args.width, args.tokens, args.rounds)
    palette = palette_row(args.weight, args.centroids, args.iterations, args.rounds)
    lines = [
        table(
            ("tensor", "bytes by plain", "encode GB/s", "decode GB/s"),
            [
                (
                    kind, f"{r['ratio']:.3f}", f"{r['encode_gb_per_second']:.2f}",
                    f"{r['decode_gb_per_second']:.2f}",
                )
                for kind, r in codec.items()
            ],
        ),
        "",
        table(
            ("block", "saved bytes by plain", "coded", "left", "seconds by plain"),
            [
                (
                    name, f"{r['saved_bytes_ratio']:.3f}", f"{r['coded']:.0f}", f"{r['left']:.0f}",
                    f"{r['seconds_ratio']:.3f}",
                )
                for name, r in whole.items()
            ],
        ),
        "",
        f"soft palette of {args.weight} bf16 weights, {args.centroids} centroids, {args.iterations} "
        f"iterations: {palette['distinct_values']:.0f} distinct values, "
        f"{palette['plain_saved_bytes'] / 1e6:.1f} MB saved, "
        f"{palette['unique_saved_bytes'] / 1e6:.1f} MB as tables ({palette['times_less']:.1f} times less), "
        f"{palette['seconds_ratio']:.2f} times the seconds; gradients bit-equal",
    ]  # fmt: skip
    summary: dict[str, Any] = {
        "palette_times_less": round(palette["times_less"], 2),
        "palette_seconds_ratio": round(palette["seconds_ratio"], 3),
        **{f"{name}_saved_bytes_ratio": round(r["saved_bytes_ratio"], 4) for name, r in whole.items()},
        **{f"{name}_seconds_ratio": round(r["seconds_ratio"], 3) for name, r in whole.items()},
        "rounds": args.rounds,
    }
    details = {"codec": codec, "blocks": whole, "palette": palette}
    publish("unique_saved", text="\n".join(lines), summary=summary, details=details)


if __name__ == "__main__":
    main()
