"""Training runs with LoRA adapters: what learns and how fast, resuming, going on, options that do not fit."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_adapters import adapted_model, trained
from helpers.tiny_building import build, scratch
from helpers.tiny_run import NO_DROPOUT, VIT, equal, run, trainer, weights

from loopitr import DualEncoder, LoopITRModel
from loopitr.building.options import LoraOptions
from loopitr.export.dual import export_dual
from loopitr.models.lora import is_adapter
from loopitr.training import saving
from loopitr.training.optimization import parameter_groups, two_cycles
from loopitr.training.options import TrainOptions

pytest.importorskip("peft", reason="LoRA adapters are made by peft (extra `lora`)")

LORA = {**VIT, "model__lora": {"vision_rank": 2, "text_rank": 2}}


def rates(model: LoopITRModel, **changes: float) -> dict[str, tuple[str, float]]:
    """Group and learning rate of every trained parameter."""
    groups = parameter_groups(model, **{"backbone_lr": 1e-5, "lr": 1e-3, "weight_decay": 0.1, **changes})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["name"], group["lr"]) for group in groups for p in group["params"]}


# How fast they learn


def test_adapters_learn_ten_times_as_fast_as_a_whole_backbone():
    model = adapted_model(vision_rank=0)
    actual = rates(model)
    assert actual.keys() == trained(model)
    for name, group in actual.items():
        backbone = name.startswith(("dual.vision.", "dual.text."))
        expected = ("adapters", 1e-4) if is_adapter(name) else ("backbones", 1e-5) if backbone else ("new", 1e-3)
        assert group == (expected[0], pytest.approx(expected[1])), name
    assert {group for group, _ in actual.values()} == {"adapters", "backbones", "new"}
    given = rates(model, lora_lr=3e-4)
    assert {rate for group, rate in given.values() if group == "adapters"} == {3e-4}


def test_adapters_slow_down_with_the_backbones_when_the_loop_starts():
    groups = parameter_groups(adapted_model(vision_rank=0), backbone_lr=1.0, lr=1.0, lora_lr=1.0, weight_decay=0.0)
    optimizer = torch.optim.SGD(groups)
    schedule = two_cycles(optimizer, steps=8, first=4, warmup=0.0, backbones=0.1)
    peaks: dict[str, float] = {}
    for step in range(8):
        if step >= 4:
            for group in optimizer.param_groups:
                peaks[group["name"]] = max(group["lr"], peaks.get(group["name"], 0.0))
        optimizer.step()
        schedule.step()
    assert peaks == {"backbones": pytest.approx(0.1), "adapters": pytest.approx(0.1), "new": pytest.approx(1.0)}


# Runs


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="late"),
        pytest.param({"model__fusion__style": "shared"}, id="shared", marks=pytest.mark.slow),
        pytest.param({"train__gradient_checkpointing": True}, id="checkpointing", marks=pytest.mark.slow),
        pytest.param({"train__precision": "bf16"}, id="bf16", marks=pytest.mark.slow),
        pytest.param(
            {"train__fusion_start": 0.5, "train__backbone_lr": 0.0, "train__lora_lr": 1e-2},
            id="late start",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_trains_adapters_heads_and_fusion_and_keeps_the_adapters(tmp_path, changes):
    # An adapter's first matrix moves from the second step on, as its other one starts with zeros.
    steps = {"train__lr": 1e-2, "train__weight_decay": 0.0, "train__max_steps": 2, "validation__every_epochs": 0}
    with trainer(tmp_path, **{**LORA, **steps, **changes}) as made:
        before = {name: value.clone() for name, value in made.model.state_dict().items()}
        made.run()
    after = weights(tmp_path)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    backbones = {name for name in before if name.startswith(("dual.vision.", "dual.text."))}
    assert moved & backbones == {name for name in backbones if is_adapter(name)}
    assert {"dual.vision_projection.weight", "fusion.cross.0.query.weight", "itm_head.weight"} <= moved
    model = LoopITRModel.from_pretrained(tmp_path / "run")
    assert model.config.lora["text"]["rank"] == 2
    export_dual(tmp_path / "run", tmp_path / "dual")
    assert not any(is_adapter(name) for name in DualEncoder.from_pretrained(tmp_path / "dual").state_dict())


@pytest.mark.slow
def test_an_interrupted_run_that_is_resumed_equals_one_that_was_not(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    options = {**LORA, "train__epochs": 1, "train__checkpoint_every": 3}
    run(tmp_path / "whole", **options)
    save = saving.save_checkpoint

    def killed(*args, **kwargs):
        save(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(saving, "save_checkpoint", killed)
    with pytest.raises(Killed):
        run(tmp_path / "parts", **options)
    monkeypatch.undo()
    other = {**options, "model__lora": {"vision_rank": 2, "text_rank": 3}}
    with pytest.raises(ValueError, match="started with other options .*model.lora.text_rank: 2 -> 3"):
        run(tmp_path / "parts", **other, resume=True)
    with pytest.raises(ValueError, match="does not fit this run's model"):
        run(tmp_path / "parts", **other, resume_with_changes=True)
    run(tmp_path / "parts", **options, resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


@pytest.mark.slow
def test_fine_tuning_goes_on_with_the_adapters_or_gives_a_plain_model_its_first(tmp_path):
    run(tmp_path / "first", **LORA, train__max_steps=1)
    first = str(tmp_path / "first" / "run")
    run(tmp_path / "second", model__init=first, train__epochs=0)
    assert equal(weights(tmp_path / "second"), weights(tmp_path / "first"))
    run(tmp_path / "third", model__init=first, train__max_steps=2, **NO_DROPOUT)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "third")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(is_adapter(name) for name in moved if name.startswith(("dual.vision.", "dual.text.")))
    assert any(map(is_adapter, moved))
    with pytest.raises(ValueError, match="has LoRA adapters already: train those, or merge them first"):
        run(tmp_path / "fourth", model__init=first, model__lora__text_rank=2)
    LoopITRModel.from_pretrained(first).merge_lora().save_pretrained(tmp_path / "first" / "run")
    merged = weights(tmp_path / "first")
    run(tmp_path / "fifth", model__init=first, model__lora__text_rank=3, train__epochs=0)
    model = LoopITRModel.from_pretrained(tmp_path / "fifth" / "run")
    assert {part: lora["rank"] for part, lora in model.config.lora.items()} == {"text": 3}
    assert equal(model.merge_lora().state_dict(), merged)  # The adapters have not learned anything yet.


# Options


def test_options_become_adapters():
    model, _ = build(scratch(lora=LoraOptions(text_rank=4, alpha=4.0, dropout=0.2, targets=["query"])))
    assert model.config.lora == {
        "text": {
            "rank": 4,
            "alpha": 4.0,
            "dropout": 0.2,
            "modules": [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)],
        }
    }
    assert build(scratch())[0].config.lora is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__freeze": ["vision"]}, "vision is frozen, so it cannot learn adapters"),
        ({"data__cache_tokens": "cache"}, "data.cache_tokens needs tokens that do not change"),
    ],
)
def test_adapters_that_do_not_fit_the_run(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **LORA, **changes)


def test_text_adapters_go_with_cached_image_tokens(tmp_path):
    options = {**VIT, "model__lora": {"text_rank": 2}, "model__freeze": ["vision"]}
    metrics = run(tmp_path, **options, data__cache_tokens=str(tmp_path / "cache"), train__max_steps=1)
    assert metrics["training"]["steps"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_rank": -1}, "model.lora.vision_rank must be at least 0, got -1"),
        ({"alpha": 0.0}, "model.lora.alpha must be above 0, got 0.0"),
        ({"dropout": 1.0}, "model.lora.dropout must be from 0 to below 1, got 1.0"),
        ({"targets": []}, "model.lora.targets is empty"),
    ],
)
def test_values_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        LoraOptions(**values)
    with pytest.raises(ValueError, match="train.lora_lr must be at least 0, got -1"):
        TrainOptions(lora_lr=-1)
