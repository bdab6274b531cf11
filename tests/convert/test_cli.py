"""`python -m loopitr.convert`: what it writes loads, what the user can mend is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fixtures.albef_tiny.plain import FOLDER, fixture
from PIL import Image

from loopitr import LoopITRModel, LoopITRProcessor
from loopitr.cli import run
from loopitr.convert import convert_albef
from loopitr.convert.__main__ import main
from loopitr.models.processing import word_tokenizer

SOURCE = str(FOLDER / "weights.safetensors")
HEADS = ["--vision-heads", "3", "--text-heads", "2"]


@pytest.fixture
def tokenizer(tmp_path) -> str:
    words = word_tokenizer(["a", "red", "circle"], max_length=64)
    words.save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def complaint(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(lambda: main(arguments))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@torch.no_grad()
def test_model_and_processor_load_again(tmp_path, tokenizer, capsys):
    out = str(tmp_path / "out")
    main(["albef", SOURCE, out, *HEADS, "--tokenizer", tokenizer])
    assert capsys.readouterr().out.startswith("albef with 0.0M parameters in ")
    expected = fixture("expected")
    inputs = [expected[name] for name in ("pixel_values", "input_ids", "attention_mask")]
    model = LoopITRModel.from_pretrained(out).eval()
    torch.testing.assert_close(model(*inputs).logits_per_image, expected["similarity"], atol=1e-5, rtol=1e-5)

    processor = LoopITRProcessor.from_pretrained(out)
    assert processor.tokenizer.model_max_length == 20  # This is the model's limit; ALBEF's own is 30.
    batch = processor(images=[Image.new("RGB", (50, 31), (255, 0, 0))], text=["a red circle " * 30])
    assert batch["pixel_values"].shape == (1, 3, 24, 24) and batch["input_ids"].shape == (1, 20)
    clip = torch.tensor([[1, 0, 0]]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])
    clip = clip / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(batch["pixel_values"].mean((2, 3)), clip)
    assert processor.image_processor.resample == Image.Resampling.BICUBIC
    model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])


def test_another_image_size_and_no_processor(tmp_path, capsys):
    main(["albef", SOURCE, str(tmp_path), *HEADS, "--image-size", "32"])
    assert "no --tokenizer was given" in capsys.readouterr().out
    model = LoopITRModel.from_pretrained(tmp_path)
    assert model.get_image_features(torch.zeros(1, 3, 32, 32)).shape == (1, 12)
    same = convert_albef(SOURCE, image_size=32, vision_heads=3, text_heads=2).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.glob("*processor*")) and not list(tmp_path.glob("tokenizer*"))


def test_the_blip_converter_is_there_too(tmp_path, capsys):
    error = complaint(["blip", SOURCE, str(tmp_path / "out"), *HEADS], capsys)
    assert "read as a BLIP checkpoint, does not fit: missing text_encoder.embeddings" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "albef|blip"),
        (["clip", SOURCE, "out"], "clip"),
        (["albef", SOURCE], "OUT"),
        (["albef", SOURCE, "out", "--heads", "3"], "--heads"),
        (["albef", SOURCE, "out", "--image-size", "big"], "big"),
        (["albef", "nowhere.pth", "out"], "no checkpoint file nowhere.pth"),
        (["albef", SOURCE, "out"], "give --vision-heads"),
        (["albef", SOURCE, "out", *HEADS, "--image-size", "-8"], "vision.image_size must be a positive integer"),
        (["albef", SOURCE, "out", *HEADS, "--tokenizer", "/no/words"], "/no/words"),
        (["albef", SOURCE, SOURCE, *HEADS], "is not a folder"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in complaint(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_with_more_words_than_the_model(tmp_path, capsys):
    word_tokenizer([f"w{number}" for number in range(80)], max_length=9).save_pretrained(tmp_path / "words")
    arguments = ["albef", SOURCE, str(tmp_path / "out"), *HEADS, "--tokenizer", str(tmp_path / "words")]
    assert "has 85 words, but the model knows 60" in complaint(arguments, capsys)
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_kind_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    assert "holds a 'blip' model" in complaint(["albef", SOURCE, str(tmp_path), *HEADS], capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").unlink()
    for _ in range(2):  # An earlier conversion is overwritten.
        main(["albef", SOURCE, str(tmp_path), *HEADS])


@pytest.mark.slow
def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "loopitr.convert", "albef", SOURCE, str(tmp_path / "out"), *HEADS]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("albef with") and (tmp_path / "out" / "model.safetensors").is_file()
