"""Files that are called images, of every mode and damage, and what a reader is to make of each."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": ("RGB", "L", "1", "P", "LA", "RGBA", "I;16"),
    "JPEG": ("RGB", "L", "CMYK", "1"),
    "GIF": ("P", "L", "RGB"),
    "BMP": ("RGB", "L", "1", "P", "RGBA"),
    "TIFF": ("RGB", "L", "1", "P", "LA", "RGBA", "CMYK", "LAB", "I;16", "I", "F"),
    "WEBP": ("RGB", "RGBA", "L"),
    "PPM": ("RGB", "L", "1", "I"),
    "TGA": ("RGB", "RGBA", "L", "P"),
    "ICO": ("RGBA",),
    "PCX": ("RGB", "L", "1", "P"),
    "SGI": ("RGB", "L", "RGBA"),
}
DAMAGED = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO")
NOT_IMAGES = {
    "text": b"not an image",
    "html": b"<html><body>404 Not Found</body></html>",
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "zip": b"PK\x03\x04" + bytes(100),
    "gzip": b"\x1f\x8b\x08" + bytes(100),
    "pdf": b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="4" height="4"/></svg>',
    "json": b'{"error": "rate limit"}',
    "pickle": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "html_jpeg": b"\xff\xd8\xff\xe0<html>",
    "one_byte": b"\xff",
    "script": b"#!/bin/sh\nexit 1\n",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A path and whether it is `readable`; None where the damage leaves that open. `reason`: a pattern."""

    path: Path
    readable: bool | None
    reason: str = ""


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def in_mode(mode: str, image: Image.Image) -> Image.Image:
    grey = np.asarray(image.convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    if mode == "LAB":
        return Image.frombytes("LAB", image.size, image.tobytes())
    return image.convert(mode)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    """A PNG file with a header of any size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", zlib.compress(data))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def hostile_images(folder: Path) -> list[Case]:
    """Some 300 of them, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    named = [*_of_every_mode(), *_damaged(), *_flipped(), *_bombs(), *_strange(), *_not_images()]
    for number, (name, data, readable, reason) in enumerate(named):
        path = folder / f"{number:03d}-{name}"
        path.write_bytes(data)
        cases.append(Case(path=path, readable=readable, reason=reason))
    return cases + list(_not_files(folder))


Named = Iterator[tuple[str, bytes, bool | None, str]]


def _of_every_mode() -> Named:
    for kind, modes in FORMATS.items():
        for mode in modes:
            yield f"{mode.replace(';', '_')}.{kind.lower()}", encode(in_mode(mode, picture()), kind), True, ""
            yield f"{mode.replace(';', '_')}-{kind}.jpg", encode(in_mode(mode, picture(1)), kind), True, ""


def _damaged() -> Named:
    for kind in DAMAGED:
        data = encode(in_mode(FORMATS[kind][0], picture()), kind)
        for part in (0.02, 0.2, 0.5, 0.8, 0.97):
            yield f"cut-{part}.{kind.lower()}", data[: int(len(data) * part)], False, ""
        half = len(data) // 2
        yield f"zeroed.{kind.lower()}", data[:half] + bytes(len(data) - half), None, ""
        yield f"headless.{kind.lower()}", data[16:], None, ""
        yield f"prefixed.{kind.lower()}", b"HTTP/1.1 200 OK\r\n\r\n" + data, False, ""
        yield f"doubled.{kind.lower()}", data + data, True, ""
        yield f"as-text.{kind.lower()}", data.replace(b"\n", b"\r\n")[:-1], None, ""


def _flipped() -> Named:
    random = np.random.default_rng(0)
    for kind in DAMAGED:
        data = np.frombuffer(encode(in_mode(FORMATS[kind][0], picture()), kind), np.uint8)
        for number in range(8):
            broken = data.copy()
            # Headers are where a reader can be led astray.
            places = random.integers(0, min(len(data), 64 if number % 2 else len(data)), 6)
            broken[places] = random.integers(0, 256, 6)
            yield f"flipped-{number}.{kind.lower()}", broken.tobytes(), None, ""


def _bombs() -> Named:
    too_many = "too many pixels"
    for width, height in ((10_000, 9_000), (20_000, 20_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)):
        yield f"bomb-{width}.png", png(width, height), False, ""
    yield "bomb.png", png(30_000, 30_000, data=bytes(10**6)), False, too_many
    bmp = encode(picture(), "BMP")
    yield "bomb.bmp", bmp[:18] + struct.pack("<ii", 40_000, 40_000) + bmp[26:], False, too_many
    gif = encode(in_mode("P", picture()), "GIF")
    yield "bomb.gif", gif[:6] + struct.pack("<HH", 65_535, 65_535) + gif[10:], False, too_many
    jpeg = encode(picture(), "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    yield "bomb.jpg", jpeg[:frame] + struct.pack(">HH", 60_000, 60_000) + jpeg[frame + 4 :], False, too_many
    yield "bomb.ppm", b"P6 90000 90000 255\n" + bytes(100), False, too_many
    yield "comment.ppm", b"P6\n# " + b"x" * 5000, False, "a header of comments"
    yield "comments.ppm", b"P3\n" + b"# a line\n" * 600 + b"2 1 255\n" + b"0 " * 6, False, "a header of comments"
    text = b"Comment\0\0" + zlib.compress(bytes(10**7))
    yield "text-bomb.png", png(4, 4, (b"zTXt", text), data=bytes(52)), None, ""
    profile = b"icc\0\0" + zlib.compress(bytes(10**7))
    yield "profile-bomb.png", png(4, 4, (b"iCCP", profile), data=bytes(52)), None, ""
    yield "0x0.png", png(0, 0), False, ""
    yield "0x5.png", png(0, 5), False, ""


def _strange() -> Named:
    yield "1x1.png", encode(picture(size=(1, 1))), True, ""
    yield "1x1.jpg", encode(picture(size=(1, 1)), "JPEG"), True, ""
    yield "1x1.gif", encode(in_mode("P", picture(size=(1, 1))), "GIF"), True, ""
    for long in (2, 100, 200):
        yield f"1x{long}.png", encode(picture(size=(1, long))), True, ""
        yield f"{long}x1.jpg", encode(picture(size=(long, 1)), "JPEG"), True, ""
    for long in (201, 5000, 60_000):
        yield f"1x{long}.png", encode(picture(size=(1, long))), False, "one side is more than 200 times the other"
        yield f"{long}x1.jpg", encode(picture(size=(long, 1)), "JPEG"), False, "one side is more than 200 times"
    frames = [picture(seed) for seed in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        yield f"animated.{kind.lower()}", data, True, ""
        yield f"animated-cut.{kind.lower()}", data[: len(data) // 5], False, ""
    for number, exif in enumerate((b"", b"Exif", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 300)):
        yield f"exif-{number}.jpg", encode(picture(), "JPEG", exif=exif), True, ""
    for value in (0, 9, 65_535, "left", (1, 2)):
        odd = Image.Exif()
        odd[0x0112] = value
        try:
            yield f"turned-{number}.jpg", encode(picture(), "JPEG", exif=odd), True, ""
        except (TypeError, struct.error):  # Pillow does not write every one of these.
            continue
    yield "transparent.png", encode(in_mode("P", picture()), transparency=0), True, ""
    yield "transparent-bytes.png", encode(in_mode("P", picture()), transparency=bytes(range(100))), True, ""
    yield "transparent-rgb.png", encode(picture(), transparency=(0, 0, 0)), True, ""
    for name, value in (("nan", np.nan), ("inf", np.inf), ("huge", 1e38), ("negative", -5.0)):
        data = encode(Image.fromarray(np.full((9, 9), value, np.float32)), "TIFF")
        yield f"{name}.tiff", data, value != -5.0, "pixel values from -5 to 0"
    yield "profile.jpg", encode(picture(), "JPEG", icc_profile=b"no profile"), True, ""
    yield "program.eps", encode(picture(), "EPS"), False, "EPS, which is a program and not a picture"
    yield "program.jpg", encode(picture(), "EPS"), False, "EPS, which is a program and not a picture"


def _not_images() -> Named:
    yield "empty.jpg", b"", False, "empty file"
    yield "empty.png", b"", False, "empty file"
    for name, data in NOT_IMAGES.items():
        yield f"{name}.jpg", data, False, ""
        yield f"{name}.png", data, False, ""


def _not_files(folder: Path) -> Iterator[Case]:
    """Pipes, sockets, devices, folders, links: what waits, never ends, or goes in circles."""
    os.mkfifo(folder / "pipe.jpg")
    yield Case(path=folder / "pipe.jpg", readable=False, reason="not a file")
    (folder / "link-to-pipe.jpg").symlink_to(folder / "pipe.jpg")
    yield Case(path=folder / "link-to-pipe.jpg", readable=False, reason="not a file")
    for device in ("zero", "null", "random", "tty"):
        if Path(f"/dev/{device}").exists():
            (folder / f"{device}.jpg").symlink_to(f"/dev/{device}")
            yield Case(path=folder / f"{device}.jpg", readable=False, reason="not a file")
            yield Case(path=Path(f"/dev/{device}"), readable=False, reason="not a file")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(folder)  # The path of a socket may have 107 bytes.
        try:
            listener.bind("socket.jpg")
        finally:
            os.chdir(here)
    yield Case(path=folder / "socket.jpg", readable=False, reason="not a file")
    (folder / "folder.jpg").mkdir()
    yield Case(path=folder / "folder.jpg", readable=False, reason="Is a directory")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    yield Case(path=folder / "circle.jpg", readable=False, reason="(?i)symbolic links")
    (folder / "broken.jpg").symlink_to(folder / "nowhere.jpg")
    for name in ("broken.jpg", "nowhere.jpg", "two\nlines.jpg", "\x1b[31mred.jpg"):
        yield Case(path=folder / name, readable=False, reason="no such file")
    yield Case(path=folder / "half\ud800.jpg", readable=False)
    yield Case(path=folder / "zero\0byte.jpg", readable=False)
    yield Case(path=folder / ("x" * 5000 + ".jpg"), readable=False, reason="(?i)name too long")
    (folder / "secret.jpg").write_bytes(encode(picture()))
    if os.geteuid():
        (folder / "secret.jpg").chmod(0)
        yield Case(path=folder / "secret.jpg", readable=False, reason="(?i)permission denied")
