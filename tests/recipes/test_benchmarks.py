"""The benchmarks run, and compare what is equal. How long anything takes is not tested."""

from __future__ import annotations

import json

import pytest
from recipe_process import launch

SMALL = {
    "pairs.py": ["--pairs", "3", "--width", "96", "--tokens", "10", "--rounds", "1"],
    "step.py": [
        *("--vision", "vit_tiny_patch16_224", "--image_size", "32", "--hidden_size", "64", "--text_layers", "1"),
        *("--fusion_layers", "1", "--batch_size", "6", "--rounds", "1"),
    ],
}


@pytest.mark.parametrize("name", SMALL)
def test_figures_by_name(name, tmp_path):
    file = tmp_path / "figures.json"
    done = launch(f"benchmarks/{name}", *SMALL[name], "--output", file)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())["figures"]
    assert len(figures) == 4 and all(case["seconds"] > 0 and case["flops"] > 0 for case in figures.values())
    assert all(case in done.stdout for case in figures)
    assert all(case.get("difference", 0.0) < 1e-5 for case in figures.values())
