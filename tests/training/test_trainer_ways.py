"""Ways to train, in runs of seconds: losses, frozen parts, precision, streams, broken data, fine-tuning."""

import pytest
import torch
from helpers.tiny_gallery import captions, jpeg
from helpers.tiny_run import NO_DROPOUT, VIT, broken_table, equal, logged, run, trainer, weights
from safetensors.torch import load_file

from loopitr import LoopITRModel, LoopITRProcessor
from loopitr.data import DataError, dataset, decode_image
from loopitr.training.reporting import read_history

PARTS = {
    "vision": "dual.vision.",
    "text": "dual.text.",
    "fusion": "fusion.",
    "itm": "itm_head.",
    "dual_head": "dual.vision_projection",
    "agreement": "agreement.",
}
ALL = {*PARTS} - {"agreement"}
AGREEMENT = {"model__fusion__agreement": 12}


def parts_of(names):
    return {part for part, prefix in PARTS.items() if any(name.startswith(prefix) for name in names)}


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, ALL),
        ({"objective__itm": 0, "objective__distillation": 0}, {"vision", "text", "dual_head"}),
        ({"objective__itm": 0}, {"vision", "text", "dual_head"}),  # The teacher stays as it is.
        ({"objective__itc": 0, "objective__distillation": 0}, {"vision", "text", "fusion", "itm"}),
        ({"objective__mlm": 1, "model__mlm_head": True}, ALL),
        (
            {"objective__mlm": 1, "model__mlm_head": True, "objective__itm": 0, "objective__distillation": 0},
            {"vision", "text", "fusion", "dual_head"},
        ),
        ({"model__mlm_head": True}, ALL),
        (AGREEMENT, {*ALL, "agreement"}),
        ({**AGREEMENT, "objective__agreement": 1}, {*ALL, "agreement"}),
        (
            {**AGREEMENT, "objective__agreement": 1, "objective__itm": 0, "objective__distillation": 0},
            {"vision", "text", "dual_head", "agreement"},
        ),
        (
            {**AGREEMENT, "objective__mlm": 1, "model__mlm_head": True, "objective__itm": 0},
            {"vision", "text", "fusion", "dual_head"},
        ),
        (
            {**AGREEMENT, "objective__agreement": 1, "model__freeze": ["vision", "text", "dual_head"]},
            {"fusion", "itm", "agreement"},
        ),
        ({"model__freeze": ["vision", "text"]}, {"fusion", "itm", "dual_head"}),
        ({"model__fusion__style": "shared"}, ALL),
    ],
    ids=lambda x: " ".join(str(k).split("__")[-1] for k in x) if isinstance(x, dict) else "",
)
def test_what_is_trained_is_what_the_losses_need(tmp_path, changes, trained):
    """The optimiser holds these parts, and the first batch gives each of them, and no other, a gradient."""
    with trainer(tmp_path, **changes) as made:
        names = {id(parameter): name for name, parameter in made.model.named_parameters()}
        held = [names[id(p)] for group in made.optimizer.param_groups for p in group["params"]]
        if made.model.agreement is not None:  # the new ITM head beside it is zero, which blocks the first gradient
            torch.nn.init.normal_(made.model.itm_head.weight)
        made.bare_objective.train()
        made.bare_objective(**next(iter(made.loader.epoch(0))).inputs).loss.backward()
    gradients = [name for name, p in made.model.named_parameters() if p.grad is not None and p.grad.any()]
    assert parts_of(gradients) == trained
    assert parts_of(held) == trained | ({"dual_head"} if changes.get("objective__itc") == 0 else set())
    assert set(gradients) <= set(held)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"train__precision": "bf16", **VIT}, ALL),
        pytest.param({"train__gradient_checkpointing": True, **VIT}, ALL, marks=pytest.mark.slow),
        pytest.param({"data__captions": "all", "objective__mining": "sample"}, ALL, marks=pytest.mark.slow),
        pytest.param({"train__batch_size": 3, "objective__num_negatives": 9}, ALL, marks=pytest.mark.slow),
        ({"train__batch_size": 1, **VIT}, ALL - {"dual_head"}),  # Without a negative ITC has nothing to say.
    ],
    ids=["bf16", "checkpointing", "all captions", "few negatives", "no negative"],
)
def test_two_steps_move_every_part_that_has_something_to_learn(tmp_path, changes, trained):
    rates = {"train__lr": 1e-2, "train__backbone_lr": 1e-2, "train__weight_decay": 0}
    with trainer(tmp_path, **rates, **changes, train__max_steps=2, validation__every_epochs=0) as made:
        before = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
        metrics = made.run()
    losses = [value for row in read_history(tmp_path / "run") for k, value in row.items() if k[:5] == "loss/"]
    assert losses and all(abs(value) < 1e3 for value in losses)  # All of them are finite.
    assert metrics["num_images"] == 16 and metrics["match"] is not None
    after = weights(tmp_path)
    assert (
        parts_of([name for name in before if name in after and not torch.equal(before[name], after[name])]) == trained
    )


def test_a_run_that_trains_the_dual_alone_reports_no_match_scores(tmp_path):
    metrics = run(tmp_path, objective__itm=0, objective__distillation=0, train__max_steps=1)
    assert metrics["num_images"] == 16 and metrics["match"] is None


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    for name, checkpointing in (("a", False), ("b", True)):
        run(tmp_path / name, train__gradient_checkpointing=checkpointing, train__max_steps=2, **NO_DROPOUT, **VIT)
    plain, other = (torch.tensor(logged(tmp_path / name, "loss/total")) for name in "ab")  # float32, as computed
    torch.testing.assert_close(plain, other)


