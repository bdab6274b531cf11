"""What may import what (read from the source, nothing is imported), and two more rules that hold for every module."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder or root module of `loopitr`, or a part of a folder that has fewer rights -> what it may import. Every unit may
# import from within itself; `__init__.py` of the package may import all, nobody imports it.
MODELS_UP = {"models", "distributed", "memory"}
ALLOWED: dict[str, set[str]] = {
    "cli": {"reading"},
    "lazy": set(),
    "distributed": set(),
    "memory": set(),
    "rgb": set(),
    "checks": set(),
    "reading": set(),
    "durable": {"reading"},
    "lineage": {"reading"},
    "data": {"distributed", "lazy", "lineage", "reading", "rgb"},
    "models": {"reading", "rgb"},
    "objective.losses": set(),
    "objective.mining": set(),
    "objective": {"checks", "objective.losses", "objective.mining", *MODELS_UP},
    "building": {"checks", "durable", "lineage", "models", "reading"},
    "evaluation": {"checks", "data", "lazy", *MODELS_UP},
    "convert": {"building", "cli", "lazy", "models", "reading"},
    "export": {"building", "data", "evaluation", "models", "reading"},
    "search": {"building", "checks", "data", "durable", "evaluation", "memory", "models", "reading", "rgb"},
    "training": {
        *("building", "checks", "data", "durable", "evaluation", "lineage", "reading"),
        *("objective", "objective.losses", "objective.mining"),
        *MODELS_UP,
    },
    "commands": {
        *("building", "checks", "cli", "convert", "data", "durable", "evaluation", "export", "reading", "search"),
        "training",
        *MODELS_UP,
    },
}

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` without what stands under `if TYPE_CHECKING:`."""
    if isinstance(node, ast.If):
        test = node.test
        if "TYPE_CHECKING" in (getattr(test, "id", None), getattr(test, "attr", None)):
            for child in node.orelse:
                yield from runtime_nodes(child)
            return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from runtime_nodes(child)


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that `module` imports; `from a import b` gives `a.b`."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{parent}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def unit_of(name: str, units: dict[str, set[str]]) -> str | None:
    """The longest listed unit that `loopitr.<...>` lies in; None for the package itself or what is not listed."""
    parts = name.split(".")[1:]
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in units), None)


def direction_faults(source: str, module: str, allowed: dict[str, set[str]], *, is_package: bool = False) -> list[str]:
    own = unit_of(module, allowed)
    faults = []
    for line, name in imports(source, module, is_package=is_package):
        if name.split(".")[0] != "loopitr" or module == "loopitr":
            continue
        unit = unit_of(name, allowed)
        if unit is None:
            faults.append(f"{module}:{line} imports {name}: the package itself, or a module not listed in ALLOWED")
        elif unit != own and unit not in allowed.get(own or "", set()):
            faults.append(f"{module}:{line} imports {name}: {own} may not import {unit}")
    return faults


def recipe_faults(source: str, module: str, recipes: set[str]) -> list[str]:
    """Imports of a recipe, as `recipes.x` or, as a script's neighbour, as `x`.

    The benchmarks share `shared.py`, and soak.py has its processes in `forked.py`,
    their options in `soak_settings.py`.
    """
    actual = ((line, name) for line, name in imports(source, module) if name.split(".")[0] in {"recipes", *recipes})
    return [f"{module}:{line} imports the recipe {name}" for line, name in actual]


def pickle_faults(source: str, module: str) -> list[str]:
    faults = []
    for line, name in imports(source, module):
        if name.split(".")[0] in PICKLERS or name == "torch.load":
            faults.append(f"{module}:{line} imports {name}")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        is_torch_load = ast.unparse(node.func) == "torch.load"
        if given.get("weights_only", not is_torch_load) is not True:
            faults.append(f"{module}:{node.lineno} loads without weights_only=True")
        if (
            re.search(r"\bAuto\w+\.from_pretrained$", ast.unparse(node.func))
            and given.get("trust_remote_code") is not False
        ):
            faults.append(f"{module}:{node.lineno} loads what may be code without trust_remote_code=False")
        if given.get("allow_pickle", False) is not False:
            faults.append(f"{module}:{node.lineno} allows pickle")
    return faults


def work_faults(source: str, module: str) -> list[str]:
    """Loops, `with` blocks and bare calls, other than registrations, at the top level of a module."""
    faults = []
    for node in ast.parse(source).body:
        call = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
        registers = call is not None and getattr(call.func, "attr", "").startswith("register")
        if isinstance(node, (ast.For, ast.While, ast.With)) or (call is not None and not registers):
            faults.append(f"{module}:{node.lineno} works at import time: {ast.unparse(node).splitlines()[0]}")
    return faults


