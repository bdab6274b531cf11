"""Dual and reranked retrieval against brute force; blocks, skips and memory."""

import json
from dataclasses import replace

import pytest
import torch
from helpers.support import plain_score, tiny_model
from helpers.tiny_gallery import captions, evaluate, jpeg, picture, tiny_processor, tiny_records

from loopitr.data import DataError, LoadReport, Record, TokenCache
from loopitr.evaluation import Ranking, evaluation_transform
from loopitr.evaluation.storage import TokenStorage
from loopitr.evaluation.text_tokens import TextTokens

HEADS = ("dual", "match", "match_plus_similarity", "reranked")
KEYS = {"num_images", "num_captions", "k", *HEADS, "ceiling", "seconds", "pairs_per_second"} | {
    "similarity_weight",
    "calibrated",
    "reranking_gain",
}


def all_scores(model, records):
    """similarity and match score of every pair `[I, T]`, the plain way, and each caption's image `[T]`."""
    processor = tiny_processor()
    model.eval()
    with torch.no_grad():
        images = model.encode_images(torch.stack([evaluation_transform(processor)(r.image) for r in records]))
        inputs = processor(text=[caption for r in records for caption in r.captions])
        texts = model.encode_texts(inputs["input_ids"], inputs["attention_mask"])
        similarity = images.embeds @ texts.embeds.T
        pairs = torch.cartesian_prod(torch.arange(len(images.embeds)), torch.arange(len(texts.embeds)))
        logits = plain_score(model, images.tokens, texts, pairs)
    match = (logits[:, 1] - logits[:, 0]).view_as(similarity)
    owner = torch.tensor([i for i, r in enumerate(records) for _ in r.captions])
    return similarity, match, owner


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name].i2t, second[name].i2t), name
        assert torch.equal(first[name].t2i, second[name].t2i), name


@pytest.mark.parametrize("style, agreement", [("late", None), ("shared", None), ("late", 12)])
def test_reranking_everything_equals_brute_force(style, agreement):
    model, records = tiny_model(style=style, fusion={"agreement": agreement}), tiny_records()
    if agreement is not None:
        model.agreement.score.weight.data.mul_(30)  # or else it changes no order
    similarity, match, owner = all_scores(model, records)
    with torch.no_grad():
        both = match + model.dual.scale * similarity
    expected = {
        "dual": Ranking.from_scores(similarity, owner),
        "match": Ranking.from_scores(match, owner),
        "match_plus_similarity": Ranking.from_scores(both, owner),
        "reranked": Ranking.from_scores(match + 0.3 * model.dual.scale.detach() * similarity, owner),
    }
    model.config.similarity_weight = 0.3
    result = evaluate(model, records, rerank=1000)
    assert_same(result.rankings, expected)
    assert result.num_pairs == 6 * 18 and result.ceiling == {"i2t": 100.0, "t2i": 100.0}
    assert (result.num_images, result.num_captions) == (6, 18)
    # Otherwise the comparison would show nothing.
    assert not torch.equal(expected["dual"].t2i, expected["match"].t2i)


def test_candidates_are_the_duals_and_a_missed_answer_stays_missed():
    model, records = tiny_model(), tiny_records()
    similarity, match, owner = all_scores(model, records)
    result = evaluate(model, records, rerank=2)
    top_captions, top_images = similarity.topk(2, dim=1).indices, similarity.T.topk(2, dim=1).indices
    pairs = {(i, t) for i in range(6) for t in top_captions[i].tolist()}
    pairs |= {(i, t) for t in range(18) for i in top_images[t].tolist()}
    assert result.num_pairs == len(pairs)
    for image, kept in enumerate(top_captions):
        own = [match[image, t] for t in kept if owner[t] == image]
        rank = 1 + sum(match[image, t] >= max(own) for t in kept if owner[t] != image) if own else torch.inf
        assert result.rankings["match"].i2t[image] == float(rank)
    for text, kept in enumerate(top_images):
        is_candidate = owner[text] in kept
        rank = 1 + sum(match[i, text] >= match[owner[text], text] for i in kept if i != owner[text])
        assert result.rankings["match"].t2i[text] == (float(rank) if is_candidate else torch.inf)
    hits = {
        "i2t": 100 * (owner[top_captions] == torch.arange(6)[:, None]).any(1).double().mean().item(),
        "t2i": 100 * (top_images == owner[:, None]).any(1).double().mean().item(),
    }
    assert result.ceiling == pytest.approx(hits) and 0 < result.ceiling["t2i"] < 100
    for side in ("i2t", "t2i"):
        assert result.to_json()["match"][side]["r10"] <= result.ceiling[side]


