"""The chunked loss against the plain one: values, gradients, memory, and what it refuses."""

from __future__ import annotations

import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memtrain.optim.autograd import UnsupportedHeadError, chunked_cross_entropy, install_chunked_loss
from memtrain.optim.autograd.chunked_loss import _SCRATCH_BYTES

transformers = pytest.importorskip("transformers")

TOKENS, FEATURES, CLASSES = 37, 16, 101
SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(CLASSES, (TOKENS,), generator=generator)
    labels[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, **options: object) -> Tensor:
    """The same loss with all its logits."""
    logits = F.linear(hidden, weight, options.get("bias"))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.get("logit_scale", 1.0)
    if cap := options.get("soft_cap"):
        logits = cap * torch.tanh(logits / cap)
    items = options.get("num_items")
    loss = F.cross_entropy(
        logits,
        labels,
        ignore_index=options.get("ignore_index", -100),
        reduction="mean" if items is None else "sum",
        label_smoothing=options.get("label_smoothing", 0.0),
    )
    return loss if items is None else loss / items


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items": 11},
        {"num_items": torch.tensor(53)},
        {"soft_cap": 3.0},
        {"logit_scale": 0.25},
        {"soft_cap": 5.0, "logit_scale": 1.5, "num_items": 7},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "num_items": 9},
        {"ignore_index": 3},
    ],
)
@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 1000])
def test_equals_the_plain_loss_in_fp64(options: dict[str, object], chunk_tokens: int) -> None:
    hidden, weight, bias, labels = operands()
    if "ignore_index" in options:
        labels = labels.clamp(min=3)
    options = {**options, "bias": bias}
    expected = plain(hidden, weight, labels, **options)
    got = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk_tokens, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    leaves = (hidden, weight, bias)
    for mine, theirs in zip(gradients(got / 3, *leaves), gradients(expected / 3, *leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_rows_of_one_chunk_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtrain.optim.autograd.chunked_loss._SCRATCH_BYTES", 3 * CLASSES * 8)
    hidden, weight, bias, labels = operands()
    got = chunked_cross_entropy(hidden, weight, labels, bias=bias, chunk_tokens=8)
    expected = plain(hidden, weight, labels, bias=bias)
    leaves = (hidden, weight, bias)
    for mine, theirs in zip(gradients(got, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_distance_in_fp32_is_rounding() -> None:
    exact = operands()
    hidden, weight, _, labels = operands(torch.float32)
    truth = plain(exact[0], exact[1], labels)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=8)
    assert abs(loss.item() - truth.item()) < 2e-6 * truth.item()
    for mine, theirs in zip(gradients(loss, hidden, weight), gradients(truth, *exact[:2]), strict=True):
        assert (mine.double() - theirs).norm() < 1e-6 * theirs.norm()


@pytest.mark.parametrize(("chunks", "factor"), [(4, 1.6), (16, 2.8)])
def test_distance_in_bf16_is_that_of_the_full_logits(chunks: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(512, 64, generator=generator), torch.randn(2000, 64, generator=generator) * 0.2
    low = [v.bfloat16().requires_grad_() for v in values]
    exact = [v.detach().double().requires_grad_() for v in low]
    labels = torch.randint(2000, (512,), generator=generator)
    truth, full = plain(*exact, labels), plain(*low, labels)
    mine = chunked_cross_entropy(*low, labels, chunk_tokens=512 // chunks)
    assert mine.dtype == torch.float32
    assert abs(mine.item() - truth.item()) <= abs(full.item() - truth.item()) + 1e-6 * truth.item()
    true_gradients = gradients(truth, *exact)
    for got, other, true in zip(gradients(mine, *low), gradients(full, *low), true_gradients, strict=True):
        error, allowed = ((g.double() - true).norm() for g in (got, other))
        assert error <= factor * allowed


def test_is_deterministic() -> None:
    hidden, weight, _, labels = operands(torch.bfloat16)
    losses = [chunked_cross_entropy(hidden, weight, labels, chunk_tokens=8) for _ in range(2)]
    first, second = (gradients(loss, hidden, weight) for loss in losses)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class PeakBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[weakref.ref, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.alive[weakref.ref(storage, lambda ref: self.alive.pop(ref))] = storage.nbytes()
                self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_peak_is_one_chunk_of_logits_and_one_gradient_of_the_weight() -> None:
    tokens, features, classes, chunk = 2048, 32, 8192, 128
    hidden = torch.randn(tokens, features).bfloat16().requires_grad_()
    weight = torch.randn(classes, features).bfloat16().requires_grad_()
    labels = torch.randint(classes, (tokens,))
    with PeakBytes() as seen:
        chunked_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).backward()
    gradients_bytes = (tokens + classes) * features * 2
    logits_bytes = chunk * classes * 2
    # fp32 rows: 128 rows of 32 KiB fit the scratch, and logsumexp holds a second copy of them.
    assert chunk * classes * 4 <= _SCRATCH_BYTES
    scratch_bytes = 2 * chunk * classes * 4
    per_token_bytes = 64 * tokens
    assert gradients_bytes + logits_bytes < seen.peak
    assert seen.peak <= gradients_bytes + logits_bytes + scratch_bytes + per_token_bytes
    assert sum(seen.alive.values()) == gradients_bytes


def test_frozen_weight_costs_no_gradient() -> None:
    hidden, weight, _, labels = operands()
    frozen = weight.detach()
    loss = chunked_cross_entropy(hidden, frozen, labels)
    (mine,) = gradients(loss, hidden)
    torch.testing.assert_close(mine, gradients(plain(hidden, frozen, labels), hidden)[0])
    with torch.no_grad():
        assert not chunked_cross_entropy(hidden, weight, labels).requires_grad


def test_second_backward_is_refused() -> None:
    hidden, weight, _, labels = operands()
    loss = chunked_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        loss.backward()
    loss = chunked_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight, _, labels = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=8)
        expected = plain(hidden, weight, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert [g.dtype for g in gradients(loss, hidden, weight)] == [torch.float32, torch.float32]


def test_every_label_ignored_gives_nan_as_the_plain_loss_does() -> None:
    hidden, weight, _, labels = operands()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    assert loss.isnan()
    assert chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100), num_items=4) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "one per token"),
        ({"labels": torch.zeros(TOKENS, dtype=torch.int32)}, "int64"),
        ({"labels": torch.full((TOKENS,), CLASSES)}, "label 101 is outside 0..100"),
        ({"labels": torch.full((TOKENS,), -1)}, "label -1"),
        ({"weight": torch.zeros(CLASSES, 3)}, "features"),
        ({"weight": torch.zeros(CLASSES, FEATURES)}, "float64 and weight"),
        ({"bias": torch.zeros(3)}, r"bias must be \[101\]"),
        ({"chunk_tokens": 0}, "chunk_tokens must be >= 1, got 0"),
        ({"soft_cap": 0.0}, "soft_cap"),
        ({"logit_scale": float("nan")}, "logit_scale"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_wrong_input_is_named(change: dict[str, object], message: str) -> None:
    hidden, weight, _, labels = operands()
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**{"hidden": hidden, "weight": weight, "labels": labels, **change})


CONFIGS = {
    "llama, tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
    "gemma2, soft-cap": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
    "cohere, scale": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.25),
    "granite, divides": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=8.0),
    "phi, bias": lambda: transformers.PhiConfig(**SMALL),
}


