"""Batches that do not depend on ranks, workers or where a run was resumed; what could not be read is counted."""

import dataclasses

import pytest
import torch
from helpers.tiny_gallery import jpeg, tiny_processor

from loopitr.data import (
    Batch,
    CaptionDataset,
    Collator,
    DataError,
    EpochSampler,
    HubStream,
    LoadReport,
    Record,
    SceneRecords,
    StreamDataset,
    TrainTransform,
    load_hub,
)
from loopitr.data.loader import EpochLoader, ShardedBatchSampler, SkipCounter

TRANSFORM = TrainTransform(32, (0.5,) * 3, (0.5,) * 3, crop_scale=(0.3, 1.0), flip=True, randaugment=True)


def loader(size=26, *, batch_size=4, rank=0, num_ranks=1, num_workers=0, seed=3, dataset=None, pin_memory=False):
    dataset = dataset or CaptionDataset(SceneRecords("train", size, image_size=32), transform=TRANSFORM, seed=seed)
    return EpochLoader(
        dataset,
        Collator(tiny_processor().tokenizer, max_length=24),
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        num_ranks=num_ranks,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def rows(batch):
    """What a batch holds, row by row and without padding."""
    batch = batch.inputs
    lengths = batch["attention_mask"].sum(1).tolist()
    texts = [tuple(ids[:length].tolist()) for ids, length in zip(batch["input_ids"], lengths)]
    return list(zip(batch["identities"].tolist(), texts, batch["caption_ids"].tolist(), batch["pixel_values"]))


def same_rows(a, b):
    return len(a) == len(b) and all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b))


def same_batches(a, b):
    return len(a) == len(b) and all(
        (x.skipped, x.truncated, x.inputs.keys()) == (y.skipped, y.truncated, y.inputs.keys())
        and all(torch.equal(x.inputs[k], y.inputs[k]) for k in x.inputs)
        for x, y in zip(a, b)
    )


@pytest.mark.parametrize("epoch", [0, 2])
def test_two_ranks_together_have_the_batches_of_one(epoch):
    whole = loader(batch_size=8)
    halves = [loader(batch_size=4, rank=rank, num_ranks=2) for rank in (0, 1)]
    assert len(whole) == len(halves[0]) == len(halves[1]) == 3  # There are 26 examples; the rest is left out.
    for one, first, second in zip(whole.epoch(epoch), halves[0].epoch(epoch), halves[1].epoch(epoch), strict=True):
        assert same_rows(rows(one), rows(first) + rows(second))


def test_an_epoch_takes_every_example_at_most_once_and_leaves_less_than_a_batch():
    sampler = EpochSampler(26, seed=0)
    sampler.set_epoch(4)
    batches = [list(ShardedBatchSampler(sampler, batch_size=4, rank=rank, num_ranks=2)) for rank in (0, 1)]
    taken = [key for rank in batches for batch in rank for key in batch]
    assert len(taken) == len(set(taken)) == 24
    assert {epoch for epoch, _ in taken} == {4}
    assert all(len(batch) == 4 for rank in batches for batch in rank)


@pytest.mark.parametrize(("start", "batches"), [(0, [0, 1, 2, 3]), (2, [2, 3]), (4, []), (1, [1, 2])])
def test_an_epoch_has_no_batch_that_fills_no_step(start, batches):
    """Under FSDP, the gradient of such a batch cannot be dropped. A changed accumulation may resume at any batch."""
    whole = [*ShardedBatchSampler(EpochSampler(22, seed=0), batch_size=4, rank=0, num_ranks=1)]
    assert len(whole) == 5
    sampler = ShardedBatchSampler(EpochSampler(22, seed=0), batch_size=4, rank=0, num_ranks=1, accumulation=2)
    sampler.start = start
    assert len(sampler) == 4 and [*sampler] == [whole[batch] for batch in batches]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 2, 5, 6])
def test_start_skips_exactly_so_many_batches(workers, start):
    resumed = loader(num_workers=workers)
    whole = list(loader().epoch(1))
    assert len(whole) == 6
    assert same_batches(list(resumed.epoch(1, start=start)), whole[start:])
    assert same_batches(list(resumed.epoch(2)), list(loader().epoch(2)))  # They are not those of the next epoch.


def test_skipped_batches_are_not_read():
    read_indices = []

    class Counting(SceneRecords):
        def read(self, index):
            read_indices.append(index)
            return super().read(index)

    dataset = CaptionDataset(Counting("train", 12, image_size=32), transform=TRANSFORM)
    list(loader(dataset=dataset, batch_size=4).epoch(0, start=2))
    assert len(read_indices) == 4