@pytest.mark.slow
def test_batches_in_chunks_change_nothing_but_memory(tmp_path):
    for name, chunk_size in (("a", None), ("b", 3)):
        run(tmp_path / name, train__chunk_size=chunk_size, train__max_steps=3, **NO_DROPOUT, **VIT)
    plain, other = (torch.tensor(logged(tmp_path / name, "loss/total")) for name in "ab")  # float32, as computed
    torch.testing.assert_close(plain, other)


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one(tmp_path, monkeypatch):
    """With the backend that runs the traced graphs as they are: no compiler is needed."""
    compile_parts = LoopITRModel.compile_parts
    monkeypatch.setattr(LoopITRModel, "compile_parts", lambda model: compile_parts(model, backend="eager"))
    for name, compiled in (("a", False), ("b", True)):
        run(tmp_path / name, train__compile=compiled, train__max_steps=3, **NO_DROPOUT, **VIT)
    plain, other = (torch.tensor(logged(tmp_path / name, "loss/total")) for name in "ab")  # float32, as computed
    torch.testing.assert_close(plain, other)
    assert weights(tmp_path / "a").keys() == weights(tmp_path / "b").keys()


def test_streaming_trains_on_a_stream_and_validates_on_a_table(tmp_path, quick_streams):
    import datasets

    for split, numbers in (("train", range(16)), ("val", range(16, 24))):
        images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in numbers]
        columns = {"image": images, "caption": [list(captions(i, 2)) for i in numbers]}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"{split}.parquet")
    stream = {
        "data__hub": "parquet",
        "data__data_files": {name: str(tmp_path / f"{name}.parquet") for name in ("train", "val")},
        "data__streaming": True,
        "train__batch_size": 4,
    }
    with pytest.raises(ValueError, match="train.max_steps"):
        run(tmp_path / "unbounded", **stream)
    metrics = run(tmp_path / "bounded", **stream, train__max_steps=6)  # This is one and a half epochs.
    assert (metrics["split"], metrics["num_images"], metrics["training"]["steps"]) == ("val", 8, 6)


@pytest.mark.slow
def test_what_cannot_be_read_is_counted_in_training_and_evaluation(tmp_path, capsys):
    table = broken_table(tmp_path)
    metrics = run(tmp_path, **table, train__epochs=2)
    assert metrics["training"]["skipped"] == {"unreadable image: truncated": 1}  # A file counts once.
    assert metrics["num_images"] == 7 and metrics["skipped"] == {"unreadable image: truncated": 1}
    assert "skipped 5.jpg: unreadable image: truncated" in capsys.readouterr().out
    with pytest.raises(DataError, match="1 of 8 images"):
        run(tmp_path, **{**table, "data__max_skipped_fraction": 0.1})


@pytest.mark.slow
def test_cached_images_train_like_decoded_ones(tmp_path, monkeypatch):
    table = {**broken_table(tmp_path), "train__epochs": 2, "data__cache_images": str(tmp_path / "cache")}
    actual = run(tmp_path / "a", **table)
    (cache,) = (tmp_path / "cache").iterdir()  # The cache is of the training split alone.
    assert actual["training"]["skipped"] == {"unreadable image: truncated": 1} and actual["num_images"] == 7
    monkeypatch.setattr(dataset, "decode_image", None)  # It is not called again in training.
    run(tmp_path / "b", **table, data__num_workers=1)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b")) and list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data__streaming": True}, "data.cache_images needs data of known length.*data.streaming"),
        ({"data__cache_tokens": "tokens", "model__freeze": ["vision"]}, "data.cache_images .* data.cache_tokens"),
    ],
)
def test_cached_images_do_not_go_with_a_stream_or_cached_tokens(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, data__cache_images=str(tmp_path / "cache"), **changes)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_large_jpegs_are_decoded_small_in_training_unless_an_option_forbids_it(tmp_path, monkeypatch):
    asked = []

    def noting(image, name, *, shortest):
        asked.append(shortest)
        return decode_image(image, name, shortest=shortest)

    monkeypatch.setattr(dataset, "decode_image", noting)
    for scaled, shortest in ((True, 53), (False, None)):  # 32 / sqrt(3/4 * 0.5)
        run(tmp_path / str(scaled), data__scaled_decode=scaled, train__max_steps=1)
        assert set(asked) == {shortest}
        asked.clear()


@pytest.mark.slow
def test_fine_tuning_goes_on_from_the_saved_model_with_other_options(tmp_path):
    table = broken_table(tmp_path)
    run(tmp_path / "first", train__max_steps=2)
    first = str(tmp_path / "first" / "run")
    metrics = run(tmp_path / "second", **table, model__init=first, train__epochs=0)
    assert equal(weights(tmp_path / "second"), weights(tmp_path / "first"))
    assert metrics["split"] == "val"
    metrics = run(tmp_path / "third", **table, model__init=first, model__image_size=64, model__freeze=["vision"])
    tuned, processor = (kind.from_pretrained(tmp_path / "third" / "run") for kind in (LoopITRModel, LoopITRProcessor))
    assert tuned.config.vision["image_size"] == 64 and processor.image_processor.size["height"] == 64
    assert not equal(weights(tmp_path / "third"), weights(tmp_path / "first"))


@pytest.mark.slow
def test_a_run_may_start_from_the_model_in_its_own_folder(tmp_path):
    run(tmp_path, train__max_steps=2)
    before = weights(tmp_path)
    run(tmp_path, model__init=str(tmp_path / "run"), train__epochs=0)
    assert equal(weights(tmp_path), before)
    assert equal(load_file(tmp_path / "run.1" / "model.safetensors"), before)