def causal_lm(config: object) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # the usual initialisation makes logits so small that no cap would bend them
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_hugging_face_models(name: str) -> None:
    model = causal_lm(CONFIGS[name]())
    ids = torch.randint(97, (2, 11))
    labels = ids.clone()
    labels[:, :3] = -100
    before_generation = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    calls = [
        {"labels": labels},
        {"labels": labels, "num_items_in_batch": torch.tensor(40)},
        {"labels": labels, "shift_labels": labels.roll(2, 1)},
    ]
    for call in calls:
        expected = model(ids, use_cache=False, **call)
        expected.loss.backward()
        theirs = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        handle = install_chunked_loss(model, chunk_tokens=5)
        got = model(ids, use_cache=False, **call)
        got.loss.backward()
        assert type(got) is type(expected)
        assert got.logits is None
        assert "logits" not in got
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
        for key, parameter in model.named_parameters():
            if key in theirs:
                torch.testing.assert_close(parameter.grad, theirs[key], rtol=1e-3, atol=1e-6)
        model.zero_grad()
        assert torch.equal(model(ids).logits, model.forward(ids).logits)
        handle.uninstall()
        handle.uninstall()
        assert "forward" not in model.__dict__
    handle = install_chunked_loss(model)
    after = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(before_generation, after)


