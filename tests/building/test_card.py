"""Model cards: what they say, that they are kept, and that the hub gets model, processor and card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.support import tiny_model
from helpers.tiny_gallery import picture, tiny_processor
from helpers.tiny_run import run as train
from helpers.tiny_run import write_table
from huggingface_hub import HfApi, ModelCard

from loopitr import DualEncoder, Retriever, export_dual
from loopitr.building import publishing
from loopitr.building.card import write_card
from loopitr.building.card_file import is_own
from loopitr.building.folders import save_for_use
from loopitr.building.origin import origin_of

HEADS = {"i2t": {"r1": 40.0, "r5": 80.0, "r10": 90.06}, "t2i": {"r1": 30.0, "r5": 70.0, "r10": 85.0}, "mean_r1": 35.0}
METRICS = {
    **{"split": "test", "num_images": 8, "num_captions": 16, "k": 4, "training": {"steps": 12}},
    **{"dual": HEADS, "reranked": {**HEADS, "i2t": {"r1": 50.0, "r5": 81.0, "r10": 91.0}}, "match": None},
    "similarity_weight": 0.25,
    "shortened": {"8": HEADS},
    "reranking_gain": {"points": 5.04, "margin": 1.5},
}
FLICKR = {
    "model": {"pair": "openai/clip-vit-base-patch16"},
    "data": {"karpathy": "/home/me/secret/dataset_flickr8k.json", "images": "/home/me/secret/images"},
    "train": {"license": "cc-by-nc-4.0"},
}


def saved(folder: Path, run: Any = FLICKR, metrics: Any = METRICS) -> Path:
    """A run folder: what training leaves of `run` and `metrics`, and a model."""
    folder.mkdir(parents=True)
    for name, content in (("config.yaml", run), ("metrics.json", metrics)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    model = tiny_model()
    model.config.similarity_weight = 0.3519
    save_for_use(model, tiny_processor(), folder)
    return folder


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def example(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card(folder).text, re.DOTALL)
    return code


def recalls(folder: Path) -> dict[str, float]:
    return {result.metric_type: result.metric_value for result in card(folder).data.eval_results or ()}


def test_a_card_has_the_hubs_metadata_and_the_results(tmp_path):
    data = card(saved(tmp_path / "mine")).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-nc-4.0", "loopitr", "feature-extraction")
    assert (data.datasets, data.base_model, data.metrics) == (
        ["dataset_flickr8k"],
        ["openai/clip-vit-base-patch16"],
        ["recall"],
    )
    assert {"image-text-retrieval", "dual-encoder", "cross-encoder"} <= set(data.tags)
    results = {result.metric_type: result for result in data.eval_results}
    assert len(results) == 12
    best = results["reranked_i2t_recall@1"]
    assert (best.metric_value, best.dataset_name, best.dataset_split) == (50.0, "dataset_flickr8k", "test")
    assert results["dual_i2t_recall@10"].metric_value == 90.06
    assert data.model_name == "mine"


def test_a_cards_text_has_table_weight_gain_and_no_path_of_this_machine(tmp_path):
    text = (saved(tmp_path / "mine") / "README.md").read_text()
    assert "| reranked (w = 0.25) | 50.0 | 81.0 | 91.0 | 30.0 | 70.0 | 85.0 |" in text
    assert "| dual encoder, first 8 dimensions | 40.0 | 80.0 | 90.1 | 30.0 |" in text
    assert "w = 0.3519" in text and "Reranking 4 candidates: +5.0 +- 1.5 points" in text
    assert "secret" not in text and str(tmp_path) not in text


def test_five_lines_of_use_run(tmp_path, monkeypatch):
    folder = saved(tmp_path / "mine")
    export_dual(folder, tmp_path / "dual")
    for number, name in enumerate(("beach.jpg", "forest.jpg")):
        picture(number).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for each in (folder, tmp_path / "dual"):
        code = example(each)
        assert len(code.strip().splitlines()) == 7  # an import, an empty line, and five lines
        variables: dict[str, Any] = {}
        exec(code, variables)
        assert variables["images"].shape == (2, 16) and "[2, 16]" in code


def test_an_export_has_the_results_of_what_it_can_do(tmp_path):
    export_dual(saved(tmp_path / "mine"), tmp_path / "dual")
    data, text = card(tmp_path / "dual").data, (tmp_path / "dual" / "README.md").read_text()
    assert data.license == "cc-by-nc-4.0" and data.base_model == ["openai/clip-vit-base-patch16"]
    assert "cross-encoder" not in data.tags and all(name.startswith("dual_") for name in recalls(tmp_path / "dual"))
    assert len(recalls(tmp_path / "dual")) == 6
    assert "Reranking" not in text and "does not include the fusion head that it was trained with" in text


def test_a_card_that_somebody_wrote_or_changed_is_kept(tmp_path):
    folder = saved(tmp_path / "mine")
    path = folder / "README.md"
    written = path.read_text()
    assert is_own(written) and is_own(written.replace("\n", "\r\n"))
    model = tiny_model()
    for text in (written.replace("cc-by-nc-4.0", "mit"), written + "More.\n", "# My model\n", "", "\xff"):
        path.write_text(text, encoding="latin-1")
        assert not write_card(folder, model)
        assert path.read_text(encoding="latin-1") == text
    path.unlink()
    assert write_card(folder, model) and is_own(path.read_text())
    (folder / "metrics.json").unlink()
    assert write_card(folder, model) and not recalls(folder)
    path.unlink()
    path.mkdir()
    assert not write_card(folder, model) and path.is_dir()


@pytest.mark.parametrize(
    ("run", "bases", "datasets", "licence"),
    [
        (None, (), (), "unknown"),
        ("train: [", (), (), "unknown"),
        ("- 1", (), (), "unknown"),
        ({"data": 3, "model": [], "train": "x"}, (), (), "unknown"),
        ({"data": {"scenes": True}, "model": {"vision": {"name": "resnet10t"}}}, (), ("scenes",), "apache-2.0"),
        ({"data": {"scenes": True}, "model": {"init": "/weights/mine"}}, (), ("scenes",), "unknown"),
        ({"data": {"hub": "nlphuji/flickr30k"}}, (), ("nlphuji/flickr30k",), "unknown"),
        ({"data": {"hub": "imagefolder"}}, (), ("imagefolder",), "unknown"),
        ({"data": {"albef": ["/a/coco.json", "/a/vg.json"]}}, (), ("coco", "vg"), "unknown"),
        (
            {
                "model": {
                    "vision": {"name": "tf_efficientnet_lite0", "pretrained": True},
                    "text": {"name": "minilm-l6", "pretrained": True},
                },
                "data": {"scenes": True},
            },
            ("timm/tf_efficientnet_lite0.in1k", "sentence-transformers/all-MiniLM-L6-v2"),
            ("scenes",),
            "unknown",
        ),
        (
            {"model": {"vision": {"name": "not_of_timm", "pretrained": True, "checkpoint": "x.pth"}}},
            (),
            (),
            "unknown",
        ),
    ],
    ids=str,
)
def test_what_a_model_was_made_of(tmp_path, run, bases, datasets, licence):
    if run is not None:
        (tmp_path / "config.yaml").write_text(run if isinstance(run, str) else yaml.safe_dump(run))
    origin = origin_of(tmp_path)
    assert (origin.base_models, origin.datasets, origin.license) == (bases, datasets, licence)


@pytest.mark.parametrize(
    "metrics",
    [
        "{",
        "[]",
        {"dual": 3},
        {"dual": {"i2t": {}}},
        {"dual": HEADS},
        {**METRICS, "training": {}},
        {**METRICS, "k": "x"},
    ],
    ids=str,
)
def test_damaged_figures_are_left_out(tmp_path, metrics):
    folder = saved(tmp_path / "mine", metrics=metrics)
    assert not recalls(folder) and "## Results" not in card(folder).text


def test_what_a_run_started_from_is_followed_through_the_runs_before_it(tmp_path):
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "second" / "best"
    saved(first)
    second.mkdir(parents=True)
    (second.parent / "config.yaml").write_text(yaml.safe_dump({"model": {"init": "runs/first"}}))
    assert origin_of(second).base_models == ("openai/clip-vit-base-patch16",)
    (first / "config.yaml").write_text(yaml.safe_dump({"model": {"init": str(first)}}))  # round and round
    assert origin_of(second).base_models == ()
    assert origin_of("me/some-model").base_models == ("me/some-model",)


@pytest.mark.slow
def test_a_training_run_leaves_a_card(tmp_path):
    table = write_table(tmp_path / "data", {"train": range(16), "val": range(16, 24)})
    metrics = train(tmp_path, data__table=str(table), data__images=str(table.parent / "images"), train__license="mit")
    folder = tmp_path / "run"
    assert card(folder).data.license == "mit" and card(folder).data.datasets == ["data"]
    assert recalls(folder)["reranked_t2i_recall@5"] == round(metrics["reranked"]["t2i"]["r5"], 2)
    weight = json.loads((folder / "config.json").read_text())["similarity_weight"]
    assert metrics["similarity_weight"] == weight
    shown = re.search(r"weight w = (\S+) of", card(folder).text)
    assert shown and float(shown[1]) == pytest.approx(weight, rel=1e-3)
    assert f"- steps: {metrics['training']['steps']}" in card(folder).text


# The hub


class Hub:
    """In the place of `HfApi`: one repository, which keeps what is sent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.created = folder, []
        folder.mkdir()

    def __call__(self, token: Any = None) -> Hub:
        self.token = token
        return self

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.created.append((repo_id, private))
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def file_exists(self, repo_id: str, name: str, *, revision: str | None) -> bool:
        return (self.folder / name).is_file()

    def hf_hub_download(self, repo_id: str, name: str, *, revision: str | None) -> str:
        return str(self.folder / name)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, revision: str | None) -> Any:
        for file in Path(folder_path).iterdir():
            (self.folder / file.name).write_bytes(file.read_bytes())
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = Hub(tmp_path / "hub")
    monkeypatch.setattr(publishing, "HfApi", fake)
    return fake


