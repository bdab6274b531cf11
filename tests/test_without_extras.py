"""Training and exporting need no extra: peft and tensorboard are as if they were not installed."""

import subprocess
import sys

import pytest
from helpers.recipe_process import ROOT, environment

SCRIPT = """
import sys
from pathlib import Path

sys.modules["peft"] = sys.modules["tensorboard"] = None  # Importing them fails.
from helpers.tiny_run import run

from loopitr.export.dual import export_dual

folder = Path(sys.argv[1])
run(folder, train__max_steps=1, train__tracker="auto", train__checkpoint_every=1)
export_dual(folder / "run", folder / "dual")
"""


@pytest.mark.slow
def test_train_and_export_without_peft_and_tensorboard(tmp_path):
    own = environment()
    own["PYTHONPATH"] = f"{own['PYTHONPATH']}:{ROOT / 'tests'}:{ROOT / 'recipes/benchmarks'}"
    words = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(words, env=own, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "dual" / "model.safetensors").is_file() and (tmp_path / "run" / "metrics.json").is_file()
    assert not list((tmp_path / "run").rglob("events.out.tfevents*"))
