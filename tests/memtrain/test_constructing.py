"""Constructors run without their weights: the same values, the same generator, and clear refusals."""

import random

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from memtrain.constructing import Blueprint, ConstructionError

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 133,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}
GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 133,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ("llama", SHAPE),
    "tied llama": ("llama", {**SHAPE, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", GPT2),
    "gemma2": ("gemma2", {**SHAPE, "head_dim": 16}),
    "mixtral": ("mixtral", SHAPE | EXPERTS),
    "qwen3_moe": ("qwen3_moe", SHAPE | EXPERTS),
    "mamba": ("mamba", SHAPE),
    "bloom": ("bloom", SHAPE),
}


def causal_lm(kind, dtype=torch.bfloat16):
    model_type, fields = MODELS[kind]
    return lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=dtype)


def drawn(make):
    """The weights by name, each handed over once, and the model."""
    weights = {}

    def put(name, tensor):
        assert name not in weights
        weights[name] = tensor.clone()

    return weights, Blueprint(make).draw(put)


def assert_as_constructed(make):
    torch.manual_seed(7)
    plain = make()
    state = torch.get_rng_state()
    torch.manual_seed(7)
    weights, model = drawn(make)
    assert torch.equal(torch.get_rng_state(), state)
    expected = dict(plain.named_parameters())
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == [
        name for name, _ in plain.named_parameters(remove_duplicate=False)
    ]


@pytest.mark.parametrize("kind", MODELS)
def test_causal_lms_are_drawn_bit_for_bit(kind):
    assert_as_constructed(causal_lm(kind))


def test_in_single_precision_too():
    assert_as_constructed(causal_lm("llama", torch.float32))


def orthogonal():
    layer = nn.Linear(40, 30)
    nn.init.orthogonal_(layer.weight)
    return layer


def padded():
    return nn.Embedding(7, 5, padding_idx=2)


def normalised():
    return nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))


def exchanged():
    layer = nn.Linear(20, 30)
    layer.bias.data = torch.arange(30.0)
    layer.weight.data.mul_(2).add_(1)
    return layer


def replaced_and_read():
    layer = nn.Linear(20, 30)
    layer.scale = nn.Parameter(layer.weight.norm(dim=1))
    with torch.no_grad():
        nn.init.trunc_normal_(layer.weight[3:9], std=0.3)
        layer.weight[:, 4] = layer.bias
    layer.bias = nn.Parameter(torch.randn(30))
    return layer


def small_and_empty():
    layer = nn.Module()
    layer.one = nn.Parameter(torch.empty(()).normal_())
    layer.few = nn.Parameter(torch.empty(15).normal_())
    layer.none = nn.Parameter(torch.empty(0, 4))
    layer.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        orthogonal,
        padded,
        normalised,
        exchanged,
        replaced_and_read,
        small_and_empty,
        lambda: nn.Sequential(nn.LSTM(4, 5), nn.MultiheadAttention(8, 2), nn.BatchNorm1d(4)),
    ],
)
def test_any_way_of_filling_weights(make):
    assert_as_constructed(make)


def test_a_first_run_leaves_the_generators_alone():
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    Blueprint(lambda: nn.Linear(int(30 + random.random() * 4), 5))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_weights_have_memory_one_at_a_time():
    """Eight layers of 4 MiB: at each hand-over all the memory of weights is one layer's."""
    alive = []

    class Counting(Blueprint):
        def draw(self, put):
            from memtrain.constructing import _Run

            run = _Run(self._lives, put)
            self.values = run._values
            return run.construct(self._make)

    counting = Counting(lambda: nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))))
    counting.draw(
        lambda name, tensor: alive.append(sum(t.nbytes for t in counting.values.values()) + tensor.nbytes)
    )
    assert alive == [4 << 20] * 8


def test_another_course_is_an_error_by_name():
    calls = []

    def fickle():
        calls.append(1)
        layer = nn.Linear(4, 4)
        if len(calls) > 1:
            nn.init.zeros_(layer.bias)
        return layer

    with pytest.raises(ConstructionError, match=r"something else to bias the second time \((zero|fill)_\)"):
        drawn(fickle)


def test_fewer_parameters_are_an_error():
    calls = []

    def fickle():
        calls.append(1)
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3 - len(calls))))

    with pytest.raises(ConstructionError, match="left out parameters or operators the second time"):
        drawn(fickle)


def test_two_parameters_in_the_same_memory_are_refused():
    def make():
        pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        pair[1].weight = nn.Parameter(pair[0].weight.data)
        return pair

    with pytest.raises(
        ConstructionError, match=r"0\.weight and 1\.weight are two parameters in the same memory"
    ):
        Blueprint(make)


def test_parameters_without_shape_or_device_are_refused():
    with pytest.raises(ConstructionError, match="no shape before the first forward"):
        Blueprint(lambda: nn.LazyLinear(3))
    with pytest.raises(ConstructionError, match="weight was constructed on the meta device"):
        Blueprint(lambda: nn.Linear(3, 3, device="meta"))


def test_the_way_modules_take_parameters_is_put_back():
    before = nn.Module.register_parameter
    with pytest.raises(ZeroDivisionError):
        Blueprint(lambda: 1 / 0)
    assert nn.Module.register_parameter is before
