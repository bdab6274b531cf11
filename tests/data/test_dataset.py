"""CaptionDataset, StreamDataset, EpochSampler, Collator: batches that do not depend on workers."""

import io
import json
import tarfile
from collections import Counter
from itertools import pairwise

import datasets
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BertTokenizerFast

from loopitr.data import (
    CaptionDataset,
    Collator,
    DataError,
    EpochSampler,
    LoadReport,
    Record,
    SceneRecords,
    StreamDataset,
    TrainTransform,
    caption_id,
    load_hub,
    scene_vocabulary,
)

AUGMENT = TrainTransform(32, (0.5,) * 3, (0.5,) * 3, crop_scale=(0.3, 1.0), flip=True, randaugment=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *scene_vocabulary()]))
    return BertTokenizerFast(vocab=str(path))


def size_transform(image):
    return torch.tensor([float(image.width), float(image.getpixel((0, 0))[0])])


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)


@pytest.mark.parametrize("captions", ["one", "all"])
def test_two_workers_give_the_batches_of_none(tokenizer, captions):
    dataset = CaptionDataset(SceneRecords("train", 12), transform=AUGMENT, captions=captions, seed=3)
    sampler = EpochSampler(len(dataset), seed=3)
    sampler.set_epoch(2)
    batches = []
    for workers in (0, 2):
        loader = DataLoader(
            dataset, batch_size=4, sampler=sampler, num_workers=workers, collate_fn=Collator(tokenizer, max_length=30)
        )
        torch.manual_seed(workers)  # The global state must not matter.
        batches.append(list(loader))
    assert len(batches[0]) == len(batches[1]) == (3 if captions == "one" else 12)
    assert all(same(a.inputs, b.inputs) for a, b in zip(*batches))


def test_items_depend_on_seed_epoch_and_index_alone():
    records = SceneRecords("train", 8)
    dataset = CaptionDataset(records, transform=AUGMENT, seed=0)
    state = torch.get_rng_state()
    first = dataset[(1, 5)]
    assert torch.equal(torch.get_rng_state(), state)
    dataset[(1, 6)]
    assert same(dataset[(1, 5)], first) and same(dataset[5], dataset[(0, 5)])
    others = [dataset[(2, 5)], CaptionDataset(records, transform=AUGMENT, seed=1)[(1, 5)]]
    assert not any(torch.equal(other["pixel_values"], first["pixel_values"]) for other in others)
    drawn = Counter(dataset[(epoch, 5)]["caption"] for epoch in range(60))
    assert set(drawn) == set(records.paraphrases(5)) and min(drawn.values()) >= 5


def test_all_captions_in_order():
    records = [
        Record(
            image=Image.new("RGB", (2 + i, 2)),
            captions=tuple(f"{i}.{j}" for j in range(i + 1)),
            identity=i,
            name=str(i),
        )
        for i in range(3)
    ]
    dataset = CaptionDataset(records, transform=size_transform, captions="all")
    assert [dataset[i]["caption"] for i in range(len(dataset))] == ["0.0", "1.0", "1.1", "2.0", "2.1", "2.2"]
    assert [dataset[i]["identity"] for i in range(6)] == [0, 1, 1, 2, 2, 2]
    with pytest.raises(IndexError):
        dataset[6]


def broken_records(flags):
    good = Image.new("RGB", (4, 4))
    return [
        Record(image=b"junk" if broken else good, captions=(f"c{i}",), identity=i, name=f"{i}.jpg")
        for i, broken in enumerate(flags)
    ]


@pytest.mark.parametrize("captions", ["one", "all"])
def test_unreadable_image_is_replaced_by_the_next_and_named(captions):
    dataset = CaptionDataset(broken_records([0, 1, 1, 0, 1]), transform=size_transform, captions=captions)
    reason = "unreadable image: not a known image format"
    assert [(e["identity"], e["caption"], e["skipped"]) for e in map(dataset.__getitem__, range(5))] == [
        (0, "c0", []),
        (3, "c3", [("1.jpg", reason), ("2.jpg", reason)]),
        (3, "c3", [("2.jpg", reason)]),
        (3, "c3", []),
        (0, "c0", [("4.jpg", reason)]),  # The stream goes on at its start.
    ]


def test_too_many_unreadable_images_stop():
    with pytest.raises(DataError, match="50 images in a row are unreadable, the first is 3.jpg"):
        CaptionDataset(broken_records([0, 0, 0] + [1] * 60), transform=size_transform)[3]
    with pytest.raises(DataError, match="2 images in a row"):
        CaptionDataset(broken_records([1, 1]), transform=size_transform)[0]


def test_dataset_refuses():
    records = broken_records([0])
    for arguments, match in [
        (([],), "at least one record"),
        ((records, "each"), "'one' or 'all', got 'each'"),
        ((records, "one", None), "transform is needed"),
    ]:
        with pytest.raises(ValueError, match=match):
            CaptionDataset(
                arguments[0],
                captions=(arguments[1:] or ["one"])[0],
                transform=size_transform if len(arguments) < 3 else None,
            )


def test_epoch_sampler_is_a_permutation_per_epoch():
    sampler = EpochSampler(50, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {e for e, _ in keys} == {epoch} and sorted(i for _, i in keys) == list(range(50)) and len(sampler) == 50
        orders.append(keys)
    assert orders[0] == orders[2] and [i for _, i in orders[0]] != [i for _, i in orders[1]]
    grouped = [index for _, index in EpochSampler(10, seed=1, group=4)]
    assert sorted(grouped) == list(range(10)) and grouped != list(range(10))
    assert all(b == a + 1 for a, b in pairwise(grouped) if b % 4)
    assert list(EpochSampler(3, seed=0, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]
    assert list(EpochSampler(3, seed=1, group=10**12)) == [(0, 0), (0, 1), (0, 2)]


def test_large_jpegs_are_decoded_small_on_request():
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120), (9, 9, 9)).save(buffer, "JPEG")
    records = [Record(image=buffer.getvalue(), captions=("c",), identity=0, name="0.jpg")]
    for shortest, width in ((None, 160.0), (60, 80.0)):
        dataset = CaptionDataset(records, transform=size_transform, shortest=shortest)
        assert dataset[0]["pixel_values"][0] == width


