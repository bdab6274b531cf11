"""TextTokenCache: what it holds equals a fresh encoding; a killed or concurrent build never leaves a wrong cache."""

import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.killed_build import killed_in_the_third

from loopitr.data import Collator, DataError, Record, SceneRecords, TextTokenCache, scene_vocabulary
from loopitr.models.processing import word_tokenizer

KEY = "0123456789abcdef0123"
TOKENIZER = word_tokenizer(scene_vocabulary(), max_length=12)


def encode(ids, mask):
    """Pooled [B, 1] and tokens [B, L, 2]; what stands at padding must not be read."""
    tokens = torch.stack([ids.sin(), ids.cos()], -1)
    return (tokens * mask[..., None]).sum((1, 2))[:, None], torch.where(mask[..., None].bool(), tokens, 7.0)


def build(folder, records, key=KEY, encode=encode, **options):
    options = {"max_length": 12, "tokenizer": TOKENIZER, "progress": False, **options}
    return TextTokenCache.open_or_build(folder, key=key, records=records, encode=encode, **options)


def never(ids, mask):
    raise AssertionError("built again")


def ids_of(caption):
    return torch.tensor(TOKENIZER([caption], truncation=True, max_length=12)["input_ids"])


def check(cache, captions):
    ids = [ids_of(caption) for caption in captions]
    lengths = [row.shape[1] for row in ids]
    cached = cache.read(captions, lengths)
    assert cached.tokens.shape == (len(captions), max(lengths), 2)
    assert cached.tokens.dtype == cached.pooled.dtype == torch.float16
    for number, row in enumerate(ids):
        pooled, tokens = encode(row, torch.ones_like(row))
        assert torch.equal(cached.pooled[number], pooled[0].half())
        assert torch.equal(cached.tokens[number, : row.shape[1]], tokens[0].half())
        assert not cached.tokens[number, row.shape[1] :].any()


def all_captions(records):
    return [caption for record in records for caption in record.captions]


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_tokens_are_those_of_the_backbone_and_are_kept(tmp_path, batch_size):
    records = SceneRecords("val", 10)
    captions = all_captions(records)
    assert len({ids_of(caption).shape[1] for caption in captions}) > 1  # ragged, and some are cut
    cache = build(tmp_path, records, batch_size=batch_size)
    assert len(cache) == len({*captions})  # each text once
    check(cache, captions[::-1])
    check(build(tmp_path, records, encode=never), captions[:1])
    assert os.listdir(tmp_path) == [cache.folder.name]


def test_changed_captions_or_key_make_another_cache(tmp_path):
    records = [Record(image=b"", captions=("a red circle", "a circle"), identity=0)]
    changed = [Record(image=b"", captions=("a red circle", "a Circle"), identity=0)]
    caches = [build(tmp_path, some, key=key) for some, key in ((records, KEY), (changed, KEY), (records, "f" * 20))]
    assert len({cache.folder for cache in caches}) == 3
    check(caches[1], ["a Circle"])
    with pytest.raises(DataError, match="caption 'a circle' is not in this cache"):
        caches[1].read(["a red circle", "a circle"], [5, 4])
    with pytest.raises(DataError, match="made for another backbone, tokenizer or set of captions"):
        build(tmp_path, records, key=KEY[:16] + "ffff")  # same first 16 characters


def test_another_length_than_the_cached_one_is_named(tmp_path):
    records = SceneRecords("val", 2)
    caption = records[0].captions[0]
    length = ids_of(caption).shape[1]
    cache = build(tmp_path, records)
    with pytest.raises(DataError, match=f"has {length} tokens here, not {length - 1}"):
        cache.read([caption], [length - 1])


def test_batches_carry_the_tokens_of_their_captions(tmp_path):
    records = SceneRecords("val", 4)
    examples = [
        {"pixel_values": torch.zeros(3, 2, 2), "caption": record.captions[0], "identity": 0, "skipped": []}
        for record in records
    ]
    plain = Collator(TOKENIZER, max_length=12)(examples)
    cached = Collator(TOKENIZER, max_length=12, texts=build(tmp_path, records))(examples)
    tokens, pooled = cached.inputs.pop("text_tokens"), cached.inputs.pop("text_pooled")
    assert cached.inputs.keys() == plain.inputs.keys() and cached.truncated == plain.truncated
    mask = plain.inputs["attention_mask"]
    expected = encode(plain.inputs["input_ids"], mask)
    assert torch.equal(tokens[mask.bool()], expected[1].half()[mask.bool()])
    torch.testing.assert_close(pooled, expected[0].half())


def test_pickling_drops_the_maps(tmp_path):
    cache = build(tmp_path, SceneRecords("val", 200))
    assert len(pickle.dumps(cache)) < 1500 < cache.folder.joinpath("tokens.npy").stat().st_size
    check(pickle.loads(pickle.dumps(cache)), list(SceneRecords("val", 200)[9].captions))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
@pytest.mark.parametrize("which", [0, 1])
def test_values_beyond_half_precision_are_refused(tmp_path, value, which):
    def bad(ids, mask):
        outputs = encode(ids, mask)
        outputs[which][-1, 0] = value
        return outputs

    with pytest.raises(DataError, match="'.*': its tokens hold NaN or values beyond float16"):
        build(tmp_path, SceneRecords("val", 4), encode=bad)
    assert os.listdir(tmp_path) == []


def test_refuses(tmp_path):
    records = SceneRecords("val", 2)
    with pytest.raises(DataError, match="no caption whose tokens could be cached"):
        build(tmp_path, [Record(image=b"", captions=(), identity=0)])
    with pytest.raises(ValueError, match="encode must return"):
        build(tmp_path, records, encode=lambda ids, mask: (encode(ids, mask)[1], encode(ids, mask)[1]))
    with pytest.raises(ValueError, match="key must be a digest"):
        build(tmp_path, records, key="../escape")
    with pytest.raises(DataError, match="not a cache of text tokens"):
        TextTokenCache(tmp_path)
    cache = build(tmp_path, records)
    meta = json.loads((cache.folder / "meta.json").read_text())
    meta["shapes"]["tokens"][0] += 1
    (cache.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="delete it to have it built again"):
        build(tmp_path, records)


def test_a_full_disk_is_said_before_the_work(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(DataError, match="caching text tokens needs"):
        build(tmp_path, SceneRecords("val", 2))


def test_killed_build_leaves_no_cache(tmp_path_factory, tmp_path):
    def slow_build(step):
        def slow(ids, mask):
            step()
            return encode(ids, mask)

        build(tmp_path, SceneRecords("val", 40), encode=slow, batch_size=1)

    killed_in_the_third(slow_build, tmp_path_factory.mktemp("log") / "log")  # Two batches are written.
    left = os.listdir(tmp_path)
    assert len(left) == 1 and left[0].startswith(".") and (tmp_path / left[0] / "tokens.npy").exists()
    records = SceneRecords("val", 40)
    cache = build(tmp_path, records)
    check(cache, all_captions(records))
    assert os.listdir(tmp_path) == [cache.folder.name]  # the ruin is cleared away


def test_concurrent_builders_agree(tmp_path):
    def slow(ids, mask):
        time.sleep(0.02)
        return encode(ids, mask)

    records = SceneRecords("val", 4)
    with ThreadPoolExecutor(3) as pool:
        caches = list(pool.map(lambda _: build(tmp_path, records, encode=slow, batch_size=2), range(3)))
    assert os.listdir(tmp_path) == [caches[0].folder.name]
    for cache in caches:
        check(cache, all_captions(records))
