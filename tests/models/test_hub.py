"""Models by hub id, out of a hub cache made by hand, and what transformers' classes need for the way back."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_building import save_tiny
from helpers.tiny_outputs import assert_same_tensors
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from loopitr import DualEncoder, DualEncoderConfig, LoopITRConfig, LoopITRModel, LoopITRProcessor
from loopitr.building.build import build_model
from loopitr.building.folders import load_saved
from loopitr.building.options import ModelOptions
from loopitr.export.dual import export_dual

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds `some/model` and `some/dual`, and no hub behind it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folders = [tmp_path / "cache" / f"models--some--{name}" for name in ("model", "dual")]
    for folder in folders:
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
    save_tiny(folders[0] / "snapshots" / COMMIT)
    export_dual(folders[0] / "snapshots" / COMMIT, folders[1] / "snapshots" / COMMIT)
    return tmp_path / "cache"


def test_a_hub_id_is_loaded_by_our_classes_and_the_auto_classes(cache):
    expected = LoopITRModel.from_pretrained(cache / "models--some--model" / "snapshots" / COMMIT)
    for kind in (LoopITRModel, AutoModel):
        loaded = kind.from_pretrained("some/model", cache_dir=cache)
        assert type(loaded) is LoopITRModel
        assert_same_tensors(loaded, expected)
    for kind in (DualEncoder, AutoModel):
        loaded = kind.from_pretrained("some/dual", cache_dir=cache, revision="main")
        assert type(loaded) is DualEncoder and torch.equal(loaded.scale, expected.dual.scale)
    for kind in (LoopITRProcessor, AutoProcessor):
        assert type(kind.from_pretrained("some/model", cache_dir=cache)) is LoopITRProcessor


def test_a_hub_id_is_evaluated_exported_and_trained_on(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    saved = load_saved("some/model")
    assert isinstance(saved.model, LoopITRModel) and isinstance(load_saved("some/dual").model, DualEncoder)
    assert_same_tensors(export_dual("some/model", tmp_path / "dual"), saved.model.dual_encoder())
    assert_same_tensors(build_model(ModelOptions(init="some/model"))[0], saved.model)


@pytest.mark.parametrize("shards", [1, 2])
def test_weights_in_eight_bits_are_refused_by_hub_id_too(cache, shards):
    folder = cache / "models--some--dual" / "snapshots" / COMMIT
    model = DualEncoder.from_pretrained("some/dual", cache_dir=cache)
    if shards > 1:
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        assert_same_tensors(DualEncoder.from_pretrained("some/dual", cache_dir=cache), model)
    for path in folder.glob("model*.safetensors"):
        weights = {
            name: tensor.to(torch.int8) if tensor.ndim > 1 else tensor for name, tensor in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="some/dual: .*weight is saved as I8"):
        DualEncoder.from_pretrained("some/dual", cache_dir=cache)


def test_an_unknown_hub_id_is_named(cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for load in (load_saved, lambda name: build_model(ModelOptions(init=name))):
        with pytest.raises(OSError, match="no weights for 'some/nosuch': not cached, and the hub cannot be reached"):
            load("some/nosuch")


@pytest.mark.parametrize("kind", [LoopITRModel, DualEncoder, LoopITRProcessor, LoopITRConfig, DualEncoderConfig])
def test_everything_can_be_pushed_to_the_hub(kind):
    assert callable(kind.push_to_hub)
