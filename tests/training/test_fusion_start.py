"""A fusion head that joins late (`train.fusion_start`): what is trained, logged, validated, kept before and after."""

import pytest
import torch
from helpers.step_reference import step_batch
from helpers.support import images, ragged_texts, tiny_model
from helpers.tiny_run import run

from loopitr import LoopITRModel
from loopitr.objective.build import build_objective
from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.options import ObjectiveOptions
from loopitr.training.options import TrainOptions
from loopitr.training.reporting import read_history

pytestmark = pytest.mark.slow


def test_without_pairs_the_dual_trains_alone_and_every_parameter_has_a_gradient():
    model = tiny_model().train()
    alone = build_objective(model, ObjectiveOptions())(**step_batch(), with_pairs=False)
    assert set(alone.terms) == {"itc"} and set(alone.metrics) == {"temperature", "image_similarity", "text_similarity"}
    torch.testing.assert_close(alone.loss, alone.terms["itc"])
    alone.loss.backward()
    for part in (model.fusion, model.itm_head):  # DDP would wait for it for ever
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters() if p.requires_grad)
    assert model.dual.text_projection.weight.grad.any()


def test_a_run_starts_with_the_dual_alone(tmp_path):
    run(tmp_path, train__epochs=2, train__fusion_start=0.5, train__distillation_warmup=0.0)
    history = read_history(tmp_path / "run")
    steps = [row for row in history if "loss/total" in row]
    joined = [("loss/itm" in row, "loss/distillation" in row) for row in steps]
    assert joined == [(False, False)] * 8 + [(True, True)] * 8
    assert all("loss/itc" in row for row in steps)
    first, last = (row for row in history if "val/dual" in row)
    assert "val/match" not in first and "val/match" in last


def test_no_model_is_kept_by_the_score_of_a_head_that_has_not_started(tmp_path):
    metrics = run(tmp_path, train__epochs=2, train__fusion_start=0.75, validation__every_steps=4)
    early = [row for row in read_history(tmp_path / "run") if "val/dual" in row and row["step"] <= 12]
    assert early and not any("val/match" in row for row in early)
    assert metrics["training"]["best_step"] == 16
    assert LoopITRModel.from_pretrained(tmp_path / "run")


def test_token_agreement_trains_and_is_validated_from_the_start(tmp_path):
    agreement = {"model__fusion__agreement": 8, "objective__agreement": 1}
    run(tmp_path, train__epochs=2, train__fusion_start=0.5, **agreement)
    history = read_history(tmp_path / "run")
    assert all("loss/agreement" in row for row in history if "loss/total" in row)
    validations = [row for row in history if "val/dual" in row]
    assert len(validations) == 2 and all("val/match" in row for row in validations)


def test_token_agreement_alone_is_the_match_score(tmp_path):
    """The ITM head, which no term trains, adds nothing to it."""
    losses = {"objective__itm": 0, "objective__distillation": 0, "objective__agreement": 1}
    run(tmp_path, model__fusion__agreement=8, validation__select="match", **losses)
    assert any("val/match" in row for row in read_history(tmp_path / "run"))
    model = LoopITRModel.from_pretrained(tmp_path / "run").eval()
    pixels, (ids, mask) = images(3), ragged_texts(4)
    image_state, text_state = model.encode_images(pixels), model.encode_texts(ids.clamp(max=20), mask)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    expected = model.agreement_of_all(image_state, text_state).flatten()
    torch.testing.assert_close(model.score_pairs(image_state, text_state, pairs).score, expected, atol=1e-6, rtol=1e-5)


def test_distillation_warms_up_from_there(tmp_path, monkeypatch):
    scales = []
    forward = LoopObjective.forward

    def noting(self, **batch):
        scales.append((batch["with_pairs"], batch["distillation_scale"]))
        return forward(self, **batch)

    monkeypatch.setattr(LoopObjective, "forward", noting)
    run(tmp_path, train__epochs=1, train__fusion_start=0.5, train__distillation_warmup=0.25)
    assert scales[4:] == [(True, 0.5), (True, 1.0), (True, 1.0), (True, 1.0)]
    assert [pairs for pairs, _ in scales[:4]] == [False] * 4

    scales.clear()
    run(tmp_path, train__epochs=1, train__distillation_warmup=0.0, train__distillation_end=0.5)
    assert scales == [(True, 1.0)] * 4 + [(True, 0.0)] * 4


@pytest.mark.parametrize("end", [0.2, 0.5, 1.1])
def test_distillation_ends_after_the_fusion_head_starts(end):
    with pytest.raises(ValueError, match=f"train.distillation_end is a part of the steps.* got {end}"):
        TrainOptions(fusion_start=0.5, distillation_end=end)


@pytest.mark.parametrize("part", [-0.1, 1.0])
def test_the_start_is_a_part_of_the_steps(part):
    with pytest.raises(ValueError, match="train.fusion_start is a part of the steps"):
        TrainOptions(fusion_start=part)


def test_the_schedule_starts_anew_with_the_loop(tmp_path):
    run(tmp_path, train__epochs=1, train__fusion_start=0.5, train__backbone_lr=1e-3, train__loop_backbone_lr=1e-4)
    rates = [row["train/lr"] for row in read_history(tmp_path / "run") if "train/lr" in row]
    assert len(rates) == 8 and rates[2] < rates[1] < rates[3]  # A row has the rate of the next step.
    with pytest.raises(ValueError, match="loop_backbone_lr needs train.fusion_start"):
        TrainOptions(loop_backbone_lr=1e-4)
    with pytest.raises(ValueError, match="loop_backbone_lr needs train.backbone_lr above 0"):
        TrainOptions(loop_backbone_lr=1e-4, backbone_lr=0.0, fusion_start=0.5)
