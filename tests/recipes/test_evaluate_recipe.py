"""recipes/evaluate.py and recipes/export_dual.py as their users start them, on a small Karpathy file."""

import json

import pytest
from helpers.recipe_process import call, error_lines, forked
from helpers.small_karpathy import CAPTIONS, IMAGES, data, write_small_karpathy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_karpathy(tmp_path_factory.mktemp("evaluate"))


def test_the_command_of_the_readme(folder, tmp_path):
    output = tmp_path / "new" / "metrics.json"
    given = data(folder, "--data.split", "test", "--data.max_skipped_fraction", 0.2, "--rerank", 4, "--output", output)
    done = forked("evaluate.py", "--model", folder / "run", *given)
    assert done.returncode == 0, done.stderr
    figures = json.loads(output.read_text())
    assert (figures["num_images"], figures["num_captions"], figures["k"]) == (IMAGES, IMAGES * CAPTIONS, 4)
    for head in ("dual", "match", "match_plus_similarity"):
        recalls = [figures[head][side][f"r{k}"] for side in ("i2t", "t2i") for k in (1, 5, 10)]
        assert all(0 <= value <= 100 for value in recalls)
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"| {head.replace('_plus_', ' + ')} "))
        assert [float(cell) for cell in row.split("|")[2:-2]] == pytest.approx(recalls, abs=0.051)
    assert figures["dual"]["i2t"]["r10"] > 0 and figures["ceiling"]["t2i"] > 0 and figures["pairs_per_second"] > 0
    assert set(figures["seconds"]) == {"encode", "rank", "rerank", "total"}
    assert sum(figures["skipped"].values()) == 1 and "8.jpg" in done.stdout
    assert "encode images" in done.stderr and "rerank" in done.stderr  # The bars show progress.


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(folder, tmp_path, monkeypatch, capsys):
    given = ["--model", folder / "run", *data(folder, "--data.max_skipped_fraction", 0.2, "--data.num_workers", 0)]
    given += ["--rerank", 4, "--token_storage", "disk", "--token_dtype", "bf16", "--token_folder", tmp_path / "tokens"]
    outputs = [tmp_path / "one.json", tmp_path / "two.json"]
    assert call(monkeypatch, capsys, "evaluate.py", *given, "--output", outputs[0])[0] == 0
    done = forked("evaluate.py", *given, "--output", outputs[1], ranks=2)
    assert done.returncode == 0, done.stderr
    figures = [json.loads(output.read_text()) for output in outputs]
    for each in figures:
        del each["seconds"], each["pairs_per_second"]
    assert figures[0] == figures[1] and figures[1]["num_images"] == IMAGES
    assert done.stdout.count("| dual ") == done.stdout.count("written to") == 1  # Only one of the processes prints.
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.startswith("encode images")]
    assert all("/4 " in bar for bar in bars) and bars  # The bar counts this process's share.
    assert list((tmp_path / "tokens").iterdir()) == []


def test_export_then_evaluate_gives_the_duals_figures(folder, tmp_path, monkeypatch, capsys):
    given = data(folder, "--data.max_skipped_fraction", 0.2, "--data.num_workers", 0)
    assert call(monkeypatch, capsys, "export_dual.py", "--model", folder / "run", "--output", tmp_path / "dual")[0] == 0
    figures = []
    for model, rerank in ((folder / "run", 4), (tmp_path / "dual", 0)):
        output = tmp_path / f"{rerank}.json"
        arguments = ["--model", model, *given, "--rerank", rerank, "--output", output]
        assert call(monkeypatch, capsys, "evaluate.py", *arguments)[0] == 0
        figures.append(json.loads(output.read_text())["dual"])
    assert figures[0] == figures[1]


def test_the_training_split_is_warned_about(folder, monkeypatch, capsys):
    given = data(folder, "--data.split", "train", "--data.num_workers", 0, "--rerank", 0)
    status, errors = call(monkeypatch, capsys, "evaluate.py", "--model", folder / "run", *given)
    assert status == 0 and "warning: this is the training split" in errors


def test_cached_tokens_and_bf16(folder, tmp_path, monkeypatch, capsys):
    cache = ["--data.cache_tokens", tmp_path / "tokens", "--data.max_skipped_fraction", 0.2, "--data.num_workers", 0]
    cache += ["--data.cache_text_tokens", tmp_path / "texts"]
    given = data(folder, *cache, "--precision", "bf16", "--rerank", 2, "--output", tmp_path / "metrics.json")
    for _ in range(2):
        assert call(monkeypatch, capsys, "evaluate.py", "--model", folder / "run", *given)[0] == 0
    assert len(list((tmp_path / "tokens").iterdir())) == len(list((tmp_path / "texts").iterdir())) == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["num_images"] == IMAGES


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--model", "/nowhere/at/all"], "no model folder /nowhere/at/all"),
        (["--model", "{folder}/images"], "images holds no model"),
        (["--model", "some/nosuch"], "no weights for 'some/nosuch'"),
        (["--data.split", "dev"], "no split 'dev'; it has test, train"),
        (["--data.karpathy", "/nowhere.json"], "/nowhere.json"),
        (["--data.images", "/nowhere"], "/nowhere"),
        (["--rerank", "-3"], "rerank must be at least 0, got -3"),
        (["--rerank", "many"], "many"),
        (["--reranking", "3"], "--reranking"),
        (["--precision", "fp8"], "fp8"),
        (["--device", "toaster"], "toaster"),
        (["--token_storage", "tape"], "tape"),
        (["--token_dtype", "fp8"], "fp8"),
        (["--token_folder", "{folder}/data.json", "--token_storage", "disk"], "token_folder /"),
        (["--output", "{folder}/data.json/metrics.json", "--model", "/nowhere/at/all"], "metrics.json cannot be"),
        (["--output", "{folder}/images", "--model", "/nowhere/at/all"], "images cannot be written: it is a folder"),
        (["--output", "/dev/null", "--model", "/nowhere/at/all"], "output /dev/null cannot be written: it is not a fi"),
        (["--output", "{folder}/data.json", "--model", "/nowhere/at/all"], "data.json exists and is not that of an ev"),
        (["--gallery", "{folder}/run/config.json"], "run/config.json exists and is not that of an evaluation"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--pair_block", "0"], "pair_block must be at least 1, got 0"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--rerank", "2"], "1 of 9 images cannot be used"),
    ],
)
def test_a_wrong_option_is_one_line(folder, monkeypatch, capsys, change, named):
    monkeypatch.delenv("LOOPITR_DEBUG", raising=False)
    given = ["--model", folder / "run", *data(folder, "--data.num_workers", 0), *change]
    status, errors = call(monkeypatch, capsys, "evaluate.py", *(str(a).format(folder=folder) for a in given))
    assert status == 2
    (line,) = error_lines(errors)
    assert named in line


def test_no_traceback_from_a_process_of_its_own(folder):
    done = forked("export_dual.py", "--model", folder / "run", "--output", folder / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "error" in line] == [done.stderr.splitlines()[-1]]
    assert "holds a 'loopitr' model" in done.stderr
