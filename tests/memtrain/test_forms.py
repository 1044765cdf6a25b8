"""Blocks in treated forms, from the measured profile to training that is bit-equal, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import memtrain
from memtrain.forms import LOSSY, POLICIES, BlockForms
from memtrain.offload.saved_group import SavedGroup
from memtrain.offload.unmoved import FixedTensors
from memtrain.optim.autograd import apply_to, revert
from memtrain.optim.autograd.sites import PROBE_TOKENS
from memtrain.planner.actions import EXACT
from memtrain.planner.profile import BlockForm, ModelProfile
from memtrain.planner.trace import profile_model
from memtrain.planner.tracing.blocks import find_blocks
from memtrain.planner.tracing.live_bytes import LiveBytes
from memtrain.rehearsal import BlockRehearsal, _Elsewhere
from memtrain.report import form_facts
from tests.memtrain.sessions import MACHINE

WIDTH, INNER, HEADS, TOKENS, ROWS = 64, 176, 4, 64, 2
HIDDEN = ROWS * TOKENS * WIDTH * 4
"""Bytes of one hidden state in fp32."""
MIXED = {
    "block": {"action": "keep", "form": "exact"},
    "block.1": {"action": "swap", "saved_tier": "nvme", "form": "exact"},
    "block.2": {"action": "recompute"},
    "block.3": {"action": "keep"},
}


def llama(*, tied: bool = False, layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=300,
        tie_word_embeddings=tied,
        use_cache=False,  # as a session trains: keys from a cache have another layout, and so other groups
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=HEADS, vocab_size=300, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.1
    )
    return GPT2LMHeadModel(config)


def batch(step: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(300, (ROWS, TOKENS), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Any]:
    """Losses, and every gradient of the last step."""
    found: list[Any] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(step)).loss
        loss.backward()
        found.append(loss.item())
        gradients = [p.grad for p in model.parameters()]
        optimizer.step()
    return [*found, *(g.clone() for g in gradients if type(g) is Tensor)]


def prepare(
    model: nn.Module, folder: Path, force: Any, device: str = "3GiB", **options: Any
) -> memtrain.Session:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return memtrain.prepare(
        model,
        optimizer,
        batch(),
        budget=memtrain.Budget(device=device, nvme=f"{folder}:1GiB"),
        machine=MACHINE,
        chunked_loss=False,
        options=memtrain.PlannerOptions(force=force, **options),
    )


def equal(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def untreated(model: nn.Module) -> bool:
    return not any("forward" in module.__dict__ for module in model.modules())


def profiled(model: nn.Module, *names: str, forms: type[BlockForms] = BlockForms) -> ModelProfile:
    found = forms(model, find_blocks(model), batch(), names)
    optimizer = torch.optim.SGD(model.parameters())
    rehearsal = BlockRehearsal(model, found)
    profile = profile_model(model, batch(), optimizer=optimizer, elementwise=True, rehearsal=rehearsal)
    assert untreated(model)
    return profile


def form_of(profile: ModelProfile, name: str) -> BlockForm:
    (found,) = {form for form in profile.blocks[1].forms if form.name == name}
    return found


def test_the_exact_form_of_a_llama_layer_by_hand() -> None:
    profile = profiled(llama(), EXACT)
    block, form = profile.blocks[1], form_of(profile, EXACT)
    wide, statistics = HIDDEN * INNER // WIDTH, ROWS * TOKENS * 4
    attention = HIDDEN + HEADS * statistics  # its output, and the logarithms of its sums
    # Input and its norm's deviation; q, k and v turned; attention; the same for the second norm; gate and up.
    assert form.saved_bytes == 2 * (HIDDEN + statistics) + 3 * HIDDEN + attention + 2 * wide
    assert form.saved_bytes < 0.6 * block.saved_bytes
    assert (form.error, block.missing_forms) == (0.0, ())
    assert {len(b.forms) for b in profile.blocks} == {1}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
def test_training_in_exact_forms_is_bit_equal(tmp_path: Path, tied: bool, schedule: str) -> None:
    """Kept and swapped exact forms among blocks that are computed again, and one that is plain."""
    plain = llama(tied=tied)
    wanted = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2))
    model = llama(tied=tied)
    state = {"state": {"optimizer_tier": "nvme"}} if schedule == "ahead" else {}
    with prepare(model, tmp_path, {**MIXED, **state}, update_schedule=schedule) as session:
        assert [b.form for b in session.plan.blocks] == ["exact", "exact", "plain", "plain"]
        assert equal(train(session.model, session.optimizer), wanted)
        assert "2 blocks in exact form: 0.4 MiB saved instead of 0.7 MiB" in session.report()
        assert "bit-equal at the sample batch" in session.report()
    assert untreated(model)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("action", ["keep", "swap"])
@pytest.mark.parametrize("name", [EXACT, "int8", "int4"])
def test_a_run_stores_what_the_profile_says_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, action: str
) -> None:
    groups: dict[str, dict[int, int]] = {}
    pack = SavedGroup.pack

    def noted(self: SavedGroup, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if tensor not in fixed and storage.data_ptr() not in self._shared:
            groups.setdefault(self.name, {})[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return pack(self, tensor)

    monkeypatch.setattr(SavedGroup, "pack", noted)
    alive: list[Tensor] = []
    model = llama()
    fixed = FixedTensors(model)
    lossy = {} if name == EXACT else {"exact_only": False, "allow_lossy": (name,)}
    with prepare(model, tmp_path, {"block": {"action": action, "form": name}}, **lossy) as session:
        model(**batch()).loss.backward()
        stored = {name: sum(sizes.values()) for name, sizes in groups.items()}
        assert stored == {block.name: block.in_form(name).saved_bytes for block in session.profile.blocks}
        places = (
            [session.plan.staging.saved_slot_bytes] if action == "swap" else session.plan.staging.kept_bytes
        )
        largest = stored["model.layers.0"]
        assert all(largest <= size < largest + 2 * 4096 for size in places)


@pytest.mark.parametrize("name", [EXACT, "int8", "int4", "fewbit4"])
def test_all_that_outlives_a_forward_passes_the_hooks(name: str) -> None:
    """So that a swap moves it: what is packed is copied, and nothing else stays but the output."""
    model = gpt2() if name == "fewbit4" else llama(layers=2)
    blocks = find_blocks(model)
    forms = BlockForms(model, blocks, batch(), [name])
    block_name, block = blocks[0]
    hidden = torch.randn(ROWS, TOKENS, WIDTH, requires_grad=True)
    rotary = {}
    if name != "fewbit4":
        rotary = {"position_embeddings": model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])}
    with forms.worn(block_name, name), LiveBytes() as live:
        elsewhere = _Elsewhere(live)
        with saved_tensors_hooks(elsewhere.pack, lambda saved: saved):
            output = block(hidden, **rotary)
        output = output[0] if isinstance(output, tuple) else output
        assert live.now_bytes == output.nbytes
        assert elsewhere.size_bytes > output.nbytes


@pytest.mark.parametrize(
    ("name", "action"), [("int8", "keep"), ("int8", "swap"), ("int4", "swap"), ("fewbit4", "swap")]
)
def test_a_lossy_form_in_a_run_gives_what_it_gives_without_one(
    tmp_path: Path, name: str, action: str
) -> None:
    """Codes and all else come back bit for bit from wherever they were."""
    build = gpt2 if name == "fewbit4" else llama
    direct, plain = build(), build()
    apply_to(direct, POLICIES[name])
    revert(direct.get_submodule("lm_head"))
    results = []
    for model in (direct, plain):
        torch.manual_seed(1)
        results.append(train(model, torch.optim.AdamW(model.parameters(), lr=1e-2)))
    model = build()
    force = {"block": {"action": action, "form": name}}
    with prepare(model, tmp_path, force, exact_only=False, allow_lossy=(name,)) as session:
        assert session.plan.action_counts() == {
            ("keep" if action == "keep" else "swap to nvme") + f" in {name} form": len(session.plan.blocks)
        }
        torch.manual_seed(1)
        found = train(session.model, session.optimizer)
        assert equal(found, results[0])
        assert not equal(found, results[1])
        error = form_of(session.profile, name).error
        assert 0 < session.plan.error == pytest.approx(error, rel=0.5)
        assert f"in {name} form" in session.report()
        assert "lossy forms: mean error of gradients" in session.report()
    assert untreated(model)


def test_errors_order_as_bits_do() -> None:
    profile = profiled(llama(), EXACT, "int8", "int4", "fewbit4")
    errors = {form.name: form.error for form in profile.blocks[1].forms}
    assert 0 == errors[EXACT] < errors["int8"] < 0.05 < errors["int4"] < 0.5
    sizes = {form.name: form.saved_bytes for form in profile.blocks[1].forms}
    assert sizes["int4"] < sizes["int8"] < 0.5 * sizes[EXACT]
    reason = dict(profile.blocks[1].missing_forms)["fewbit4"]
    assert "few-bit backward gives nothing in a gated MLP" in reason


def test_a_tight_error_budget_mixes_forms(tmp_path: Path) -> None:
    """Only as many blocks are lossy as the budget allows, and the checker agrees."""
    force = {"block": {"action": "swap", "form": "exact"}, "block.0": {"action": "keep", "form": "int8"}}
    model = llama()
    allowed = {"exact_only": False, "allow_lossy": ("int8",), "error_budget": 0.02}
    with prepare(model, tmp_path, force, **allowed) as session:
        assert [b.form for b in session.plan.blocks] == ["int8", "exact", "exact", "exact"]
        assert session.plan.error == pytest.approx(session.profile.blocks[0].forms[1].error / 4, rel=1e-6)
        train(session.model, session.optimizer)
        assert "over all saved bytes (budget 0.02)" in session.report()
    with pytest.raises(memtrain.InfeasibleError, match="error_budget"):
        prepare(llama(), tmp_path, force, **allowed | {"error_budget": 1e-6})


class Off(BlockForms):
    """Changes the last bit of one weight's gradient."""

    @contextmanager
    def worn(self, block: str, form: str) -> Iterator[None]:
        weight = self._blocks[block].mlp.down_proj.weight
        with super().worn(block, form):
            handle = weight.register_hook(lambda g: torch.nextafter(g, torch.full_like(g, 9.0)))
            try:
                yield
            finally:
                handle.remove()


