"""What the Markdown pages show: their links lead somewhere, and the commands that they name have these options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.recipe_process import ROOT

from loopitr.cli import parse
from loopitr.commands.calibrate import CalibrateOptions
from loopitr.commands.evaluate import EvaluateOptions
from loopitr.commands.export import ExportOptions
from loopitr.training.options import PretrainOptions

PAGES = [*ROOT.glob("*.md"), *ROOT.glob(".github/*.md"), ROOT / "loopitr" / "README.md", *ROOT.glob("recipes/**/*.md")]
OPTIONS = {
    "recipes/pretrain.py": PretrainOptions,
    "recipes/evaluate.py": EvaluateOptions,
    "recipes/calibrate.py": CalibrateOptions,
    "recipes/export_dual.py": ExportOptions,
}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in the page's blocks of shell commands."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield shlex.split(line.rpartition("&&")[2].replace("[--objective...]", ""), comments=True)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            name, _, heading = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not heading or heading in anchors(target), link


@pytest.mark.slow
def test_commands_of_recipes_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = 0
    for page in PAGES:
        for words in commands(page):
            recipe = next((word for word in words if word.startswith("recipes/") and word.endswith(".py")), None)
            if recipe is None:
                continue
            assert Path(recipe).is_file(), words
            arguments = words[words.index(recipe) + 1 :]
            if recipe in OPTIONS and not {"--help", "--print_config"} & {*arguments}:
                parse(OPTIONS[recipe], arguments)
                seen += 1
    assert seen > 30
