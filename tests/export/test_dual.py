"""The exported dual encoder: the same embeds, no fusion weights, loadable alone."""

import json

import pytest
import torch
from helpers.support import CNN, images, ragged_texts, tiny_model
from helpers.tiny_gallery import captions, picture, tiny_processor
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor, BertConfig, BertModel

from loopitr import DualEncoder, LoopITRModel
from loopitr.building.folders import load_saved
from loopitr.export.dual import export_dual


def embeds(model, size=32):
    model.eval()
    with torch.no_grad():
        return model.get_image_features(images(size=size)), model.get_text_features(*ragged_texts())


def saved_run(folder, **kwargs):
    model = tiny_model(**kwargs)
    model.save_pretrained(folder)
    tiny_processor(model.config.vision["image_size"]).save_pretrained(folder)
    return model


@pytest.mark.parametrize(("vision", "style", "size"), [(None, "late", 32), (None, "shared", 32), (CNN, "late", 64)])
def test_embeds_are_bit_equal(tmp_path, vision, style, size):
    model = saved_run(tmp_path / "run", vision=vision, style=style)
    export_dual(tmp_path / "run", tmp_path / "dual")
    loaded = [DualEncoder.from_pretrained(tmp_path / "dual"), AutoModel.from_pretrained(tmp_path / "dual")]
    for dual in loaded:
        assert type(dual) is DualEncoder
        for ours, theirs in zip(embeds(model, size), embeds(dual, size), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(model.dual.scale, dual.scale)


def test_nothing_of_the_fusion_head_is_written(tmp_path):
    model = saved_run(tmp_path / "run", mlm_head=True)
    export_dual(tmp_path / "run", tmp_path / "dual")
    with safe_open(tmp_path / "dual" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == set(model.dual.state_dict())
    assert not any("fusion" in name or "itm" in name or "mlm" in name for name in names)
    assert "fusion" not in json.loads((tmp_path / "dual" / "config.json").read_text())


def test_the_processor_goes_with_it(tmp_path):
    saved_run(tmp_path / "run")
    export_dual(tmp_path / "run", tmp_path / "dual")
    loaded = AutoProcessor.from_pretrained(tmp_path / "dual")
    given = {"images": [picture(1)], "text": list(captions(1, 3))}
    for key, value in tiny_processor()(**given).items():
        assert torch.equal(loaded(**given)[key], value), key
    card = (tmp_path / "dual" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: loopitr\n") and "Retriever.from_pretrained" in card and "{" not in card


def test_a_model_in_memory(tmp_path):
    model = tiny_model()
    dual = export_dual(model, tmp_path, processor=tiny_processor())
    assert dual is model.dual_encoder()  # The weights are shared, not copied.
    assert torch.equal(embeds(load_saved(tmp_path).model)[0], embeds(model)[0])
    with pytest.raises(ValueError, match="needs its processor"):
        export_dual(model, tmp_path)


@pytest.mark.parametrize("inside", ["best", "model"])
def test_a_run_folder_may_hold_its_model_in_a_subfolder(tmp_path, inside):
    model = saved_run(tmp_path / inside)
    export_dual(tmp_path, tmp_path / "dual")
    assert torch.equal(embeds(DualEncoder.from_pretrained(tmp_path / "dual"))[1], embeds(model)[1])


def test_a_run_is_never_overwritten_but_an_export_may_be(tmp_path):
    saved_run(tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a 'loopitr' model.*choose another folder"):
        export_dual(tmp_path / "run", tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    for _ in range(2):
        export_dual(tmp_path / "run", tmp_path / "dual")
    with pytest.raises(ValueError, match="is a dual encoder already"):
        export_dual(tmp_path / "dual", tmp_path / "again")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="is not a folder"):
        export_dual(tmp_path / "run", tmp_path / "file")
    (tmp_path / "run").rename(tmp_path / "best")
    (tmp_path / "outer").mkdir()
    (tmp_path / "best").rename(tmp_path / "outer" / "best")
    with pytest.raises(ValueError, match="outer is the folder of a run, with its model in best/"):
        export_dual(tmp_path / "outer", tmp_path / "outer")
    with pytest.raises(ValueError, match="the output has no name"):
        export_dual(tmp_path / "outer", "")


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    saved_run(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    export_dual(tmp_path / "run", "~/dual")
    assert DualEncoder.from_pretrained(tmp_path / "dual") and not (tmp_path / "~").exists()


def test_what_holds_no_such_model_is_named(tmp_path):
    with pytest.raises(OSError, match="no model folder .*nowhere"):
        load_saved(tmp_path / "nowhere")
    with pytest.raises(OSError, match="holds no model"):
        load_saved(tmp_path)
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'bert' model, wanted 'loopitr' or 'loopitr_dual'"):
        load_saved(tmp_path)
    saved_run(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(OSError, match="damaged"):
        load_saved(tmp_path / "run")


def test_a_saved_model_comes_in_the_precision_asked_for(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        loaded = load_saved(tmp_path, dtype=dtype)
        assert isinstance(loaded.model, LoopITRModel) and not loaded.model.training
        assert loaded.model.dtype == expected
