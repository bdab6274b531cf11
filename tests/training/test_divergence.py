"""Steps without a finite loss and gradient are left out, named, counted; too many in a row end the run."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers.tiny_run import equal, logged, run, trainer, weights

from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.parts import StepOutput
from loopitr.training import trainer as training
from loopitr.training.checkpoints import Progress
from loopitr.training.divergence import StepGuard
from loopitr.training.reporting import read_history

RUN = {"train__max_steps": 8, "train__log_every": 3, "train__checkpoint_every": 2}


def poison(monkeypatch, bad, what="loss"):
    """The loss, or only its gradient, is not finite at the steps (from 1) in `bad`."""
    calls = []
    original = LoopObjective.compare

    def compare(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        if not self.training:
            return output
        calls.append(1)
        if len(calls) in bad:
            with torch.no_grad():
                self.model.dual.vision.model.bn1.running_mean.data.fill_(
                    torch.nan
                )  # as its forward pass would have left it
            if what == "loss":
                object.__setattr__(output, "loss", output.loss * torch.nan)
            else:
                output.loss.register_hook(lambda gradient: gradient * torch.inf)
        return output

    monkeypatch.setattr(LoopObjective, "compare", compare)


def states(monkeypatch):
    """The weights, moments and statistics after each step."""
    seen = []
    step = training.Trainer._step

    def noted(self):
        step(self)
        moments = [state["exp_avg"].clone() for state in self.optimizer.state.values()]
        counts = [float(state["step"]) for state in self.optimizer.state.values()]
        model = {name: value.clone() for name, value in self.model.state_dict().items() if "num_batches" not in name}
        seen.append((model, moments, counts))

    monkeypatch.setattr(training.Trainer, "_step", noted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_step_changes_nothing_and_is_named(tmp_path, monkeypatch, capsys, what):
    poison(monkeypatch, {4, 5}, what)
    seen = states(monkeypatch)
    run(tmp_path, **RUN)
    for before, after in ((2, 3), (3, 4)):
        assert equal(seen[before][0], seen[after][0])
        assert all(torch.equal(a, b) for a, b in zip(seen[before][1], seen[after][1], strict=True))
        assert seen[before][2] == seen[after][2]
    assert not equal(seen[4][0], seen[5][0])
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 5]
    assert all(len(row["images"]) == 8 and "scene" in row["images"][0] for row in rows)
    output = capsys.readouterr().out
    loss = "loss nan" if what == "loss" else "loss "
    assert f"warning: step 4 is skipped: {loss}" in output and "and 5 more (all in" in output
    assert logged(tmp_path, "train/bad_steps") == [2.0, 2.0]
    assert all(value == value for row in read_history(tmp_path / "run") for value in row.values())  # no NaN


@pytest.mark.slow
def test_so_many_in_a_row_stop_the_run_and_leave_a_finite_model(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(4, 100))
    with pytest.raises(ValueError, match="stopped at step 6, the last of 3 in a row without a finite gradient") as got:
        run(tmp_path, **RUN, train__max_bad_steps=3)
    line = str(got.value)
    assert "\n" not in line and "images scene" in line and "lower the learning rate" in line
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]
    run(tmp_path, **RUN, resume=True)
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_two_in_a_row_and_two_more_are_not_four_in_a_row(tmp_path, monkeypatch):
    poison(monkeypatch, {2, 3, 5, 6})
    run(tmp_path, **RUN, train__max_bad_steps=3)
    assert logged(tmp_path, "train/bad_steps")[-1] == 4.0


def test_the_count_goes_on_after_a_resume(tmp_path, monkeypatch):
    poison(monkeypatch, range(3, 100))
    step = training.Trainer._step

    def stop(self):
        step(self)
        if self.progress.step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Trainer, "_step", stop)
        run(tmp_path, **RUN, train__max_bad_steps=4)
    monkeypatch.undo()
    poison(monkeypatch, range(1, 100))  # The checkpoint is of step 4, after two.
    with pytest.raises(ValueError, match="stopped at step 6, the last of 4 in a row"):
        run(tmp_path, **RUN, train__max_bad_steps=4, resume=True)


def test_a_run_of_bad_steps_alone_goes_on_if_it_is_told_to(tmp_path, monkeypatch):
    poison(monkeypatch, range(1, 100))
    with trainer(tmp_path, **RUN, train__max_bad_steps=0, validation__every_epochs=0) as made:
        before = {name: value.clone() for name, value in made.model.named_parameters()}
        made.run()
        assert equal(before, dict(made.model.named_parameters()))


def test_an_accumulated_step_is_bad_if_one_of_its_batches_is(tmp_path, monkeypatch):
    poison(monkeypatch, {3})
    seen = states(monkeypatch)
    run(tmp_path, train__max_steps=4, train__accumulation=2)
    assert equal(seen[0][0], seen[1][0]) and not equal(seen[1][0], seen[2][0])
    assert logged(tmp_path, "train/bad_steps")[-1] == 1.0
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()]
    assert (
        row["step"] == 2
        and len(row["images"]) == 16
        and [loss["loss"] == "nan" for loss in row["losses"]]
        == [
            True,
            False,
        ]
    )


def test_chunks_are_guarded_too(tmp_path, monkeypatch):
    from helpers.tiny_run import VIT

    poisoned = []
    original = training.Stepper._backward_from

    def backward(self, output):
        poisoned.append(1)
        if len(poisoned) == 2:
            object.__setattr__(output, "loss", output.loss * torch.inf)
        original(self, output)

    monkeypatch.setattr(training.Stepper, "_backward_from", backward)
    seen = states(monkeypatch)
    run(tmp_path, **VIT, train__max_steps=3, train__chunk_size=4)
    assert equal(seen[0][0], seen[1][0]) and not equal(seen[1][0], seen[2][0])


@pytest.mark.parametrize(("bad", "most"), [(range(40), 10), (range(40), 0), (range(3, 19), 10)])
def test_a_scaler_that_skips_every_step_stops_the_run(tmp_path, bad, most):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu")
    accelerator = SimpleNamespace(scaler=scaler, distributed_type=DistributedType.NO)
    scaled = SimpleNamespace(step=lambda: (scaler.step(optimizer), scaler.update()))
    guard = StepGuard(accelerator, torch.nn.Identity(), scaled, folder=tmp_path, most_in_row=most)
    stops = most > 0 and len(bad) == 40
    with pytest.raises(ValueError, match="step 30: .* not finite at any scale") if stops else nullcontext():
        for step in range(40):
            loss = weight.sum()
            guard.note(StepOutput(loss, {}, {}))
            scaler.scale(loss).backward()
            if step in bad:
                weight.grad.fill_(torch.nan)
            scaler.unscale_(optimizer)
            guard.step(weight.grad.norm())
            optimizer.zero_grad()
            if step % 10 == 9:
                guard.settle(Progress(step=step + 1))
    assert float(weight.detach()) == pytest.approx(1 - 0.1 * (0 if len(bad) == 40 else 40 - len(bad)))
