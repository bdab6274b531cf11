"""ONNX graphs give what the model gives, at any batch and length, and run without this package."""

import io
import json
import shutil
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
import torch
from helpers.recipe_process import ROOT, environment
from helpers.support import BERT, CNN, SIZES, images, ragged_texts, tiny_model
from helpers.tiny_gallery import captions, evaluate, picture, tiny_processor, tiny_records
from PIL import Image
from tokenizers import Tokenizer

import loopitr.export.onnx as exporting
from loopitr import Retriever, export_onnx
from loopitr.data import DataError, LoadReport
from loopitr.evaluation.gallery import build_gallery
from loopitr.export.graphs import FusionGraph
from loopitr.export.onnx_card import onnx_card
from loopitr.export.onnx_recall import _Reading, onnx_recall
from loopitr.export.onnx_running import OnnxModel
from loopitr.export.source import Source

WEIGHT = 0.4
ONE_LAYER = {**BERT, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def model():
    model = tiny_model(CNN, text=ONE_LAYER, fusion={"agreement": 8}).eval()
    model.config.similarity_weight = WEIGHT
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "out"
    return export_onnx(model, folder, precisions=["fp16", "int8"], processor=tiny_processor(64))


@pytest.mark.parametrize(
    "changes",
    [{}, {"layers": 1}, {"style": "shared", "fusion": {"first_token_id": 7}}, {"fusion": {"agreement": 8}}],
    ids=["late", "one layer", "shared", "agreement"],
)
@torch.no_grad()
def test_the_padded_fusion_head_scores_as_the_packed_one(changes):
    model = tiny_model(**changes).eval()
    pictures, texts = model.encode_images(images(3)), model.encode_texts(*ragged_texts())
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(5))
    expected = model.score_pairs(pictures, texts, pairs).score.view(3, 5)
    got = FusionGraph(model)(pictures.tokens, texts.tokens, texts.mask.long())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.slow
def test_parity_is_what_other_inputs_show_too(exported, model):
    assert exported.graphs == ["image_tower", "text_tower", "fusion_head"]
    assert {*exported.parity} == {"image_embeds", "text_embeds", "image_tokens", "text_tokens", "match_scores"}
    assert all(0 <= value <= 1e-5 for value in exported.parity.values())
    running = OnnxModel(exported.folder, names=exported.graphs)
    for count, longest in ((5, 11), (1, 3)):
        pixels, (ids, mask) = images(count, size=64, seed=9), ragged_texts(count + 1, longest, seed=4)
        pictures, texts = model.encode_images(pixels), model.encode_texts(ids, mask)
        pairs = torch.cartesian_prod(torch.arange(count), torch.arange(count + 1))
        expected = model.score_pairs(pictures, texts, pairs).score.view(count, -1)
        image_embeds, image_tokens = running.encode_images(pixels.numpy())
        text_embeds, text_tokens = running.encode_texts(ids.numpy(), mask.numpy())
        match = running.match(image_tokens, text_tokens, mask.numpy())
        for ours, theirs in ((pictures.embeds, image_embeds), (texts.embeds, text_embeds), (expected, match)):
            np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-5)


