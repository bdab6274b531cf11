"""`Retriever` against evaluation's scores, one pair at a time, and in whatever portions."""

import weakref

import numpy as np
import pytest
import torch
from helpers.support import CNN, plain_score, tiny_model
from helpers.tiny_building import save_tiny
from helpers.tiny_gallery import captions, evaluate, jpeg, picture, tiny_processor, tiny_records
from PIL import Image

from loopitr import Retriever
from loopitr.evaluation import reranking, retrieval
from loopitr.evaluation.gallery import evaluation_transform

WEIGHT = 0.3


def tiny(style="late", agreement=None, **changes):
    model = tiny_model(style=style, fusion={"agreement": agreement}, **changes)
    model.config.similarity_weight = WEIGHT
    return Retriever(model, tiny_processor())


def plain(retriever, pictures, texts):
    """similarity and reranking score `[I, T]` of all pairs, image by image and text by text."""
    model, processor = retriever.model, retriever.processor
    with torch.no_grad():
        pixels = [evaluation_transform(processor)(image)[None] for image in pictures]
        images = torch.cat([model.encode_images(one).tokens for one in pixels])
        image_embeds = model.dual.embed_image_tokens(images)
        rows = []
        for text in texts:
            state = model.encode_texts(**processor(text=[text]))
            logits = plain_score(model, images, state, torch.tensor([[i, 0] for i in range(len(images))]))
            rows.append((image_embeds @ state.embeds[0], logits[:, 1] - logits[:, 0]))
    similarity, match = (torch.stack(columns, 1) for columns in zip(*rows, strict=True))
    return similarity, match.double() + WEIGHT * model.dual.scale.double() * similarity.double()


PICTURES, TEXTS = [picture(i) for i in range(5)], list(captions(0, 7))


@pytest.mark.parametrize(("style", "agreement"), [("late", None), ("shared", None), ("late", 12)])
def test_scores_are_those_of_each_pair_alone(style, agreement):
    retriever = tiny(style, agreement)
    similarity, score = plain(retriever, PICTURES, TEXTS)
    images, texts = retriever.encode_images(PICTURES), retriever.encode_texts(TEXTS)
    assert images.dtype == np.float32 and np.allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)
    torch.testing.assert_close(retriever.similarity(images, texts), similarity, atol=1e-5, rtol=0)
    pairs = [(text, image) for text in TEXTS for image in PICTURES]
    got = retriever.predict([*pairs, pairs[3]])
    torch.testing.assert_close(torch.from_numpy(got[:-1]).view(7, 5).T, score, atol=1e-5, rtol=0)
    assert got[-1] == got[3] and got.dtype == np.float64
    for t, text in enumerate(TEXTS[:2]):
        assert_ranking(retriever.rank(text, PICTURES, top_k=None), score[:, t])
    for i, image in enumerate(PICTURES[:2]):
        assert_ranking(retriever.rank(image, TEXTS, top_k=3), score[i], 3)
        assert_ranking(retriever.rank(image, PICTURES), torch.from_numpy(images) @ torch.from_numpy(images[i]))
    match = score - WEIGHT * retriever.model.dual.scale.double() * similarity
    assert match.std() > 1e-4 and similarity.std() > 1e-3  # Were one of them missing, it would show.


def assert_ranking(ranking, scores, count=None):
    best = scores.argsort(descending=True)[:count].tolist()
    assert [entry["corpus_id"] for entry in ranking] == best
    assert [entry["score"] for entry in ranking] == pytest.approx(scores[best].tolist(), abs=1e-5)
    assert all(entry.keys() == {"corpus_id", "score"} for entry in ranking)


