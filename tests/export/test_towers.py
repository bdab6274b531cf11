"""One tower alone: the same embeds, and nothing of the other one is read or written."""

import json

import pytest
import torch
from helpers.support import CNN, SIZES, images, ragged_texts, tiny_model
from helpers.tiny_gallery import captions, picture, tiny_processor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer

import loopitr.building.towers as towers
from loopitr import ImageTower, TextTower, export_dual, export_tower
from loopitr.building.folders import load_saved
from loopitr.export.source import read_source


def saved_run(folder, **kwargs):
    model = tiny_model(**kwargs)
    model.save_pretrained(folder)
    tiny_processor(model.config.vision["image_size"]).save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def own_and_exported(model, tower, folder, size=32):
    loaded = AutoModel.from_pretrained(folder).eval()
    if tower == "image":
        assert type(loaded) is ImageTower
        pixels = images(size=size)
        return model.get_image_features(pixels), loaded.get_image_features(pixels), loaded(pixels)
    assert type(loaded) is TextTower
    return model.get_text_features(*ragged_texts()), loaded.get_text_features(*ragged_texts()), loaded(*ragged_texts())


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"vision": CNN, "projection": "mlp", "projection_dropout": 0.1}, {"style": "shared", "text_pooling": "first"}],
    ids=["vit", "cnn", "shared"],
)
def test_embeds_are_bit_equal(tmp_path, tower, changes):
    model = saved_run(tmp_path / "run", **changes)
    export_dual(tmp_path / "run", tmp_path / "dual")
    for source in (tmp_path / "run", tmp_path / "dual", model):
        export_tower(source, tmp_path / "tower", tower, processor=tiny_processor(model.config.vision["image_size"]))
        own, *exported = own_and_exported(model, tower, tmp_path / "tower", model.config.vision["image_size"])
        assert all(torch.equal(own, given) for given in exported)
    part = "vision" if tower == "image" else "text"
    with safe_open(tmp_path / "tower" / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {part, f"{part}_projection"}  # noqa: SIM118
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    assert not {"vision", "text", "fusion"} - {part} & set(config)


def test_rotary_positions_are_as_precise_as_in_the_whole_model_in_half_precision(tmp_path):
    ids = {"pad_token_id": 0, "cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    text = {"model_type": "modernbert", **SIZES, **ids}
    model = saved_run(tmp_path, text=text)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    whole = load_saved(tmp_path)
    of_model = read_source(whole.model, processor=whole.processor, tower="text").model
    expected = dict(whole.model.dual.text.named_buffers(prefix="text"))
    assert any(name.endswith("inv_freq") for name in expected)
    for part in (towers.load_tower(tmp_path, "text")[0], of_model):
        torch.testing.assert_close(dict(part.named_buffers()), expected, rtol=0, atol=0)
    exact = read_source(tmp_path, tower="text", dtype=torch.float32).model
    assert {tensor.dtype for tensor in exact.parameters()} == {torch.float32}


def test_a_copy_of_other_weights_beside_the_models_is_not_read(tmp_path):
    model = saved_run(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "model_old.safetensors")
    for tower in ("image", "text"):
        loaded, _ = towers.load_tower(tmp_path, tower)
        assert all(torch.equal(value, model.dual.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_the_other_towers_weights_are_not_read(tmp_path, monkeypatch):
    saved_run(tmp_path / "run", mlm_head=True)
    read = []

    class Watched:
        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *raised):
            self.file.__exit__(*raised)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(towers, "safe_open", Watched)
    export_tower(tmp_path / "run", tmp_path / "text", "text")
    assert read and all(name.startswith(("dual.text.", "dual.text_projection.")) for name in read)
    # They may be missing altogether.
    file = tmp_path / "run" / "model.safetensors"
    kept = {name: value for name, value in load_file(file).items() if name in read}
    save_file(kept, file, metadata={"format": "pt"})
    export_tower(tmp_path / "run", tmp_path / "again", "text")
    with pytest.raises(OSError, match="holds no weights of an image tower"):
        export_tower(tmp_path / "run", tmp_path / "image", "image")
    assert not (tmp_path / "image").exists()


def test_what_reads_its_inputs_goes_with_it(tmp_path):
    saved_run(tmp_path / "run")
    for tower in ("image", "text"):
        export_tower(tmp_path / "run", tmp_path / tower, tower)
        card = (tmp_path / tower / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: loopitr\n") and "{" not in card
    for auto in (AutoImageProcessor, AutoProcessor):
        assert "LoopITR" not in type(auto.from_pretrained(tmp_path / "image")).__name__
    assert "LoopITR" not in type(AutoProcessor.from_pretrained(tmp_path / "text")).__name__
    pixels = AutoImageProcessor.from_pretrained(tmp_path / "image")(picture(1), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, tiny_processor()(images=[picture(1)])["pixel_values"])
    texts = list(captions(1, 3))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "text")(texts, padding=True, return_tensors="pt")
    assert torch.equal(tokens["input_ids"], tiny_processor()(text=texts)["input_ids"])


def test_adapters_are_merged(tmp_path):
    from loopitr.models.lora import add_lora

    model = tiny_model()
    add_lora(model, text_rank=2, vision_rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(3))
    model.eval().save_pretrained(tmp_path / "run")
    tiny_processor().save_pretrained(tmp_path / "run")
    for tower in ("image", "text"):
        export_tower(tmp_path / "run", tmp_path / tower, tower)
        own, exported, _ = own_and_exported(model, tower, tmp_path / tower)
        torch.testing.assert_close(own, exported, atol=1e-6, rtol=0)
        assert not json.loads((tmp_path / tower / "config.json").read_text()).get("lora")


def test_bad_input_is_named(tmp_path):
    model = saved_run(tmp_path / "run")
    with pytest.raises(ValueError, match="tower must be one of image, text, got 'audio'"):
        export_tower(model, tmp_path / "out", "audio", processor=tiny_processor())
    with pytest.raises(ValueError, match="needs its processor"):
        export_tower(model, tmp_path / "out", "text")
    with pytest.raises(ValueError, match="holds a 'loopitr' model, which would be overwritten"):
        export_tower(tmp_path / "run", tmp_path / "run", "text")
    with pytest.raises(OSError, match="no model folder"):
        export_tower(tmp_path / "none", tmp_path / "out", "text")
    export_tower(tmp_path / "run", tmp_path / "text", "text")
    with pytest.raises(ValueError, match="holds a 'loopitr_text' model, wanted"):
        export_tower(tmp_path / "text", tmp_path / "out", "text")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(OSError, match="damaged"):
        export_tower(tmp_path / "run", tmp_path / "out", "text")
    assert not (tmp_path / "out").exists()
