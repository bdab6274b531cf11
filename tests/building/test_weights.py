import errno
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from loopitr.building import weights as pretrained

LITE0 = "tf_efficientnet_lite0"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "backbones" / f"{LITE0}.safetensors"

needs_vision = pytest.mark.skipif(
    pretrained.load_package_vision(LITE0) is None, reason=f"needs the image package: {pretrained.INSTALL}"
)
needs_text = pytest.mark.skipif(
    pretrained.package_text_folder(MINILM) is None, reason=f"needs the text package: {pretrained.INSTALL}"
)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins of both packages that fail when imported; returns lite0's state dict with random weights."""
    lite0 = timm.create_model(LITE0).state_dict()
    for table, (package, path) in (
        ("VISION_PACKAGES", ("stand_in_vision", "models/weights.pth")),
        ("TEXT_PACKAGES", ("stand_in_text", "model")),
    ):
        root = tmp_path / "site" / package
        (root / path).parent.mkdir(parents=True)
        (root / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.setattr(pretrained, table, {LITE0 if table.startswith("VISION") else MINILM: (package, path)})
    (tmp_path / "site/stand_in_text/model").mkdir()
    torch.save(
        {f"theirs.{i}": value for i, value in enumerate(lite0.values())},
        tmp_path / "site/stand_in_vision/models/weights.pth",
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    return lite0


@pytest.mark.parametrize("name", [LITE0, f"{LITE0}.in1k"])
def test_package_vision_is_renamed_by_order_and_loads_strictly(packages, name):
    weights = pretrained.load_package_vision(name)
    model = timm.create_model(LITE0, num_classes=0)
    model.load_state_dict(weights, strict=True)
    assert set(packages) - set(weights) == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, packages[key]) for key, value in model.state_dict().items())


def test_tensors_in_another_order_or_number_are_refused():
    weights = dict(timm.create_model(LITE0).state_dict())
    first = weights.pop("conv_stem.weight")
    with pytest.raises(ValueError, match="has 296 tensors, the weights given have 295"):
        pretrained.in_timm_names(LITE0, weights)
    with pytest.raises(ValueError, match=r"bn1.weight is \[32\], but conv_stem.weight of .* is \[32, 3, 3, 3\]"):
        pretrained.in_timm_names(LITE0, {**weights, "conv_stem.weight": first})


def test_models_that_no_package_carries_give_none():
    assert pretrained.load_package_vision("vit_tiny_patch16_224") is None
    assert pretrained.vision_weights("vit_tiny_patch16_224") is None
    assert pretrained.package_text_folder("bert-base-uncased") is None


def test_packages_that_are_not_installed_give_none(monkeypatch):
    monkeypatch.setattr(pretrained, "VISION_PACKAGES", {LITE0: ("loopitr_no_such_package", "weights.pth")})
    monkeypatch.setattr(pretrained, "TEXT_PACKAGES", {MINILM: ("loopitr_no_such_package", "model")})
    assert pretrained.vision_weights(LITE0) is None
    assert pretrained.text_source("minilm-l6") == MINILM


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_explicit_file_goes_before_the_package(packages, tmp_path, suffix):
    own = {key: value + 1 for key, value in packages.items()}
    file = tmp_path / f"own{suffix}"
    if suffix == ".pth":  # A DDP training script leaves it so.
        torch.save({"state_dict": {f"module.{key}": value for key, value in own.items()}}, file)
    else:
        save_file(own, file)
    weights = pretrained.vision_weights(LITE0, file)
    assert set(weights) == set(own) - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, own[key]) for key, value in weights.items())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file .*absent.pth.* tf_efficientnet_lite0"):
        pretrained.vision_weights(LITE0, str(tmp_path / "absent.pth"))
    with pytest.raises(FileNotFoundError, match="no model folder .*absent"):
        pretrained.text_source(str(tmp_path / "absent"))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="could run code"):
        pretrained.vision_weights(LITE0, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_classifiers_of_a_distilled_vit_are_dropped(tmp_path):
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1)
    save_file(model.state_dict(), tmp_path / "deit.safetensors")
    weights = pretrained.vision_weights("deit_tiny_distilled_patch16_224", tmp_path / "deit.safetensors")
    timm.create_model("deit_tiny_distilled_patch16_224", depth=1, num_classes=0).load_state_dict(weights, strict=True)