def test_batches_are_the_same_with_0_and_2_workers_and_whatever_the_global_seed():
    epochs = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        own = loader(num_workers=workers)
        epochs.append([list(own.epoch(epoch)) for epoch in (0, 1)])
    assert all(same_batches(a, b) for a, b in zip(*epochs))
    assert not same_batches(epochs[0][0], epochs[0][1])


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_generator_that_dropout_uses_alone(workers):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    list(loader(num_workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_changes_the_order():
    first, second = (next(iter(loader(seed=seed).epoch(0))).inputs["identities"].tolist() for seed in (0, 1))
    assert first != second


@pytest.fixture
def stream(tmp_path):
    import datasets

    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(14)]
    table = datasets.Dataset.from_dict({"image": images, "caption": [f"a red circle {i}" for i in range(14)]})
    table.to_parquet(tmp_path / "train-0.parquet")
    files = {"train": str(tmp_path / "*.parquet")}
    stream = load_hub("parquet", "train", LoadReport(), data_files=files, streaming=True)
    assert isinstance(stream, HubStream)
    return stream


def test_a_stream_gives_full_batches_and_can_be_started_in_the_middle(stream):
    own = loader(dataset=StreamDataset(stream, transform=TRANSFORM, seed=1), batch_size=4)
    with pytest.raises(TypeError, match="no length"):
        len(own)
    whole = list(own.epoch(0))
    assert [len(batch.inputs["input_ids"]) for batch in whole] == [4, 4, 4]
    assert same_batches(list(own.epoch(0, start=2)), whole[2:])
    assert not same_batches(list(own.epoch(1)), whole)  # The crops differ.


def test_a_stream_decodes_jpegs_small_on_request(stream):
    def widths(shortest):
        dataset = StreamDataset(stream, transform=lambda image: torch.tensor(image.width), shortest=shortest)
        return {int(example["pixel_values"]) for example in dataset}

    assert widths(None) == {40} and widths(15) == {20}


@pytest.mark.parametrize("pin_memory", [False, True])
def test_batches_are_pinned_on_request(stream, pin_memory):
    for dataset in (None, StreamDataset(stream, transform=TRANSFORM)):
        assert loader(dataset=dataset, pin_memory=pin_memory).loader.pin_memory == pin_memory


def test_pinning_a_batch_keeps_every_field_and_pins_every_tensor(monkeypatch):
    pinned = []

    def pin(tensor):  # This machine may have no GPU, and page-locked memory needs one.
        pinned.append(tensor)
        return tensor.clone()

    whole = dataclasses.replace(next(loader().epoch(0)), skipped=(("a.jpg", "truncated"),), truncated=2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    copy = whole.pin_memory()
    assert [id(tensor) for tensor in pinned] == [id(tensor) for tensor in whole.inputs.values()]
    assert same_batches([copy], [whole])
    assert all(copy.inputs[name] is not whole.inputs[name] for name in whole.inputs)
    for field in dataclasses.fields(Batch):  # A field that is added later must be kept as well.
        if field.name != "inputs":
            assert getattr(copy, field.name) == getattr(whole, field.name)


# What could not be read


def batch(size, skipped=(), truncated=0):
    return Batch(inputs={"input_ids": torch.zeros(size, 3)}, skipped=tuple(skipped), truncated=truncated)


def test_skips_are_named_and_counted_and_the_batch_is_left_whole():
    lines = []
    counter = SkipCounter(max_fraction=0.5, log=lines.append)
    first = batch(8, [("a.jpg", "truncated"), ("b.jpg", "no such file")], truncated=3)
    counter.update(first)
    counter.update(batch(8, [("c.jpg", "truncated")], truncated=1))
    assert len(first.skipped) == 2 and first.truncated == 3  # The counter reads a batch and leaves it whole.
    assert lines == ["skipped a.jpg: truncated", "skipped b.jpg: no such file", "skipped c.jpg: truncated"]
    assert counter.report.counts == {"truncated": 2, "no such file": 1}
    assert counter.truncated == 4
    assert counter.seen == 19


def test_the_log_is_not_flooded():
    lines = []
    counter = SkipCounter(max_fraction=1.0, log=lines.append)
    counter.update(batch(8, [(f"{i}.jpg", "truncated") for i in range(50)]))
    assert len(lines) == 10
    assert counter.report.skipped == 50


def test_too_many_skips_stop_the_run_by_name_and_not_before_100_examples():
    counter = SkipCounter(max_fraction=0.1, log=lambda line: None)
    for number in range(5):
        counter.update(batch(15, [(f"{number}-{i}.jpg", "truncated") for i in range(3)]))  # 3 of 18
    with pytest.raises(DataError, match=r"18 of 108 items.*0\.1.*0-0\.jpg"):
        counter.update(batch(15, [(f"5-{i}.jpg", "truncated") for i in range(3)]))


def test_few_skips_do_not_stop_the_run():
    counter = SkipCounter(max_fraction=0.1, log=lambda line: None)
    for number in range(50):
        counter.update(batch(9, [(f"{number}.jpg", "truncated")]))  # 1 of 10
    assert counter.report.skipped == 50


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_arrive_in_skipped_and_batches_stay_full(workers):
    broken = {3, 4}
    records = [
        Record(image=jpeg(i)[: 200 if i in broken else None], captions=("red",), identity=i, name=f"{i}.jpg")
        for i in range(8)
    ]
    own = loader(dataset=CaptionDataset(records, transform=TRANSFORM), batch_size=4, num_workers=workers)
    counter = SkipCounter(max_fraction=0.5, log=lambda line: None)
    for part in own.epoch(0):
        counter.update(part)
        assert len(part.inputs["input_ids"]) == 4 and not broken & set(part.inputs["identities"].tolist())
    assert set(next(iter(counter.report.names.values()))) == {"3.jpg", "4.jpg"}
