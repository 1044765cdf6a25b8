"""The Trainer with memtrain's optimizers: its arguments honoured, its checkpoints resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memtrain.integrations.huggingface import trainer_optimizer
from memtrain.optim import Apollo, GaLore

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def make_arguments(folder: Path, **changes: Any) -> Any:
    values = dict(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-7,
        max_grad_norm=0.5, lr_scheduler_type="linear", warmup_steps=2, save_steps=4, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, seed=3,
    )  # fmt: skip
    return transformers.TrainingArguments(**{**values, **changes})


def make_trainer(folder: Path, name: str = "galore", *, batch: int = 2, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 64, (32, 12), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = make_arguments(folder, per_device_train_batch_size=batch)
    by_name = {"adamw-8bit": {}, "frugal": {"density": 0.25, "update_gap": 3}}
    chosen = {**by_name.get(name, {"rank": 4, "update_proj_gap": 3}), **settings}
    return transformers.Trainer(
        make_model(),
        arguments,
        train_dataset=data,
        optimizer_cls_and_kwargs=trainer_optimizer(name, arguments, **chosen),
    )


def test_the_arguments_are_honoured(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scale=0.5, proj_type="reverse_std", state_dtype="int8")
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is GaLore
    matrices = next(g for g in optimizer.param_groups if g["projection"])
    others = [g for g in optimizer.param_groups if not g["projection"]]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-2, (0.8, 0.95), 1e-7)
        assert group["state_dtype"] == "int8"
    expected = (4, 3, 0.5, "reverse_std", 0.1)
    names = ("rank", "update_gap", "scale", "side", "weight_decay")
    assert tuple(matrices[name] for name in names) == expected
    assert len(matrices["params"]) == 2 * 7
    decay = {name: group["weight_decay"] for group in others for name in group["param_names"]}
    assert decay["model.embed_tokens.weight"] == decay["lm_head.weight"] == 0.1
    assert decay["model.norm.weight"] == decay["model.layers.0.input_layernorm.weight"] == 0.0
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in trainer.model.parameters()
    }


@pytest.mark.parametrize("name", ["galore", "frugal", "apollo", "adamw-8bit"])
def test_a_run_taken_up_within_a_refresh_period_ends_alike(name: str, tmp_path: Path) -> None:
    """Saved after step 4, refreshed at steps 0 and 3 (counted from 0): bit-equal at step 6."""
    whole = make_trainer(tmp_path / "whole", name)
    whole.train()
    cut = make_trainer(tmp_path / "cut", name)
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert cut.state.global_step == 6
    start = make_model()
    for (key, ours), theirs, first in zip(
        cut.model.named_parameters(), whole.model.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), key
        assert not torch.equal(ours, first), key
    saved = torch.load(tmp_path / "whole" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["step"] == 4
    rates = [entry["learning_rate"] for entry in whole.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 5e-3, 1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_apollo_by_its_authors_names(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "apollo", scale_type="tensor", proj="svd")
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is Apollo
    group = next(g for g in optimizer.param_groups if g["projection"])
    assert (group["projection"], group["granularity"], group["residual"]) == ("svd", "tensor", "scale_only")


def test_overrides_leave_a_parameter_whole(tmp_path: Path) -> None:
    optimizer = make_trainer(tmp_path, overrides={"*.down_proj.weight": "other"}).create_optimizer()
    projected = {n for g in optimizer.param_groups if g["projection"] for n in g["param_names"]}
    assert len(projected) == 2 * 6
    assert not any("down_proj" in name for name in projected)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"rank": 4, "lr": 1e-3}, "set learning_rate of TrainingArguments"),
        ({}, {"rank": 4, "betas": (0.9, 0.99)}, "set adam_beta1 and adam_beta2"),
        ({}, {"rnk": 4}, "galore: rnk: Extra inputs"),
        ({}, {}, "galore: give either rank, such as 128, or density"),
        ({}, {"rank": 0}, "galore: rank: .*greater than 0, got 0"),
        ({"optim_target_modules": ["mlp"]}, {"rank": 4}, "optim_target_modules=.*overrides"),
        ({"optim_args": "rank=4"}, {"rank": 4}, "optim_args="),
    ],
)
def test_what_would_be_ignored_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_optimizer("galore", make_arguments(tmp_path, **changes), **settings)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'galor' is none of adamw-8bit, galore"):
        trainer_optimizer("galor", make_arguments(tmp_path))
