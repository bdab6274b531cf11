"""Images of every form and mode, and what is no image, no text and no pair."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import jpeg, picture, tiny_processor
from PIL import Image

from loopitr import Retriever
from loopitr.data import DataError, decode_image
from loopitr.search.inputs import given_images, given_texts, is_text, picture_of, products_of, vector_rows

RETRIEVER = Retriever(tiny_model(), tiny_processor())
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encode(*images):
    return RETRIEVER.encode_images(list(images))


def modes():
    picture_ = Image.fromarray(PIXELS)
    palette, clear = picture_.convert("P"), picture_.convert("RGBA")
    clear.putalpha(Image.fromarray(PIXELS[..., 0]))
    turned = Image.fromarray(PIXELS)
    turned.getexif()[0x0112] = 6
    deep = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    return {
        "RGB": picture_,
        "palette": palette,
        "transparent": clear,
        "grey": picture_.convert("L"),
        "grey with transparency": clear.convert("LA"),
        "CMYK": picture_.convert("CMYK"),
        "16 bits": deep,
        "floats": Image.fromarray(PIXELS[..., 0].astype(np.float32) / 255),
        "turned": turned,
        "two colours": picture_.convert("1"),
    }


@pytest.mark.parametrize("mode", modes())
def test_an_image_is_opened_as_in_training(mode):
    image = modes()[mode]
    vector, plain = encode(image, decode_image(image))
    assert np.allclose(vector, plain, atol=1e-6)
    assert np.allclose(RETRIEVER.predict([("a dog", image)]), RETRIEVER.predict([("a dog", decode_image(image))]))


def test_a_turned_file_is_upright_and_differs_from_what_its_pixels_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    upright = Image.fromarray(np.rot90(PIXELS, -1))
    turned, expected, flat = encode(tmp_path / "turned.png", upright, Image.fromarray(PIXELS))
    assert np.allclose(turned, expected, atol=1e-6) and not np.allclose(turned, flat, atol=1e-3)


def test_arrays_and_tensors_are_the_pictures_that_they_hold():
    grey = PIXELS[..., 0]
    clear = np.dstack([PIXELS, grey])
    forms = {
        "RGB": (PIXELS, Image.fromarray(PIXELS)),
        "channels first": (np.moveaxis(PIXELS, -1, 0), Image.fromarray(PIXELS)),
        "tensor": (torch.from_numpy(PIXELS).permute(2, 0, 1), Image.fromarray(PIXELS)),
        "floats": (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255, Image.fromarray(PIXELS)),
        "half": (torch.ones(3, 4, 5, dtype=torch.bfloat16), Image.new("RGB", (5, 4), "white")),
        "transparent": (clear, Image.fromarray(clear)),
        "grey": (grey, Image.fromarray(grey)),
        "one channel": (grey[..., None], Image.fromarray(grey)),
        "16 bits": (grey.astype(np.uint16) * 257, Image.fromarray(grey)),
        "16 bits and channels": (PIXELS.astype(np.uint16) * 257, Image.fromarray(PIXELS)),
        "bool": (grey > 99, Image.fromarray(np.where(grey > 99, np.uint8(255), np.uint8(0)))),
    }
    for name, (given, expected) in forms.items():
        images, alone = given_images(given)
        assert alone and len(images) == 1, name
        assert np.array_equal(np.asarray(picture_of(given)), np.asarray(expected)), name
        assert np.array_equal(RETRIEVER.encode_images(given), encode(expected)[0]), name
    assert RETRIEVER.encode_images(np.stack([PIXELS, PIXELS])).shape == (2, 16)
    assert RETRIEVER.encode_images(torch.rand(2, 3, 8, 8)).shape == (2, 16)
    assert RETRIEVER.encode_images(picture(i) for i in range(3)).shape == (3, 16)  # a generator


@pytest.mark.parametrize("workers", [0, 2])
def test_the_unreadable_one_among_many_is_named(tmp_path, workers):
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i)[: 200 if i == 4 else None])
    paths = [str(tmp_path / f"{i}.jpg") for i in range(6)]
    calls = [
        lambda: RETRIEVER.encode_images(paths, 2, num_workers=workers),
        lambda: RETRIEVER.predict([("a dog", path) for path in paths], 2, num_workers=workers),
        lambda: RETRIEVER.rank("a dog", paths, batch_size=2, num_workers=workers),
    ]
    for call in calls:
        with pytest.raises(DataError, match=r"^.*/4\.jpg: unreadable image \(truncated\)$"):
            call()


def test_the_unreadable_one_without_a_name_is_named_by_its_position(tmp_path):
    with pytest.raises(ValueError, match=r"^image 2: unreadable image \(not a known image format\)$"):
        encode(jpeg(0), picture(1), b"no image")
    with pytest.raises(ValueError, match=r"^image 3: unreadable image \(empty file\)$"):  # of the pairs
        RETRIEVER.predict([("a dog", jpeg(0)), ("a cat", PIXELS), ("a dog", PIXELS), ("a dog", b"")])
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (("gone.jpg", "no such file"), ("pipe.jpg", "not a file"), ("", "Is a directory")):
        with pytest.raises(ValueError, match=f"unreadable image .*{reason}"):
            RETRIEVER.encode_images(tmp_path / name)
    with pytest.raises(ValueError, match="zero size"):
        encode(Image.new("RGB", (0, 4)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([picture(0), None], "image 1 must be a path, bytes, a PIL image or an array, got NoneType"),
        ([picture(0), 7], "image 1 must be a path, .* got int"),
        (None, "images must be a list of paths, bytes, PIL images or arrays, got NoneType"),
        ({"a.jpg"}, "images must be a list .*, got set"),
        ({"a.jpg": 1}, "images must be a list .*, got dict"),
        (np.zeros(()), "images must be a list .*, got ndarray"),
        (np.zeros((5, 6, 7)), r"image 0 must be an array \[H, W\], .*, got \[5, 6, 7\]"),
        ([np.zeros((0, 6, 3), dtype=np.uint8)], r"image 0 must be an array .*, got \[0, 6, 3\]"),
        ([np.zeros((6, 6, 3)) - 1], "image 0: floating-point pixels must be from 0 to 1, got -1 to -1"),
        ([np.full((6, 6, 3), 200.0)], "image 0: floating-point pixels must be from 0 to 1, got 200 to 200"),
        ([np.full((6, 6), np.nan)], "image 0: floating-point pixels must be from 0 to 1, got nan to nan"),
        ([np.zeros((6, 6, 3), dtype=np.int64)], "image 0 must have pixels of bool, uint8, uint16 or floats, got int64"),
        ([np.zeros((6, 6), dtype=complex)], "image 0 must have pixels of .*, got complex128"),
    ],
)
def test_what_is_no_image(images, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        RETRIEVER.encode_images(images)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a dog", 3], "text 1 must be a str, got int"),
        (["a dog", None], "text 1 must be a str, got NoneType"),
        (["a dog", ["a cat"]], "text 1 must be a str, got list"),
        (["a dog", " \n"], "text 1 is empty"),
        ("", "text 0 is empty"),
        (["a \udc80"], "text 0 is not valid Unicode: .*"),
        (b"a dog", "texts must be a list of str, got bytes"),
        (7, "texts must be a list of str, got int"),
        ({"a dog"}, "texts must be a list of str, got set"),
    ],
)
def test_what_is_no_text(texts, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        RETRIEVER.encode_texts(texts)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(picture(0), picture(1))], r"pair 0 must be \(text, image\), got \['Image', 'Image'\]"),
        ([("a dog", picture(0)), "a dog"], "pair 1 must be .*, got str"),
        ([("a dog", picture(0)), ("a dog",)], r"pair 1 must be .*, got \['str'\]"),
        ([("a dog", picture(0)), ("", picture(0))], "text 1 is empty"),
        ([("a dog", picture(0)), ("a dog", 3)], "image 1 must be a path, .*, got int"),
        ("a dog", r"pairs must be a list of \(text, image\), got str"),
        (("a dog", "a cat"), r"a cat: unreadable image \(no such file\)"),
    ],
)
def test_what_is_no_pair(pairs, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        RETRIEVER.predict(pairs)


@pytest.mark.parametrize(
    ("query", "candidates", "options", "message"),
    [
        (["a dog"], [picture(0)], {}, "the query must be one text or one image, got list"),
        (3, [picture(0)], {}, "images must be a list of .*, got int"),
        ("", [picture(0)], {}, "text 0 is empty"),
        (picture(0), ["a dog", picture(1)], {}, "candidates must be all texts or all images: 0 is text, 1 is image"),
        (picture(0), 5, {}, "candidates must be a list of texts or images, got int"),
        ("a dog", ["a cat"], {}, r"a cat: unreadable image \(no such file\)"),
        ("dgo.jpg", [picture(0)], {}, r"dgo.jpg: unreadable image \(no such file\)"),
        ("a dog", [picture(0)], {"top_k": 0}, "top_k must be at least 1, got 0"),
        ("a dog", [picture(0)], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("a dog", [picture(0)], {"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_ranked(query, candidates, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        RETRIEVER.rank(query, candidates, **options)


def test_which_str_is_a_path(tmp_path):
    (tmp_path / "photo").write_bytes(jpeg(0))
    for path in ("a.jpg", "photos/a dog.PNG", "/x/y.webp", str(tmp_path / "photo")):
        assert not is_text(path), path
    for text in ("a dog", "a dog.", "either/or", "version 2.0", str(tmp_path / "none"), "x" * 5000 + "/", "a\0/b"):
        assert is_text(text), text
    assert not is_text(Path("a dog")) and not is_text(b"a dog")


def test_vectors_that_do_not_compare():
    vectors = RETRIEVER.encode_texts(["a dog", "a cat", "a bird"])
    assert torch.equal(
        RETRIEVER.similarity(vectors[0], vectors), RETRIEVER.similarity(torch.tensor(vectors[:1]), vectors)
    )
    with pytest.raises(ValueError, match="^vectors must be equally wide, got 16 and 8 dimensions$"):
        RETRIEVER.similarity(vectors, vectors[:, :8])
    with pytest.raises(ValueError, match="^similarity takes vectors of floats, got torch.int8"):
        RETRIEVER.similarity(vectors, RETRIEVER.encode_texts(["a", "a cat"], precision="int8"))
    with pytest.raises(ValueError, match=r"^vectors must be \[n, E\] or \[E\], got \[1, 3, 16\]$"):
        RETRIEVER.similarity(vectors, vectors[None])


@pytest.mark.parametrize(
    "vectors",
    [
        "ab",
        None,
        {},
        [[1.0, 2.0], ["x", "y"]],
        np.array([None, 1.0]),
        np.array(["a"]),
        itertools.repeat(1.0),
        1j * np.ones(2),
    ],
)
def test_what_are_no_vectors(vectors):
    with pytest.raises(ValueError, match="vectors must be"):
        vector_rows(vectors)


def test_vectors_of_any_layout():
    rows = np.arange(6.0).reshape(2, 3)
    for same in (rows.astype(">f4"), rows[:, ::-1][:, ::-1], rows.tolist(), np.asfortranarray(rows)):
        assert vector_rows(same).tolist() == rows.tolist()


def test_products_that_no_memory_holds():
    huge = torch.ones(1, 1).expand(10**8, 1)
    with pytest.raises(ValueError, match="100000000 x 100000000 similarities do not fit"):
        products_of(huge, huge)


def test_an_iterator_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("loopitr.search.inputs.MOST_ITEMS", 100)
    for take in (given_texts, given_images):
        with pytest.raises(ValueError, match="more than 100 items and perhaps no end"):
            take(itertools.repeat("a.jpg"))
    assert len(given_texts(["a"] * 101)[0]) == 101
    assert len(given_texts("a" for _ in range(100))[0]) == 100