def test_the_hub_gets_model_processor_and_card_and_nothing_else_of_a_run(tmp_path, hub):
    retriever = Retriever.from_pretrained(saved(tmp_path / "mine"), device="cpu")
    assert retriever.push_to_hub("pets", private=True, token="abc") == "https://hub/me/pets/commit/1"
    assert hub.created == [("pets", True)] and hub.token == "abc"
    names = {file.name for file in hub.folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json", "README.md"} <= names
    assert not names & {"config.yaml", "metrics.json"}
    assert card(hub.folder).data.model_name == "pets" and 'from_pretrained("me/pets")' in example(hub.folder)
    assert recalls(hub.folder)["reranked_i2t_recall@1"] == 50.0
    again = Retriever.from_pretrained(hub.folder, device="cpu")
    pairs = [("a red circle", picture(1))]
    assert again.predict(pairs) == pytest.approx(retriever.predict(pairs), abs=1e-6)


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    retriever = Retriever.from_pretrained(saved(tmp_path / "mine"), device="cpu")
    api = HfApi(endpoint="http://127.0.0.1:9", token="abc")
    monkeypatch.setattr(publishing, "HfApi", lambda token: api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match="refused"):
        retriever.push_to_hub("me/pets")


def test_the_card_that_somebody_wrote_goes_to_the_hub_and_one_there_stays(tmp_path, hub):
    folder = saved(tmp_path / "mine")
    retriever = Retriever.from_pretrained(folder, device="cpu")
    retriever.push_to_hub("me/pets")
    (hub.folder / "README.md").write_text("# Written on the hub\n")
    retriever.push_to_hub("me/pets")
    assert (hub.folder / "README.md").read_text() == "# Written on the hub\n"
    (folder / "README.md").write_text("# Written here\n")
    retriever.push_to_hub("me/pets")
    assert (hub.folder / "README.md").read_text() == "# Written here\n"


def test_an_exported_dual_encoder_is_pushed_and_saved_likewise(tmp_path, hub):
    export_dual(saved(tmp_path / "mine"), tmp_path / "dual")
    (tmp_path / "dual" / "README.md").write_text("# Mine\n")
    retriever = Retriever.from_pretrained(tmp_path / "dual", device="cpu")
    retriever.push_to_hub("me/dual")
    retriever.save_pretrained(tmp_path / "copy")
    for folder in (hub.folder, tmp_path / "copy"):
        assert DualEncoder.from_pretrained(folder) and (folder / "README.md").read_text() == "# Mine\n"