def test_text_source_prefers_a_folder_then_a_package_then_the_hub(packages, tmp_path, monkeypatch):
    packaged = str(tmp_path / "site/stand_in_text/model")
    for name in (MINILM, "all-MiniLM-L6-v2", "minilm-l6"):
        assert pretrained.text_source(name) == packaged
    assert pretrained.text_source("bert-base-uncased") == "bert-base-uncased"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm-l6").mkdir()
    assert pretrained.text_source("minilm-l6") == "minilm-l6"


def test_hub_access_says_what_to_install_in_one_line():
    with pytest.raises(OSError) as raised, pretrained.hub_access("minilm-l6"):
        raise FileNotFoundError("cannot find\nthe requested files")
    message = str(raised.value)
    assert "\n" not in message and "'minilm-l6'" in message and pretrained.INSTALL in message


def test_hub_access_leaves_other_errors_alone():
    with pytest.raises(OSError, match="No space left"), pretrained.hub_access("minilm-l6"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyError), pretrained.hub_access("minilm-l6"):
        raise KeyError("model_type")


@needs_vision
@pytest.mark.skipif(not SHARED.is_file(), reason=f"{SHARED.name} in timm's names is not beside this checkout")
def test_the_real_image_package_equals_timms_own_weights():
    expected = load_file(SHARED)
    weights = pretrained.load_package_vision(LITE0)
    assert set(weights) == set(expected) - {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())


@needs_vision
def test_the_real_image_package_fits_the_model_strictly():
    timm.create_model(LITE0, num_classes=0).load_state_dict(pretrained.vision_weights(LITE0), strict=True)


@needs_text
def test_the_real_text_package_understands_paraphrases(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = pretrained.text_source("minilm-l6")
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    captions = ["a dog runs across the grass", "a puppy is running on a lawn", "two men repair a car engine"]
    inputs = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    similarity = pooled @ pooled.T
    assert similarity[0, 1] > 0.6 > 0.2 > similarity[0, 2]


# Weights into a module


def norm():
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


def load(module, weights, *, extra_allowed=False, names=None):
    pretrained.load_weights(module, weights, extra_allowed=extra_allowed, error=repr, names=names)


def test_weights_fill_a_module_under_their_own_names_or_others():
    weights = {name: torch.rand_like(value, dtype=torch.float32) for name, value in norm().state_dict().items()}
    weights["1.num_batches_tracked"] = torch.tensor(7)
    first, second = norm(), norm()
    load(first, weights)
    load(second, {name.upper(): value for name, value in weights.items()}, names={x: x.upper() for x in weights})
    for module in (first, second):
        assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())


def test_extra_weights_are_left_alone_only_where_that_is_allowed():
    module = norm()
    weights = {**norm().state_dict(), "more": torch.ones(1)}
    with pytest.raises(ValueError, match=r"missing=\[\], left_over=\['more'\], other_shape={}"):
        load(module, weights)
    load(module, weights, extra_allowed=True)
    assert torch.equal(module[0].weight, weights["0.weight"])


def test_only_the_count_of_batches_may_be_missing():
    weights = norm().state_dict()
    del weights["1.num_batches_tracked"]
    module = norm()
    load(module, weights)
    assert torch.equal(module[0].weight, weights["0.weight"]) and module[1].num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"missing=\['1.running_var'\]"):
        load(module, {name: value for name, value in weights.items() if name != "1.running_var"})


def test_weights_that_do_not_fit_change_nothing():
    module, other = norm(), {**norm().state_dict(), "0.bias": torch.ones(4)}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"other_shape={'0.bias': \(\[4\], \[3\]\)}"):
        load(module, other, extra_allowed=True)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_weights_in_eight_bits_are_refused():
    """torch would copy them into the module's floats."""
    module, weights = norm(), norm().state_dict()
    for kind in (torch.int8, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"other_type={{'0.weight': '{str(kind)[6:]}'}}"):
            load(module, {**weights, "0.weight": weights["0.weight"].to(kind)})
    load(module, {**weights, "0.weight": weights["0.weight"].half()})
