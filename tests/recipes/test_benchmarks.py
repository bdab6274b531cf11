"""The benchmarks run, and compare what is equal. How long anything takes is not tested."""

from __future__ import annotations

import json

import pytest
import shared
from helpers.recipe_process import call, run_here

SMALL = {
    "pairs.py": ["--pairs", "3", "--width", "96", "--tokens", "10", "--rounds", "1"],
    "step.py": [
        *("--vision", "vit_tiny_patch16_224", "--image_size", "32", "--hidden_size", "64", "--text_layers", "1"),
        *("--fusion_layers", "1", "--batch_size", "6", "--rounds", "1"),
    ],
    "encode.py": [
        *("--vision", "vit_tiny_patch16_224", "--image_size", "32", "--hidden_size", "64", "--text_layers", "1"),
        *("--batch_size", "3", "--rounds", "1"),
    ],
    "grad_cache.py": [
        *("--vision", "vit_tiny_patch16_224", "--image_size", "32", "--hidden_size", "64", "--text_layers", "1"),
        *("--fusion_layers", "1", "--batch_size", "6", "--chunk_size", "2", "--loop", "true"),
    ],
    "onnx_speed.py": [
        *("--vision", "resnet10t", "--image_size", "32", "--hidden_size", "64", "--text_layers", "1", "--rounds", "1"),
    ],
    "input.py": [
        *("--vision", "vit_tiny_patch16_224", "--image_size", "32", "--batch_size", "2", "--batches", "1"),
        *("--num_workers", "1", "--rounds", "1"),
    ],
    "evaluate.py": [
        *("--images", "12", "--captions_per_image", "2", "--k", "4", "--part", "0.5", "--rounds", "1"),
        *("--vision", "vit_tiny_patch16_224", "--image_size", "32", "--hidden_size", "64", "--text_layers", "1"),
        *("--fusion_layers", "2", "--num_workers", "0", "--plain_pairs", "3"),
    ],
}
SMALL["search.py"] = [
    *("--vision", "vit_tiny_patch16_224", "--image_size", "32", "--hidden_size", "64", "--text_layers", "1"),
    *("--fusion_layers", "1", "--count", "5", "--vectors", "400", "--candidates", "8", "--rounds", "1"),
    *("--batch_size", "2", "--num_workers", "0"),
]
SMALL["agreement_alone.py"] = ["--images", "3", "--layers", "1", "--rounds", "1"]
SMALL["step_parts.py"] = ["--batch_size", "6", "--rounds", "1"]
OWN = {  # How many figures there are, and what is counted in each.
    "step.py": (9, {"seconds", "flops", "ratio", "of_peak"}),
    "encode.py": (3, {"per_second", "bare_per_second", "throughput", "flops"}),
    "grad_cache.py": (2, {"seconds", "pairs", "peak_gib"}),
    "onnx_speed.py": (8, {"milliseconds", "times_faster"}),
    "input.py": (7, {"seconds", "images_per_second"}),
    "search.py": (3, set()),
    "step_parts.py": (8, set()),
    "agreement_alone.py": (2, {"seconds", "flops"}),
}


# One starts a process for each of its figures, for the memory that this one peaks at; another exports graphs.
SLOW = ("grad_cache.py", "onnx_speed.py", "input.py", "step.py", "search.py")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SMALL])
def test_figures_by_name(name, monkeypatch, capsys, tmp_path):
    file = tmp_path / "figures.json"
    done = run_here(monkeypatch, capsys, f"benchmarks/{name}", *SMALL[name], "--output", file)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())["figures"]
    count, counted = OWN.get(name, (4, {"seconds", "flops"}))
    assert len(figures) == count and all(case[key] > 0 for case in figures.values() for key in counted)
    assert all(case in done.stdout for case in figures)
    assert all(case.get("difference", 0.0) < 1e-5 for case in figures.values())
    without = ("grad_cache.py", "search.py", "onnx_speed.py", "step_parts.py", "agreement_alone.py")
    assert name in without or any(case.get("of_peak", 0.0) > 0 for case in figures.values())


ON_GPU = ("encode.py", "pairs.py", "step.py", "evaluate.py", "grad_cache.py")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in (*SLOW, "pairs.py") else n for n in ON_GPU]
)
def test_on_a_gpu_no_operation_mixes_devices(gpu, monkeypatch, capsys, tmp_path, name):
    """Pretended; a matrix product of a GPU's size is too much for a CPU."""
    monkeypatch.setattr(shared, "matmul_speed", lambda *_: 1e12)
    where = ["--only", "in chunks"] if name == "grad_cache.py" else ["--output", tmp_path / "figures.json"]
    status, errors = call(monkeypatch, capsys, f"benchmarks/{name}", *SMALL[name], "--device", "cuda", *where)
    assert status == 0, errors


def test_the_layout_of_pixels_is_timed_where_there_are_convolutions(monkeypatch, capsys, tmp_path):
    file = tmp_path / "figures.json"
    done = run_here(
        monkeypatch, capsys, "benchmarks/encode.py", *SMALL["encode.py"], "--vision", "resnet10t", "--output", file
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())["figures"]
    assert [name for name in figures if "layout" in name] == ["images, layout", "images, layout, trained"]
    assert figures["images, layout, trained"]["flops"] > 2 * figures["images, layout"]["flops"] > 0


def test_input_of_a_folder_needs_a_jpeg_in_it(monkeypatch, capsys, tmp_path):
    done = run_here(monkeypatch, capsys, "benchmarks/input.py", "--images", tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "no .jpg or .jpeg file in it" in done.stderr
