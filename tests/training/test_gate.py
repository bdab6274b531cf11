"""The gate of the distillation on made-up validations, and runs with teachers that stop and go on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from helpers.tiny_run import equal, logged, run, weights

from loopitr.objective.teachers import Match, MatchPlusSimilarity
from loopitr.training.checkpoints import Progress
from loopitr.training.gate import Gate


def gate(teacher=None, margin=1.0, *, fusion_start=0, warmup=0.0, end=1000, log=None):
    objective = SimpleNamespace(teacher=teacher or Match(), teacher_margin=margin)
    log = ([] if log is None else log).append
    return Gate(objective, fusion_start=fusion_start, warmup=warmup, end=end, log=log)


def validate(own, progress, step, **scores):
    progress.step = step
    return own.update(progress, scores, lambda model: pytest.fail("no other model is to be measured"))


def test_it_opens_and_closes_with_the_lead_of_the_teacher():
    lines: list[str] = []
    own, progress = gate(log=lines), Progress()
    assert own.next_scale(progress) == 0.0
    for step, dual, match, opened in [(10, 20.0, 5.0, False), (20, 21.0, 21.9, False), (30, 22.0, 23.0, True)]:
        assert validate(own, progress, step, dual=dual, match=match) == {"teacher": match}
        assert (own.next_scale(progress) == 1.0) == opened
    assert progress.teaching_since == 30
    validate(own, progress, 40, dual=23.0, match=30.0)  # it stays open, from where it was
    assert progress.teaching_since == 30 and len(lines) == 1
    validate(own, progress, 50, dual=30.0, match=30.5)
    assert own.next_scale(progress) == 0.0 and progress.teaching_since is None
    assert lines == [
        "step 30: the teacher (match) is +1.0 points from the dual head, wanted +1.0: distillation is on from here",
        "step 50: the teacher (match) is +0.5 points from the dual head, wanted +1.0: distillation is off",
    ]
    assert own.warning(progress) is None  # it did count for a while


def test_the_weight_rises_anew_each_time_that_it_opens():
    own, progress = gate(warmup=10.0), Progress()
    validate(own, progress, 100, dual=1.0, match=9.0)
    assert own.next_scale(progress) == pytest.approx(0.1)
    progress.step = 104
    assert own.next_scale(progress) == pytest.approx(0.5)
    progress.step = 200
    assert own.next_scale(progress) == 1.0


@pytest.mark.parametrize("margin", [1.0, None])
def test_distillation_ends_for_good(margin):
    own, progress = gate(margin=margin, end=50), Progress()
    validate(own, progress, 40, dual=1.0, match=9.0)
    for step, scale in [(49, 1.0), (50, 0.0), (51, 0.0)]:
        progress.step = step
        assert own.next_scale(progress) == scale
    # A validation after the end measures no teacher, and opens nothing.
    assert validate(own, progress, 60, dual=1.0, match=9.0) == {}
    assert own.next_scale(progress) == 0.0 and own.warning(progress) is None


def test_without_a_margin_it_counts_from_the_start_of_the_fusion_head():
    own, progress = gate(margin=None, fusion_start=20, warmup=10.0), Progress()
    progress.step = 24
    assert own.next_scale(progress) == pytest.approx(0.5)
    assert validate(own, progress, 30, dual=9.0, match=1.0) == {}
    assert own.next_scale(progress) == 1.0 and own.warning(progress) is None


def test_each_teacher_is_compared_by_its_own_score():
    own, progress = gate(MatchPlusSimilarity()), Progress()
    assert validate(own, progress, 1, dual=9.0, match=1.0, reranked=10.5) == {"teacher": 10.5}
    assert progress.teaching_since == 1
    other = SimpleNamespace(name="momentum", model="its model")
    own, progress = gate(other), Progress()
    assert own.update(progress, {"dual": 9.0, "match": 99.0}, {"its model": {"match": 9.5}}.get) == {"teacher": 9.5}
    assert progress.teaching_since is None


def test_nothing_is_compared_before_the_fusion_head_starts_or_without_candidates():
    own, progress = gate(fusion_start=50), Progress()
    assert validate(own, progress, 40, dual=1.0, match=9.0) == {}
    assert validate(own, progress, 60, dual=1.0) == {}
    assert progress.teaching_since is None and progress.best_lead is None


def test_a_gate_that_never_opens_is_warned_of_once_with_advice():
    own, progress = gate(), Progress()
    assert "no validation before the end compared teacher and student" in own.warning(progress)
    validate(own, progress, 10, dual=9.0, match=3.0)
    validate(own, progress, 20, dual=9.0, match=4.5)
    warning = own.warning(progress)
    assert "at most -4.5 points from the dual head, wanted +1.0" in warning
    assert "objective.teacher_margin to null" in warning
    validate(own, progress, 30, dual=9.0, match=12.0)  # It opens when the run ends.
    assert "the last validation was the first that found the teacher" in own.warning(progress)


GATED = {
    "objective__distillation": 1.0,
    "objective__mining": "sample",
    "train__epochs": 2,
    "validation__every_steps": 4,
    "train__checkpoint_every": 3,
}


@pytest.mark.slow
def test_a_run_whose_gate_stays_closed_never_distils(tmp_path, capsys):
    run(tmp_path, **GATED, objective__teacher_margin=100.0)
    assert logged(tmp_path, "loss/distillation") == []
    assert len(logged(tmp_path, "val/teacher")) >= 3  # the first one before the first step
    assert capsys.readouterr().out.count("distillation was never on") == 1


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["match", "match_plus_similarity", "momentum"])
def test_a_run_whose_gate_is_open_distils_and_goes_on_alike_after_an_interruption(tmp_path, monkeypatch, teacher):
    """Weights, history and figures to the bit: of the momentum copy, the weight w, the gate and its warm-up."""
    from loopitr.training import trainer as training

    options = {**GATED, "objective__teacher": teacher, "objective__teacher_margin": -100.0}
    whole = run(tmp_path / "whole", **options)
    assert len(logged(tmp_path / "whole", "loss/distillation")) > 8
    step = training.Trainer._step

    def stop(self):
        step(self)
        if self.progress.step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Trainer, "_step", stop)
        run(tmp_path / "parts", **options)
    resumed = run(tmp_path / "parts", **options, resume=True)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    for metrics in (whole, resumed):
        metrics["seconds"] = metrics["training"]["seconds"] = metrics["pairs_per_second"] = None
    assert json.dumps(whole) == json.dumps(resumed)
    for name in ("loss/total", "val/teacher"):
        assert logged(tmp_path / "whole", name) == logged(tmp_path / "parts", name)


@pytest.mark.slow
def test_a_frozen_teacher_of_a_folder(tmp_path, capsys):
    run(tmp_path / "teacher", train__max_steps=2)
    options = {"objective__teacher": "frozen", "objective__teacher_model": str(tmp_path / "teacher" / "run")}
    run(tmp_path / "student", **options, train__max_steps=2)
    assert len(logged(tmp_path / "student", "loss/distillation")) == 2
    with pytest.raises(OSError, match="no model folder"):
        run(tmp_path / "nothing", **{**options, "objective__teacher_model": "runs/nothing/here"})


@pytest.mark.slow
def test_a_frozen_teacher_with_another_image_backbone_does_not_go_with_cached_tokens(tmp_path):
    run(tmp_path / "teacher", train__max_steps=2)
    options = {
        "objective__teacher": "frozen",
        "objective__teacher_model": str(tmp_path / "teacher" / "run"),
        "model__freeze": ["vision"],
        "data__cache_tokens": str(tmp_path / "cache"),
    }
    with pytest.raises(ValueError, match="teacher 'frozen' has another image backbone: leave data.cache_tokens unset"):
        run(tmp_path / "other", **options, train__max_steps=1)
    same = {**options, "model__init": str(tmp_path / "teacher" / "run")}
    run(tmp_path / "same", **same, train__max_steps=1)
    assert len(logged(tmp_path / "same", "loss/distillation")) == 1
