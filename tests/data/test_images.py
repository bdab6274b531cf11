"""decode_image: every mode becomes the RGB it should, and everything broken is named."""

import io
import os

import numpy as np
import pytest
from PIL import Image, ImageFile

from loopitr.data import DataError, UnreadableImage, decode_image


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(size=(32, 24)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def pixel(image, at=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(at)


def test_path_bytes_and_pil_agree(tmp_path):
    image = noise()
    image.save(tmp_path / "x.png")
    for form in (tmp_path / "x.png", str(tmp_path / "x.png"), encode(image), image):
        assert np.array_equal(np.asarray(decode_image(form)), np.asarray(image))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_put_on_white(mode):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (10, 10, 10, 255))
    image.putpixel((2, 2), (0, 0, 0, 128))
    decoded = decode_image(encode(image.convert(mode)))
    assert pixel(decoded) == (255, 255, 255)
    assert pixel(decoded, (1, 1)) == (10, 10, 10)
    assert pixel(decoded, (2, 2)) == pytest.approx((127, 127, 127), abs=1)


def test_palette_with_and_without_transparency():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.putpixel((1, 1), 1)
    assert pixel(decode_image(encode(image))) == (200, 0, 0)
    transparent = decode_image(encode(image, transparency=0))
    assert pixel(transparent) == (255, 255, 255) and pixel(transparent, (1, 1)) == (0, 0, 200)


@pytest.mark.parametrize("mode, value, expected", [("L", 90, 90), ("1", 1, 255)])
def test_greyscale(mode, value, expected):
    assert pixel(decode_image(encode(Image.new(mode, (4, 4), value)))) == (expected,) * 3


@pytest.mark.parametrize("kind, white", [("f4", 1.0), ("f4", 1.001), ("f4", 255), ("f4", 65535), ("i4", 2**31 - 1)])
def test_the_white_of_numbers_is_found_in_their_range(kind, white):
    """Pixels that go beyond the guessed range would all become white, and those far below it black."""
    values = np.array([[0.0, white / 2, white]]).astype(kind)
    assert [pixel(decode_image(Image.fromarray(values)), (x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("value, expected", [(0, 0), (65535, 255), (32896, 128), (300, 1)])
def test_sixteen_bits_are_scaled_not_clipped(value, expected):
    image = Image.fromarray(np.full((4, 4), value, dtype=np.uint16))
    assert pixel(decode_image(encode(image))) == (expected,) * 3


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-1.0, 0.0), (-99.0, 65.0)])
def test_values_below_0_are_refused_and_not_clipped(tmp_path, low, high):
    values = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "x.tif")
    images = [tmp_path / "x.tif", Image.fromarray(values), Image.fromarray((values * 200).astype(np.int32))]
    for image, scale in zip(images, (1, 1, 200)):
        with pytest.raises(UnreadableImage) as error:
            decode_image(image, "x")
        assert f"x: unreadable image (pixel values from {low * scale:.2g} to {high * scale:.2g}," in str(error.value)


def test_the_ripples_of_resampling_are_no_values_below_0():
    edge = np.zeros((8, 8), np.float32)
    edge[:, 4:] = 1.0
    resized = Image.fromarray(edge).resize((32, 32), Image.Resampling.LANCZOS)
    assert np.asarray(resized).min() < -0.05
    assert pixel(decode_image(resized)) == (0,) * 3


def test_float_image_in_unit_range():
    assert pixel(decode_image(Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)))) == (128,) * 3


