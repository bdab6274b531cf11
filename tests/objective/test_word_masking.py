"""Which tokens are hidden for masked language modelling."""

from __future__ import annotations

import torch

from loopitr.objective.word_masking import IGNORE_INDEX, TokenMasking

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


def test_never_and_always():
    ids, _, changed, labels = masked(probability=0.0)
    assert torch.equal(changed, ids) and (labels == IGNORE_INDEX).all()
    ids, mask, _, labels = masked(probability=1.0)
    words = mask.bool() & ~torch.isin(ids, torch.tensor(SPECIAL))
    assert torch.equal(labels != IGNORE_INDEX, words)


def test_the_ids_given_are_not_written_to():
    ids, mask, *_ = masked()
    before = ids.clone()
    TokenMasking(mask_token_id=MASK, vocab_size=VOCABULARY, special_ids=SPECIAL)(ids, mask)
    assert torch.equal(ids, before)