def test_the_numbers_are_those_of_evaluation(monkeypatch):
    """What `evaluate_retrieval` ranks by, taken out on its way."""
    retriever, records, seen = tiny(), tiny_records(), {}
    scored_candidates, nearest = reranking.scored_candidates, retrieval.nearest

    def keep(*args, **kwargs):
        seen["scored"] = scored_candidates(*args, **kwargs)
        return seen["scored"]

    def keep_nearest(images, texts, *args, **kwargs):
        seen["embeds"], seen["nearest"] = (images, texts), nearest(images, texts, *args, **kwargs)
        return seen["nearest"]

    monkeypatch.setattr(retrieval, "scored_candidates", keep)
    monkeypatch.setattr(retrieval, "nearest", keep_nearest)
    evaluate(retriever.model, records, rerank=4)
    texts = [caption for record in records for caption in record.captions]
    images = [record.image for record in records]
    for embeds, own in zip(seen["embeds"], (retriever.encode_images(images), retriever.encode_texts(texts))):
        torch.testing.assert_close(torch.from_numpy(own), embeds, atol=1e-5, rtol=0)
    wanted = seen["scored"].reranking(WEIGHT).images  # [T, 4]
    candidates = seen["nearest"].images.tolist()
    got = retriever.predict([(text, images[i]) for text, row in zip(texts, candidates) for i in row])
    torch.testing.assert_close(torch.from_numpy(got).view(-1, 4), wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("vision", [None, CNN], ids=["vit", "cnn"])
def test_portions_change_nothing(vision, tmp_path):
    size = 64 if vision else 32
    retriever = Retriever(tiny_model(vision=vision), tiny_processor(size))
    paths = [tmp_path / f"{i}.jpg" for i in range(5)]
    for i, path in enumerate(paths):
        path.write_bytes(jpeg(i))
    pairs = [(text, path) for text in TEXTS for path in paths]
    whole = retriever.encode_images(paths), retriever.encode_texts(TEXTS), retriever.predict(pairs)
    assert len({tuple(row.round(4)) for row in whole[0]}) == 5  # The tiny model tells them apart.
    for batch_size, workers in ((1, 0), (2, 2), (3, 0)):
        parts = (
            retriever.encode_images(paths, batch_size, num_workers=workers),
            retriever.encode_texts(TEXTS, batch_size),
            retriever.predict(pairs, batch_size, num_workers=workers),
        )
        for part, expected in zip(parts, whole):
            assert np.allclose(part, expected, atol=1e-5, rtol=0)
    backwards = retriever.encode_images(paths[::-1], 2), retriever.encode_texts(TEXTS[::-1], 2)
    for part, expected in zip(backwards, whole):
        assert np.allclose(part[::-1], expected, atol=1e-5, rtol=0)


def test_pixels_and_tokens_are_held_a_batch_at_a_time_and_each_image_is_encoded_once(monkeypatch):
    retriever, seen = tiny(), {"images": [], "projected": [], "pairs": []}
    model = retriever.model
    model.dual.vision.register_forward_pre_hook(lambda _, args: seen["images"].append(len(args[0])))
    project, score = model.fusion.project, model.score_pairs

    def project_tokens(tokens):
        seen["projected"].append(len(tokens))
        return project(tokens)

    def score_pairs(images, texts, pairs, **options):
        seen["pairs"].append(len(pairs))
        return score(images, texts, pairs, **options)

    monkeypatch.setattr(model.fusion, "project", project_tokens)
    monkeypatch.setattr(model, "score_pairs", score_pairs)
    retriever.encode_images(PICTURES, 2)
    assert seen["images"] == [2, 2, 1]
    retriever.predict([(text, image) for text in TEXTS for image in PICTURES], 2)
    assert seen["images"][3:] == seen["projected"] == [2, 2, 1]
    assert seen["pairs"] == [14, 14, 7]
    retriever.predict([(TEXTS[0], PICTURES[0])] * 40)
    assert seen["images"][6:] == [1] and seen["pairs"][3:] == [1]


def test_a_batch_is_let_go_before_the_next_but_one():
    """So that memory does not grow with the number of images."""
    retriever, batches, alive = tiny(), [], []

    def count(module, args, tokens):
        batches.extend([weakref.ref(args[0]), weakref.ref(tokens)])
        alive.append(sum(batch() is not None for batch in batches))

    retriever.model.dual.vision.register_forward_hook(count)
    pictures = [picture(i) for i in range(8)]
    retriever.encode_images(pictures, 1)
    retriever.rank("a red circle", pictures, batch_size=1)
    assert len(alive) == 16 and max(alive) <= 4  # This batch's pixels and tokens, and the last one's.


def test_a_dual_encoder_alone_encodes_compares_and_ranks(tmp_path):
    whole = tiny()
    dual = Retriever(whole.model.dual_encoder(), whole.processor)
    assert np.array_equal(dual.encode_images(PICTURES), whole.encode_images(PICTURES))
    assert np.array_equal(dual.encode_texts(TEXTS), whole.encode_texts(TEXTS))
    similarity = dual.similarity(dual.encode_images(PICTURES), dual.encode_texts(TEXTS))
    assert_ranking(dual.rank(TEXTS[1], PICTURES), similarity[:, 1])
    assert_ranking(dual.rank(PICTURES[2], TEXTS), similarity[2])
    assert dual.rank(PICTURES[2], PICTURES)[0]["corpus_id"] == 2
    with pytest.raises(ValueError, match="a DualEncoder has no fusion head to predict with"):
        dual.predict([(TEXTS[0], PICTURES[0])])


def test_a_folder_with_a_device_and_a_type(tmp_path):
    saved = save_tiny(tmp_path / "run" / "best")
    retriever = Retriever.from_pretrained(tmp_path / "run", device="cpu")
    assert not retriever.model.training and retriever.device == torch.device("cpu")
    again = Retriever(tiny_model(), tiny_processor())
    assert np.array_equal(retriever.encode_texts(TEXTS), again.encode_texts(TEXTS))
    half = Retriever.from_pretrained(saved, device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.encode_images(PICTURES).dtype == np.float32
    assert np.allclose(half.encode_images(PICTURES), again.encode_images(PICTURES), atol=0.05)
    assert np.isfinite(half.predict([(TEXTS[0], PICTURES[0])])).all()
    with pytest.raises(ValueError, match="dtype must be a floating-point type .*, got int8"):
        Retriever.from_pretrained(saved, dtype="int8")
    with pytest.raises(ValueError, match="device 'toaster' cannot be used"):
        Retriever.from_pretrained(saved, device="toaster")
    with pytest.raises(OSError, match="no model folder"):
        Retriever.from_pretrained(tmp_path / "nowhere")


def test_one_item_gives_one_result_and_is_not_split_into_letters(tmp_path):
    retriever = tiny()
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    path = str(tmp_path / "0.jpg")
    vector = retriever.encode_texts("a dog")
    assert vector.shape == (16,) and np.array_equal(vector, retriever.encode_texts(["a dog"])[0])
    vectors = [retriever.encode_images(x) for x in (path, tmp_path / "0.jpg", jpeg(0), Image.open(path))]
    assert all(np.array_equal(vector, vectors[0]) and vector.shape == (16,) for vector in vectors)
    score = retriever.predict(("a dog", path))
    assert score.shape == () and score == retriever.predict([["a dog", path]])[0]
    assert score == retriever.predict(["a dog", path])
    assert retriever.rank("a dog", path) == retriever.rank("a dog", [path])
    assert retriever.rank(tmp_path / "0.jpg", "a dog") == retriever.rank(path, ["a dog"])
    assert retriever.rank(path, path)[0]["score"] == pytest.approx(1)
    tensor = retriever.encode_texts("a dog", convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and not tensor.is_inference() and tensor.shape == (16,)


def test_nothing_gives_nothing():
    retriever = tiny()
    assert retriever.encode_images([]).shape == retriever.encode_texts([]).shape == (0, 16)
    assert retriever.encode_texts([], precision="binary").shape == (0, 2)
    assert retriever.encode_images([], precision="int8", truncate_dim=3).shape == (0, 3)
    assert retriever.encode_images([], convert_to_tensor=True).dtype == torch.float32
    assert retriever.predict([]).shape == (0,)
    assert retriever.rank("a dog", []) == retriever.rank(PICTURES[0], []) == []
    assert Retriever(retriever.model.dual_encoder(), retriever.processor).rank("a dog", []) == []
    assert retriever.similarity(retriever.encode_texts([]), retriever.encode_texts(TEXTS)).shape == (0, 7)


def test_documents_come_with_their_scores_if_asked_for(tmp_path):
    retriever = tiny()
    for query, documents, kind in ((TEXTS[0], PICTURES, "image"), (PICTURES[0], TEXTS, "text")):
        ranking = retriever.rank(query, documents, top_k=2, return_documents=True)
        assert all(entry[kind] is documents[entry["corpus_id"]] for entry in ranking) and len(ranking) == 2


def test_long_texts_are_cut_at_the_models_length_and_counted_once():
    retriever = Retriever(tiny_model(), tiny_processor(max_length=6))
    long, short = "a red circle left of a blue square", "a red circle left"
    with pytest.warns(UserWarning, match="^2 of 3 texts were cut to the 6 tokens that the model takes$") as warned:
        vectors = retriever.encode_texts([long, short, long])
    assert len(warned) == 1 and warned[0].filename == __file__
    assert np.allclose(vectors[0], vectors[1], atol=1e-6)
    with pytest.warns(UserWarning, match="1 of 1 texts were cut"):
        retriever.rank(long, PICTURES)


def test_a_bar_is_shown_for_more_than_one_batch(capsys):
    retriever = tiny()
    retriever.encode_images(PICTURES)
    retriever.encode_texts(TEXTS, 2, show_progress=False)
    assert capsys.readouterr().err == ""
    retriever.encode_images(PICTURES, 2)
    assert "encode images" in capsys.readouterr().err


def test_a_model_that_gives_no_numbers_is_no_result():
    retriever = tiny()
    with torch.no_grad():
        retriever.model.itm_head.bias.fill_(torch.nan)
    retriever.encode_texts(TEXTS)
    with pytest.raises(ValueError, match="the model gives NaN or infinite values"):
        retriever.predict([(TEXTS[0], PICTURES[0])])
    with torch.no_grad():
        retriever.model.dual.text_projection.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="the model gives NaN or infinite values"):
        retriever.encode_texts(TEXTS)


def test_gradients_are_not_kept_and_a_training_model_is_set_to_use():
    model = tiny_model().train()
    retriever = Retriever(model, tiny_processor())
    assert not model.training
    assert not retriever.encode_images([jpeg(3)], convert_to_tensor=True).requires_grad


def test_a_model_on_a_gpu_gives_arrays_and_tensors_of_the_cpu(gpu):
    retriever, expected = tiny(), tiny()
    retriever.model.cuda()
    assert retriever.device.type == "cuda"
    pairs = [(text, image) for text in TEXTS[:2] for image in PICTURES]
    for got, wanted in (
        (retriever.encode_images(PICTURES, 2), expected.encode_images(PICTURES, 2)),
        (retriever.encode_texts(TEXTS), expected.encode_texts(TEXTS)),
        (retriever.predict(pairs), expected.predict(pairs)),
    ):
        assert np.allclose(got, wanted, atol=1e-5)
    assert retriever.encode_texts(TEXTS, convert_to_tensor=True).device.type == "cpu"
    assert retriever.rank(PICTURES[0], PICTURES)[0]["corpus_id"] == 0
    assert retriever.similarity(torch.ones(2, 3).cuda(), torch.ones(1, 3)).tolist() == [[3], [3]]
