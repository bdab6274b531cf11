"""Options of a run reach what they are about: the optimiser's step, the model's passes, the training images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_building import save_tiny
from helpers.tiny_run import NO_AUGMENTATION, NO_DROPOUT, VIT, run, trainer
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from transformers import PreTrainedModel
from transformers.image_utils import PILImageResampling

from loopitr import LoopITRModel, LoopITRProcessor
from loopitr.data import DataError
from loopitr.training.setup import make_loader

EXACT = {**VIT, **NO_DROPOUT, **NO_AUGMENTATION, "train__max_steps": 1, "train__distillation_warmup": 0.0}


@pytest.fixture
def stepped(monkeypatch):
    """The gradients at each of the optimiser's steps, in the order of its groups."""
    seen = []
    step = torch.optim.AdamW.step

    def noting(self, *args, **kwargs):
        seen.append([p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_an_accumulated_step_has_the_mean_of_its_batches_own_gradients(tmp_path, stepped, chunk_size):
    run(tmp_path / "run", **EXACT, train__accumulation=2, train__clip=1e9, train__chunk_size=chunk_size)
    own = []
    with trainer(tmp_path / "alone", **EXACT) as made:
        parameters = [p for group in made.optimizer.param_groups for p in group["params"]]
        made.bare_objective.train()
        for batch, _ in zip(made.loader.epoch(0), range(2)):
            loss = made.bare_objective(**batch.inputs).loss
            own.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    means = [(a + b) / 2 for a, b in zip(*own, strict=True) if a is not None]
    (actual,) = stepped
    assert len(actual) == len(means)
    for ours, mean in zip(actual, means, strict=True):
        torch.testing.assert_close(ours, mean, atol=1e-5, rtol=1e-3)
    assert max(float((a - b).abs().max()) for a, b in zip(*own, strict=True) if a is not None) > 1e-2


@pytest.mark.slow
def test_gradients_are_clipped_to_a_norm(tmp_path, stepped):
    norms = []
    for clip in (1e9, 1e-3):
        run(tmp_path / str(clip), **EXACT, train__clip=clip)
        norms.append(float(torch.cat([gradient.flatten() for gradient in stepped[-1]]).norm()))
    assert norms[0] > 0.1 and norms[1] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_linear_layers_compute_in_the_precision_asked_for(tmp_path, monkeypatch, precision, dtype, chunk_size):
    trained, evaluated, scores = set(), set(), set()
    forward = nn.Linear.forward

    def noting(self, x):
        output = forward(self, x)
        if self.training or torch.is_inference_mode_enabled():  # What runs while the model is built does not count.
            (scores if self.out_features == 2 else trained if self.training else evaluated).add(output.dtype)
        return output

    monkeypatch.setattr(nn.Linear, "forward", noting)
    run(tmp_path, **EXACT, train__precision=precision, train__chunk_size=chunk_size)
    assert trained == evaluated == {dtype}  # The evaluations are those of the validation and of the final table.
    assert scores == {torch.float32}  # In bfloat16, those of close candidates would tie.


@pytest.mark.slow
def test_tokens_are_cached_in_float32_whatever_the_precision(tmp_path):
    frozen = {**EXACT, "model__freeze": ["vision"], "train__epochs": 0}
    for precision in ("fp32", "bf16"):
        folder = str(tmp_path / f"{precision}-cache")
        run(tmp_path / precision, **frozen, train__precision=precision, data__cache_tokens=folder)
    actual = [sorted((tmp_path / f"{precision}-cache").glob("*/tokens.npy")) for precision in ("fp32", "bf16")]
    assert len(actual[0]) == len(actual[1]) == 3  # The splits are train, val and test.
    for fp32, bf16 in zip(*actual, strict=True):
        assert fp32.parent.name == bf16.parent.name and fp32.read_bytes() == bf16.read_bytes()


@pytest.mark.parametrize(("chunk_size", "block"), [(None, None), (3, 3 * (1 + 2 * 4))])
def test_pairs_are_scored_in_blocks_of_a_chunks_queries(tmp_path, chunk_size, block):
    with trainer(tmp_path, **EXACT, train__chunk_size=chunk_size, objective__num_negatives=4) as made:
        assert made.bare_objective.pair_block == block


@pytest.mark.parametrize("start", ["scratch", "saved"])
def test_chunks_are_refused_for_batch_statistics_that_move_before_anything_is_made(tmp_path, start):
    moving = {"model__hold_batch_statistics": False}
    if start == "saved":
        moving["model__init"] = str(tmp_path / "saved")
        with trainer(tmp_path / "first") as made:
            made.model.save_pretrained(tmp_path / "saved")
            made.processor.save_pretrained(tmp_path / "saved")
    cache = tmp_path / "cache"
    refused = trainer(tmp_path, **moving, train__chunk_size=3, data__cache_images=str(cache))
    with pytest.raises(ValueError, match="takes those of the batch: set model.hold_batch_statistics"), refused:
        pass
    assert not cache.exists() and not (tmp_path / "run").exists()
    for fine in ({"model__hold_batch_statistics": True}, {"model__freeze": ["vision"]}):
        with trainer(tmp_path, **{**moving, **fine}, train__chunk_size=3):
            pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_for_a_gpu_are_pinned(tmp_path, device):
    with trainer(tmp_path, **EXACT) as made:
        made.caches.accelerator = SimpleNamespace(device=torch.device(device), num_processes=1, process_index=0)
        assert make_loader(made.test, made.options, made.caches).loader.pin_memory == (device == "cuda")


@pytest.mark.parametrize("wanted", [False, True])
def test_gradient_checkpointing_reaches_every_part(tmp_path, wanted):
    with trainer(tmp_path, **EXACT, train__gradient_checkpointing=wanted) as made:
        model = made.model
        layer = model.dual.text.model.encoder.layer[0]
        actual = [model.fusion.gradient_checkpointing, model.dual.vision.model.grad_checkpointing]
        assert [*actual, layer.gradient_checkpointing] == [wanted] * 3


def test_gradient_checkpointing_by_its_older_name(tmp_path, monkeypatch):
    """transformers 5.20 and older have no `activation_checkpointing_enable`."""
    calls = []
    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable", raising=False)
    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", lambda self: calls.append(type(self)))
    with trainer(tmp_path, **EXACT, train__gradient_checkpointing=True):
        assert calls == [LoopITRModel]


def test_learning_rates_and_weight_decay_reach_their_groups(tmp_path):
    rates = {"train__backbone_lr": 1e-4, "train__lr": 2e-3, "train__weight_decay": 0.3}
    with trainer(tmp_path, **EXACT, **rates) as made:
        groups = {(g["name"], g["weight_decay"]): g["initial_lr"] for g in made.optimizer.param_groups}
    assert groups == {("backbones", 0.3): 1e-4, ("backbones", 0.0): 1e-4, ("new", 0.3): 2e-3, ("new", 0.0): 2e-3}


@pytest.mark.parametrize(("given", "rate"), [(None, 1e-3), (5e-5, 5e-5)])
def test_adapters_learn_at_ten_times_the_backbones_rate_unless_another_is_given(tmp_path, given, rate):
    pytest.importorskip("peft", reason="LoRA adapters are made by peft (extra `lora`)")
    lora = {"model__lora": {"text_rank": 2}, "train__backbone_lr": 1e-4, "train__lora_lr": given}
    with trainer(tmp_path, **EXACT, **lora) as made:
        actual = {g["initial_lr"] for g in made.optimizer.param_groups if g["name"] == "adapters"}
    assert actual == {rate}


def steps_of(made):
    return list(made.loader.dataset.transform.steps.transforms)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("randaugment", [False, True])
def test_augmentation_is_what_was_asked_for(tmp_path, flip, randaugment):
    asked = {"data__flip": flip, "data__randaugment": randaugment, "data__crop_scale_min": 0.3}
    with trainer(tmp_path, **{**EXACT, **asked}) as made:
        steps, processor = steps_of(made), made.processor.image_processor
    (crop,) = [step for step in steps if isinstance(step, v2.RandomResizedCrop)]
    assert tuple(crop.scale) == (0.3, 1.0) and tuple(crop.size) == (32, 32)
    assert sum(isinstance(step, v2.RandomHorizontalFlip) for step in steps) == flip
    assert sum(isinstance(step, v2.RandomChoice) for step in steps) == 2 * randaugment
    assert steps[-1].mean == list(processor.image_mean) and steps[-1].std == list(processor.image_std)


@pytest.mark.slow
@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_training_images_are_resized_as_the_processor_says(tmp_path, resample):
    processor = LoopITRProcessor.from_pretrained(save_tiny(tmp_path / "saved"))
    processor.image_processor.resample = PILImageResampling[resample.upper()]
    processor.save_pretrained(tmp_path / "saved")
    with trainer(tmp_path, model__init=str(tmp_path / "saved")) as made:
        (crop,) = [step for step in steps_of(made) if isinstance(step, v2.RandomResizedCrop)]
    known = {"bilinear": InterpolationMode.BILINEAR}  # Not all of the other ways can resize tensors.
    assert crop.interpolation == known.get(resample, InterpolationMode.BICUBIC)


def test_a_cache_that_cannot_be_made_moves_no_run_aside(tmp_path):
    good = tmp_path / "run"
    (good / "best").mkdir(parents=True)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match="cannot make a folder"), trainer(good, data__cache_images=str(file / "no")):
        pass
    assert list(tmp_path.glob("run*")) == [good]