def test_cmyk_jpeg():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert pixel(decode_image(encode(red, "JPEG", quality=95))) == pytest.approx((254, 0, 0), abs=6)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    image.paste((200, 0, 0), (0, 0, 20, 20))  # The left half is red.
    exif = Image.Exif()
    exif[0x0112] = 6  # To view it, it is turned clockwise: left becomes top.
    decoded = decode_image(encode(image, "JPEG", exif=exif, quality=95))
    assert decoded.size == (20, 40)
    assert pixel(decoded, (10, 5))[1] < 50 and pixel(decoded, (10, 35))[1] > 200


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_truncated_raises_with_the_name(tmp_path, format):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = encode(noise((64, 64)), format)
    (tmp_path / "half.img").write_bytes(data[: len(data) // 2])
    with pytest.raises(UnreadableImage, match="half.img.*truncated"):
        decode_image(tmp_path / "half.img")


@pytest.mark.parametrize("data, reason", [(b"", "empty file"), (b"hello", "not a known image format")])
def test_no_image_at_all(tmp_path, data, reason):
    (tmp_path / "x.jpg").write_bytes(data)
    for image in (data, tmp_path / "x.jpg"):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            decode_image(image, "row 7")
        assert (caught.value.name, caught.value.reason) == ("row 7", reason)


def test_missing_file_folder_and_zero_size(tmp_path):
    with pytest.raises(UnreadableImage, match="nowhere.jpg.*no such file"):
        decode_image(tmp_path / "nowhere.jpg")
    with pytest.raises(UnreadableImage, match="directory"):
        decode_image(tmp_path)
    with pytest.raises(UnreadableImage, match="zero size 0x5"):
        decode_image(Image.new("RGB", (0, 5)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [600, 300])  # Pillow only warns up to twice its limit
def test_decompression_bomb(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(UnreadableImage, match="too many pixels"):
        decode_image(encode(noise()))


def test_error_is_one_line():
    with pytest.raises(DataError) as caught:
        decode_image(b"x", "a.jpg")
    assert str(caught.value) == "a.jpg: unreadable image (not a known image format)"


# Scaled decode: JPEGs only, sizes only


def smooth(size, seed=0):
    """A picture that survives scaling."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def close_to_shrunk(image, whole, tolerance=3.0):
    shrunk = np.asarray(whole.resize(image.size, Image.Resampling.BOX), dtype=float)
    return np.abs(np.asarray(image) - shrunk).mean() < tolerance


@pytest.mark.parametrize(
    "size, shortest, expected",
    [
        ((400, 300), 300, (400, 300)),
        ((400, 300), 151, (400, 300)),
        ((400, 300), 150, (200, 150)),
        ((300, 400), 75, (75, 100)),
        ((301, 403), 37, (38, 51)),
        ((400, 300), 1, (50, 38)),
        ((400, 300), 500, (400, 300)),
        ((800, 50), 40, (800, 50)),
    ],
)
def test_a_jpeg_is_decoded_small_but_not_below_shortest(tmp_path, size, shortest, expected):
    data = encode(smooth(size), "JPEG", quality=95)
    (tmp_path / "x.jpg").write_bytes(data)
    whole = decode_image(data)
    for form in (data, tmp_path / "x.jpg"):
        image = decode_image(form, shortest=shortest)
        assert image.mode == "RGB" and image.size == expected and close_to_shrunk(image, whole)
        assert min(image.size) >= min(shortest, min(size))
    assert decode_image(data, shortest=max(size)).tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    "image, options",
    [
        (smooth((160, 120)).convert("CMYK"), {}),
        (smooth((160, 120)).convert("L"), {}),
        (smooth((160, 120)), {"progressive": True}),
        (smooth((160, 120)), {"subsampling": 2}),
    ],
    ids=["CMYK", "greyscale", "progressive", "subsampled"],
)
def test_colours_of_a_scaled_jpeg_are_those_of_the_whole(image, options):
    data = encode(image, "JPEG", quality=95, **options)
    small, whole = decode_image(data, shortest=30), decode_image(data)
    assert small.mode == "RGB" and small.size == (40, 30) and close_to_shrunk(small, whole)


def test_a_scaled_jpeg_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(smooth((160, 120)), "JPEG", exif=exif, quality=95)
    small = decode_image(data, shortest=60)
    assert small.size == (60, 80) and close_to_shrunk(small, decode_image(data))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_other_formats_are_decoded_whole(format):
    transparent = smooth((160, 120)).convert("RGBA" if format != "GIF" else "P")
    if format != "GIF":
        transparent.putalpha(100)
    data = encode(transparent, format)
    assert decode_image(data, shortest=30).tobytes() == decode_image(data).tobytes()


def test_an_open_jpeg_of_the_caller_stays_whole():
    opened = Image.open(io.BytesIO(encode(smooth((160, 120)), "JPEG")))
    assert decode_image(opened, shortest=30).size == (160, 120) and opened.size == (160, 120)


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_truncated_jpeg_stays_unreadable_when_scaled(part):
    data = encode(noise((160, 120)), "JPEG")
    for shortest in (None, 15):
        with pytest.raises(UnreadableImage, match="^x.jpg: unreadable image .truncated.$"):
            decode_image(data[: int(len(data) * part)], "x.jpg", shortest=shortest)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_scaling_does_not_let_a_bomb_through(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)
    with pytest.raises(UnreadableImage, match="too many pixels"):
        decode_image(encode(smooth((160, 120)), "JPEG"), shortest=15)


def test_shortest_must_be_a_size():
    with pytest.raises(ValueError, match="shortest must be at least 1 pixel, got 0"):
        decode_image(encode(noise(), "JPEG"), shortest=0)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImage, match="pipe.jpg: unreadable image \\(not a file\\)"):
        decode_image(tmp_path / "pipe.jpg")
