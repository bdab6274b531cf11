"""What a run leaves behind for use: the fitted similarity weight, and no head that only training needs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from helpers.support import tiny_model
from helpers.tiny_run import run

from loopitr import Contrastive, LoopITRModel, LoopObjective, Matching
from loopitr.building.options import ModelOptions
from loopitr.evaluation.calibration import WEIGHTS
from loopitr.objective.options import ObjectiveOptions
from loopitr.training.checkpoints import Progress
from loopitr.training.options import PretrainOptions, ValidationOptions
from loopitr.training.sharding import WholeModel
from loopitr.training.validation import Validator


def saved_config(folder):
    return json.loads((folder / "run" / "config.json").read_text())


def test_the_similarity_weight_is_fitted_on_validation_and_kept_in_the_model(tmp_path):
    metrics = run(tmp_path, train__max_steps=4)
    weight = saved_config(tmp_path)["similarity_weight"]
    assert weight in WEIGHTS and weight == metrics["similarity_weight"]
    assert metrics["calibrated"] is False  # The table is about the test split, on which nothing was fitted.
    assert f"reranked (w = {weight:.2g})" in (tmp_path / "run" / "results.md").read_text()
    assert metrics["reranking_gain"]["margin"] >= 0


def test_a_table_about_the_data_of_the_fit_says_so(tmp_path):
    metrics = run(tmp_path, train__max_steps=2, validation__final_split="val")
    assert metrics["calibrated"] is True
    assert metrics["reranked"]["mean_r1"] >= max(metrics[head]["mean_r1"] for head in ("dual", "match"))
    assert "fitted on these same queries" in (tmp_path / "run" / "results.md").read_text()


def test_without_candidates_the_weight_stays_and_that_is_said_once(tmp_path, capsys):
    metrics = run(tmp_path, train__max_steps=2, validation__rerank=0, validation__final_rerank=0)
    assert saved_config(tmp_path)["similarity_weight"] == 1.0 and metrics["similarity_weight"] is None
    said = [line for line in capsys.readouterr().out.splitlines() if "no candidates to fit on" in line]
    assert said == [
        "validation.final_rerank is 0: there are no candidates to fit on, and the similarity weight stays 1"
    ]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_the_head_of_word_prediction_is_saved_only_if_asked_for(tmp_path, keep):
    run(tmp_path, train__max_steps=2, objective__mlm=1.0, validation__keep_mlm_head=keep)
    assert saved_config(tmp_path)["mlm_head"] is keep
    assert (LoopITRModel.from_pretrained(tmp_path / "run").mlm_head is not None) is keep


@pytest.mark.slow
def test_a_model_saved_without_the_head_goes_on_with_a_new_one(tmp_path):
    run(tmp_path / "first", train__max_steps=2, objective__mlm=1.0)
    start = str(tmp_path / "first" / "run")
    run(tmp_path / "second", train__max_steps=2, objective__mlm=1.0, model__init=start)
    rows = [json.loads(line) for line in (tmp_path / "second" / "run" / "history.jsonl").read_text().splitlines()]
    assert all(row["loss/mlm"] > 0 for row in rows if "loss/total" in row)


def test_word_prediction_is_on_where_a_fusion_head_starts_from_scratch():
    def decided(**changes):
        options = PretrainOptions()
        for name, value in changes.items():
            group, option = name.split("__")
            setattr(getattr(options, group), option, value)
        result = options.decided()
        return result.objective.mlm, result.model.mlm_head

    assert decided() == (1.0, True)
    assert decided(model__pair="openai/clip-vit-base-patch16") == (1.0, True)
    assert decided(model__init="runs/x") == (0.0, False)
    assert decided(model__init="runs/x", objective__mlm=0.5) == (0.5, True)
    assert decided(objective__mlm=0.0) == (0.0, False)
    assert decided(objective__mlm=0.0, model__mlm_head=True) == (0.0, True)
    assert decided(model__freeze=["fusion"]) == (0.0, False)
    assert decided(objective__itm=0.0, objective__distillation=0.0) == (0.0, False)  # The dual head trains alone.


def test_token_agreement_trains_where_the_model_has_it_and_starts_from_scratch():
    def decided(agreement=True, weight=None, **model):
        options = PretrainOptions(objective=ObjectiveOptions(agreement=weight), model=ModelOptions(**model))
        options.model.fusion.agreement = agreement
        return options.decided().objective.agreement

    assert decided() == decided(agreement=16) == 1.0
    assert (
        decided(agreement=False) == decided(init="runs/x") == decided(weight=0.0) == decided(freeze=["fusion"]) == 0.0
    )
    assert decided(init="runs/x", weight=0.5) == 0.5


def test_a_fusion_head_from_scratch_does_not_teach_by_itself():
    def decided(weight=None, teacher="match", **model):
        objective = ObjectiveOptions(distillation=weight, teacher=teacher)
        return PretrainOptions(objective=objective, model=ModelOptions(**model)).decided().objective.distillation

    assert decided() == 0.0
    assert decided(init="runs/x") == decided(teacher="momentum") == decided(freeze=["fusion"]) == 1.0
    assert decided(weight=0.5) == 0.5


def test_of_equally_good_validations_the_better_dual_is_kept(tmp_path, monkeypatch):
    results = iter([(80.0, 100.0), (70.0, 100.0), (97.0, 100.0), (99.0, 99.9), (97.0, 100.0)])

    def measured(self, model, records, *, step, **kinds):
        dual, reranked = next(results)
        return SimpleNamespace(similarity_weight=None, mean_r1=lambda: {"dual": dual, "reranked": reranked})

    monkeypatch.setattr(Validator, "evaluate", measured)
    saved: list[int] = []
    monkeypatch.setattr("loopitr.training.validation.save_for_use", lambda *args, **kinds: saved.append(progress.step))
    objective = LoopObjective(tiny_model(), [Contrastive(), Matching()])
    caches = SimpleNamespace(accelerator=Accelerator(cpu=True), processor=None)
    whole = WholeModel(objective, caches.accelerator)
    validator = Validator(objective, whole, caches, ValidationOptions(), folder=tmp_path, records=[])
    progress = Progress()
    for progress.step in range(5):
        validator.validate(progress)
    assert saved == [0, 2] and (progress.best, progress.best_dual, progress.best_step) == (100.0, 97.0, 2)
