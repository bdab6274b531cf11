"""A plain list of records is a data set: training, caches and evaluation take it as they take a source's records."""

import dataclasses

import numpy as np
import pytest
from helpers.support import tiny_model
from helpers.tiny_gallery import tiny_processor
from PIL import Image
from torch.utils.data import DataLoader

from loopitr import evaluate_retrieval
from loopitr.data import (
    CaptionDataset,
    Collator,
    DataError,
    ImageCache,
    Record,
    TrainTransform,
    decode_image,
    images_digest,
)


def own_records(image_dir):
    """A plain list: a path as text, a path, encoded bytes and a PIL image, of which one has a name and an identity."""
    return [
        Record(image=str(image_dir / "0.png"), captions=("red",)),
        Record(image=image_dir / "1.png", captions=("green", "a green card")),
        Record(image=(image_dir / "2.png").read_bytes(), captions=("blue",)),
        Record(image=Image.open(image_dir / "3.png").copy(), captions=("yellow",), identity=3, name="three"),
    ]


def test_identities_and_names_left_out_depend_on_the_image_alone(image_dir):
    records, again = own_records(image_dir), own_records(image_dir)
    assert [(r.identity, r.name) for r in records] == [(r.identity, r.name) for r in again]
    assert len({r.identity for r in records}) == len({r.name for r in records}) == 4
    assert [r.name for r in records[:2]] == [str(image_dir / "0.png"), str(image_dir / "1.png")]
    assert records[0].identity == Record(image=image_dir / "0.png", captions=("crimson",)).identity
    assert (records[3].identity, records[3].name) == (3, "three")
    assert Record(image=b"", captions=("x",), identity=0).identity == 0  # The identity 0 is no missing one.
    pictures = [Image.new("RGB", size, "red") for size in ((4, 2), (2, 4), (4, 2))]
    first, turned, same = (Record(image=picture, captions=("x",)).identity for picture in pictures)
    assert first == same != turned
    for record in records:  # A copy keeps what was derived.
        assert dataclasses.replace(record, captions=("other",)).identity == record.identity


@pytest.mark.parametrize("workers", [0, 1])
def test_a_plain_list_is_trained_on(image_dir, workers):
    records = [*own_records(image_dir), Record(image=image_dir / "4.png", captions=())]
    dataset = CaptionDataset(records, transform=TrainTransform(16, (0.5,) * 3, (0.5,) * 3))
    collator = Collator(tiny_processor().tokenizer, max_length=8)
    (batch,) = DataLoader(dataset, batch_size=5, collate_fn=collator, num_workers=workers)
    assert batch.inputs["identities"].tolist() == [r.identity for r in [*records[:4], records[0]]]
    assert batch.skipped == ((str(image_dir / "4.png"), "no captions"),)
    assert len(CaptionDataset(records, transform=lambda image: None, captions="all")) == 5


def test_a_plain_list_is_cached(image_dir, tmp_path):
    records = own_records(image_dir)
    images = ImageCache.open_or_build(tmp_path / "images-cache", records=records, shortest=16, progress=False)
    assert len(images) == 4 and not images.unreadable
    for index, record in enumerate(records):
        assert images[index].permute(1, 2, 0).numpy().tolist() == np.asarray(decode_image(record.image)).tolist()
    other = Record(image=(image_dir / "5.png").read_bytes(), captions=("blue",))  # Other bytes give another cache.
    assert images_digest([*records[:2], other, records[3]]) != images_digest(records)


def test_a_plain_list_is_evaluated(image_dir):
    model = tiny_model()
    result = evaluate_retrieval(model, tiny_processor(), own_records(image_dir), progress=False)
    assert result.num_images == 4


@pytest.mark.parametrize(
    ("image", "captions", "message"),
    [
        (np.zeros((4, 4, 3)), ("a",), "must be a path, encoded bytes or a PIL image, got ndarray"),
        ("a.jpg", "a dog", "must be a tuple of texts, got the text 'a dog'"),
    ],
)
def test_a_wrong_record_is_refused(image, captions, message):
    with pytest.raises(DataError, match=message):
        Record(image=image, captions=captions)


def test_a_pil_image_that_cannot_be_read_is_refused_or_skipped(tmp_path, image_dir):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:2000])
    with pytest.raises(DataError, match="needs a name and an identity"):
        Record(image=Image.open(tmp_path / "x.png"), captions=("a",))
    broken = Record(image=Image.open(tmp_path / "x.png"), captions=("a",), identity=1, name="x")
    dataset = CaptionDataset([broken, own_records(image_dir)[0]], transform=TrainTransform(16, (0.5,) * 3, (0.5,) * 3))
    assert dataset[0]["skipped"] == [("x", "unreadable image: truncated")]


def test_a_cache_knows_pictures_in_memory_by_their_pixels(tmp_path):
    """Their names may be the caller's numbers, which say nothing."""

    def cards(*pictures):
        return [Record(image=x, captions=("a card",), identity=i, name=str(i)) for i, x in enumerate(pictures)]

    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    digest = images_digest(cards(red, red))
    assert digest == images_digest(cards(red.copy(), red)) != images_digest(cards(red, blue))
    caches = [ImageCache.open_or_build(tmp_path, records=cards(x), shortest=8, progress=False) for x in (red, blue)]
    assert [cache[0][:, 0, 0].tolist() for cache in caches] == [[255, 0, 0], [0, 0, 255]]
    red.save(tmp_path / "0.png")
    opened = Image.open(tmp_path / "0.png")
    unread = images_digest(cards(opened))
    assert opened.fp is not None  # It is not read, which would keep it in memory.
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "0.png")
    assert images_digest(cards(Image.open(tmp_path / "0.png"))) != unread
    closed = Image.open(tmp_path / "0.png")
    closed.close()
    assert images_digest(cards(closed))
