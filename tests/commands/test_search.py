"""`loopitr search` from a folder of photos to hits, and what it says of mistakes."""

import json
import sys

import pytest
from helpers.recipe_process import error_lines, started
from helpers.tiny_building import save_tiny
from helpers.tiny_gallery import jpeg
from helpers.tiny_index import write_photos

from loopitr import export_dual
from loopitr.commands.main import main
from loopitr.commands.search import COMMANDS, _table
from loopitr.commands.subcommands import positional
from loopitr.search.searcher import Hit


def run(capsys, *arguments):
    """What `loopitr search arguments` prints."""
    main(["search", *map(str, arguments)])
    return capsys.readouterr().out


def fails(capsys, *arguments):
    """The one line that `loopitr search arguments` ends with."""
    with pytest.raises(SystemExit) as raised:
        main(["search", *map(str, arguments)])
    assert raised.value.code == 2
    captured = capsys.readouterr()
    (line,) = error_lines(captured.err)
    return line


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with photos, a run, and an index of them."""
    folder = tmp_path_factory.mktemp("search")
    write_photos(folder / "photos", 6)
    (folder / "photos" / "broken.jpg").write_bytes(jpeg(0)[:100])
    save_tiny(folder / "run")
    words = ("search", "index", folder / "photos", "--model", folder / "run", "--output", folder / "index")
    main([*map(str, words), "--num_workers", "0", "--device", "cpu"])
    return folder


def test_index_and_query(made, capsys, tmp_path):
    words = ("index", made / "photos", "--model", made / "run", "--output", tmp_path / "index", "--num_workers", 0)
    out = run(capsys, *words)
    assert f"skipped {made}/photos/broken.jpg: " in out and "6 added, 0 updated, 0 unchanged, 1 skipped" in out
    assert "0 added, 0 updated, 6 unchanged, 1 skipped" in run(capsys, *words)
    lines = run(capsys, "query", tmp_path / "index", "a dog on the beach", "--top", 4).splitlines()
    assert lines[0].split() == ["similarity", "match", "score", "path"] and len(lines) == 5
    assert all(line.split()[3].endswith(".jpg") for line in lines[1:])
    for query in ("123", "null", "true", "{a: [b", "-"):
        assert len(run(capsys, "query", tmp_path / "index", query, "--top", 1).splitlines()) == 2
    (hit,) = json.loads(run(capsys, "query", made / "index", made / "photos" / "002.jpg", "--top", 1, "--json"))
    assert hit["path"] == f"{made}/photos/002.jpg" and hit["match"] is None and hit["columns"]["width"] == 40
    assert hit["similarity"] == pytest.approx(1, abs=1e-5)
    assert run(capsys, "query", made / "index", "a dog", "--where", "width > 4000") == "no image found\n"


def test_a_path_neither_breaks_the_line_nor_steers_the_terminal():
    hit = Hit(path="/photos/a\n\x1b[31m caf\xe9.jpg", similarity=0.5, match=None, score=0.5, columns={})
    assert _table([hit]).splitlines()[1:] == ["    0.5000        -    0.500  /photos/a\\n\\x1b[31m caf\xe9.jpg"]


def test_json_has_no_number_that_json_does_not_have(made, capsys, tmp_path):
    rows = ["image,share", f"{made}/photos/000.jpg,nan", f"{made}/photos/001.jpg,inf", f"{made}/photos/002.jpg,0.5"]
    (tmp_path / "data.csv").write_text("\n".join(rows))
    run(capsys, "index", tmp_path / "data.csv", "--model", made / "run", "--output", tmp_path / "index")
    hits = json.loads(run(capsys, "query", tmp_path / "index", "a dog", "--json"), parse_constant=pytest.fail)
    assert sorted((hit["columns"].get("share") for hit in hits), key=str) == [0.5, None, None]


def test_a_model_that_cannot_rerank_and_one_that_has_been_moved(made, capsys, tmp_path):
    words = ("query", made / "index", "a dog", "--top", 1)
    export_dual(made / "run", tmp_path / "dual")
    main(["search", *map(str, words), "--model", str(tmp_path / "dual")])
    assert f"warning: {tmp_path}/dual has no fusion head to rerank with\n" in capsys.readouterr().err
    main(["search", *map(str, words), "--model", str(tmp_path / "dual"), "--rerank", "0"])
    assert "fusion head" not in capsys.readouterr().err
    (made / "run").rename(tmp_path / "moved")
    try:
        for command in (words, ("add", made / "index", made / "photos")):
            line = fails(capsys, *command)
            assert f"{made}/index: the model of this index cannot be loaded (no model folder {made}/run)" in line
            assert "give its new place as the model (--model)" in line
        assert len(run(capsys, *words, "--model", tmp_path / "moved").splitlines()) == 2
    finally:
        (tmp_path / "moved").rename(made / "run")


def test_a_page_of_results(made, capsys, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    run(capsys, "query", made / "index", "a dog", "--html", tmp_path / "page.html", "--open")
    assert opened == [(tmp_path / "page.html").as_uri()]
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 6


def test_add_remove_and_info(made, capsys, tmp_path):
    more = write_photos(tmp_path / "more", 2, first=20)
    assert "2 added" in run(capsys, "add", made / "index", more, "--num_workers", 0)
    info = json.loads(run(capsys, "info", made / "index", "--json"))
    assert (info["images"], info["model"], info["complete"]) == (8, str(made / "run"), True)
    assert "images        8\n" in run(capsys, "info", made / "index")
    assert run(capsys, "remove", made / "index", more / "020.jpg") == f"1 images removed from {made}/index\n"
    (more / "021.jpg").unlink()
    assert run(capsys, "remove", made / "index", "--missing").startswith("1 images removed")
    assert run(capsys, "remove", made / "index", "--where", "width < 3").startswith("0 images removed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command is given; known: index, query, serve, add, remove, info"),
        (["find"], "unknown command 'find'; known: index"),
        (["index"], "no source is given: loopitr search index SOURCE --model RUN --output INDEX"),
        (["index", "{made}/photos"], "no model is given"),
        (["index", "{made}/photos", "more"], "unexpected argument 'more'"),
        (["index", "{made}/none", "--model", "{made}/run", "--output", "{tmp}/out"], "{made}/none: no such folder"),
        (["index", "{made}/photos", "--model", "{made}/none", "--output", "{tmp}/out"], "no model folder {made}/none"),
        (["index", "{made}/photos", "--model", "{made}/run", "--output", "{made}/photos"], "no search index"),
        (["index", "{tmp}", "--model", "{made}/run", "--output", "{tmp}/out"], "{tmp}: there is no image to index"),
        (
            ["index", "{made}/photos", "--model", "{made}/run", "--output", "{tmp}/out", "--store", "qdrant:6333"],
            "the store qdrant:6333: not an address such as http://host:6333",
        ),
        (
            ["index", "{made}/photos", "--model", "{made}/run", "--output", "{tmp}/out", "--store", "ftp://host"],
            "the store ftp://host: not an address such as http://host:6333",
        ),
        (["query", "{tmp}", "a dog"], "{tmp} is not a search index"),
        (["query", "{made}/index", "a", "dog"], "unexpected argument 'dog'; wanted INDEX QUERY, with quotes"),
        (["query", "{made}/index"], "the query is empty"),
        (["query", "{made}/index", "nowhere.jpg"], "nowhere.jpg: unreadable image (no such file)"),
        (["query", "{made}/index", "a dog", "--html", "{tmp}"], "output {tmp} cannot be written: it is a folder"),
        (["query", "{made}/index", "a dog", "--top", "0"], "top must be at least 1, got 0"),
        (["query", "{made}/index", "a dog", "--where", "widht > 3"], "where 'widht > 3': Schema error: No field"),
        (["query", "{made}/index", "a dog", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["add", "{made}/index", "{tmp}/none.csv"], "none.csv: No such file"),
        (["remove", "{made}/index"], "nothing is named to remove"),
        (["remove", "{made}/index", "{tmp}/x.jpg"], "holds no image {tmp}/x.jpg"),
        (["info", "{tmp}/none"], "{tmp}/none is not a search index: no such folder"),
        (
            [
                "index",
                "{made}/photos",
                "--model",
                "{made}/run",
                "--output",
                "{tmp}/out",
                "--store",
                "http://127.0.0.1:9",
            ],
            "the store http://127.0.0.1:9: ",
        ),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_status_2(made, arguments, message, tmp_path, capsys):
    words = (word.format(made=made, tmp=tmp_path) for word in arguments)
    assert message.format(made=made, tmp=tmp_path) in fails(capsys, *words)


def test_lancedb_that_is_not_installed(made, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    assert 'pip install "loopitr[search]"' in fails(capsys, "info", made / "index")
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    words = ("index", made / "photos", "--model", made / "run", "--output", made / "other", "--store", "http://x")
    assert 'pip install "loopitr[qdrant]"' in fails(capsys, *words)


def test_help_does_without_torch():
    *shown, imported = started("search", "--help")
    assert imported == "[]" and [name for name in COMMANDS if not any(name in line for line in shown)] == []
    *shown, imported = started("search", "query", "--help")
    assert imported == "[]" and any("--rerank" in line for line in shown)


def test_words_before_the_options_are_theirs():
    assert positional(["a", "b c", "--top", "3"], "index", "query") == ["--index=a", "--query=b c", "--top", "3"]
    assert positional(["a", "-dog", "-h"], "index", "query") == ["--index=a", "--query=-dog", "-h"]
    assert positional(["a", "x", "y", "--json"], "index", rest="paths") == ["--index=a", '--paths=["x", "y"]', "--json"]
    assert positional(["--query", "x"], "index") == ["--query", "x"]
    assert positional(["a", "-"], "index", "query") == ["--index=a", "--query=-"]
