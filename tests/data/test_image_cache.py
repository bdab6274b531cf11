"""ImageCache: what it holds is the image, shrunk; a killed, concurrent or failing build never leaves a wrong cache."""

import json
import os
import pickle
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.killed_build import killed_in_the_third
from PIL import Image
from torch.utils.data import DataLoader

from loopitr.data import (
    CaptionDataset,
    DataError,
    ImageCache,
    Record,
    SceneRecords,
    TokenCache,
    TrainTransform,
    decode_image,
    decoded,
    images_digest,
)
from loopitr.data import image_cache as image_cache_module

SIZES = [(40, 30), (30, 40), (200, 100), (97, 161), (16, 16), (10, 90), (64, 48)]
TRANSFORM = TrainTransform(16, (0.5,) * 3, (0.25,) * 3, crop_scale=(0.3, 1.0), flip=True, randaugment=True)


def picture(size, seed):
    """Smooth, so that shrinking it in another way gives nearly the same."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)


def record(image, name):
    return Record(image=image, captions=(f"picture {name}",), identity=len(name), name=name)


@pytest.fixture
def files(tmp_path):
    """A JPEG of each size; the second is truncated, the fourth is not there."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate(SIZES):
        picture(size, i).save(folder / f"{i}.jpg", quality=95)
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:300])
    (folder / "3.jpg").unlink()
    return [record(folder / f"{i}.jpg", f"{i}.jpg") for i in range(len(SIZES))]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def build(folder, records, shortest=24, **options):
    return ImageCache.open_or_build(folder, records=records, shortest=shortest, progress=False, **options)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "num_workers": 2}])
def test_images_are_shrunk_to_the_shorter_side_and_never_enlarged(files, folder, options):
    cache = build(folder, files, **options)
    assert len(cache) == 7 and cache.unreadable == {1: "truncated", 3: "no such file"}
    assert [tuple(cache[i].shape) for i in (0, 2, 4, 5, 6)] == [
        (3, 24, 32),
        (3, 24, 48),
        (3, 16, 16),
        (3, 90, 10),
        (3, 24, 32),
    ]
    for i in (0, 2, 4, 5, 6):
        whole = decode_image(files[i].image)
        wanted = np.asarray(whole.resize((cache[i].shape[2], cache[i].shape[1]), Image.Resampling.BOX), dtype=float)
        actual = cache[i].permute(1, 2, 0).numpy()
        assert actual.dtype == np.uint8 and np.abs(actual - wanted).mean() < 4
        if whole.size == wanted.shape[1::-1]:
            assert np.array_equal(actual, wanted)
    assert os.listdir(folder) == [cache.folder.name] == [f"24px-{images_digest(files)[:16]}"]


def test_a_large_jpeg_is_as_sharp_as_from_a_whole_decode(folder):
    path = folder.parent / "large.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (110, 88, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((352, 440), Image.Resampling.BICUBIC).save(path, quality=95, subsampling=0)
    cached = build(folder, [record(path, "large.jpg")], shortest=40)[0].permute(1, 2, 0).numpy()

    def difference(shortest):
        shrunk = decode_image(path, shortest=shortest).resize((40, 50), Image.Resampling.BICUBIC)
        return np.abs(np.asarray(shrunk, dtype=float) - cached).mean()

    assert decode_image(path, shortest=40).size == (44, 55)  # An eighth is fast and would do, but is not what is kept.
    assert difference(None) < 2 and difference(40) > 2 * difference(None)


def test_a_large_jpeg_is_not_decoded_whole(folder, monkeypatch):
    path, sizes = folder.parent / "large.jpg", []
    picture((352, 440), 0).save(path)

    def noting(*args, **options):
        image = decode_image(*args, **options)
        sizes.append(image.size)
        return image

    monkeypatch.setattr(decoded, "decode_image", noting)
    build(folder, [record(path, "large.jpg")], shortest=40)
    assert sizes == [(88, 110)]  # A quarter is decoded, since an eighth has less than twice 40.


def test_a_cache_is_kept_and_another_size_or_other_images_make_another(files, folder, monkeypatch):
    first = build(folder, files)
    others = [build(folder, files, shortest=25), build(folder, files[:6]), build(folder, SceneRecords("val", 4))]
    assert len({first.folder, *(cache.folder for cache in others)}) == 4
    monkeypatch.setattr(image_cache_module, "_build", None)  # It cannot be called.
    assert torch.equal(build(folder, files)[2], first[2]) and build(folder, files).unreadable == first.unreadable


def test_training_on_cached_images_equals_training_on_the_same_images_decoded(folder):
    """Scenes are no larger than `shortest` and have no loss: crops, flips and distortions must be equal to the bit."""
    records = SceneRecords("val", 6)
    cache = build(folder, records, shortest=64)
    decoded = CaptionDataset(records, transform=TRANSFORM, seed=3)
    cached = CaptionDataset(records, transform=TRANSFORM, seed=3, images=cache)
    batches = list(DataLoader(cached, batch_size=None, sampler=[(1, i) for i in range(6)], num_workers=2))
    for i, item in enumerate(batches):
        other = decoded[(1, i)]
        assert torch.equal(item.pop("pixel_values"), other.pop("pixel_values")) and item == other


def test_unreadable_images_are_skipped_by_name_with_the_reason_of_a_decoder(files, folder):
    decoded = CaptionDataset(files, transform=TRANSFORM)
    cached = CaptionDataset(files, transform=TRANSFORM, images=build(folder, files))
    for i in range(7):
        assert cached[i]["skipped"] == decoded[i]["skipped"] and cached[i]["caption"] == decoded[i]["caption"]
    assert cached[1]["skipped"] == [("1.jpg", "unreadable image: truncated")]


