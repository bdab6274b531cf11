"""What the benchmarks ask of their options before they time anything, and what their figures say."""

from __future__ import annotations

import json
import runpy
from types import SimpleNamespace
from typing import Any

import pytest
import shared as benchmarking
import torch
from helpers.recipe_process import ROOT, call, error_lines
from shared import Timing, check_options, interleaved, peak_memory

from loopitr.cli import check_output_file

NAMES = ["agreement_alone", "encode", "evaluate", "grad_cache", "input", "pairs", "search", "step", "step_parts"]


def recipe(name: str) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / f"recipes/benchmarks/{name}.py"), run_name="recipe"))


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: Any) -> str:
    """The line that says why, before anything is built or timed."""

    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the options were not looked at first")

    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    for work in ("random_model", "matmul_speed", "interleaved"):
        monkeypatch.setattr(benchmarking, work, too_late)
    status, errors = call(monkeypatch, capsys, f"benchmarks/{name}.py", *arguments)
    (line,) = error_lines(errors)
    assert status == 2
    return line


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((name, "--rounds", 0) for name in NAMES if name != "grad_cache"),
        *((name, "--batch_size", 0) for name in NAMES if name not in ("agreement_alone", "pairs")),
        ("agreement_alone", "--images", 0),
        ("pairs", "--pairs", 0),
        ("grad_cache", "--chunk_size", 0),
        ("evaluate", "--k", 0),
        ("evaluate", "--pair_block", -1),
        ("evaluate", "--num_workers", -1),
    ],
)
def test_a_count_that_is_too_small(monkeypatch, capsys, name, option, value):
    least = 0 if option == "--num_workers" else 1
    line = refused(monkeypatch, capsys, name, option, value)
    assert line == f"error: {option[2:]} must be at least {least}, got {value}"


@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_is_not_there(monkeypatch, capsys, name):
    assert "device 'cuda:99' cannot be used" in refused(monkeypatch, capsys, name, "--device", "cuda:99")


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_cannot_be_written(monkeypatch, capsys, tmp_path, name):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "figures.json"
    assert f"output {output} cannot be written" in refused(monkeypatch, capsys, name, "--output", output)


def test_a_width_that_heads_do_not_share(monkeypatch, capsys):
    line = refused(monkeypatch, capsys, "pairs", "--width", 100)
    assert line == "error: width must be a multiple of the 12 heads, got 100"


def test_batches_that_workers_do_not_share(monkeypatch, capsys):
    line = refused(monkeypatch, capsys, "input", "--batches", 5, "--num_workers", 2)
    assert "multiple of num_workers 2, got 5" in line


def test_what_is_allowed(tmp_path):
    options = SimpleNamespace(rounds=1, num_workers=0, loop=False, part=0.1, only=None, device="cpu", output=None)
    check_options(options)
    with pytest.raises(ValueError, match="device 'toaster'"):
        check_options(SimpleNamespace(device="toaster", output=None))


def test_looking_at_an_output_makes_its_folder_and_nothing_else(tmp_path):
    file = tmp_path / "new" / "folder" / "figures.json"
    check_output_file(file)
    assert list(file.parent.iterdir()) == []
    file.write_text("earlier figures")
    check_output_file(file)
    assert file.read_text() == "earlier figures"
    with pytest.raises(ValueError, match=f"output {file.parent} cannot be written: it is a folder"):
        check_output_file(file.parent)


def test_a_ratio_is_how_many_times_the_others_seconds():
    assert Timing([2.0, 9.0, 4.0], 0).ratio(Timing([1.0, 3.0, 4.0], 0)) == 2.0


def test_flops_are_counted_also_of_a_view_without_gradient():
    layer, x = torch.nn.Linear(5, 7), torch.ones(4, 5, requires_grad=True) * 2

    @torch.no_grad()
    def call() -> None:
        layer(x[1:])

    timed = interleaved({"twice": lambda: (call(), call()), "once": call}, rounds=3, device="cpu")
    assert {name: timing.flops for name, timing in timed.items()} == {"twice": 2 * 210, "once": 210}  # 2 x 3 x 5 x 7
    assert all(len(timing.seconds) == 3 for timing in timed.values())


def test_memory_is_that_of_the_named_gpu(gpu, monkeypatch):
    asked = []

    def allocated(device: Any = None) -> int:
        asked.append(str(device))
        return len(asked) * 2**30

    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated)
    assert peak_memory("cuda:1") == 2**30 and asked == ["cuda:1"]
    benchmark = recipe("grad_cache")
    tiny = {"vision": "vit_tiny_patch16_224", "image_size": 32, "hidden_size": 64, "text_layers": 1, "chunk_size": 2}
    figures = benchmark.measure(benchmark.Options(**tiny, device="cuda:1"), "plain")
    assert asked == ["cuda:1"] * 3
    assert (figures["step_gib"], figures["peak_gib"]) == (1, 3)


def test_the_slower_side_is_the_bottleneck(capsys, tmp_path):
    benchmark, file = recipe("input"), tmp_path / "figures.json"
    options = benchmark.Options(batch_size=4, batches=5, num_workers=2, output=str(file))  # A round has 20 images.
    timed = {
        "photos, whole JPEG": Timing([4.0], 0),
        "photos, scaled decode": Timing([2.0], 0),
        "photos, cached": Timing([0.5], 0),
        "step": Timing([0.25], 10**9),  # 16 images/s
    }
    benchmark.report(options, timed, "step", 8e9)
    figures = json.loads(file.read_text())["figures"]
    expected = {"whole JPEG": (5, 1, 7, "input"), "scaled decode": (10, 2, 4, "input"), "cached": (40, 8, 1, "step")}
    for name, actual in expected.items():
        case = figures[f"photos, {name}"]
        keys = ("images_per_second", "ratio", "workers_needed", "bottleneck")
        assert tuple(case[key] for key in keys) == actual
    assert figures["step"] == {"images_per_second": 16, "seconds": 0.25, "flops": 10**9, "of_peak": 0.5}
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| step ")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["16.0", "", "", "", "1.0", "0.50"]
