"""The cards of all exports: the licence, origin and figures of the run that they are from, in the hub's metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.support import tiny_model
from helpers.tiny_gallery import tiny_processor
from huggingface_hub import ModelCard

from loopitr.building.card_file import is_own
from loopitr.building.folders import save_for_use
from loopitr.export.dual import export_dual
from loopitr.export.onnx import export_onnx
from loopitr.export.sentence_transformers import export_sentence_transformers
from loopitr.export.towers import export_tower

RECALLS = {"i2t": {"r1": 40.0, "r5": 80.0, "r10": 90.0}, "t2i": {"r1": 30.0, "r5": 70.0, "r10": 85.0}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = {"data": {"hub": "me/pets"}, "model": {"pair": "openai/clip"}, "train": {"license": "mit"}}
    metrics = {"split": "test", "num_images": 8, "num_captions": 16, "k": 4, "training": {"steps": 12}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps({**metrics, "dual": RECALLS, "reranked": RECALLS}))
    save_for_use(tiny_model(), tiny_processor(), folder)
    return folder


def figures(card: ModelCard) -> set[str]:
    """Whose figures are in the metadata."""
    return {result.metric_type.split("_")[0] for result in card.data.eval_results or ()}


def checked(folder: Path, library: str) -> ModelCard:
    assert is_own((folder / "README.md").read_text())
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.license, data.library_name, data.datasets) == ("mit", library, ["me/pets"])
    assert data.base_model == ["openai/clip"] and {"loopitr", "image-text-retrieval"} <= {*data.tags}
    assert card.text.lstrip().startswith(f"# {folder.name}\n") and card.text.count("\n# ") == 1
    return card


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_towers_card_has_no_figures_of_a_retrieval(run, tmp_path, tower):
    export_tower(run, tmp_path / "one", tower)
    card = checked(tmp_path / "one", "loopitr")
    assert f"{tower}-encoder" in card.data.tags and not figures(card) and "## Results" not in card.text


def test_a_sentence_transformers_card_has_the_dual_encoders_figures(run, tmp_path):
    export_sentence_transformers(run, tmp_path / "st")
    card = checked(tmp_path / "st", "sentence-transformers")
    assert "sentence-transformers" in card.data.tags and figures(card) == {"dual"}
    assert 'SentenceTransformer("PATH")' in card.text and "## Results" in card.text


@pytest.mark.slow
def test_an_onnx_card(run, tmp_path):
    export_onnx(run, tmp_path / "graph", tower="text")
    card = checked(tmp_path / "graph", "onnx")
    assert "onnx" in card.data.tags and not figures(card) and "text_tower.onnx" in card.text


def test_a_card_that_somebody_wrote_outlives_the_next_export(run, tmp_path):
    for export, folder in ((export_dual, tmp_path / "dual"), (lambda a, b: export_tower(a, b, "text"), tmp_path / "t")):
        export(run, folder)
        (folder / "README.md").write_text("# Mine\n")
        export(run, folder)
        assert (folder / "README.md").read_text() == "# Mine\n"
