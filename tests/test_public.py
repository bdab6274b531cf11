"""`import loopitr`: its names, what it does not import, and the examples in the docstrings."""

import ast
import doctest
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.recipe_process import environment
from helpers.tiny_building import save_tiny
from helpers.tiny_run import reset_accelerate

import loopitr
import loopitr.data
import loopitr.evaluation

HEAVY = ("timm", "torchvision", "datasets", "accelerate", "matplotlib")
# "as in the example of `NAME`": an example that goes on with what another one has made.
GOES_ON = re.compile(r"Example \(.* as in the example of `(\w+)`\):")


def run(code: str, *arguments: object) -> str:
    """What `python -c code arguments` prints."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def imported_for_types(package) -> dict[str, str]:
    """Name -> module of what a package imports under `if TYPE_CHECKING:`."""
    names = {}
    for node in ast.walk(ast.parse(Path(package.__file__).read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                module = "." * statement.level + statement.module
                names.update({alias.name: module for alias in statement.names})
    return names


@pytest.mark.parametrize("package", [loopitr, loopitr.data, loopitr.evaluation], ids=lambda package: package.__name__)
def test_lazy_names_are_what_type_checkers_see(package):
    assert imported_for_types(package) == package._MODULES
    assert list(package._MODULES) == sorted(package._MODULES) == package.__all__
    assert set(package.__all__) <= set(dir(package))
    for name, module in package._MODULES.items():
        assert name != module.rpartition(".")[2], "once the module is imported, it takes the place of its namesake"
        value = getattr(package, name)
        assert value is getattr(importlib.import_module(module, package.__name__), name)
        assert value.__doc__ or package is not loopitr, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        package.Nonsense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        exec(f"from {package.__name__} import Nonsense")


def run_example(name: str) -> dict:
    """Run the example of a public name, after the one that it goes on from; returns the variables that it leaves."""
    documented = getattr(loopitr, name)
    start = GOES_ON.search(documented.__doc__)
    variables = run_example(start[1]) if start else {}
    (example,) = doctest.DocTestFinder(recurse=False).find(documented, name, globs=variables)
    assert example.examples, f"{name} has no example"
    assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
    return example.globs


EXPORTS = ("export_onnx", "export_sentence_transformers")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in EXPORTS else n for n in loopitr.__all__]
)
def test_examples_run(name):
    reset_accelerate()
    try:
        run_example(name)
    finally:
        reset_accelerate()


def test_the_examples_of_the_page_on_the_package_run():
    (example,) = doctest.DocTestFinder(recurse=False).find(loopitr, "loopitr", globs={})
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_importing_the_package_imports_nothing_heavy():
    wanted = (*HEAVY, "torch", "transformers", "numpy")
    assert run(f"import sys, loopitr; print([name for name in {wanted} if name in sys.modules])") == "[]"


@pytest.mark.parametrize("recipe", ["pretrain", "evaluate", "calibrate", "export_dual"])
def test_help_does_without_torch(recipe):
    code = """
import runpy, sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_path(f"recipes/{sys.argv[0]}.py", run_name="__main__")
except SystemExit as stop:
    print("status", stop.code, [name for name in ("torch", "transformers") if name in sys.modules])
