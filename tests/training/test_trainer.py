"""Whole runs of seconds in this process: what they leave behind, keep, cache and refuse."""

import json
from typing import ClassVar

import pytest
import torch
from helpers.tiny_run import NO_AUGMENTATION, NO_DROPOUT, equal, logged, run, weights, write_table

from loopitr.data import DataError
from loopitr.data import token_cache as token_cache_module
from loopitr.models.image_backbone import VisionBackbone
from loopitr.objective.loop_objective import LoopObjective
from loopitr.training import validation
from loopitr.training.reporting import read_history

# What a run leaves behind


def test_a_run_returns_and_writes_its_metrics(tmp_path):
    metrics = run(tmp_path, train__epochs=2)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics
    assert metrics["split"] == "test"
    assert (metrics["num_images"], metrics["num_captions"], metrics["k"]) == (16, 64, 8)
    assert metrics["training"]["steps"] == 16
    assert metrics["training"]["skipped"] == {}
    history = read_history(tmp_path / "run")
    steps = [row["step"] for row in history if "loss/total" in row]
    assert steps == list(range(1, 17))
    for name in (
        "loss/itc",
        "loss/itm",
        "loss/distillation",
        "train/itm_accuracy",
        "train/rank_agreement",
        "train/valid_length",
        "train/temperature",
        "train/lr",
        "train/skipped",
        "train/truncated",
    ):
        values = logged(tmp_path, name)
        assert len(values) == 16 and all(-1e3 < value < 1e3 for value in values)
    # Each epoch is validated once, the last one too.
    assert [row["step"] for row in history if "val/dual" in row] == [8, 16]
    torch.testing.assert_close(logged(tmp_path, "loss/itm")[0], 0.69, rtol=0.5, atol=0)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model_and_another_seed_another(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, train__seed=seed, train__max_steps=3)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_training_learns(tmp_path):
    """Eight pictures by heart: both heads' losses fall far below where they start, and each finds all eight."""
    table = write_table(tmp_path / "table", {"train": range(8), "val": range(8, 9)}, per_image=1)
    # The model is tiny: at 0.02 all captions would be alike.
    text = {**NO_DROPOUT["model__text__kwargs"], "initializer_range": 0.2}
    metrics = run(
        tmp_path,
        **{**NO_DROPOUT, **NO_AUGMENTATION, "model__text__kwargs": text},
        data__table=str(table),
        data__images=str(table.parent / "images"),
        objective__mining="stratified",
        objective__distillation=0.3,
        train__epochs=60,
        train__lr=1e-2,
        train__backbone_lr=1e-2,
        validation__every_epochs=0,
        validation__final_split="train",
    )
    for name in ("loss/itc", "loss/itm"):
        values = logged(tmp_path, name)
        assert sum(values[-5:]) < 0.2 * sum(values[:5]), name
    for head in ("dual", "match"):
        assert metrics[head]["mean_r1"] == 100, head


class FixedResult:
    """Stands in for a validation's result."""

    similarity_weight = 0.5
    examples: ClassVar[dict[str, object]] = {}

    def __init__(self, scores):
        self.scores = scores

    def mean_r1(self):
        return self.scores

    def to_json(self):
        return {"dual": self.scores["dual"]}

    def table(self):
        return "| table |"


@pytest.mark.parametrize(("select", "best"), [("auto", 4), ("dual", 2), ("match", 4)])
def test_the_best_validated_model_is_the_one_that_is_kept(tmp_path, monkeypatch, select, best):
    results = {
        1: {"dual": 10.0, "match": 5.0, "reranked": 10.0},
        2: {"dual": 30.0, "match": 6.0, "reranked": 20.0},
        3: {"dual": 20.0, "match": 7.0, "reranked": 40.0},
        4: {"dual": 30.0, "match": 8.0, "reranked": 40.0},  # At a tie the better dual is kept, then the earlier model.
    }
    states = {}

    def evaluate(model, *args, **kwargs):
        number = len(states) + 1
        if number <= 4:
            states[number] = {name: value.clone() for name, value in model.state_dict().items()}
        return FixedResult(results[min(number, 4)])

    monkeypatch.setattr(validation, "evaluate_retrieval", evaluate)
    metrics = run(tmp_path, train__max_steps=4, validation__every_steps=1, validation__select=select)
    assert len(states) == 4
    assert metrics["training"]["best_step"] == best
    assert equal(weights(tmp_path), states[best])
    assert metrics["training"]["best_val_mean_r1"] == results[best][{"auto": "reranked"}.get(select, select)]


@pytest.mark.slow
def test_an_accumulated_step_is_one_step_of_the_schedule(tmp_path):
    metrics = run(tmp_path, train__accumulation=3, train__epochs=3, train__warmup=0.5, train__lr=1e-2)
    assert metrics["training"]["steps"] == 6  # 8 batches an epoch are 2 steps; the rest is dropped
    rates = logged(tmp_path, "train/lr")
    assert max(rates) == pytest.approx(1e-2) and rates[-1] == pytest.approx(0.0)


@pytest.mark.slow
def test_distillation_warms_up(tmp_path, monkeypatch):
    scales = []
    forward = LoopObjective.forward

    def noting(self, **batch):
        scales.append(batch["distillation_scale"])
        return forward(self, **batch)

    monkeypatch.setattr(LoopObjective, "forward", noting)
    run(tmp_path, train__epochs=1, train__distillation_warmup=0.5)
    assert scales == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]


# Cached image tokens


