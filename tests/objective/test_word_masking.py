"""Which tokens are hidden for masked language modelling."""

from __future__ import annotations

import pytest
import torch

from loopitr.models.processing import word_tokenizer
from loopitr.objective.build import build_masking
from loopitr.objective.options import ObjectiveOptions
from loopitr.objective.word_masking import IGNORE_INDEX, TokenMasking, common_tokens

MASK, VOCABULARY, SPECIAL = 4, 1000, (0, 1, 2, 3, 4)


def masked(probability: float = 0.15, rows: int = 400, length: int = 50):
    torch.manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (rows, length))
    ids[:, 0], ids[:, 30] = 2, 3
    mask = (torch.arange(length) < 40).long().repeat(rows, 1)
    masking = TokenMasking(mask_token_id=MASK, vocab_size=VOCABULARY, special_ids=SPECIAL, probability=probability)
    return ids, mask, *masking(ids, mask)


def test_only_real_words_are_hidden_and_the_rest_stays():
    ids, mask, changed, labels = masked()
    chosen = labels != IGNORE_INDEX
    assert not chosen[mask == 0].any() and not chosen[torch.isin(ids, torch.tensor(SPECIAL))].any()
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(changed[~chosen], ids[~chosen])


def test_shares_are_those_of_bert():
    ids, mask, changed, labels = masked()
    chosen = labels != IGNORE_INDEX
    words = mask.bool() & ~torch.isin(ids, torch.tensor(SPECIAL))
    assert abs(chosen.sum() / words.sum() - 0.15) < 0.01
    hidden, same = changed[chosen] == MASK, changed[chosen] == ids[chosen]
    assert abs(hidden.float().mean() - 0.8) < 0.03
    assert abs(same.float().mean() - 0.1) < 0.03
    assert abs((~hidden & ~same).float().mean() - 0.1) < 0.03
    others = changed[chosen][~hidden & ~same]
    assert others.unique().numel() > 0.8 * len(others) and int(others.max()) < VOCABULARY


def test_at_least_one_word_of_every_caption_and_all_of_them():
    ids, mask, _, labels = masked(probability=1e-9)
    assert ((labels != IGNORE_INDEX).sum(1) == 1).all()
    assert len(torch.unique((labels != IGNORE_INDEX).int().argmax(1))) > 30  # anywhere, not always the first
    ids, mask, _, labels = masked(probability=1.0)
    words = mask.bool() & ~torch.isin(ids, torch.tensor(SPECIAL))
    assert torch.equal(labels != IGNORE_INDEX, words)


def test_the_ids_given_are_not_written_to():
    ids, mask, *_ = masked()
    before = ids.clone()
    TokenMasking(mask_token_id=MASK, vocab_size=VOCABULARY, special_ids=SPECIAL)(ids, mask)
    assert torch.equal(ids, before)


def test_a_caption_without_a_word_has_nothing_to_hide():
    ids = torch.tensor([[2, 3, 0, 0], [2, 7, 3, 0]])
    masking = TokenMasking(mask_token_id=MASK, vocab_size=VOCABULARY, special_ids=SPECIAL)
    _, labels = masking(ids, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]))
    assert labels.tolist() == [[IGNORE_INDEX] * 4, [IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX]]


def test_common_words_are_left_alone_unless_a_caption_has_no_other():
    torch.manual_seed(0)
    ids = torch.tensor([[2, 10, 11, 12, 3], [2, 10, 11, 10, 3]]).repeat(200, 1)
    masking = TokenMasking(
        mask_token_id=MASK, vocab_size=VOCABULARY, special_ids=SPECIAL, common_ids=(10, 11), probability=0.5
    )
    _, labels = masking(ids, torch.ones_like(ids))
    chosen = (labels != IGNORE_INDEX).unflatten(0, (200, 2))  # [200, 2, 5]
    assert chosen[:, 0].sum(0).tolist() == [0, 0, 0, 200, 0]  # the one word of content, always: at least one
    assert (chosen[:, 1].sum(0) > 50).tolist() == [False, True, True, True, False]


def test_common_tokens_are_counted_once_a_caption():
    tokenizer = word_tokenizer(["a", "dog", "cat", "runs"], max_length=8)
    captions = ["a dog runs", "a a a a cat", "a dog", "cat"]
    share = {
        word: tokenizer.convert_tokens_to_ids(word) for word in ("a", "dog", "cat", "runs")
    }  # 3, 2, 2 and 1 of the 4 captions
    assert set(common_tokens(tokenizer, captions, 0.75)) == {share["a"]}
    assert set(common_tokens(tokenizer, captions, 0.5)) == {share["a"], share["dog"], share["cat"]}
    assert common_tokens(tokenizer, [], 0.5) == ()


def test_content_words_of_a_stream_cannot_be_known():
    tokenizer = word_tokenizer(["a", "dog"], max_length=8)
    with pytest.raises(ValueError, match="mlm_words 'content' counts words in all captions"):
        build_masking(tokenizer, ObjectiveOptions(mlm=1.0, mlm_words="content"), None)
    assert build_masking(tokenizer, ObjectiveOptions(mlm_words="content"), None).common_ids == ()
    masking = build_masking(tokenizer, ObjectiveOptions(mlm=1.0, mlm_words="content", mlm_common=1.0), ["a dog", "a"])
    assert masking.common_ids == (tokenizer.convert_tokens_to_ids("a"),)
