"""A `Retriever` inside sentence-transformers' own evaluator of cross encoders."""

import numpy as np
import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import captions, picture, tiny_processor
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator

from loopitr import Retriever

PICTURES, TEXTS = [picture(i) for i in range(6)], list(captions(3, 6))


@pytest.fixture(scope="module")
def retriever():
    return Retriever(tiny_model(), tiny_processor())


@pytest.fixture(scope="module")
def scores(retriever):
    """`[text, image]`."""
    return retriever.predict([(text, image) for text in TEXTS for image in PICTURES]).reshape(6, 6)


@pytest.mark.parametrize("asked_with", ["texts", "images"])
def test_the_evaluators_figures_are_those_of_the_scores(retriever, scores, asked_with):
    queries, documents = (TEXTS, PICTURES) if asked_with == "texts" else (PICTURES, TEXTS)
    table = scores if asked_with == "texts" else scores.T
    samples = [
        {"query": query, "positive": [documents[i]], "documents": documents[:5]} for i, query in enumerate(queries[:4])
    ]
    evaluator = CrossEncoderRerankingEvaluator(samples, at_k=10, name="tiny", write_csv=False)
    figures = evaluator(retriever)
    ranks = [1 + int((table[i, :5] > table[i, i]).sum()) for i in range(4)]
    assert figures["tiny_mrr@10"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert figures["tiny_map"] == pytest.approx(figures["tiny_mrr@10"])  # There is one right answer for each.
    assert len(set(ranks)) > 1
    assert [*retriever.model_card_data.metrics] == ["tiny"]


def test_arguments_of_a_cross_encoder(retriever, scores):
    pairs = [(TEXTS[0], PICTURES[0]), [PICTURES[1], TEXTS[0]]]
    tensor = retriever.predict(pairs, convert_to_numpy=False, show_progress_bar=False, prompt_name=None)
    assert isinstance(tensor, torch.Tensor)
    torch.testing.assert_close(tensor, torch.from_numpy(scores[0, :2].copy()), atol=1e-5, rtol=0)
    assert retriever.predict((PICTURES[1], TEXTS[0])) == pytest.approx(scores[0, 1], abs=1e-5)  # one pair, its score
    with pytest.raises(ValueError, match="there are no prompts: prompt_name must be None, got 'query'"):
        retriever.predict(pairs, prompt_name="query")
    best = retriever.rank(TEXTS[0], PICTURES, top_k=1, show_progress_bar=False)
    assert best[0]["corpus_id"] == int(scores[0].argmax())
