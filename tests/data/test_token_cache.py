"""TokenCache: what it holds equals a fresh encoding; a killed or concurrent build never leaves a wrong cache."""

import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.killed_build import killed_in_the_third
from helpers.tiny_tokens import KEY, encode, to_tensor
from torch.utils.data import DataLoader

from loopitr.data import CaptionDataset, DataError, Record, SceneRecords, TokenCache, decode_image, images_digest


def build(folder, records, key=KEY, encode=encode, **options):
    return TokenCache.open_or_build(
        folder, key=key, records=records, transform=to_tensor, encode=encode, progress=False, **options
    )


def never(pixels):
    raise AssertionError("built again")


def broken(records, *indices):
    return [
        Record(image=b"junk", captions=r.captions, identity=r.identity, name=r.name) if i in indices else r
        for i, r in enumerate(records)
    ]


@pytest.mark.parametrize("options", [{}, {"batch_size": 3, "num_workers": 2}])
def test_tokens_are_those_of_the_backbone_and_are_kept(tmp_path, options):
    records = SceneRecords("val", 10)
    cache = build(tmp_path, records, **options)
    assert cache.shape == (10, 16, 3) and len(cache) == 10 and cache.unreadable == frozenset()
    for index, record in enumerate(records):
        wanted = encode(to_tensor(decode_image(record.image))[None])[0].half()
        assert cache[index].dtype == torch.float16 and torch.equal(cache[index], wanted)
    assert cache.folder.name == f"{KEY[:16]}-{images_digest(records)[:8]}"
    assert torch.equal(build(tmp_path, records, encode=never)[7], cache[7])
    assert os.listdir(tmp_path) == [cache.folder.name]


def test_other_images_or_key_make_another_cache(tmp_path):
    records = SceneRecords("val", 4)
    sets = [(records, KEY), (records, "f" * 20), (records[:3], KEY), (SceneRecords("val", 4, seed=1), KEY)]
    folders = {build(tmp_path, some, key=key).folder for some, key in sets}
    assert len(folders) == 4
    with pytest.raises(DataError, match="made for another"):  # The first 16 characters are the same.
        build(tmp_path, records, key=KEY[:16] + "ffff")
    paths = [[Record(image=f"{folder}/0.png", captions=("c",), identity=0, name="0.png")] for folder in "ab"]
    assert images_digest(paths[0]) != images_digest(paths[1])


def test_an_image_replaced_under_its_name_makes_another_cache(tmp_path, image_dir):
    records = [Record(image=image_dir / f"{i}.png", captions=("c",)) for i in range(4)]
    first = build(tmp_path, records)
    (image_dir / "2.png").write_bytes((image_dir / "3.png").read_bytes() + bytes(50))
    second = build(tmp_path, records)
    assert second.folder != first.folder and torch.equal(second[1], first[1])
    assert torch.equal(second[2], first[3]) and not torch.equal(second[2], first[2])


def test_training_on_cached_tokens_skips_unreadable(tmp_path):
    records = broken(SceneRecords("val", 6), 2)
    cache = build(tmp_path, records, batch_size=1)
    assert cache.unreadable == {2} and build(tmp_path, records, encode=never).unreadable == {2}
    dataset = CaptionDataset(records, transform=None, tokens=[cache])
    item = dataset[2]
    assert item["identity"] == records[3].identity and torch.equal(item["image_tokens"], cache[3])
    assert item["skipped"] == [(records[2].name, "unreadable image: no cached tokens")]
    loaded = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert all(torch.equal(loaded[i]["image_tokens"], cache[i]) for i in range(6) if i != 2)
    with pytest.raises(ValueError, match="6 images, the records are 5"):
        CaptionDataset(records[:5], transform=None, tokens=[cache])


def test_pickling_drops_the_map(tmp_path):
    cache = build(tmp_path, SceneRecords("val", 200))
    assert len(pickle.dumps(cache)) < 1000 < cache.folder.joinpath("tokens.npy").stat().st_size
    assert torch.equal(pickle.loads(pickle.dumps(cache))[9], cache[9])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_values_beyond_half_precision_are_refused(tmp_path, value):
    def bad(pixels):
        tokens = encode(pixels)
        tokens[-1, 0, 0] = value
        return tokens

    records = SceneRecords("val", 4)
    with pytest.raises(DataError, match=f"{records.name(3)}: its tokens hold NaN or values beyond float16"):
        build(tmp_path, records, encode=bad)
    assert os.listdir(tmp_path) == []


def test_refuses(tmp_path):
    with pytest.raises(DataError, match="none of 2 images is readable"):
        build(tmp_path, broken(SceneRecords("val", 2), 0, 1))
    with pytest.raises(ValueError, match="encode must return"):
        build(tmp_path, SceneRecords("val", 2), encode=lambda pixels: pixels.mean(dim=(2, 3)))
    with pytest.raises(ValueError, match="key must be a digest"):
        build(tmp_path, SceneRecords("val", 2), key="../escape")
    with pytest.raises(DataError, match="not a token cache"):
        TokenCache(tmp_path)
    cache = build(tmp_path, SceneRecords("val", 2))
    meta = json.loads((cache.folder / "meta.json").read_text())
    (cache.folder / "meta.json").write_text(json.dumps({**meta, "shape": [3, 16, 3]}))
    with pytest.raises(DataError, match="delete it to have it built again"):
        build(tmp_path, SceneRecords("val", 2))


def test_killed_build_leaves_no_cache(tmp_path_factory, tmp_path):
    def slow_build(step):
        def slow(pixels):
            step()
            return encode(pixels)

        build(tmp_path, SceneRecords("val", 40), encode=slow, batch_size=1)

    killed_in_the_third(slow_build, tmp_path_factory.mktemp("log") / "log")  # Two batches are written.
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].startswith(".") and (tmp_path / left[0] / "tokens.npy").exists()
    records = SceneRecords("val", 40)
    cache = build(tmp_path, records)
    assert torch.equal(cache[39], encode(to_tensor(records[39].image)[None])[0].half())
    assert os.listdir(tmp_path) == [cache.folder.name]  # The remains are cleared away.


def test_concurrent_builders_agree(tmp_path):
    def slow(pixels):
        time.sleep(0.05)
        return encode(pixels)

    records = SceneRecords("val", 8)
    with ThreadPoolExecutor(3) as pool:
        caches = list(pool.map(lambda _: build(tmp_path, records, encode=slow, batch_size=2), range(3)))
    assert len({cache.folder for cache in caches}) == 1 and os.listdir(tmp_path) == [caches[0].folder.name]
    assert all(
        torch.equal(cache[i], encode(to_tensor(records[i].image)[None])[0].half()) for cache in caches for i in range(8)
    )
