"""What a run notices of itself is said once, by name, with advice; each is provoked here."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_run import NO_AUGMENTATION, logged, run

from loopitr import Contrastive, Distillation, LoopObjective, Matching, PartialRanking, TopK
from loopitr.objective import losses
from loopitr.objective.losses.distillation import kl
from loopitr.training import trainer as training
from loopitr.training import watch as watching
from loopitr.training.checkpoints import Progress
from loopitr.training.gate import Gate
from loopitr.training.watch import Watch, prior_loss

FINE = {"loss/itm": 0.4, "train/temperature": 0.05, "train/image_similarity": 0.3, "train/valid_length": 2.0}


def watch(terms=None, *, total_steps=400, negatives=2, **kwargs):
    lines: list[str] = []
    objective = LoopObjective(tiny_model(), terms, miner=TopK(negatives), **kwargs)
    return Watch(objective, total_steps=total_steps, log=lines.append), lines


def look(own, progress, steps, **values):
    for step in steps:
        progress.step = step
        own.look(progress, {**FINE, **{name.replace("__", "/"): value for name, value in values.items()}})


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("negatives", [1, 4])
def test_the_prior_is_the_least_loss_of_a_head_that_looks_at_nothing(balanced, negatives):
    matching = torch.tensor([True] + [False] * 2 * negatives)
    loss = losses.balanced_itm_loss if balanced else losses.itm_loss
    constants = torch.linspace(-4, 4, 801)
    logits = torch.stack([torch.zeros(801), constants], -1)[:, None].expand(-1, len(matching), -1)
    least = min(float(loss(each, matching, torch.ones_like(matching))) for each in logits)
    assert prior_loss(Matching(balanced=balanced), negatives) == pytest.approx(least, abs=1e-4)


def test_a_matching_loss_at_its_prior_is_said_once():
    own, lines = watch([Matching(balanced=False, negatives=1)])
    progress = Progress()
    look(own, progress, range(10, 100, 10), loss__itm=0.636)
    assert lines == []
    look(own, progress, [100, 110, 400, 800], loss__itm=0.636)
    (line,) = lines
    assert line.startswith(
        "warning: step 100: the matching loss has been 0.636 for 100 steps or more, that of guessing"
    )
    assert "objective.mlm 1" in line


def test_a_plateau_that_ends_in_time_is_none_and_its_count_starts_anew():
    own, lines = watch([Matching()])
    progress = Progress()
    look(own, progress, range(10, 100, 10), loss__itm=math.log(2))
    look(own, progress, [100], loss__itm=0.5)
    look(own, progress, range(110, 200, 10), loss__itm=math.log(2))
    assert lines == []
    look(own, progress, [200], loss__itm=math.log(2))
    assert len(lines) == 1


def test_it_goes_on_counting_after_a_resume():
    own, lines = watch([Matching()])
    progress = Progress()
    look(own, progress, range(10, 100, 10), loss__itm=math.log(2))
    resumed, lines = watch([Matching()])
    look(resumed, Progress(step=90, watch=dict(progress.watch)), [100], loss__itm=math.log(2))
    assert len(lines) == 1


def test_a_head_trained_on_the_sum_has_no_such_prior():
    own, lines = watch([Contrastive(), Matching()], sum_dropout=0.3)
    look(own, Progress(), range(10, 500, 10), loss__itm=math.log(2))
    assert lines == []


def test_a_temperature_that_falls_to_its_limit_is_said_and_one_that_starts_there_is_not():
    own, lines = watch()
    progress = Progress()
    look(own, progress, [10])
    look(own, progress, range(20, 130, 10), train__temperature=0.01)
    (line,) = lines
    assert "the temperature has been at its lower limit, 0.01, for 100 steps" in line and "train.lr" in line
    clip, lines = watch()
    look(clip, Progress(), range(10, 500, 10), train__temperature=0.01)
    assert lines == []


@pytest.mark.parametrize(("side", "other"), [("image", "text"), ("text", "image")])
def test_embeds_that_collapse_are_said(side, other):
    own, lines = watch()
    look(own, Progress(), range(10, 300, 10), **{f"train__{side}_similarity": 0.99})
    (line,) = lines
    assert f"{side} embeds have been nearly the same (mean cosine 0.990)" in line and f"the {other}s differ" in line


@pytest.mark.parametrize(("loss", "length"), [(PartialRanking(), 0.0), (kl, 1.0)])
def test_nothing_to_distil_is_said(loss, length):
    own, lines = watch([Distillation(loss)])
    look(own, Progress(), range(10, 300, 10), train__valid_length=length)
    (line,) = lines
    assert "there has been nothing to distil for 100 steps" in line and "objective.hard_rule" in line
    own, lines = watch([Distillation(loss)])
    look(own, Progress(), range(10, 300, 10), train__valid_length=length + 0.1)
    assert lines == []


def test_a_short_run_is_not_told_what_its_first_steps_are_like():
    own, lines = watch([Matching()], total_steps=8)
    look(own, Progress(), range(1, 9), loss__itm=math.log(2))
    assert lines == []
    assert watch(total_steps=10**6)[0].patience == watching.PATIENCE


def test_a_teacher_behind_that_teaches_all_the_same_is_said_once():
    from loopitr.objective.teachers import Match

    lines: list[str] = []
    objective = SimpleNamespace(teacher=Match(), teacher_margin=None)
    gate, progress = Gate(objective, fusion_start=0, warmup=0, end=1000, log=lines.append), Progress()
    for scores in (
        {"dual": 20.0},
        {"dual": 20.0, "match": 21.0},
        {"dual": 30.0, "match": 21.0},
        {"dual": 9, "match": 1},
    ):
        progress.step += 10
        assert gate.update(progress, scores, lambda _: pytest.fail("no other model is to be measured")) == {}
    (line,) = lines
    assert line.startswith("warning: step 30: the teacher (match) is 9.0 points of R@1 behind the dual head")
    assert "objective.teacher_margin 1" in line


def test_another_models_lead_is_measured_once():
    lines, measured = [], []
    teacher = SimpleNamespace(name="frozen", model=object(), held_out_score=None)
    objective = SimpleNamespace(teacher=teacher, teacher_margin=None)
    gate, progress = Gate(objective, fusion_start=0, warmup=0, end=1000, log=lines.append), Progress()

    def measure(model):
        measured.append(model)
        return {"match": 50.0}

    for dual in (20.0, 60.0):
        gate.update(progress, {"dual": dual}, measure)
    assert measured == [teacher.model] and lines == []


@pytest.mark.slow
def test_a_run_provokes_them_all(tmp_path, monkeypatch, capsys):
    """Heads that are spoiled after each step: they give the same for all."""
    monkeypatch.setattr(watching, "LEAST", 3)
    step = training.Trainer._step

    def spoiled(self):
        step(self)
        dual = self.model.dual
        with torch.no_grad():
            dual.logit_scale.fill_(5.0)
            for layer in (dual.vision_projection, dual.text_projection):
                layer.weight.zero_()
                layer.bias.fill_(1.0)
            self.model.itm_head.weight.zero_()
            self.model.itm_head.bias.zero_()

    monkeypatch.setattr(training.Trainer, "_step", spoiled)
    run(
        tmp_path,
        **NO_AUGMENTATION,
        objective__hard_rule="threshold",
        objective__hard_threshold=0.9,
        validation__every_epochs=0,
    )
    output = capsys.readouterr().out
    for words in (
        "the matching loss has been 0.693 for 3 steps",
        "the temperature has been at its lower limit",
        "image embeds have been nearly the same (mean cosine 1.000)",
        "text embeds have been nearly the same (mean cosine 1.000)",
        "there has been nothing to distil",
    ):
        assert output.count(words) == 1, words
    assert logged(tmp_path, "train/image_similarity")[-1] == pytest.approx(1.0)
