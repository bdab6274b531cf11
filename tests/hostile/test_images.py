"""Several hundred files that are called images: each is read or is a counted skip, and none changes another sample."""

import os
import re

import numpy as np
import pytest
import torch
from helpers.hostile_images import hostile_images, picture
from helpers.tiny_gallery import tiny_processor
from PIL import Image
from torch.utils.data import DataLoader

from loopitr.data import (
    CaptionDataset,
    Collator,
    DataError,
    ImageCache,
    Record,
    TrainTransform,
    UnreadableImage,
    decode_image,
    shared_images,
)
from loopitr.data.loader import SkipCounter

pytestmark = [
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore:.*(EXIF|Palette|Truncated|Metadata|tag).*:UserWarning"),
]
TRANSFORM = TrainTransform(16, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return hostile_images(tmp_path_factory.mktemp("hostile") / "images")


@pytest.fixture(scope="module")
def outcomes(cases):
    """For each case, the picture or the error; what else is raised fails."""
    outcomes = []
    for case in cases:
        try:
            outcomes.append(decode_image(case.path))
        except UnreadableImage as error:
            outcomes.append(error)
    return outcomes


def test_each_is_a_picture_or_one_line(cases, outcomes):
    assert len(cases) > 350
    wrong = []
    for case, outcome in zip(cases, outcomes, strict=True):
        if isinstance(outcome, UnreadableImage):
            line = str(outcome)
            good = case.readable is not True and re.search(case.reason, outcome.reason)
            good = good and line.isprintable() and len(outcome.reason) < 200 and str(case.path) not in outcome.reason
        else:
            good = case.readable is not False and outcome.mode == "RGB" and min(outcome.size) > 0
        if not good:
            wrong.append((case, outcome))
    assert not wrong
    refused = sum(isinstance(outcome, UnreadableImage) for outcome in outcomes)
    assert refused > 150 and len(outcomes) - refused > 100


def test_small_decoding_refuses_the_same(cases, outcomes):
    for case, outcome in zip(cases, outcomes, strict=True):
        if isinstance(outcome, UnreadableImage):
            with pytest.raises(UnreadableImage):
                decode_image(case.path, shortest=8)
        else:
            small = decode_image(case.path, shortest=8)
            assert small.mode == "RGB" and min(small.size) >= min(8, min(outcome.size))


def test_content_from_memory_is_judged_as_from_a_file(cases, outcomes):
    for case, outcome in zip(cases, outcomes, strict=True):
        if os.path.isfile(case.path) and case.readable is not None and case.path.name != "secret.jpg":
            data = case.path.read_bytes()
            if isinstance(outcome, UnreadableImage):
                with pytest.raises(UnreadableImage, match=re.escape(outcome.reason)):
                    decode_image(data)
            else:
                assert decode_image(data).tobytes() == outcome.tobytes()


def records_of(cases, folder, *, bad):
    """Two good images around every hostile file, or around a good one in its place."""
    records = []
    for number, case in enumerate(cases):
        good = folder / f"good-{number % 7}.png"
        if not good.exists():
            picture(number).save(good)
        records.append(Record(image=good, captions=(f"good {number}", "good"), identity=2 * number))
        hostile = case.path if bad else good
        records.append(Record(image=hostile, captions=("x",), identity=2 * number + 1, name=f"hostile {number}"))
    return records


@pytest.fixture(scope="module")
def refused(cases, outcomes):
    return [case for case, outcome in zip(cases, outcomes, strict=True) if isinstance(outcome, UnreadableImage)]


def test_no_file_changes_another_sample(refused, tmp_path):
    clean, hostile = (
        CaptionDataset(records_of(refused, tmp_path, bad=bad), transform=TRANSFORM, seed=3) for bad in (False, True)
    )
    for index in range(len(clean)):
        expected, actual = clean[4, index], hostile[4, index]
        if index % 2 == 0:
            assert torch.equal(actual["pixel_values"], expected["pixel_values"])
            assert (actual["caption"], actual["identity"], actual["skipped"]) == (
                expected["caption"],
                expected["identity"],
                [],
            )
        else:  # The next record stands in for it.
            assert [name for name, _ in actual["skipped"]] == [f"hostile {index // 2}"]
            assert actual["identity"] == (index + 1) % len(clean)


def test_batches_count_every_one_of_them(refused, tmp_path):
    records = records_of(refused, tmp_path, bad=True)
    dataset = CaptionDataset(records, transform=TRANSFORM)
    collator = Collator(tiny_processor().tokenizer, max_length=8)
    lines: list[str] = []
    skips = SkipCounter(max_fraction=1.0, log=lines.append)
    for batch in DataLoader(dataset, batch_size=50, collate_fn=collator, num_workers=1):
        skips.update(batch)
        assert torch.isfinite(batch.inputs["pixel_values"]).all()
    assert skips.report.skipped == len(skips.files) == len(refused)
    assert len(lines) == 10 and all(line.isprintable() for line in lines)
    strict = SkipCounter(max_fraction=0.1, log=lines.append)
    with pytest.raises(DataError, match="items were skipped, more than the allowed fraction 0.1") as caught:
        for batch in DataLoader(dataset, batch_size=50, collate_fn=collator):
            strict.update(batch)
    assert str(caught.value).isprintable()


def test_a_cache_and_a_search_for_shared_images(cases, outcomes, tmp_path):
    records = [Record(image=case.path, captions=("x",), identity=n) for n, case in enumerate(cases)]
    cache = ImageCache.open_or_build(tmp_path / "cache", records=records, shortest=16, progress=False)
    expected = {n for n, outcome in enumerate(outcomes) if isinstance(outcome, UnreadableImage)}
    assert set(cache.unreadable) == expected
    shared = {image.name for image in shared_images(records, records)}
    assert {case.path.name for case in cases if case.readable} <= {name.rpartition("/")[2] for name in shared}


def test_every_picture_can_be_evaluated(outcomes):
    """Also by CLIP's processor, which makes the shorter side of an image as long as the model wants."""
    from transformers import CLIPImageProcessor

    for images in (tiny_processor().image_processor, CLIPImageProcessor(size={"shortest_edge": 224})):
        for outcome in outcomes:
            if not isinstance(outcome, UnreadableImage):
                assert torch.isfinite(images(outcome, return_tensors="pt")["pixel_values"]).all()


def test_a_strange_value_leaves_the_others_of_a_float_image_alone():
    values = np.full((8, 8), 0.5, dtype=np.float32)
    values[0, 0], values[1, 1] = np.nan, np.inf
    assert decode_image(Image.fromarray(values)).getpixel((4, 4)) == (128, 128, 128)
