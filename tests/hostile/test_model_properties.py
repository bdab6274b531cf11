"""Pairs in any order, masks of any shape: each score is that of its own pair, and hidden words count for nothing."""

import pytest
import torch
from helpers.support import images, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopitr.objective.losses import IGNORE_INDEX
from loopitr.objective.word_masking import TokenMasking
from loopitr.search.inputs import given_pairs

few = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
IMAGES, TEXTS, LENGTH = 3, 4, 7
index = st.integers(-1, 5)
masks = st.lists(st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH), min_size=TEXTS, max_size=TEXTS)
seeds = st.integers(0, 2**32)


@pytest.fixture(scope="module", params=["late", "shared"])
def model(request):
    return tiny_model(style=request.param, fusion={"agreement": 8}).eval()


def ids_of(seed):
    return torch.randint(5, 60, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(seed))


@few
@given(st.lists(st.tuples(index, index), max_size=12), st.none() | st.integers(1, 5))
def test_each_score_is_that_of_its_pair(model, pairs, block_size):
    with torch.no_grad():
        image_state = model.encode_images(images(IMAGES))
        text_state = model.encode_texts(ids_of(0), torch.ones(TEXTS, LENGTH, dtype=torch.int64))
        wanted = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        if any(not (0 <= i < IMAGES and 0 <= t < TEXTS) for i, t in pairs):
            with pytest.raises(ValueError):
                model.score_pairs(image_state, text_state, wanted, block_size=block_size)
            return
        every = torch.cartesian_prod(torch.arange(IMAGES), torch.arange(TEXTS))
        scores = model.score_pairs(image_state, text_state, every).score.reshape(IMAGES, TEXTS)
        actual = model.score_pairs(image_state, text_state, wanted, block_size=block_size)
    torch.testing.assert_close(actual.score, scores[wanted[:, 0], wanted[:, 1]], atol=1e-5, rtol=1e-4)


@few
@given(masks, seeds)
def test_hidden_words_count_for_nothing(model, masks, seed):
    mask, ids = torch.tensor(masks).long(), ids_of(seed)
    others = torch.where(mask.bool(), ids, ids_of(seed + 1))
    pairs = torch.tensor([[n % IMAGES, n] for n in range(TEXTS)])
    results = []
    with torch.no_grad():
        image_state = model.encode_images(images(IMAGES))
        for words in (ids, others):
            try:
                text_state = model.encode_texts(words, mask)
                scores = model.score_pairs(image_state, text_state, pairs).score
            except ValueError as error:
                assert not mask.any(1).all() and "token" in str(error)
                return
            results.append((text_state.embeds, scores))
    assert mask.any(1).all()
    for first, second in zip(*results, strict=True):
        assert torch.isfinite(first).all()
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


@few
@given(masks, seeds, st.floats(1e-6, 1 - 1e-6), st.sets(st.integers(5, 59), max_size=30))
def test_masking_hides_real_words_alone(masks, seed, probability, common):
    mask, ids = torch.tensor(masks).long(), ids_of(seed)
    ids[:, 0] = 2
    masking = TokenMasking(
        mask_token_id=4, vocab_size=60, special_ids=(0, 1, 2, 3, 4), common_ids=tuple(common), probability=probability
    )
    torch.manual_seed(seed)
    changed, labels = masking(ids, mask)
    chosen, words = labels != IGNORE_INDEX, mask.bool() & (ids > 4)
    assert not (chosen & ~words).any() and torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(changed[~chosen], ids[~chosen]) and int(changed.max()) < 60 and int(changed.min()) >= 0
    assert torch.equal(chosen.any(1), words.any(1))
    content = words & ~torch.isin(ids, torch.tensor(sorted(common), dtype=torch.int64))
    assert not (chosen & ~content)[content.any(1)].any()


objects = st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5) | st.lists(st.text(max_size=3))


@few
@given(st.lists(st.tuples(objects, objects) | objects, max_size=5) | objects)
def test_pairs_are_those_given_or_one_line(pairs):
    try:
        result = given_pairs(pairs)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    items = [pairs] if result.alone else pairs
    assert [(result.texts[t], result.images.images[i]) for i, t in result.pairs] == [tuple(item) for item in items]