""".replace("{sys.argv[0]}", recipe)
    text = run(code)
    assert "--config" in text and text.endswith("status 0 []")


CONFIG_FIRST = """
import sys, loopitr
from transformers import AutoConfig
print(type(AutoConfig.for_model("loopitr")).__name__, type(AutoConfig.for_model("loopitr_dual")).__name__)
"""
MODEL_FIRST = """
import sys, loopitr
from transformers import AutoModel, AutoProcessor
AutoModel, AutoProcessor  # This loads them, and our classes after them.
assert "loopitr.models.loop_model" in sys.modules and "timm" not in sys.modules
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__, type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)
"""
OURS_LAST = """
import sys
from transformers import AutoModel, AutoProcessor
AutoModel, AutoProcessor  # This loads them.
import loopitr
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__, type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)
"""
OURS_FIRST = """
import sys
from loopitr import DualEncoder, LoopITRModel, LoopITRProcessor
from transformers import AutoModel, AutoProcessor
assert type(AutoModel.from_pretrained(sys.argv[1])) is LoopITRModel
assert type(AutoProcessor.from_pretrained(sys.argv[1])) is LoopITRProcessor
"""
# SigLIP's module imports the Auto classes at its beginning, before the classes exist that our text backbone uses.
IN_THE_MIDDLE = """
import sys, loopitr
import transformers.models.siglip.modeling_siglip
from transformers import AutoModel
print(type(AutoModel.from_pretrained(sys.argv[1])).__name__)
"""


MODELS = sorted(f"loopitr.models.{file.stem}" for file in (Path(loopitr.__file__).parent / "models").glob("*.py"))
AUTO = ("transformers.models.auto.modeling_auto", "transformers.models.auto.processing_auto")
OURS_ALONE = f"""
import importlib, sys
for name in {MODELS}: importlib.import_module(name)
print([name for name in {AUTO} if name in sys.modules])
"""
PRINTED = {
    "config first": (CONFIG_FIRST, "LoopITRConfig DualEncoderConfig"),
    "model first": (MODEL_FIRST, "LoopITRModel LoopITRProcessor"),
    "ours last": (OURS_LAST, "LoopITRModel LoopITRProcessor"),
    "ours first": (OURS_FIRST, ""),
    "in the middle": (IN_THE_MIDDLE, "LoopITRModel"),
    "ours alone": (OURS_ALONE, "[]"),  # No module of ours loads the Auto classes that it registers with.
}
# What is slow to import is imported once: torch, and the parts of transformers that do not load the Auto classes.
EACH_IN_A_FORK = f"""
import contextlib, io, json, os, sys
import transformers.modeling_utils, transformers.tokenization_utils_base
assert not [name for name in sys.modules if name in {AUTO} or name.split(".")[0] in ("loopitr", "timm")]
codes = json.loads(sys.argv.pop())
for name, code in codes.items():
    if os.fork() == 0:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {{}})
        print(json.dumps([name, printed.getvalue().strip()]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


@pytest.fixture(scope="module")
def printed_by_order(tmp_path_factory) -> dict[str, str]:
    saved = save_tiny(tmp_path_factory.mktemp("saved"))
    lines = run(EACH_IN_A_FORK, saved, json.dumps({name: code for name, (code, _) in PRINTED.items()})).splitlines()
    return dict(json.loads(line) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("order", PRINTED)
def test_auto_classes_know_our_models_in_whatever_order_they_are_imported(order, printed_by_order):
    assert printed_by_order[order] == PRINTED[order][1]


def test_load_gives_model_and_processor(tmp_path):
    saved = save_tiny(tmp_path / "run" / "best")
    loaded = loopitr.load(tmp_path / "run")
    model, processor = loopitr.load(saved, device="cpu", dtype=torch.bfloat16)
    assert isinstance(loaded.model, loopitr.LoopITRModel) and isinstance(processor, loopitr.LoopITRProcessor)
    assert not loaded.model.training and model.dtype == torch.bfloat16 and loaded.model.dtype == torch.float32
    dual = loopitr.export_dual(loaded.model, tmp_path / "dual", processor=processor)
    assert isinstance(loopitr.load(tmp_path / "dual").model, loopitr.DualEncoder)
    ids = torch.tensor([[2, 7, 3]])
    assert torch.equal(loopitr.load(tmp_path / "dual").model.get_text_features(ids), dual.get_text_features(ids))


@pytest.mark.parametrize("device", ["toaster", "cuda:99", torch.device("cuda", 99)])
def test_a_device_that_cannot_be_used_is_named(tmp_path, device):
    with pytest.raises(ValueError, match=f"^device '{device}' cannot be used: .") as raised:
        loopitr.load(save_tiny(tmp_path / "saved"), device=device)
    assert "\n" not in str(raised.value)


def test_what_load_cannot_load(tmp_path):
    with pytest.raises(OSError, match="no model folder"):
        loopitr.load(tmp_path / "nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds a 'bert' model"):
        loopitr.load(tmp_path)
