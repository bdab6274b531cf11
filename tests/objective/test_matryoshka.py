"""Training at prefixes of the embeds: the losses written out, what is kept of it, and its figures at the end."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.step_reference import assert_same_gradients, gradients, is_positive, model_of, step, step_batch
from helpers.support import tiny_model
from helpers.tiny_gallery import evaluate, tiny_processor, tiny_records
from helpers.tiny_run import NO_AUGMENTATION, NO_DROPOUT
from helpers.tiny_run import run as train
from torch import Tensor

from loopitr import (
    Contrastive,
    DualEncoder,
    LoopITRConfig,
    LoopITRModel,
    LoopObjective,
    SigmoidContrastive,
    TrainOptions,
    export_dual,
)
from loopitr.data.options import DataOptions
from loopitr.evaluation.ranking import Ranking
from loopitr.objective.build import build_objective
from loopitr.objective.grad_cache import cached_backward
from loopitr.objective.options import ObjectiveOptions
from loopitr.training.setup import prepare_model

ONLY_ITC = {"itm": 0.0, "distillation": 0.0}


def logits_at(model: LoopITRModel, batch: dict[str, Tensor], dim: int) -> list[list[Tensor]]:
    """Cosine / temperature of the first `dim` dimensions of each image and each text, one after the other."""
    images = model.encode_images(batch["pixel_values"]).embeds
    texts = model.encode_texts(batch["input_ids"], batch["attention_mask"]).embeds
    scale = model.dual.logit_scale.exp()
    rows = []
    for image in images:
        row = []
        for text in texts:
            dot, lengths = (image[:dim] * text[:dim]).sum(), image[:dim].norm() * text[:dim].norm()
            row.append(scale * dot / lengths)
        rows.append(row)
    return rows


def itc_loop(logits: list[list[Tensor]], batch: dict[str, Tensor]) -> Tensor:
    size, losses = len(logits), []
    for query in range(size):
        texts = logits[query], [is_positive(batch, query, j) for j in range(size)]
        images = [logits[i][query] for i in range(size)], [is_positive(batch, i, query) for i in range(size)]
        for scores, right in (texts, images):
            total = torch.logsumexp(torch.stack(scores), 0)
            own = [total - score for score, is_own in zip(scores, right, strict=True) if is_own]
            losses.append(sum(own) / len(own))
    return sum(losses) / len(losses)


def sigmoid_loop(logits: list[list[Tensor]], batch: dict[str, Tensor], bias: Tensor) -> Tensor:
    size = len(logits)
    signs = [[1 if is_positive(batch, i, j) else -1 for j in range(size)] for i in range(size)]
    return -sum(F.logsigmoid(signs[i][j] * (logits[i][j] + bias)) for i in range(size) for j in range(size)) / size


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dims", [[3], [1, 8], [12, 5, 16]])
def test_the_loss_is_the_mean_over_prefixes_written_out(kind, dims):
    """The whole width, 16, counts once, whether it is among the dimensions or not."""
    options = ObjectiveOptions(**ONLY_ITC, itc_loss=kind, matryoshka_dims=dims)
    model, batch = model_of(options), step_batch()
    out = build_objective(model, options)(**batch)
    losses = []
    for dim in {*dims, 16}:
        logits = logits_at(model, batch, dim)
        if kind == "softmax":
            losses.append(itc_loop(logits, batch))
        else:
            losses.append(sigmoid_loop(logits, batch, model.dual.logit_bias))
    expected = sum(losses) / len(losses)
    torch.testing.assert_close(out.terms["itc"], expected, atol=1e-5, rtol=1e-5)
    plain = step(model, batch, **ONLY_ITC, itc_loss=kind).loss
    assert (plain - out.loss).abs() > 1e-4
    assert_same_gradients(gradients(model, out.loss), gradients(model, expected))


def test_without_dimensions_nothing_changes_and_the_others_terms_see_the_whole_width():
    model, batch = tiny_model().train(), step_batch()
    plain, all_of_it = (step(model, batch, matryoshka_dims=dims) for dims in ([], [16]))
    assert torch.equal(plain.loss, all_of_it.loss)
    cut = step(model, batch, matryoshka_dims=[4])
    assert cut.terms["itc"] != plain.terms["itc"]
    assert torch.equal(cut.terms["itm"], plain.terms["itm"])
    assert torch.equal(cut.terms["distillation"], plain.terms["distillation"])


def test_in_chunks_the_gradients_are_the_same():
    model, batch = tiny_model().train(), step_batch()
    objective = LoopObjective(model, [Contrastive(dims=(2, 6))])
    expected = gradients(model, objective(**batch).loss)
    model.zero_grad()
    cached_backward(objective, batch, chunk_size=3)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matryoshka_dims": [0]}, "objective.matryoshka_dims must be whole numbers of at least 1, got 0"),
        ({"matryoshka_dims": [8, -1]}, "got -1"),
        ({"matryoshka_dims": [True]}, "got True"),
        ({"matryoshka_dims": [8.0]}, "got 8.0"),
        ({"matryoshka_dims": [8, 4, 8]}, r"must differ, got \[8, 4, 8\]"),
        ({"matryoshka_dims": [8], "itc": 0.0}, "needs objective.itc above 0"),
        ({"matryoshka_dims": [17]}, "objective.matryoshka_dims must be from 1 to the model's 16 dimensions, got 17"),
        ({"matryoshka_dims": [17], "itc_loss": "sigmoid"}, "from 1 to the model's 16 dimensions, got 17"),
    ],
)
def test_bad_dimensions_are_named_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        build_objective(tiny_model(initial_logit_bias=-1.0), ObjectiveOptions(**options))


def test_the_models_config_keeps_them(tmp_path):
    model = tiny_model()
    prepare_model(LoopObjective(model, [Contrastive(dims=(8, 4))]), TrainOptions(), DataOptions())
    model.save_pretrained(tmp_path)
    loaded = LoopITRModel.from_pretrained(tmp_path)
    assert loaded.config.matryoshka_dims == loaded.dual.config.matryoshka_dims == [4, 8]
    prepare_model(LoopObjective(loaded, []), TrainOptions(), DataOptions())  # its similarities are not trained
    assert loaded.config.matryoshka_dims == [4, 8]
    prepare_model(LoopObjective(loaded, [Contrastive()]), TrainOptions(), DataOptions())
    assert loaded.config.matryoshka_dims is None and LoopITRConfig().matryoshka_dims is None
    for wrong in ([0], [17], ["8"]):
        with pytest.raises(ValueError, match="matryoshka_dims must be"):
            LoopITRConfig(embed_dim=16, matryoshka_dims=wrong)


def test_the_terms_can_be_made_by_hand():
    model = tiny_model(initial_logit_bias=-1.0).train()
    assert LoopObjective(model, [SigmoidContrastive(dims=[4])]).matryoshka_dims == (4,)
    assert LoopObjective(model, []).matryoshka_dims is None


# Its figures


def test_the_dual_encoder_is_measured_at_prefixes():
    model, records = tiny_model(), tiny_records()
    result = evaluate(model, records, rerank=2, dims=(3, 16))
    assert torch.equal(result.shortened[16].i2t, result.rankings["dual"].i2t)
    assert torch.equal(result.shortened[16].t2i, result.rankings["dual"].t2i)
    processor = tiny_processor()
    with torch.inference_mode():
        images = model.encode_images(processor(images=[r.image for r in records])["pixel_values"]).embeds[:, :3]
        inputs = processor(text=[caption for r in records for caption in r.captions])
        texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"]).embeds[:, :3]
        cosine = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    expected = Ranking.from_scores(cosine, torch.arange(len(records)).repeat_interleave(3))
    assert torch.equal(result.shortened[3].i2t, expected.i2t) and torch.equal(result.shortened[3].t2i, expected.t2i)
    figures = json.loads(json.dumps(result.to_json()))
    assert [*figures["shortened"]] == ["3", "16"] and figures["shortened"]["16"] == figures["dual"]
    rows = [line.split("|")[1].strip() for line in result.table().splitlines() if line.startswith("| ")]
    assert rows[2:5] == ["dual", "dual, first 3 dimensions", "dual, first 16 dimensions"]
    assert "shortened" not in evaluate(model, records).to_json()
    with pytest.raises(ValueError, match="dims must be at most the embeds' 16 dimensions, got 17"):
        evaluate(model, records, dims=(17,))


@pytest.mark.slow
def test_a_run_ends_with_the_table_at_its_dimensions_and_its_exports_know_them(tmp_path):
    changes = {**NO_DROPOUT, **NO_AUGMENTATION, "objective__matryoshka_dims": [4, 8]}
    metrics = train(tmp_path, **changes)
    assert [*metrics["shortened"]] == ["4", "8"]
    assert all(math.isfinite(metrics["shortened"][dim]["mean_r1"]) for dim in ("4", "8"))
    folder = tmp_path / "run"
    assert "| dual, first 4 dimensions |" in (folder / "results.md").read_text()
    assert "| dual encoder, first 8 dimensions |" in (folder / "README.md").read_text()
    assert "matryoshka_dims" in (folder / "config.yaml").read_text()
    export_dual(folder, tmp_path / "dual")
    assert DualEncoder.from_pretrained(tmp_path / "dual").config.matryoshka_dims == [4, 8]
