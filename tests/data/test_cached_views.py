"""Several cached views of each training image: random, but a function of the view and the image alone."""

import numpy as np
import pytest
import torch
from helpers.tiny_tokens import KEY, encode, to_tensor

from loopitr.data import CaptionDataset, SceneRecords, TokenCache
from loopitr.data.transforms import TrainTransform

RECORDS = SceneRecords("val", 6)
CROP = TrainTransform(64, mean=[0.0] * 3, std=[1.0] * 3, crop_scale=(0.3, 0.5), flip=True)


def view(folder, number, **options):
    return TokenCache.open_or_build(
        folder, key=f"{number}{KEY}", records=RECORDS, transform=CROP, encode=encode, progress=False, **options
    )


def test_a_view_does_not_depend_on_who_builds_it(tmp_path):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    alone = view(tmp_path / "a", 1, seed=1, batch_size=1)
    workers = view(tmp_path / "b", 1, seed=1, batch_size=4, num_workers=2)
    assert torch.equal(torch.get_rng_state(), state)  # A run is the same whether its cache was built before or not.
    other = view(tmp_path / "a", 2, seed=2)
    for index in range(len(RECORDS)):
        assert torch.equal(alone[index], workers[index])
        assert not torch.equal(alone[index], other[index])


def test_each_example_draws_its_view_anew_in_each_epoch(tmp_path):
    plain = TokenCache.open_or_build(
        tmp_path, key=KEY, records=RECORDS, transform=to_tensor, encode=encode, progress=False
    )
    views = [plain, view(tmp_path, 1, seed=1), view(tmp_path, 2, seed=2)]
    dataset = CaptionDataset(RECORDS, transform=None, tokens=views, captions="all")
    drawn = []
    for epoch in range(8):
        for index in range(len(dataset)):
            tokens = dataset[epoch, index]["image_tokens"]
            assert torch.equal(tokens, dataset[epoch, index]["image_tokens"])
            image = index // 4  # Each has four captions.
            equal = [torch.equal(tokens, cached[image]) for cached in views]
            assert sum(equal) == 1
            drawn.append(equal.index(True))
    counts = np.bincount(drawn, minlength=3)  # of 8 x 24 draws
    assert counts.min() > 40
    table = np.array(drawn).reshape(8, -1)
    assert (table != table[0]).any() and (table[:, 0] != table.T).any()


def test_views_of_other_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="6 images, the records are 5"):
        CaptionDataset(RECORDS[:5], transform=None, tokens=[view(tmp_path, 1, seed=1)])