def test_a_form_that_is_not_bit_equal_is_dropped_with_its_reason() -> None:
    profile = profiled(llama(), EXACT, forms=Off)
    reason = "the gradients of its parameters are not bit-equal to the plain form's at this batch"
    assert profile.blocks[2].forms == ()
    assert profile.blocks[2].missing_forms == ((EXACT, reason),)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.two(F.relu(self.one(hidden)).square())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, WIDTH)
        self.layers = nn.ModuleList(Square() for _ in range(2))

    def forward(self, tokens: Tensor, *, long: bool = False) -> Tensor:
        if tokens.shape[1] < TOKENS and long:
            raise RuntimeError("only long rows")
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().mean()


def test_a_model_without_such_modules_has_no_forms_and_says_why() -> None:
    model = Net()
    forms = BlockForms(model, find_blocks(model), (batch()["input_ids"],), [EXACT])
    assert forms.of("layers.0") == {}
    assert "nothing of Net could be treated" in forms.missing("layers.0")[EXACT]


def test_a_model_that_cannot_be_tried_has_no_forms_and_says_why() -> None:
    model = Net()
    given = {"tokens": batch()["input_ids"], "long": True}
    forms = BlockForms(model, find_blocks(model), given, [EXACT])
    reason = "Net cannot be tried on 8 tokens of the sample batch (RuntimeError: only long rows)"
    assert forms.missing("layers.1") == {EXACT: reason}