def test_the_dataset_refuses_what_does_not_fit(files, folder, tmp_path):
    cache = build(folder, files)
    with pytest.raises(ValueError, match="the image cache has 7 images, the records are 6"):
        CaptionDataset(files[:6], transform=TRANSFORM, images=cache)
    with pytest.raises(ValueError, match="transform is needed"):
        CaptionDataset(files, transform=None, images=cache)
    tokens = TokenCache.open_or_build(
        tmp_path / "tokens",
        key="0" * 16,
        records=files,
        transform=TRANSFORM,
        encode=lambda pixels: pixels.flatten(2),
        progress=False,
    )
    with pytest.raises(ValueError, match="got both"):
        CaptionDataset(files, transform=TRANSFORM, images=cache, tokens=[tokens])


def test_pickling_drops_the_maps(folder):
    cache = build(folder, SceneRecords("val", 50))
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 1000 and torch.equal(copy[9], cache[9])


def test_refuses(folder, files):
    with pytest.raises(DataError, match="none of 2 images is readable, the first is 1.jpg"):
        build(folder, [files[1], files[3]])
    with pytest.raises(ValueError, match="shortest must be at least 1 pixel, got 0"):
        build(folder, files, shortest=0)
    with pytest.raises(DataError, match="not an image cache"):
        ImageCache(folder)
    cache = build(folder, files)
    whole = (cache.folder / "pixels.bin").read_bytes()
    for damaged in (whole[:-1], b""):
        (cache.folder / "pixels.bin").write_bytes(damaged)
        with pytest.raises(DataError, match="delete it to have it built again"):
            build(folder, files)
    (cache.folder / "pixels.bin").write_bytes(whole)
    meta = json.loads((cache.folder / "meta.json").read_text())
    (cache.folder / "meta.json").write_text(json.dumps({**meta, "images_digest": "0" * 32}))
    with pytest.raises(DataError, match="made for another size or set of images"):
        build(folder, files)


def test_an_image_replaced_under_its_name_is_read_again(files, folder):
    first = build(folder, files)
    path = files[0].image
    other = picture((40, 30), 99)
    other.save(path, quality=95)
    os.utime(path, (0, 0))  # A copy may have any time.
    second = build(folder, files)
    assert second.folder != first.folder and not torch.equal(second[0], first[0])
    assert torch.equal(second[2], first[2])
    os.utime(path, (10**9, 10**9))
    assert build(folder, files).folder == second.folder
    path.unlink()  # A file that has gone is another than one of any size, even of none.
    third = build(folder, files)
    path.touch()
    assert len({first.folder, second.folder, third.folder, build(folder, files).folder}) == 4


def test_an_older_cache_can_be_opened(files, folder):
    cache = build(folder, files)
    path = cache.folder / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({"names_digest": meta.pop("images_digest"), **meta}))
    assert torch.equal(ImageCache(cache.folder)[0], cache[0])


def test_a_folder_that_cannot_be_made_is_named(files, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match=r"file/cache: cannot make a folder for the cache \(Not a directory\)"):
        build(file / "cache", files)
    with pytest.raises(DataError, match=r"file: cannot make a folder for the cache \(File exists\)"):
        TokenCache.open_or_build(
            file,
            key="0" * 16,
            records=files,
            transform=TRANSFORM,
            encode=lambda pixels: pixels.flatten(2),
            progress=False,
        )


def test_too_small_a_disk_is_named_before_it_is_full(files, folder, monkeypatch):
    needed = 3 * 64 * 64 * 40
    free = [needed, needed - 1]  # This is enough for 40 scenes, and one byte too little.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    assert len(build(folder, SceneRecords("val", 40), shortest=64, batch_size=40)) == 40
    shutil.rmtree(folder)
    free.pop(0)
    with pytest.raises(DataError, match="cache: caching images needs .* GiB"):
        build(folder, SceneRecords("val", 40), shortest=64, batch_size=4)
    assert os.listdir(folder) == []


def test_a_disk_that_fills_up_meanwhile_is_one_clear_error(folder):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(DataError, match="cannot write the image cache"):
            build(folder, SceneRecords("val", 40), batch_size=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(folder) == []


def test_killed_build_leaves_no_cache(folder, tmp_path_factory):
    def slow_build(step):
        class Slow(SceneRecords):
            def read(self, index):
                step()
                return super().read(index)

        build(folder, Slow("val", 40), shortest=32, batch_size=1)

    killed_in_the_third(slow_build, tmp_path_factory.mktemp("log") / "log")  # Two images are written.
    left = os.listdir(folder)
    assert len(left) == 1 and left[0].startswith(".") and (folder / left[0] / "pixels.bin").stat().st_size > 0
    cache = build(folder, SceneRecords("val", 40), shortest=32)
    assert len(cache) == 40 and os.listdir(folder) == [cache.folder.name]  # The remains are cleared away.


def test_concurrent_builders_agree(files, folder):
    with ThreadPoolExecutor(3) as pool:
        caches = list(pool.map(lambda _: build(folder, files, batch_size=1), range(3)))
    assert len({cache.folder for cache in caches}) == 1 and os.listdir(folder) == [caches[0].folder.name]
    assert all(torch.equal(cache[6], caches[0][6]) for cache in caches)