def example(caption, identity=0, **more):
    return {"pixel_values": torch.zeros(3, 4, 4), "caption": caption, "identity": identity, "skipped": [], **more}


def test_collator(tokenizer):
    caption = "a small red circle left of a large blue square"  # 10 words and 2 special tokens
    batch = Collator(tokenizer, max_length=12)(
        [example(caption, 2**60), example("a ring", 7, skipped=[("x", "y")]), example("A  Ring", 7)]
    )
    assert batch.inputs["pixel_values"].shape == (3, 3, 4, 4) and batch.inputs["input_ids"].shape == (3, 12)
    assert batch.inputs["attention_mask"].sum(1).tolist() == [12, 4, 4] and batch.truncated == 0
    assert batch.inputs["identities"].tolist() == [2**60, 7, 7] and batch.inputs["identities"].dtype == torch.int64
    ids = batch.inputs["caption_ids"]
    assert ids.dtype == torch.int64 and ids[1] == ids[2] != ids[0] and ids[1] == caption_id("a ring")
    assert batch.skipped == (("x", "y"),)
    short = Collator(tokenizer, max_length=11)([example(caption), example("a ring"), example(caption + " above it")])
    assert short.truncated == 2 and short.inputs["input_ids"].shape == (3, 11)
    assert short.inputs["input_ids"][0, -1] == tokenizer.sep_token_id
    assert Collator(tokenizer, max_length=99)([example("a ring")]).inputs["input_ids"].shape == (
        1,
        4,
    )  # This is the longest in the batch.


def test_collator_pads_on_the_right_whatever_side_the_tokenizer_has(tokenizer, monkeypatch):
    """With padding before it, the first token that is pooled would be none of the caption's."""
    examples = [example("a small red circle"), example("a ring")]
    expected = Collator(tokenizer, max_length=12)(examples).inputs["input_ids"]
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    assert torch.equal(Collator(tokenizer, max_length=12)(examples).inputs["input_ids"], expected)
    assert expected[1, 0] == tokenizer.cls_token_id and expected[1, -1] == tokenizer.pad_token_id


def test_caption_id_is_stable_across_processes():
    assert caption_id("a ring") == caption_id(" A\tring\n") != caption_id("a rings")
    assert caption_id("a ring") == -2656891518075002608  # A salted hash would differ from run to run.


def test_collator_keeps_half_precision_tokens_and_refuses(tokenizer):
    tokens = [{**example("a ring"), "image_tokens": torch.ones(5, 6).half()}]
    batch = Collator(tokenizer, max_length=9)(tokens * 2)
    assert batch.inputs["image_tokens"].shape == (2, 5, 6) and batch.inputs["image_tokens"].dtype == torch.float16
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        Collator(tokenizer, max_length=0)


@pytest.fixture
def stream(tmp_path, monkeypatch):
    """Two tars of five images; the third image is broken, the fourth has no caption."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for number in range(5 * shard, 5 * shard + 5):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
                captions = [] if number == 3 else [f"a {number}", f"b {number}"]
                for name, data in (
                    (f"{number}.png", b"junk" if number == 2 else buffer.getvalue()),
                    (f"{number}.json", json.dumps({"captions": captions}).encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return load_hub("webdataset", "train", LoadReport(), data_files=str(tmp_path / "train-*.tar"), streaming=True)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_stream_covers_everything_once_over_workers_and_ranks(stream, workers):
    seen, skipped = [], []
    for rank in range(2):
        dataset = StreamDataset(
            stream,
            transform=size_transform,
            captions="all",
            num_shards=2,
            index=rank,
            shuffle_buffer=3 if workers else 0,
        )
        for item in DataLoader(dataset, batch_size=None, num_workers=workers):
            assert item["pixel_values"][1] == float(item["caption"][2:])
            seen.append(item["caption"])
            skipped += item["skipped"]
    good = [i for i in range(10) if i not in (2, 3)]
    assert sorted(seen) == sorted(f"{letter} {i}" for i in good for letter in "ab")
    if workers == 0:
        assert sorted((name.split("::")[1], reason) for name, reason in skipped) == [
            ("2", "unreadable image: not a known image format"),
            ("3", "no captions"),
        ]


def test_stream_draws_by_seed_and_epoch(stream):
    dataset = StreamDataset(stream, transform=size_transform, captions="one", seed=1, shuffle_buffer=5)
    runs = []
    for epoch in (0, 1, 2, 0):
        dataset.set_epoch(epoch)
        runs.append([item["caption"] for item in dataset])
    assert all(len(run) == 8 for run in runs) and runs[0] == runs[3]
    assert {letter for run in runs for letter in (c[0] for c in run)} == {"a", "b"}
    assert [c[2:] for c in runs[0]] != [c[2:] for c in runs[1]]
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (1, 2):  # A persistent worker sees the epoch change.
        dataset.set_epoch(epoch)
        assert [item["caption"] for item in loader] == runs[epoch]


def test_stream_of_broken_images_stops(stream, monkeypatch):
    monkeypatch.setattr("loopitr.data.dataset.MAX_FAILURES", 1)
    with pytest.raises(DataError, match="images in a row are unreadable, the first is .*::2"):
        list(StreamDataset(stream, transform=size_transform))