@pytest.mark.parametrize("mask", [False, True])
def test_a_model_is_tried_on_few_tokens_whatever_the_batch_is_wrapped_in(mask: bool) -> None:
    """What is tried holds every activation: with all tokens that is more than training takes."""
    model = llama(layers=2)
    seen: list[torch.Size] = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape))
    given = {"attention_mask": torch.zeros(ROWS, 1, TOKENS, TOKENS)} if mask else {}
    forms = BlockForms(model, find_blocks(model), BatchEncoding({**given, **batch()}), [EXACT])
    assert all(shape[1] == PROBE_TOKENS for shape in seen)
    assert mask or list(forms.of("model.layers.0")) == [EXACT]


def test_a_batch_that_cannot_be_made_shorter_is_not_tried() -> None:
    model = Net()
    forms = BlockForms(model, find_blocks(model), (batch()["input_ids"][0],), [EXACT])
    assert forms.missing("layers.1") == {
        EXACT: "the sample batch has no tensor of rows and tokens that could be made shorter"
    }


def test_a_model_that_was_treated_by_hand_is_left_as_it_is() -> None:
    model = llama(layers=2)
    apply_to(model)
    forms = BlockForms(model, find_blocks(model), batch(), [EXACT])
    assert "are treated already; revert first" in forms.missing("model.layers.0")[EXACT]
    revert(model)
    assert untreated(model)