@pytest.mark.parametrize("token_storage", ["memory", "disk", "recompute"])
def test_blocks_change_nothing(token_storage):
    model, records = tiny_model(), tiny_records()
    whole = evaluate(model, records, rerank=4)
    sizes = {"batch_size": 2, "image_block": 4, "pair_block": 3}
    assert_same(evaluate(model, records, rerank=4, token_storage=token_storage, **sizes).rankings, whole.rankings)


def test_workers_change_nothing():
    model, records = tiny_model(), tiny_records(4, 1)
    records = [replace(record, image=jpeg(i)) for i, record in enumerate(records)]
    assert_same(evaluate(model, records, rerank=2).rankings, evaluate(model, records, rerank=2, num_workers=2).rankings)


@pytest.mark.parametrize(("token_storage", "passes"), [("recompute", 2), ("disk", 1), ("memory", 1)])
def test_memory_is_bounded_by_the_blocks(monkeypatch, token_storage, passes):
    model, records = tiny_model(), tiny_records(8, 2)
    seen = {"images": [], "projected": [], "texts": [], "captions": []}
    model.dual.vision.register_forward_pre_hook(lambda _, args: seen["images"].append(len(args[0])))
    model.dual.text.register_forward_pre_hook(lambda _, args: seen["captions"].append(len(args[0])))
    project, score = model.fusion.project, model.score_pairs

    def score_pairs(image_state, text_state, pairs, *, block_size):
        seen["texts"].append(len(text_state.tokens))
        return score(image_state, text_state, pairs, block_size=block_size)

    monkeypatch.setattr(model.fusion, "project", lambda x: seen["projected"].append(len(x)) or project(x))
    monkeypatch.setattr(model, "score_pairs", score_pairs)
    sizes = {"batch_size": 4, "image_block": 3, "pair_block": 5}
    evaluate(model, records, rerank=3, token_storage=token_storage, **sizes)
    assert max(seen["images"]) <= 3 and sum(seen["images"]) == passes * 8
    assert seen["projected"] == [3, 3, 2]  # Each image is projected once, whatever the number of its captions.
    assert max(seen["texts"]) <= 5 and max(seen["captions"]) <= 4
    assert (sum(seen["captions"]) == 16) == (passes == 1)


def test_captions_are_scored_beside_others_of_their_length(monkeypatch):
    """The longest first: what does not fit into memory fails at once; and nothing is padded to it for long."""
    model, records = tiny_model(), tiny_records(8, 4)
    longest, score = [], model.score_pairs

    def score_pairs(image_state, text_state, pairs, *, block_size):
        longest.append(text_state.mask.shape[1])
        return score(image_state, text_state, pairs, block_size=block_size)

    monkeypatch.setattr(model, "score_pairs", score_pairs)
    evaluate(model, records, rerank=4, pair_block=8)
    assert longest == sorted(longest, reverse=True) and longest[0] > longest[-1]


def test_tokens_of_a_caption_that_were_not_kept_are_not_made_up():
    model, words = tiny_model().eval(), list(captions(0, 3))
    texts = TextTokens(model, tiny_processor(), words, batch_size=2, storage=TokenStorage("memory"))
    every = torch.arange(3)
    with torch.inference_mode():
        texts.embeds = torch.cat([texts.encode(every[:2]), torch.zeros(1, model.config.embed_dim)])
        assert len(texts.state(every[:2]).tokens) == 2
        with pytest.raises(RuntimeError, match=f"caption '{words[2]}' are not kept yet"):
            texts.state(every)
        texts.keep(every)
        assert len(texts.state(every).tokens) == 3


