"""A frozen teacher reads what its student's processor makes."""

from __future__ import annotations

import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import picture, tiny_processor

from loopitr import DualEncoder
from loopitr.building.teacher import load_teacher
from loopitr.models.processing import word_tokenizer


def saved(folder, processor, model=None):
    (model or tiny_model()).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_a_teacher_sees_the_pixels_that_it_was_trained_on(tmp_path):
    own, student = tiny_processor(), tiny_processor()
    own.image_processor.image_mean, own.image_processor.image_std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    teacher = load_teacher(saved(tmp_path, own), student).eval()
    pictures = [picture(seed) for seed in range(3)]
    with torch.no_grad():
        wanted = tiny_model().eval().get_image_features(own(images=pictures)["pixel_values"])
        given = teacher.get_image_features(student(images=pictures)["pixel_values"])
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=0)
    with torch.no_grad():  # The same mean and deviation: nothing is converted.
        assert not torch.allclose(teacher.get_image_features(own(images=pictures)["pixel_values"]), wanted, atol=1e-3)
        same = load_teacher(str(tmp_path), own).eval().get_image_features(own(images=pictures)["pixel_values"])
    assert torch.equal(same, wanted)


def test_a_teacher_with_other_words_or_none_to_score_is_refused(tmp_path):
    student = tiny_processor()
    words = list(student.tokenizer.get_vocab())
    other = tiny_processor()
    other.tokenizer = word_tokenizer([*reversed(words)], max_length=24)
    with pytest.raises(ValueError, match=r"a cannot teach this model: its token \d+ is '\w+', the model's '\w+'"):
        load_teacher(saved(tmp_path / "a", other), student)
    spaced = tiny_processor()
    spaced.tokenizer.backend_tokenizer.normalizer = None  # It keeps capital letters, which become unknown words.
    spaced.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="b cannot teach this model: its tokenizer splits captions into other tokens"):
        load_teacher(saved(tmp_path / "b", spaced), student)
    with pytest.raises(ValueError, match="d cannot teach this model: it takes 24 tokens, and captions may have 25"):
        load_teacher(saved(tmp_path / "d", student), tiny_processor(max_length=25))
    with pytest.raises(ValueError, match="c holds a dual encoder alone"):
        load_teacher(saved(tmp_path / "c", student, DualEncoder(tiny_model().config.dual_config())), student)