def test_a_session_of_a_model_that_was_treated_by_hand_names_the_remedy(tmp_path: Path) -> None:
    model = llama(layers=2)
    apply_to(model)
    with pytest.raises(memtrain.PrepareError, match=r"call revert\(model\) first\. The plan has"):
        prepare(model, tmp_path, {})
    revert(model)
    prepare(model, tmp_path, {}).close()


def test_what_no_block_can_have_is_reported(tmp_path: Path) -> None:
    model = llama(layers=2)
    model.model.layers[0].mlp.act_fn = nn.Hardswish()
    plain = {f"block.{index}": {"form": "plain"} for index in range(2)}  # the general wish leaves forms open
    with prepare(model, tmp_path, plain) as session:
        assert session.profile.blocks[0].forms[0].saved_bytes > session.profile.blocks[1].forms[0].saved_bytes
    profile = profiled(llama(), EXACT, forms=Off)
    facts = form_facts(session.plan, ModelProfile(**{**_fields(profile), "blocks": profile.blocks[:2]}))
    assert facts[0].startswith("2 blocks cannot have form exact: the gradients of its parameters are not")


def _fields(profile: ModelProfile) -> dict[str, Any]:
    return {name: getattr(profile, name) for name in ModelProfile.__dataclass_fields__}


@pytest.mark.parametrize("wish", [{"action": "swap"}, {"action": "recompute", "form": "exact"}])
def test_what_is_forced_may_leave_an_allowed_form_unused(tmp_path: Path, wish: dict[str, str]) -> None:
    lossy: dict[str, Any] = {"exact_only": False, "allow_lossy": ("int8",)}
    if "form" in wish:
        with pytest.raises(ValueError, match="form exact is only for keep and swap"):
            prepare(llama(layers=2), tmp_path, {"block": wish}, **lossy)
        return
    with prepare(llama(layers=2), tmp_path, {"block": wish}, **lossy) as session:
        assert session.profile.blocks[0].forms == ()
        assert dict(session.profile.blocks[0].missing_forms)["int8"].startswith(
            "the options of this plan rule"
        )
        assert "cannot have form" not in session.report()


def test_a_form_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(memtrain.PrepareError, match="no form 'int2'; lossy ones are int8, int4"):
        prepare(llama(), tmp_path, {}, exact_only=False, allow_lossy=("int2",))
    assert LOSSY == ("int8", "int4", "fewbit2", "fewbit3", "fewbit4")