def test_installation_leaves_modes_and_random_numbers_alone() -> None:
    model = causal_lm(CONFIGS["llama, tied"]())
    model.model.layers[0].train()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    install_chunked_loss(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("first", ["inner", "outer"])
def test_forward_passes_of_two_threads_under_way_at_once(first: str) -> None:
    model = causal_lm(CONFIGS["llama, tied"]())
    head = model.get_output_embeddings()
    install_chunked_loss(model)
    one, other = torch.randint(97, (2, 11)), torch.randint(97, (1, 7))
    expected = [model(ids, labels=ids).loss for ids in (one, other)]
    plain = model(other).logits
    found: list[Tensor] = []
    reached, go_on = threading.Event(), threading.Event()

    def run() -> None:
        found.append(model(other, labels=other).loss)

    def meet(*_: object) -> None:
        if threading.current_thread() is thread:
            reached.set()
            if first == "outer":
                assert go_on.wait(60)
            return
        thread.start()
        assert reached.wait(60)
        if first == "inner":
            thread.join(60)

    thread = threading.Thread(target=run)
    handle = model.model.layers[0].register_forward_pre_hook(meet)
    found.append(model(one, labels=one).loss)
    go_on.set()
    thread.join(60)
    handle.remove()
    if first == "inner":
        found.reverse()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert "forward" not in head.__dict__
    assert torch.equal(model(other).logits, plain)


def test_uninstall_refuses_when_forward_was_replaced_since() -> None:
    model = causal_lm(CONFIGS["gpt2"]())
    handle = install_chunked_loss(model)
    model.forward = lambda **_: None
    with pytest.raises(RuntimeError, match="replaced after"):
        handle.uninstall()


class Doubled(nn.Module):
    """Wraps a causal LM and does something of its own to logits and loss."""

    def __init__(self, inner: nn.Module, *, logits: float = 1.0, extra_loss: float = 0.0) -> None:
        super().__init__()
        self.inner, self.logits, self.extra_loss = inner, logits, extra_loss
        self.config = inner.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, return_dict: bool = True) -> object:
        output = self.inner(input_ids)
        output["logits"] = output.logits * self.logits
        if labels is not None:
            loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            output["loss"] = loss + self.extra_loss
        return output


def test_what_a_model_does_of_its_own_is_refused_by_name() -> None:
    model = causal_lm(CONFIGS["gpt2"]())
    install_chunked_loss(Doubled(model)).uninstall()
    with pytest.raises(UnsupportedHeadError, match="changes its logits"):
        install_chunked_loss(Doubled(model, logits=2.0))
    with pytest.raises(UnsupportedHeadError, match="has other terms"):
        install_chunked_loss(Doubled(model, extra_loss=0.01))
    assert "forward" not in model.lm_head.__dict__


def test_other_refusals() -> None:
    with pytest.raises(UnsupportedHeadError, match="no output embedding"):
        install_chunked_loss(nn.Linear(2, 2))
    mixtral = transformers.MixtralConfig(**SMALL, num_local_experts=2, output_router_logits=True)
    with pytest.raises(UnsupportedHeadError, match="router loss"):
        install_chunked_loss(causal_lm(mixtral))
    model = causal_lm(CONFIGS["gpt2"]())
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedHeadError, match="a hook"):
        install_chunked_loss(model)
    hook.remove()
    install_chunked_loss(model)
    ids = torch.randint(97, (1, 5))
    with pytest.raises(ValueError, match="return_dict=False"):
        model(ids, labels=ids, return_dict=False)
    with pytest.raises(ValueError, match="one per token"):
        model(ids, labels=ids, logits_to_keep=2)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedHeadError, match="Sequential"):
        install_chunked_loss(model)