def test_images_go_to_a_gpu_from_pinned_memory(gpu, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.nbytes) or x)
    evaluate(tiny_model().cuda(), tiny_records(6), rerank=0, batch_size=4)
    assert [size for size in pinned if size % (3 * 32 * 32 * 4) == 0] == [4 * 12288, 2 * 12288]


def test_what_cannot_be_used_is_skipped_counted_and_named():
    records = tiny_records(5)
    broken = Record(image=jpeg(9)[:200], captions=captions(9, 3), identity=9, name="broken.jpg")
    silent = Record(image=picture(10), captions=(" ",), identity=10, name="silent.jpg")
    halves = replace(records[1], captions=(*records[1].captions, ""), name="halves.jpg")
    mixed = [records[0], broken, halves, silent, *records[2:]]
    model, report = tiny_model(), LoadReport()
    result = evaluate(model, mixed, rerank=3, report=report, max_skipped_fraction=0.5)
    assert_same(result.rankings, evaluate(model, records, rerank=3).rankings)
    assert (result.num_images, result.num_captions) == (5, 15)
    assert result.to_json()["skipped"] == report.counts
    assert sorted(report.counts.values()) == [1, 1, 2]
    assert "broken.jpg" in report.summary() and "unreadable image" in report.summary()
    assert set(report.names["empty caption"]) == {"silent.jpg", "halves.jpg"}
    assert report.names["no captions"] == ["silent.jpg"]
    assert "broken.jpg" in result.table()
    with pytest.raises(DataError, match=r"2 of 7 images cannot be used.*broken\.jpg"):
        evaluate(model, mixed, rerank=3)


def test_nothing_usable_is_an_error():
    broken = [Record(image=b"x", captions=("a",), identity=0, name="x.jpg")]
    for records in ([], broken):
        with pytest.raises(DataError, match="nothing to evaluate on"):
            evaluate(tiny_model(), records, max_skipped_fraction=1.0)


def test_images_of_one_identity_share_their_captions():
    model, records = tiny_model(), tiny_records(4)
    twins = [*records[:3], replace(records[3], identity=records[0].identity)]
    similarity, match, owner = all_scores(model, twins)
    identity = torch.tensor([r.identity for r in twins])
    own = identity[:, None] == identity[owner]
    result = evaluate(model, twins, rerank=100)
    for name, scores in (("dual", similarity), ("match", match)):
        best = scores.masked_fill(~own, -torch.inf)
        i2t = 1 + ((scores >= best.amax(1, keepdim=True)) & ~own).sum(1)
        t2i = 1 + ((scores >= best.amax(0)) & ~own).sum(0)
        assert torch.equal(result.rankings[name].i2t, i2t.double())
        assert torch.equal(result.rankings[name].t2i, t2i.double())


def test_dual_only_and_the_exported_dual():
    model, records = tiny_model(), tiny_records()
    alone = evaluate(model, records, rerank=0)
    assert_same(alone.rankings, {"dual": evaluate(model, records, rerank=3).rankings["dual"]})
    assert_same(evaluate(model.dual_encoder(), records, rerank=0).rankings, alone.rankings)
    figures = alone.to_json()
    assert figures.keys() >= KEYS and figures["k"] == 0
    assert all(figures[name] is None for name in ("match", "match_plus_similarity", "ceiling", "pairs_per_second"))
    assert "match" not in alone.table() and alone.mean_r1().keys() == {"dual"}
    with pytest.raises(ValueError, match="no fusion head"):
        evaluate(model.dual_encoder(), records, rerank=3)