@pytest.mark.slow
def test_graphs_say_what_they_take(exported):
    config = json.loads((exported.folder / "onnx_config.json").read_text())
    assert config["opset"] == 20 and config["precisions"] == ["fp32", "fp16", "int8"]
    assert config["similarity_weight"] == WEIGHT
    for name in exported.graphs:
        for suffix in ("", "_fp16", "_int8"):
            graph = onnx.load(exported.folder / f"{name}{suffix}.onnx")
            onnx.checker.check_model(graph)
            assert {opset.version for opset in graph.opset_import if opset.domain in ("", "ai.onnx")} == {20}
            types = {initializer.data_type for initializer in graph.graph.initializer}
            assert (onnx.TensorProto.FLOAT16 in types) == (suffix == "_fp16")
            assert (onnx.TensorProto.INT8 in types) == (suffix == "_int8")
            every = [*graph.graph.input, *graph.graph.output]
            assert all(x.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64) for x in every)
    card = (exported.folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: onnx\n") and "image_tower.onnx" in card and "PICTURE" not in card


@pytest.mark.slow
def test_the_tokenizer_pads_and_cuts_as_the_processor(exported):
    tokenizer = Tokenizer.from_file(str(exported.folder / "tokenizer.json"))
    texts = [*captions(2, 4), " ".join(["red"] * 60)]
    expected = tiny_processor(64)(text=texts, return_tensors="np")
    encoded = tokenizer.encode_batch(texts)
    assert np.array_equal([text.ids for text in encoded], expected["input_ids"])
    assert np.array_equal([text.attention_mask for text in encoded], expected["attention_mask"])
    assert expected["input_ids"].shape[1] == 24


@pytest.mark.slow
def test_the_example_runs_without_this_package(exported, model, tmp_path):
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.png")  # of the graphs' own size, so that resizing does not matter
        picture(number, (64, 64)).convert("RGBA" if number % 2 else "L").save(paths[-1])
    turned, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    picture(7, (64, 64)).save(turned, "JPEG", exif=exif)
    paths.append(tmp_path / "turned.jpg")
    paths[-1].write_bytes(turned.getvalue())
    query = captions(5, 1)[0]
    # In a process in which importing torch or this package fails.
    code = (
        "import sys, runpy; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'loopitr'])); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = ROOT / "recipes/examples/onnx_without_loopitr.py"
    words = [sys.executable, "-c", code, script, exported.folder, query, *paths]
    done = subprocess.run(list(map(str, words)), env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    expected = Retriever(model, tiny_processor(64)).rank(query, paths, top_k=None, return_documents=True)
    assert [path for _, path in rows] == [str(row["image"]) for row in expected]
    np.testing.assert_allclose([float(s) for s, _ in rows], [row["score"] for row in expected], atol=2e-3)


@pytest.mark.slow
def test_recall_of_each_precision(exported, model):
    records = tiny_records(8, 2)
    recall = onnx_recall(exported.folder, tiny_processor(64), records, rerank=4, num_workers=0, progress=False)
    expected = evaluate(model, records, processor=tiny_processor(64), rerank=4)
    assert [*recall.rankings] == ["fp32", "fp16", "int8"]
    for kind in ("dual", "reranked"):
        for side in ("i2t", "t2i"):
            ours, theirs = getattr(recall.rankings["fp32"][kind], side), getattr(expected.rankings[kind], side)
            assert torch.equal(ours, theirs)
    table = recall.table()
    assert "| fp32 dual" in table and "| int8 reranked" in table and "int8 against fp32" in table
    assert recall.change("fp32") == {"dual": 0.0, "reranked": 0.0}
    assert (recall.num_images, recall.num_captions) == (8, 16)


@pytest.mark.slow
def test_recall_leaves_out_what_cannot_be_read(exported):
    records = [*tiny_records(6, 2)]
    records[2] = type(records[2])(image=b"no image", captions=records[2].captions, identity=3, name="broken.jpg")
    with pytest.raises(ValueError, match="1 of 6 images cannot be used"):
        onnx_recall(exported.folder, tiny_processor(64), records, num_workers=0, progress=False)
    recall = onnx_recall(
        *(exported.folder, tiny_processor(64), records), max_skipped_fraction=0.5, num_workers=0, progress=False
    )
    assert (recall.num_images, recall.num_captions) == (5, 10)


def test_scores_are_not_those_of_other_images_if_one_vanishes():
    records = [*tiny_records(3, 1)]
    records[1] = type(records[1])(image=b"gone", captions=records[1].captions, identity=1, name="gone.jpg")
    gallery = build_gallery(records, [[0], [1], [2]], LoadReport(), captions_per_image=None)
    reading = _Reading(records, tiny_processor(), batch_size=2, num_workers=0, progress=False)
    graphs = Mock(encode_images=lambda x: (None, np.zeros((len(x), 2, 4))), match=lambda i, t, m: np.zeros((1, len(t))))
    with pytest.raises(DataError, match="readable before is not any more"):
        reading.scores(graphs, gallery, [np.zeros((3, 4))] * 3, torch.tensor([[0, 0], [1, 2]]))


@pytest.mark.slow
def test_one_tower_of_a_dual_encoder_in_half_precision(tmp_path):
    dual = tiny_model(text=ONE_LAYER).dual_encoder().to(torch.float16)
    exported = export_onnx(dual, tmp_path / "text", tower="text", processor=tiny_processor())
    assert exported.graphs == ["text_tower"] and [*exported.parity] == ["text_embeds"]
    assert dual.dtype == torch.float16  # The caller's own stays as it is.
    assert sorted(path.name for path in (tmp_path / "text").iterdir()) == [
        *("README.md", "onnx_config.json", "text_tower.onnx", "tokenizer.json")
    ]
    with pytest.raises(ValueError, match="holds one tower alone"):
        onnx_recall(tmp_path / "text", tiny_processor(), tiny_records())


@pytest.mark.slow
def test_a_model_in_training_and_a_tokenizer_that_cuts_on_the_left(tmp_path):
    dual, processor = tiny_model(text=ONE_LAYER).dual_encoder().train(), tiny_processor()
    processor.tokenizer.truncation_side = "left"
    export_onnx(dual, tmp_path / "out", processor=processor)
    assert all(module.training for module in dual.modules())  # The caller goes on with dropout.
    text = " ".join(["red"] * 20 + ["blue"] * 20)
    ids = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text).ids
    assert ids == processor(text=[text])["input_ids"][0].tolist()


def test_the_cards_lines_resize_as_an_image_processor_that_crops(tmp_path, monkeypatch):
    processor = tiny_processor(56)
    images = processor.image_processor
    images.size, images.do_center_crop = {"shortest_edge": 56}, True
    card = onnx_card(Source(tiny_model().dual_encoder(), processor, "x"), [], {})
    lines = card[card.index("image = Image.open") : card.index("\npixels = ")]
    monkeypatch.chdir(tmp_path)
    for size in ((57, 90), (89, 58), (71, 71), (110, 97)):
        picture(3, size).save("photo.jpg", quality=95)
        own = {"config": images.to_dict(), "Image": Image}
        exec(lines, own)
        got = np.asarray(own["image"], np.float32).transpose(2, 0, 1) / 255
        expected = processor(images=[Image.open("photo.jpg")])["pixel_values"][0].numpy() * 0.25 + 0.5
        np.testing.assert_allclose(got, expected, atol=0.02)


@pytest.mark.slow
def test_a_pair_whose_text_tokens_are_a_view_in_half_precision(tmp_path):
    text = {"model_type": "siglip_text_model", **SIZES, "projection_size": 32}
    model = tiny_model(text=text, text_pooling="backbone", layers=1).to(torch.bfloat16)
    exported = export_onnx(model, tmp_path / "out", processor=tiny_processor())
    assert exported.graphs == ["image_tower", "text_tower", "fusion_head"]
    scale = json.loads((tmp_path / "out" / "onnx_config.json").read_text())["scale"]
    own = float(model.float().dual.scale.detach())
    assert scale == pytest.approx(own, rel=1e-6)  # as in the graphs, not rounded to bfloat16


@pytest.mark.slow
def test_a_graph_that_computes_otherwise_is_not_kept(exported, tmp_path, monkeypatch):
    def other(graph, inputs, outputs, axes, path):
        shutil.copy(exported.folder / path.name, path)

    monkeypatch.setattr(exporting, "write_graph", other)
    another = tiny_model(CNN, text=ONE_LAYER, fusion={"agreement": 8}, seed=1)
    with pytest.raises(ValueError, match="the model: ONNX and torch differ in .* by"):
        export_onnx(another, tmp_path / "out", processor=tiny_processor(64))
    assert not [*tmp_path.iterdir()]


def test_bad_input_is_named_before_any_work(tmp_path, monkeypatch):
    model, given = tiny_model(), {"processor": tiny_processor()}
    monkeypatch.setattr(exporting, "write_graph", None)
    with pytest.raises(ValueError, match="precisions must be of fp16, int8, got 'int4'"):
        export_onnx(model, tmp_path / "out", precisions=["int4"], **given)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("")
    with pytest.raises(ValueError, match="full exists and is not empty; choose another folder"):
        export_onnx(model, tmp_path / "full", **given)
    with pytest.raises(OSError, match="notes is not a folder"):
        export_onnx(model, tmp_path / "full" / "notes", **given)
    with pytest.raises(ValueError, match="the output has no name"):
        export_onnx(model, " ", **given)
    with pytest.raises(OSError, match="no model folder"):
        export_onnx(tmp_path / "none", tmp_path / "out")
    processor = tiny_processor()
    processor.tokenizer.padding_side = "left"
    with pytest.raises(ValueError, match="its tokenizer pads on the left"):
        export_onnx(model, tmp_path / "out", processor=processor)
    for name in ("onnx", "onnxruntime", "onnxscript"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(ModuleNotFoundError, match=rf'ONNX needs {name}: pip install "loopitr\[onnx\]"'):
                export_onnx(model, tmp_path / "out", **given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_an_error_of_an_old_torch_names_its_version(model, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise RuntimeError("unsupported operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(RuntimeError, match="unsupported operator"):
        export_onnx(model, tmp_path / "new", processor=tiny_processor(64))
    monkeypatch.setattr("loopitr.export.onnx_files.TESTED_TORCH", "99")
    with pytest.raises(ValueError, match="tested with torch 99, and failed with .*: unsupported operator$"):
        export_onnx(model, tmp_path / "old", processor=tiny_processor(64))
