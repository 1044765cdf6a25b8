"""What is found out about the tokens of a block, by hand for small ones; what cannot be cut is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.offload.attention_probe import AttentionProbe
from memtrain.offload.errors import TokenRangeError
from memtrain.offload.token_kinds import Kind, TokenProbe
from memtrain.offload.token_probe import probe_tokens
from memtrain.offload.token_rows import RowAxis
from memtrain.planner.tracing.live_bytes import LiveBytes

WIDTH = 16


def probe(
    function: Callable[..., Any],
    *args: Any,
    prefix: int | None = 4,
    attention: tuple[int, ...] = (),
    **kwargs: Any,
) -> TokenProbe:
    return probe_tokens(
        "block",
        function,
        args,
        kwargs,
        is_fixed=lambda tensor: isinstance(tensor, nn.Parameter),
        prefix=prefix,
        attention_prefixes=attention,
    )


def hidden(rows: int = 2, tokens: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, tokens, WIDTH, generator=generator).requires_grad_()


def attend(entry: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    heads = entry.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, heads, mask, is_causal=causal and mask is None)


def test_every_kind_of_saved_tensor() -> None:
    scale = torch.linspace(1, 2, 9)[:, None]
    bias = torch.ones(WIDTH)

    def block(entry: Tensor, scale: Tensor) -> Tensor:
        constant = bias.double().float()  # the same for a prefix
        total = scale.sum()  # of all tokens, but not seen by what each of them gives
        return (entry * scale).tanh() * constant + 0.0 * torch.exp(
            total.detach() * torch.ones(()).requires_grad_()
        )

    found = probe(block, hidden(), scale)
    assert found.arguments == {0: (1,), 1: (0,)}
    # mul saves the scale alone (it needs no gradient), tanh its result, mul the constant; exp its result.
    assert found.saved[:3] == (Kind.GIVEN, RowAxis(dim=1), Kind.AGAIN)
    assert found.saved[-1] is Kind.WHOLE
    assert found.row_bytes == 2 * WIDTH * 4
    assert found.tokens == 9
    assert found.bit_equal
    assert found.difference == 0.0


def test_the_witness_is_one_row_of_each() -> None:
    found = probe(attend, hidden(), attention=(4,))
    # Query, key and value are views of the input: 16 numbers for each of 2 tokens; an output of attention as
    # many, and the logarithm of a sum for each of 2 heads.
    assert found.witness_bytes == 2 * 4 * (WIDTH + WIDTH + 2)
    assert probe(attend, hidden(), prefix=None, attention=(4,)).witness_bytes == 2 * 4 * (WIDTH + 2)
    assert probe(torch.tanh, hidden()).witness_bytes == 2 * 4 * WIDTH


def test_a_look_takes_less_than_a_forward_that_saves() -> None:
    """Eight tensors of one size are saved, and with half of the tokens eight halves. When the second of all
    tokens is there, the first is, too, and seven halves are still to be compared."""

    def block(entry: Tensor) -> Tensor:
        for _ in range(8):
            entry = entry.tanh()
        return entry

    entry = hidden(1, 10)
    with LiveBytes() as live:
        probe(block, entry, prefix=5)
    assert live.peak_bytes == 5.5 * entry.nbytes


def test_a_shared_storage_counts_once() -> None:
    def block(entry: Tensor) -> Tensor:
        first, second = (entry * 2.0).chunk(2, -1)
        return first * second

    assert probe(block, hidden()).row_bytes == 2 * WIDTH * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_not_called_acausal(value: float) -> None:
    """A masked score of them is not finite either, and changes the rows before it."""
    entry = hidden()
    entry.data[0, -1, 0] = value
    with pytest.raises(TokenRangeError, match=r"^block: was given values that are not finite"):
        probe(attend, entry, attention=(4,))


def test_sizes_that_happen_to_equal_the_tokens() -> None:
    """A table of WIDTH by WIDTH where there are as many tokens: its last dimension is none of tokens."""
    table = torch.randn(WIDTH, WIDTH)

    def block(entry: Tensor, table: Tensor) -> Tensor:
        return (entry * table).tanh()

    assert probe(block, hidden(2, WIDTH), table).arguments == {0: (1,), 1: (0,)}


def test_attention_kernels() -> None:
    mask = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    for given in (None, mask):
        found = probe(attend, hidden(), mask=given, attention=(4, 2))
        assert found.attention == ((RowAxis(dim=2), RowAxis(dim=2)),)
        assert found.arguments == ({0: (1,)} if given is None else {0: (1,), 1: (2, 3)})
        assert found.difference < 1e-6


class WithState:
    """The CPU's flash kernel, as a GPU's: it gives the state of its random numbers, too."""

    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def __getattr__(self, name: str) -> Any:
        return getattr(self.operator, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return *self.operator(*args, **kwargs), torch.tensor([7, 0])


def test_a_kernel_that_gives_its_random_state() -> None:
    probe, kernel = AttentionProbe("block", 9, (4, 2)), WithState()
    heads = torch.randn(2, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    given = heads, heads, heads, 0.0, True
    for _ in range(2):
        probe.look_at(kernel, given, {}, kernel(*given))
    assert probe.axes == [(RowAxis(dim=2), RowAxis(dim=2), None)] * 2
    assert probe.whole_bytes == 2 * 2 * 8  # two numbers of 8 bytes, twice
    assert probe.row_bytes == 2 * 2 * (2 * 8 + 2) * 4


def test_a_prefix_lies_in_memory_as_the_whole_does() -> None:
    """For so it does in backward, and products may round otherwise if it does not."""
    tokens_first = []

    def look(entry: Tensor) -> Tensor:
        tokens_first.append(entry.stride(1) > entry.stride(0))
        return entry.tanh()

    probe(look, hidden().transpose(0, 1).contiguous().transpose(0, 1).detach().requires_grad_())
    assert tokens_first == [True] * 4  # of all, of the prefix, of all again, and of other tokens


def test_random_numbers_and_arguments_stay() -> None:
    entry = hidden()
    before, state = entry.detach().clone(), torch.get_rng_state()
    found = probe(lambda entry: F.dropout(entry, 0.5), entry, prefix=8)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(entry, before)
    assert entry.grad is None
    assert found.is_random
    assert found.drawn == (RowAxis(dim=1),)
    assert found.bit_equal


@pytest.mark.parametrize("prefix", [0, 9, 12])
def test_a_prefix_is_a_part(prefix: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 8 tokens"):
        probe(torch.tanh, hidden(), prefix=prefix)
    with pytest.raises(ValueError, match="between 1 and 8 tokens"):
        probe(torch.tanh, hidden(), attention=(4, prefix))


def shut_gate(entry: Tensor) -> Tensor:
    """Every token sees all, behind a gate that is shut: the output does not tell."""
    gate = torch.zeros(1, requires_grad=True)
    return entry + gate * attend(entry, causal=False).transpose(1, 2).flatten(2)


def eager(entry: Tensor) -> Tensor:
    scores = (
        entry @ entry.transpose(1, 2)
        + torch.full((9, 9), -torch.inf).triu(1)[: entry.shape[1], : entry.shape[1]]
    )
    return scores.softmax(-1) @ entry


def counts_in_rows(entry: Tensor) -> Tensor:
    return entry.reshape(-1, 9 * WIDTH).tanh().view_as(entry)


def routes(entry: Tensor) -> Tensor:
    """Takes the larger half of its entries, and is not bit-equal for a prefix."""
    entry = entry * (1.0 + 2.0**-22 * (entry.shape[1] > 4))
    return entry.gather(-1, entry.topk(WIDTH // 2, dim=-1).indices).tanh()


def sizes_by_value(entry: Tensor) -> Tensor:
    return entry[entry > 0.5].tanh().sum() * entry


def slightly_ahead(entry: Tensor) -> Tensor:
    """Looks ahead by less than rounding explains."""
    return (entry + 1e-6 * entry.mean(1, keepdim=True)).tanh()


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda entry: attend(entry, causal=False), "is not causal: .* first 4 tokens .saved tensor 3, "),
        (shut_gate, "is not causal"),
        (slightly_ahead, "is not causal"),
        (eager, "tokens along two dimensions"),
        (counts_in_rows, "cannot be computed for the first 4 of 9 tokens alone"),
        (routes, "chooses by value"),
        (
            sizes_by_value,
            "cannot be computed for the first 4 of 9 tokens alone .*not by the number of tokens",
        ),
        (lambda entry: (entry * torch.rand_like(entry)).tanh(), "gives other values for the first 4 tokens"),
        (lambda entry: entry * (1.01 if entry.shape[1] > 4 else 1.0) * entry, "more than rounding"),
    ],
)
def test_what_cannot_be_cut_is_refused(function: Callable[..., Any], match: str) -> None:
    with pytest.raises(TokenRangeError, match=f"^block: .*({match}).*; plan without recomputed_tokens"):
        probe(function, hidden())


def test_attention_that_looks_ahead_is_refused() -> None:
    with pytest.raises(TokenRangeError, match="is not causal: attention kernel 0"):
        probe(lambda entry: attend(entry, causal=False), hidden(), prefix=None, attention=(4,))


def test_attention_to_other_tokens_is_refused() -> None:
    memory = torch.randn(2, 2, 5, 8)

    def cross(entry: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(entry.unflatten(-1, (2, -1)).transpose(1, 2), memory, memory)

    with pytest.raises(TokenRangeError, match="9 queries and 5 keys"):
        probe(cross, hidden(), prefix=None, attention=(4,))