def test_json_and_table():
    result = evaluate(tiny_model(), tiny_records(), rerank=2)
    figures = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert figures.keys() == KEYS | {"num_pairs", "skipped", "truncated_captions"}
    assert (figures["num_images"], figures["num_captions"], figures["k"]) == (6, 18, 2)
    for name in HEADS:
        assert figures[name].keys() == {"i2t", "t2i", "mean_r1", "mean_recall", "median_rank"}
        assert figures[name]["i2t"].keys() == figures[name]["t2i"].keys() == {"r1", "r5", "r10"}
        assert figures[name]["mean_r1"] == (figures[name]["i2t"]["r1"] + figures[name]["t2i"]["r1"]) / 2
    assert figures["ceiling"].keys() == {"i2t", "t2i"}
    assert figures["seconds"].keys() == {"encode", "rank", "rerank", "total"}
    assert figures["pairs_per_second"] == pytest.approx(result.num_pairs / result.seconds["rerank"])
    rows = [line for line in result.table().splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "dual",
        "match",
        "match + similarity",
        "reranked (w = 1)",
    ]
    assert len({row.count("|") for row in rows}) == 1
    values = [float(cell) for cell in rows[2].split("|")[2:-1]]
    assert values[0] == pytest.approx(figures["dual"]["i2t"]["r1"], abs=0.05)
    assert values[-1] == pytest.approx(figures["dual"]["mean_r1"], abs=0.05)


def test_cached_tokens_are_used_instead_of_images(tmp_path):
    model, processor, records = tiny_model(), tiny_processor(), tiny_records()
    records[2] = replace(records[2], image=b"no image", name="gone.jpg")
    cache = TokenCache.open_or_build(
        tmp_path,
        key="0123456789",
        records=records,
        transform=evaluation_transform(processor),
        encode=model.eval().dual.vision,
        progress=False,
    )
    # The cache keeps tokens in half precision.
    half = model.dual.vision.register_forward_hook(lambda *args: args[-1].half().float())
    expected = evaluate(model, records, rerank=4, max_skipped_fraction=0.5)
    half.remove()
    model.dual.vision.register_forward_pre_hook(lambda *_: pytest.fail("the backbone ran"))
    cached = evaluate(model, records, rerank=4, max_skipped_fraction=0.5, tokens=cache, token_storage="disk")
    assert_same(cached.rankings, expected.rankings)
    assert "gone.jpg" in cached.skipped.summary()
    with pytest.raises(ValueError, match="the token cache has 6 images, the records are 7"):
        evaluate(model, [*records, records[0]], tokens=cache)


def test_the_model_comes_back_as_it_was():
    model = tiny_model().train()
    model.freeze(["vision"])
    modes = [module.training for module in model.modules()]
    during = []
    model.dual.text.register_forward_pre_hook(lambda module, _: during.append(module.training))
    evaluate(model, tiny_records(3), rerank=2)
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes
    assert during and not any(during)
    assert all(p.requires_grad for p in model.fusion.parameters()) and torch.is_grad_enabled()


def test_part_of_the_data():
    model, records = tiny_model(), tiny_records()
    first = [replace(record, captions=record.captions[:2]) for record in records[:4]]
    part = evaluate(model, records, rerank=3, captions_per_image=2, max_images=4)
    assert_same(part.rankings, evaluate(model, first, rerank=3).rankings)
    assert (part.num_images, part.num_captions) == (4, 8)


def test_a_caption_longer_than_the_text_backbone_takes_is_cut_and_counted():
    records = tiny_records(3)
    records[0] = replace(records[0], captions=("a red circle " * 20, "a red circle"))
    model = tiny_model()
    result = evaluate(model, records, rerank=2, processor=tiny_processor(max_length=100))
    assert result.truncated == 1 == result.to_json()["truncated_captions"]
    assert evaluate(model, tiny_records(3), rerank=2).truncated == 0


@pytest.mark.parametrize("option", ["rerank", "batch_size", "image_block", "pair_block", "max_images"])
def test_an_option_out_of_range_is_named(option):
    with pytest.raises(ValueError, match=f"{option} must be at least [01], got -1"):
        evaluate(tiny_model(), tiny_records(2), **{option: -1})