@pytest.mark.slow
def test_cached_tokens_are_computed_once_and_read_by_the_next_run(tmp_path, monkeypatch):
    encoded, read = [], []
    forward, open_cache = VisionBackbone.forward, token_cache_module.TokenCache.__getitem__

    def noting(self, pixel_values):
        encoded.append(len(pixel_values))
        return forward(self, pixel_values)

    def noting_read(self, index):
        read.append(index)
        return open_cache(self, index)

    monkeypatch.setattr(VisionBackbone, "forward", noting)
    monkeypatch.setattr(token_cache_module.TokenCache, "__getitem__", noting_read)
    cached = {"data__cache_tokens": str(tmp_path / "cache"), "model__freeze": ["vision"], "train__epochs": 2}
    first = run(tmp_path / "a", **cached)
    assert sum(encoded) == 64 + 16 + 16  # Each image of train, val and test is encoded once.
    assert len(list((tmp_path / "cache").iterdir())) == 3
    encoded.clear()
    read.clear()
    run(tmp_path / "b", **cached, train__lr=2e-3)
    assert encoded == []
    assert len(read) >= 2 * 64
    # Another seed gives another backbone.
    other = run(tmp_path / "c", **cached, train__seed=1, validation__every_epochs=0)
    assert sum(encoded) == 64 + 16 + 16
    assert first["num_images"] == other["num_images"]


@pytest.mark.slow
def test_cached_tokens_evaluate_like_fresh_ones(tmp_path):
    frozen = {"model__freeze": ["vision"], "train__epochs": 0}
    fresh = run(tmp_path / "a", **frozen)
    cached = run(tmp_path / "b", **frozen, data__cache_tokens=str(tmp_path / "cache"))
    for head in ("dual", "match"):
        # The cache has half precision.
        assert cached[head]["mean_recall"] == pytest.approx(fresh[head]["mean_recall"], abs=3)


def test_caching_a_backbone_that_is_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data.cache_tokens needs a frozen image backbone"):
        run(tmp_path, data__cache_tokens=str(tmp_path / "cache"))


@pytest.mark.slow
def test_cached_views_are_built_once_and_by_what_makes_them(tmp_path):
    views = {"model__freeze": ["vision"], "data__cache_tokens": str(tmp_path / "cache"), "train__max_steps": 2}

    def caches(name, **changes):
        run(tmp_path / name, **views, **changes)
        return len(list((tmp_path / "cache").iterdir()))

    plain = caches("a")
    assert caches("b", data__cached_views=3) == plain + 2  # The training images have two more.
    assert caches("c", data__cached_views=3) == plain + 2
    assert caches("d", data__cached_views=2, data__flip=True) == plain + 3
    losses = {name: logged(tmp_path / name, "loss/itc") for name in "abc"}
    assert losses["a"] != losses["b"] == losses["c"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data__cached_views": 2}, "data.cached_views needs data.cache_tokens, which is unset"),
        ({"data__cached_views": 0}, "data.cached_views must be at least 1, got 0"),
        (
            {"data__cached_views": 2, "data__cache_tokens": "x", "model__freeze": ["vision"], "data__streaming": True},
            "data.cached_views needs data of known length",
        ),
    ],
)
def test_views_without_a_cache_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **options)


# What is refused


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_too_many_broken_images_stop_a_run_on_few(tmp_path, accumulation):
    table = write_table(tmp_path / "table", {"train": range(12), "val": range(12, 16)}, broken=tuple(range(6)))
    few = {"data__table": str(table), "data__images": str(table.parent / "images"), "train__batch_size": 4}
    with pytest.raises(DataError, match=r"items were skipped, .* 0.05: .*unreadable image: truncated \([0-5]\.jpg"):
        run(tmp_path, **few, train__accumulation=accumulation, train__epochs=1)
    run(tmp_path, **few, train__max_steps=1)  # The run does not stop before all of them were seen.


def test_a_loss_that_is_not_finite_names_the_step_and_the_terms(tmp_path):
    message = r"stopped at step \d, the last of 4 in a row .*: loss nan, itc .*itm .*distillation .*; lower"
    with pytest.raises(ValueError, match=message) as raised:
        run(tmp_path, train__lr=1e30, train__backbone_lr=1e30, train__warmup=0.0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 65}, "64 training examples do not fill one step of 65 x 1 processes x 1"),
        ({"train__accumulation": 9}, "64 training examples do not fill one step of 8 x 1 processes x 9"),
        ({"model__freeze": ["vision", "text", "dual_head", "fusion"]}, "nothing to train"),
        ({"data__split": "trian"}, "no split 'trian'; it has train, val, test"),
        ({"data__val_split": "dev"}, "no split 'dev'"),
        ({"validation__final_split": "tset"}, "no split 'tset'"),
        ({"data__karpathy": "absent.json", "data__images": "."}, "absent.json"),
        ({"data__karpathy": "absent.json", "data__table": "absent.csv"}, "data.karpathy and data.table"),
        ({"train__tracker": "nonsense"}, "nonsense"),
        ({"train__tracker": "comet_ml"}, "train.tracker comet_ml is not installed"),
        ({"data__scenes_val": 5000}, "at most 880"),
        ({"model__init": "absent"}, "no model folder absent"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_what_cannot_be_run_is_said_in_one_line(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message) as raised:
        run(tmp_path, **changes)
    assert "\n" not in str(raised.value)


def test_a_torch_that_cannot_compile_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("loopitr.training.setup.COMPILED_FROM", "99")
    with pytest.raises(ValueError, match="train.compile needs torch 99 or newer"):
        run(tmp_path, train__compile=True)
