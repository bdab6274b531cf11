"""Packed index arithmetic against loops over pairs and tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from loopitr.models.packing import MAX_BUCKETS, SMALL, image_blocks, lay_out, segments

LENGTHS = {
    "one": [3],
    "equal": [4] * 40,
    "few": [5, 1, 9, 2],
    "many": torch.randint(1, 30, (50,), generator=torch.Generator().manual_seed(0)).tolist(),
    "one_long": [2] * 30 + [100] + [3] * 9,
    "sorted": list(range(1, 33)),
    "just_enough": [1] * (SMALL - 1) + [7],
}


def padding(lengths: torch.Tensor) -> int:
    return sum(bucket.rows.numel() for bucket in segments(lengths).buckets) - int(lengths.sum())


@pytest.mark.parametrize("name", LENGTHS)
def test_every_row_is_in_one_bucket_under_its_segment(name):
    lengths = torch.tensor(LENGTHS[name])
    starts = (lengths.cumsum(0) - lengths).tolist()
    result = segments(lengths)
    assert len(result.buckets) <= MAX_BUCKETS
    members = torch.cat([bucket.members for bucket in result.buckets])
    assert sorted(members.tolist()) == list(range(len(lengths)))
    for bucket in result.buckets:
        for segment, rows, place in zip(bucket.members.tolist(), bucket.rows.tolist(), range(len(bucket.rows))):
            count = LENGTHS[name][segment]
            assert rows[:count] == list(range(starts[segment], starts[segment] + count))
            assert set(rows[count:]) <= set(rows[:count])  # Padding points at a real row of the same segment.
            if bucket.mask is None:
                assert len(rows) == count
            else:
                assert bucket.mask[place].tolist() == [True] * count + [False] * (len(rows) - count)


@pytest.mark.parametrize("name", LENGTHS)
def test_scatter_undoes_the_cut(name):
    lengths = torch.tensor(LENGTHS[name])
    table = torch.randn(int(lengths.sum()), 3)
    result = segments(lengths)
    cut = [result.cut(table, bucket) for bucket in result.buckets]
    for bucket, piece in zip(result.buckets, cut):
        if bucket.mask is not None:
            piece[~bucket.mask] = torch.nan  # What stands in the padding is never read.
    assert torch.equal(result.scatter(cut), table)


@pytest.mark.parametrize("name", ["many", "one_long", "sorted"])
def test_buckets_save_padding(name):
    lengths = torch.tensor(LENGTHS[name])
    single = int(lengths.max()) * len(lengths) - int(lengths.sum())
    assert len(segments(lengths).buckets) > 1
    assert padding(lengths) < 0.6 * single


def test_one_bucket_stays_in_the_tables_order():
    """Fusion relies on it: with one bucket, keys and values are not selected; nor is anything, without padding."""
    for name in ("one", "equal", "few"):
        result = segments(torch.tensor(LENGTHS[name]))
        (bucket,) = result.buckets
        assert bucket.members.tolist() == list(range(len(LENGTHS[name])))
        assert (result.back is None) == (name != "few")
        table = torch.randn(sum(LENGTHS[name]), 3)
        assert (result.cut(table, bucket).data_ptr() == table.data_ptr()) == (name != "few")


@pytest.mark.parametrize("name", LENGTHS)
def test_fixed_segments_have_one_structure(name):
    """As many buckets and masks whatever the lengths, and no size of 1, which torch.compile takes for a constant."""
    lengths = torch.tensor(LENGTHS[name])
    result = segments(lengths, fixed=True)
    assert len(result.buckets) == MAX_BUCKETS and result.back is not None and not result.whole
    for bucket in result.buckets:
        assert bucket.mask.sum(1).tolist() == lengths[bucket.members].tolist()
        assert min(bucket.rows.shape) >= 2 and bucket.rows.shape == bucket.mask.shape
    table = torch.randn(int(lengths.sum()), 3)
    assert torch.equal(result.scatter([result.cut(table, bucket) for bucket in result.buckets]), table)


def test_fixed_segments_are_not_padded_to_the_longest():
    """As an image that many captions mistake for theirs would have it."""
    lengths = torch.tensor([900, *[30] * 40, *[14] * 60])
    assert sum(bucket.rows.numel() for bucket in segments(lengths, fixed=True).buckets) < 2 * int(lengths.sum()) + 100


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_unpick_undoes_the_pick(name, fixed):
    lengths = torch.tensor(LENGTHS[name])
    result, items = segments(lengths, fixed=fixed), torch.randn(len(lengths), 3)
    assert torch.equal(result.unpick([result.pick(items, bucket) for bucket in result.buckets]), items)
    rows = torch.randperm(2 * len(lengths))[: len(lengths)]
    among = result.among(rows)
    table = torch.randn(2 * len(lengths), 3)
    assert torch.equal(result.unpick([among.pick(table, bucket) for bucket in among.buckets]), table[rows])


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_blocks_end_between_images_where_they_can(size):
    counts = [2, 1, 1, 9, 3, 1]
    images = torch.repeat_interleave(torch.tensor([0, 1, 4, 5, 6, 9]), torch.tensor(counts))
    pairs = torch.stack([images, torch.arange(len(images))], 1)
    blocks = image_blocks(pairs, size)
    assert torch.equal(torch.cat(blocks), pairs) and max(map(len, blocks)) <= size
    for before, after in pairwise(blocks):
        image = int(after[0, 0])
        if int(before[-1, 0]) == image:  # An image is cut, because it has more pairs than fit.
            assert int((images == image).sum()) > size


def test_the_example_that_the_module_draws(monkeypatch):
    mask = torch.arange(3) < torch.tensor([[2], [3], [1]])
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 2]])
    layout = lay_out(pairs, mask)
    assert layout.tokens.tolist() == [0, 1, 3, 4, 5, 6]
    assert layout.source.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert layout.firsts.tolist() == [0, 2, 5, 8]
    assert [row[mask].tolist() for bucket in layout.images.buckets for row, mask in zip(bucket.rows, bucket.mask)] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8],
    ]
    (bucket,) = layout.texts.buckets
    assert bucket.rows.tolist() == [[0, 1, 1], [2, 3, 4], [5, 6, 7], [8, 8, 8]]
    assert bucket.mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]]
    monkeypatch.setattr("loopitr.models.packing.SMALL", 4)
    buckets = lay_out(pairs, mask).texts.buckets
    assert [bucket.rows.tolist() for bucket in buckets] == [[[8]], [[0, 1]], [[2, 3, 4], [5, 6, 7]]]
    assert all(bucket.mask is None for bucket in buckets)


@pytest.mark.parametrize("count", [1, 6, 60])
def test_lay_out_against_loops(count):
    generator = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 9, (12,), generator=generator)
    mask = torch.rand(12, 20, generator=generator).argsort(1) < lengths[:, None]  # Real tokens may stand anywhere.
    every = torch.cartesian_prod(torch.tensor([0, 2, 3, 7, 8, 9]), torch.arange(12))
    pairs = every[torch.randperm(len(every), generator=generator)[:count].sort().values]

    used = sorted(set(pairs[:, 1].tolist()))
    tokens = [text * 20 + column for text in used for column in range(20) if mask[text, column]]
    source, firsts, by_text, by_image, first_by_image = [], [], [], {}, {}
    for position, (image, text) in enumerate(pairs.tolist()):
        start = sum(int(lengths[other]) for other in used if other < text)
        rows = range(len(source), len(source) + int(lengths[text]))
        source += range(start, start + int(lengths[text]))
        firsts.append(rows[0])
        by_text.append(list(rows))
        by_image.setdefault(image, []).extend(rows)
        first_by_image.setdefault(image, []).append(position)

    layout = lay_out(pairs, mask)
    assert layout.tokens.tolist() == tokens
    assert layout.source.tolist() == source and layout.firsts.tolist() == firsts
    expected = {"texts": by_text, "images": list(by_image.values()), "image_firsts": list(first_by_image.values())}
    for name, wanted in expected.items():
        got: dict[int, list[int]] = {}
        for bucket in getattr(layout, name).buckets:
            for place, segment in enumerate(bucket.members.tolist()):
                rows = bucket.rows[place] if bucket.mask is None else bucket.rows[place][bucket.mask[place]]
                got[segment] = rows.tolist()
        assert [got[segment] for segment in range(len(wanted))] == wanted, name