def sources(folder: str) -> dict[str, Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


PACKAGE, RECIPES, TESTS = sources("loopitr"), sources("recipes"), sources("tests")
RECIPE_STEMS = {file.stem for file in RECIPES.values()} - {"shared", "forked", "soak_settings"}


@pytest.mark.parametrize("module", PACKAGE)
def test_import_direction(module):
    file = PACKAGE[module]
    assert module == "loopitr" or unit_of(module, ALLOWED), f"list {module} in ALLOWED: what may it import?"
    assert not direction_faults(file.read_text(), module, ALLOWED, is_package=file.name == "__init__.py")


def test_the_table_has_no_cycle_and_no_row_without_a_module():
    assert set().union(*ALLOWED.values()) <= set(ALLOWED)
    list(graphlib.TopologicalSorter(ALLOWED).static_order())
    assert [unit for unit in ALLOWED if f"loopitr.{unit}" not in PACKAGE] == []


def test_modules_do_not_import_each_other_in_a_circle():
    """Within a folder too, imports inside functions included; names that are imported lazily are not followed."""
    graph = {}
    for module, file in PACKAGE.items():
        names = [name for _, name in imports(file.read_text(), module, is_package=file.name == "__init__.py")]
        parents = [(name, name.rpartition(".")[0]) for name in names]
        graph[module] = {next(n for n in pair if n in PACKAGE) for pair in parents if {*pair} & PACKAGE.keys()} - {
            module
        }
        graph[module] -= {"loopitr"}
    assert graph["loopitr.objective.build"] >= {"loopitr.objective.loop_objective", "loopitr.objective.terms"}
    list(graphlib.TopologicalSorter(graph).static_order())  # It raises CycleError.


@pytest.mark.parametrize("module", [*PACKAGE, *RECIPES, *TESTS])
def test_nobody_imports_a_recipe(module):
    file = (PACKAGE | RECIPES | TESTS)[module]
    assert not recipe_faults(file.read_text(), module, RECIPE_STEMS)


@pytest.mark.parametrize("module", [*PACKAGE, *RECIPES])
def test_nothing_is_loaded_with_pickle(module):
    assert not pickle_faults((PACKAGE | RECIPES)[module].read_text(), module)


@pytest.mark.parametrize("module", PACKAGE)
def test_no_work_at_import_time(module):
    assert not work_faults(PACKAGE[module].read_text(), module)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from loopitr.models import LoopITRModel", "loopitr.objective.losses.contrastive"),
        ("from loopitr import models", "loopitr.objective.mining"),
        ("import loopitr.models.loop_model as m", "loopitr.objective.mining"),
        ("from .. import models", "loopitr.data.loader"),
        ("from ..step import LoopObjective", "loopitr.objective.losses.contrastive"),
        ("from ...models.config import LoopITRConfig", "loopitr.objective.losses.contrastive"),
        ("from loopitr import LoopITRModel", "loopitr.training.trainer"),
        ("def late():\n    from loopitr.training.trainer import Trainer", "loopitr.models.loop_model"),
        ("import importlib\nimportlib.import_module('loopitr.training')", "loopitr.models.loop_model"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from loopitr.training import x", "loopitr.objective.step"),
        ("from loopitr.models import LoopITRConfig", "loopitr.brand_new"),
    ],
)
def test_the_checker_flags_a_bad_import(source, module):
    faults = direction_faults(source, module, ALLOWED)
    assert len(faults) == 1 and faults[0].startswith(f"{module}:")


@pytest.mark.parametrize(
    ("source", "module", "is_package"),
    [
        ("import torch\nfrom torch import nn", "loopitr.objective.mining", False),
        ("from .contrastive import contrastive_loss", "loopitr.objective.losses", True),
        ("from .contrastive import contrastive_loss", "loopitr.objective.losses.matching", False),
        ("from ..models.config import LoopITRConfig\nfrom .. import models", "loopitr.evaluation.retrieval", False),
        ("from .ranking import recall", "loopitr.evaluation.retrieval", False),
        ("if TYPE_CHECKING:\n    from loopitr.training import x", "loopitr.objective.step", False),
        ("if typing.TYPE_CHECKING:\n    from ..training import x", "loopitr.objective.step", False),
        ("from .training import train", "loopitr", True),
    ],
)
def test_the_checker_passes_a_good_import(source, module, is_package):
    assert direction_faults(source, module, ALLOWED, is_package=is_package) == []


def test_the_checker_flags_recipes_pickles_and_work():
    for source in ("import recipes.pretrain", "from recipes import pretrain", "import pretrain", "from . import other"):
        assert len(recipe_faults(source, "recipes.evaluate", {"pretrain"})) == 1, source
    assert recipe_faults("from loopitr import LoopITRModel", "recipes.evaluate", {"pretrain"}) == []
    for source in (
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path)",
        "transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
    ):
        assert len(pickle_faults(source, "loopitr.x")) == 1, source
    assert pickle_faults("torch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)", "loopitr.x") == []
    for source in ("for name in names:\n    load(name)", "download()", "with open(path) as f:\n    text = f.read()"):
        assert len(work_faults(source, "loopitr.x")) == 1, source
    assert work_faults('"""doc"""\nimport torch\nAutoModel.register(Config, Model)\nX = {}', "loopitr.x") == []
