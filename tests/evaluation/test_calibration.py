"""The similarity weight against a brute-force search, the reranking score everywhere, and what reranking gains."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import evaluate, tiny_processor, tiny_records

from loopitr import LoopITRModel
from loopitr.evaluation import Ranking, evaluation_transform
from loopitr.evaluation.calibration import WEIGHTS, fit_similarity_weight, reranking_gain
from loopitr.evaluation.report import weight_text
from loopitr.evaluation.reranking import CandidateScores, ScoredCandidates
from loopitr.models.scoring import DUAL_ALONE, reranking_score


def random_candidates(seed, *, images=12, captions=2, k=6, match_signal=1.0):
    """Scored candidates of a gallery in which both scores know something of the right answers, the similarity more."""
    generator = torch.Generator().manual_seed(seed)

    def side(queries, right_answers):
        right = torch.zeros(queries, k, dtype=torch.bool)
        for row in range(queries):
            if torch.rand((), generator=generator) < 0.9:  # some queries have no right answer among their candidates
                right[row, torch.randperm(k, generator=generator)[:right_answers]] = True
        match = torch.randn(queries, k, generator=generator) + match_signal * right
        similarity = 3 * torch.randn(queries, k, generator=generator) + 4 * right
        return match, similarity, right

    parts = list(zip(side(images, captions), side(images * captions, 1)))
    return ScoredCandidates(*(CandidateScores(*part) for part in parts))


def brute_force(candidates, weight):
    """Mean R@1 and log-likelihood, query by query, in Python numbers."""
    recalls, likelihoods = [], []
    for side in ("captions", "images"):
        match, similarity, right = (
            getattr(part, side).tolist() for part in (candidates.match, candidates.similarity, candidates.right)
        )
        hits, logs = [], []
        for m, s, r in zip(match, similarity, right):
            scores = [a + weight * b for a, b in zip(m, s)]
            best_right = max((x for x, ok in zip(scores, r) if ok), default=-math.inf)
            best_wrong = max((x for x, ok in zip(scores, r) if not ok), default=-math.inf)
            hits.append(any(r) and best_right > best_wrong)
            if any(r):
                top = max(scores)
                total = sum(math.exp(x - top) for x in scores)
                logs.append(math.log(sum(math.exp(x - top) for x, ok in zip(scores, r) if ok) / total + 1e-300))
        recalls.append(100 * sum(hits) / len(hits))
        likelihoods.append(sum(logs) / len(logs))
    return sum(recalls) / 2, sum(likelihoods) / 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("match_signal", [0.0, 2.0])
def test_the_fitted_weight_is_the_best_of_a_brute_force_search(seed, match_signal):
    candidates = random_candidates(seed, match_signal=match_signal)
    quality = {weight: brute_force(candidates, weight) for weight in WEIGHTS}
    highest = max(recall for recall, _ in quality.values())
    fitted = fit_similarity_weight(candidates)
    assert quality[fitted][0] == pytest.approx(highest)
    likelihoods = [likelihood for recall, likelihood in quality.values() if recall == pytest.approx(highest)]
    assert quality[fitted][1] == pytest.approx(max(likelihoods), abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_calibration_never_lowers_recall_on_the_data_it_is_fitted_on(seed):
    candidates = random_candidates(seed, match_signal=-3.0)  # a cross head that is wrong
    recall = {
        weight: candidates.ranking(candidates.reranking(weight)).metrics()["mean_r1"]
        for weight in (0.0, 1.0, DUAL_ALONE, fit_similarity_weight(candidates))
    }
    dual = candidates.ranking(candidates.similarity).metrics()["mean_r1"]
    assert recall[DUAL_ALONE] == dual
    assert recall[fit_similarity_weight(candidates)] >= max(dual, *recall.values())
    assert recall[0.0] < dual  # or else the comparison shows nothing


def test_the_dual_alone_keeps_the_order_of_similarities_that_differ_in_the_last_bit():
    similarity = torch.tensor([[0.5, 0.5]])
    similarity[0, 1] = torch.nextafter(similarity[0, 1], torch.tensor(1.0))
    scores = reranking_score(torch.tensor([[60.0, -60.0]]), 14 * similarity, DUAL_ALONE)
    assert scores[0, 1] > scores[0, 0]


def test_weights_as_they_stand_in_tables():
    assert [weight_text(weight) for weight in (0.0, 0.3548, 1.0, DUAL_ALONE)] == [
        "w = 0",
        "w = 0.35",
        "w = 1",
        "the dual alone",
    ]


def test_the_reranking_score_is_one_function_in_evaluation_in_python_and_after_saving(tmp_path):
    model, records, processor = tiny_model().eval(), tiny_records(), tiny_processor()
    model.config.similarity_weight = 0.25
    result = evaluate(model, records, rerank=1000)
    assert result.similarity_weight == 0.25 and not result.calibrated
    model.save_pretrained(tmp_path)
    loaded = LoopITRModel.from_pretrained(tmp_path).eval()
    assert loaded.config.similarity_weight == 0.25
    owner = torch.tensor([i for i, record in enumerate(records) for _ in record.captions])
    for own in (model, loaded):
        with torch.no_grad():
            images = own.encode_images(torch.stack([evaluation_transform(processor)(r.image) for r in records]))
            inputs = processor(text=[caption for record in records for caption in record.captions])
            texts = own.encode_texts(inputs["input_ids"], inputs["attention_mask"])
            pairs = torch.cartesian_prod(torch.arange(len(images.embeds)), torch.arange(len(texts.embeds)))
            match = own.score_pairs(images, texts, pairs).score.view(len(records), -1)
            scores = own.reranking_score(match, images.embeds @ texts.embeds.T)
        expected = Ranking.from_scores(scores, owner)
        assert torch.equal(result.rankings["reranked"].i2t, expected.i2t)
        assert torch.equal(result.rankings["reranked"].t2i, expected.t2i)
    assert "reranked (w = 0.25)" in result.table()


def test_an_evaluation_that_calibrates_says_so_and_leaves_the_model_alone():
    model, records = tiny_model(), tiny_records()
    result = evaluate(model, records, rerank=4, calibrate=True)
    assert result.calibrated and result.similarity_weight in WEIGHTS
    assert model.config.similarity_weight == 1.0
    assert result.mean_r1()["reranked"] >= max(result.mean_r1().values())
    assert "fitted on these same queries" in result.table()
    json = result.to_json()
    assert json["similarity_weight"] == result.similarity_weight and json["calibrated"] is True
    assert json["reranking_gain"]["points"] == pytest.approx(result.mean_r1()["reranked"] - result.mean_r1()["dual"])


def ranks(*hits):
    return torch.tensor([1.0 if hit else 2.0 for hit in hits], dtype=torch.float64)


def test_the_gain_is_the_difference_of_the_recalls_with_the_bootstraps_interval():
    images, per_image = 200, 2
    rows = torch.arange(images).repeat_interleave(per_image)
    better = torch.arange(images) % 4 == 0  # a quarter of the images is won, with all of its captions
    before = Ranking(i2t=ranks(*[False] * images), t2i=ranks(*[False] * images * per_image))
    after = Ranking(i2t=ranks(*better), t2i=ranks(*better[rows]))
    gain = reranking_gain(before, after, rows)
    assert gain.points == pytest.approx(25.0)
    # Captions go with their images: the standard error is that of 200 draws, not of 600.
    assert gain.margin == pytest.approx(196 * (0.25 * 0.75 / images) ** 0.5, rel=0.1)
    assert gain.line().startswith("reranking pays: +25.0 +- ")
    assert reranking_gain(after, before, rows).line().startswith("reranking does not pay: -25.0 +- ")
    same = reranking_gain(after, after, rows)
    assert (same.points, same.margin) == (0.0, 0.0)
    assert same.line().startswith("reranking makes no significant difference")


def test_few_queries_have_a_wide_interval():
    before = Ranking(i2t=ranks(False, True, False), t2i=ranks(False, True, False))
    after = Ranking(i2t=ranks(True, True, False), t2i=ranks(True, True, False))
    gain = reranking_gain(before, after, torch.arange(3))
    assert gain.points == pytest.approx(100 / 3) and gain.margin > gain.points
    assert "no significant difference" in gain.line() and "3 images" in gain.line()
    assert "evaluate on more images" in gain.line()


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_a_weight_that_is_no_weight_is_refused(weight):
    with pytest.raises(ValueError, match="similarity_weight must be a finite number >= 0"):
        type(tiny_model().config)(similarity_weight=weight)


def test_a_config_of_before_has_weight_one():
    config = tiny_model().config.to_dict()
    del config["similarity_weight"]
    assert type(tiny_model().config)(**config).similarity_weight == 1.0


def test_no_answer_among_the_candidates_and_no_similarity_at_all_are_no_error():
    nothing = CandidateScores(torch.zeros(2, 3), torch.zeros(2, 3))
    wrong = CandidateScores(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool))
    candidates = ScoredCandidates(match=nothing, similarity=nothing, right=wrong)
    assert fit_similarity_weight(candidates) in WEIGHTS
    assert SimpleNamespace(**candidates.ranking(nothing).metrics()).mean_r1 == 0.0
