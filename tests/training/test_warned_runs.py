"""Tiny runs that really go wrong, by their data or their options alone, and what each says of itself."""

from __future__ import annotations

import json

import pytest
from helpers.tiny_gallery import captions
from helpers.tiny_run import NO_AUGMENTATION, NO_DROPOUT, logged, run, trainer
from PIL import Image

pytestmark = pytest.mark.slow

PLAIN = {
    **NO_AUGMENTATION,
    **NO_DROPOUT,
    "validation__every_epochs": 0,
    "validation__gallery_queries": 0,
    "objective__lce": 0.0,
    "train__epochs": 100,
}
COLOURS = ("red", "lime", "blue", "yellow", "aqua", "fuchsia", "white", "black")


def table(folder, colours):
    """One image of each colour with one caption, for training and again for validation."""
    (folder / "images").mkdir(parents=True)
    lines = ["image,caption,split"]
    for number, colour in enumerate(colours):
        (caption,) = captions(number, 1)
        for split in ("train", "val"):
            name = f"{split}-{number}.png"
            Image.new("RGB", (32, 32), colour).save(folder / "images" / name)
            lines.append(f"{name},{caption},{split}")
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    return {"data__table": str(folder / "data.csv"), "data__images": str(folder / "images")}


def warnings(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: step ")]


def test_images_that_show_nothing(tmp_path, capsys):
    """All are black. One positive and two negatives of each pair: the plateau of a head that guesses is 0.637."""
    run(
        tmp_path,
        **PLAIN,
        **table(tmp_path / "table", ["black"] * 32),
        objective__balance_itm=False,
        objective__num_negatives=1,
        objective__hard_rule="threshold",
        objective__hard_threshold=0.9,
        train__max_steps=32,
        train__lr=0.01,
    )
    lines = warnings(capsys)
    for words in (
        "the matching loss has been 0.63",
        "image embeds have been nearly the same (mean cosine 1.000) for 20 steps or more",
        "text embeds have been nearly the same",
        "there has been nothing to distil for 20 steps or more",
    ):
        assert sum(words in line for line in lines) == 1, (words, lines)


def test_a_temperature_that_falls_to_its_limit_and_a_teacher_that_is_never_trained(tmp_path, capsys):
    """The lowest temperature is 0.5 here: it takes longer to fall to that of CLIP, 0.01."""
    with trainer(
        tmp_path,
        **{**PLAIN, "validation__every_steps": 30},
        **table(tmp_path / "table", COLOURS),
        model__temperature=0.55,
        objective__itm=0.0,
        objective__distillation=1e-6,
        train__max_steps=36,
        train__lr=0.02,
        train__backbone_lr=0.01,
    ) as made:
        made.model.dual.config.max_logit_scale = 2.0
        made.run()
    temperatures = logged(tmp_path, "train/temperature")
    assert temperatures[0] > 0.54 and temperatures[-1] == pytest.approx(0.5)
    lines = warnings(capsys)
    assert sum("the temperature has been at its lower limit, 0.5, for 20 steps" in line for line in lines) == 1, lines
    assert sum("the teacher (match) is" in line and "points of R@1 behind" in line for line in lines) == 1, lines


def test_a_learning_rate_that_leaves_nothing_finite(tmp_path, capsys):
    with pytest.raises(
        ValueError, match="stopped at step 4, the last of 3 in a row without a finite gradient: loss nan"
    ):
        run(
            tmp_path,
            **PLAIN,
            **table(tmp_path / "table", COLOURS),
            train__max_steps=20,
            train__lr=1e25,
            train__backbone_lr=1e25,
            train__max_bad_steps=3,
        )
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4]
    assert all(sorted(row["images"]) == [f"train-{number}.png" for number in range(8)] for row in rows)
    assert [line[:31] for line in warnings(capsys)] == [f"warning: step {step} is skipped: los" for step in (2, 3, 4)]
