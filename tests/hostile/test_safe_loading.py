"""Model folders that hold code: whatever loads one runs none of it, and asks nobody whether it may."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.hostile_tars import Evidence
from helpers.tiny_building import build, save_bert, save_tiny, with_text, with_vit
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from loopitr import LoopITRModel, LoopITRProcessor, load
from loopitr.building.clip import load_pair
from loopitr.convert.weights import read_checkpoint
from loopitr.data import scene_vocabulary
from loopitr.models.processing import word_tokenizer
from loopitr.training.grid import read_grid

CODE = """
from pathlib import Path
Path({evidence!r}).touch()
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, CLIPImageProcessor
class Evil(BertConfig):
    model_type = "evil"
class EvilModel(BertModel):
    config_class = Evil
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
class EvilImages(CLIPImageProcessor):
    pass
"""
REMOTE = {
    "AutoConfig": "evil.Evil",
    "AutoModel": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
    "AutoImageProcessor": "evil.EvilImages",
    "AutoProcessor": "evil.Evil",
}


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """A file that is made where code runs; a question on the terminal would be answered with yes."""
    path = tmp_path / "it ran"
    questions = []
    monkeypatch.setattr(builtins, "input", lambda *prompt: questions.append(prompt) or "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield path
    assert not path.exists() and not questions
    assert not (tmp_path / "passwd").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_tiny(folder / "model")
    dual = LoopITRModel.from_pretrained(folder / "model").dual_encoder()
    dual.save_pretrained(folder / "dual")
    LoopITRProcessor.from_pretrained(folder / "model").save_pretrained(folder / "dual")
    save_bert(folder / "text")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 60, "max_position_embeddings": 24},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder / "pair")
    word_tokenizer(scene_vocabulary(), max_length=24).save_pretrained(folder / "pair")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder / "pair")
    return folder


def of_text(folder):
    return build(with_text(str(folder), num_layers=2))


# Everything else that reads a folder of this package's (Retriever, model.init, the classes) goes through the first.
LOADERS = {
    "load": ("model", load),
    "load a dual": ("dual", load),
    "LoopITRProcessor": ("model", LoopITRProcessor.from_pretrained),
    "model.text.name": ("text", of_text),
    "model.pair": ("pair", lambda folder: load_pair(str(folder))),
}


def edit(path, **changes):
    if path.is_file():
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def remote_code(folder, evidence):
    """All that transformers would follow to a class of the folder's own."""
    (folder / "evil.py").write_text(CODE.format(evidence=str(evidence)))
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        edit(folder / name, auto_map=REMOTE)


def odd_classes(folder, evidence):
    remote_code(folder, evidence)
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    edit(folder / "preprocessor_config.json", image_processor_type="EvilImages", processor_class="Evil")
    edit(folder / "processor_config.json", image_processor_type="EvilImages", processor_class="Evil")


def odd_type(folder, evidence):
    remote_code(folder, evidence)
    edit(folder / "config.json", model_type="evil")


def odd_parts(folder, evidence):
    remote_code(folder, evidence)
    config = json.loads((folder / "config.json").read_text())
    for part in ("text", "text_config", "vision_config"):
        if part in config:
            edit(folder / "config.json", **{part: {**config[part], "model_type": "evil", "auto_map": REMOTE}})


def module_names(folder, evidence):
    """Names of classes that are importable, and harmful if they are called."""
    remote_code(folder, evidence)
    edit(folder / "tokenizer_config.json", tokenizer_class="os.system")
    edit(
        folder / "config.json",
        architectures=["os.system"],
        _attn_implementation="evil/kernel",
        attn_implementation="evil/kernel",
    )


def pickled_weights(folder, evidence):
    (folder / "pytorch_model.bin").write_bytes(Evidence(evidence).saved())
    (folder / "model.safetensors").unlink()


def pickle_called_safetensors(folder, evidence):
    (folder / "model.safetensors").write_bytes(Evidence(evidence).saved())


def index_to_elsewhere(folder, evidence):
    (folder / "shard.bin").write_bytes(Evidence(evidence).saved())
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name, file in (("model.safetensors", "../../shard.bin"), ("pytorch_model.bin", "shard.bin")):
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, file)}
        (folder / f"{name}.index.json").write_text(json.dumps(index))


def adapter(folder, evidence):
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder / "base"), "auto_mapping": REMOTE})
    )
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": REMOTE}))
    (folder / "adapter_model.bin").write_bytes(Evidence(evidence).saved())


def pickled_tokenizer(folder, evidence):
    for name in ("tokenizer.json", "tokenizer.model", "spiece.model", "added_tokens.json", "vocab.txt"):
        (folder / name).write_bytes(Evidence(evidence).pickled())


def template_with_code(folder, evidence):
    code = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% import 'os' as os %}"
    edit(folder / "tokenizer_config.json", chat_template=code)
    (folder / "chat_template.jinja").write_text(code)


def links_out(folder, evidence):
    """Its parts are links to files elsewhere, some of which are no JSON or never end."""
    for name, target in (("tokenizer.json", "/etc/passwd"), ("config.json", "/dev/zero"), ("vocab.txt", "/dev/zero")):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)


def quantised(folder, evidence):
    for method in ("bitsandbytes", "evil", "gptq"):
        edit(folder / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})


def generation(folder, evidence):
    remote_code(folder, evidence)
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "evil", "auto_map": REMOTE}))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(evidence=str(evidence)))


HARM = (
    *(remote_code, odd_classes, odd_type, odd_parts, module_names, pickled_weights, pickle_called_safetensors),
    *(index_to_elsewhere, adapter, pickled_tokenizer, template_with_code, links_out, quantised, generation),
)


@pytest.mark.parametrize("harm", HARM, ids=[harm.__name__ for harm in HARM])
def test_no_loader_runs_what_a_folder_holds(saved, tmp_path, evidence, harm):
    for number, (name, (kind, loader)) in enumerate(LOADERS.items()):
        folder = tmp_path / str(number) / "x"
        shutil.copytree(saved / kind, folder)
        harm(folder, evidence)
        try:
            loader(folder)
        except (ValueError, OSError) as error:
            assert str(error), name
        assert not evidence.exists(), name


def test_the_code_would_run(saved, tmp_path, evidence):
    from transformers import AutoConfig

    folder = tmp_path / "x"
    shutil.copytree(saved / "text", folder)
    odd_type(folder, evidence)
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert evidence.exists()
    evidence.unlink()
    torch.load(_written(folder / "x.bin", Evidence(evidence).saved()), weights_only=False)
    assert evidence.exists()
    evidence.unlink()


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["x.pth", "x.bin", "x.pt", "x.safetensors", "x.ckpt"])
def test_a_checkpoint_runs_nothing(tmp_path, evidence, name):
    for content in (Evidence(evidence).saved(), Evidence(evidence).pickled()):
        path = _written(tmp_path / name, content)
        with pytest.raises(ValueError):
            read_checkpoint(path)
        with pytest.raises((ValueError, OSError)):
            build(with_vit(32, checkpoint=str(path)))


def test_a_grid_constructs_nothing(tmp_path, evidence):
    path = tmp_path / "grid.yaml"
    path.write_text(f"base: tiny.yaml\nrows: !!python/object/apply:os.mkdir ['{evidence}']\n")
    with pytest.raises(ValueError):
        read_grid(path)
