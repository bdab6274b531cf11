"""Ranks and candidates by blocks against the whole matrix."""

import pytest
import torch

from loopitr.evaluation.nearest import nearest
from loopitr.evaluation.ranking import Ranking


def embeds(count, seed, width=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


@pytest.mark.parametrize("block_elements", [1, 60, 10**6])
@pytest.mark.parametrize("k", [1, 4, 1000])
def test_equals_the_whole_matrix(block_elements, k):
    owner = torch.arange(7).repeat(3)[torch.randperm(21, generator=torch.Generator().manual_seed(0))]
    identity = torch.tensor([40, -3, 12, 7, 2**40, 0, 5])
    images, texts = embeds(7, 1), embeds(21, 2)
    result = nearest(images, texts, identity, identity[owner], k=k, block_elements=block_elements)
    similarity = images @ texts.T
    expected = Ranking.from_scores(similarity, owner)
    assert torch.equal(result.ranking.i2t, expected.i2t) and torch.equal(result.ranking.t2i, expected.t2i)
    by_image, by_text = similarity.topk(min(k, 21), dim=1), similarity.T.topk(min(k, 7), dim=1)
    assert torch.equal(result.captions, by_image.indices) and torch.equal(result.images, by_text.indices)
    torch.testing.assert_close(result.caption_similarity, by_image.values)
    torch.testing.assert_close(result.image_similarity, by_text.values)


@pytest.mark.parametrize("block_elements", [1, 10**6])
def test_right_answers_are_those_of_equal_identity(block_elements):
    images = torch.eye(3)  # The first two images show the same thing.
    texts = torch.tensor([[0.0, 1.0, 0.1], [0.9, 0.0, 1.0], [0.2, 0.5, 1.0]])
    identities = torch.tensor([8, 8, 9]), torch.tensor([8, 8, 9])
    result = nearest(images, texts, *identities, k=1, block_elements=block_elements)
    # At the third image a foreign caption ties, which counts against it.
    assert result.ranking.i2t.tolist() == [1, 1, 2]
    # Caption 0 is nearest to image 1, which shows the same as image 0; caption 1 is nearest to the foreign image 2.
    assert result.ranking.t2i.tolist() == [1, 2, 1]


def test_one_embed_for_all_finds_nothing():
    one = torch.ones(4, 2)
    result = nearest(one, one.repeat(2, 1), torch.arange(4), torch.arange(4).repeat(2), k=2, block_elements=8)
    assert (result.ranking.i2t > 1).all() and (result.ranking.t2i == 4).all()


def test_nan_embeds_are_an_error():
    broken = torch.eye(2)
    broken[1, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        nearest(torch.eye(2), broken, torch.arange(2), torch.arange(2), k=1)
