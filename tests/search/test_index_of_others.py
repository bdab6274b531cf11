"""An index that is damaged, or that somebody else has made: what is wrong is named, and nothing waits for ever."""

import json
import os
import shutil

import lancedb
import pyarrow as pa
import pytest
from helpers.tiny_index import index, tiny_retriever, write_photos

from loopitr import Searcher
from loopitr.search.indexing import add_images
from loopitr.search.manifest import LOCK, MANIFEST, SKIPPED, read_skipped, writing
from loopitr.search.removing import remove_images


@pytest.fixture(scope="module")
def retriever():
    return tiny_retriever()


@pytest.fixture(scope="module")
def made(tmp_path_factory, retriever):
    folder = tmp_path_factory.mktemp("made")
    index(write_photos(folder / "photos", 4), retriever, folder / "index")
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made / "index", tmp_path / "index")
    return tmp_path / "index"


def refused(folder, retriever, match):
    with pytest.raises((ValueError, OSError), match=match) as raised:
        Searcher.open(folder, model=retriever).search("a red circle")
    assert "\n" not in str(raised.value)


MANIFESTS = {
    "model": [5, None, "", "a\0b"],
    "model_hash": [5],
    "embed_dim": [-1, "x", 10**12, True],
    "tokens": ["evil", ["fp16"], None],
    "token_shape": [[5], "ab", [10**12, 1], [0, 4], None],
    "store": [5, ["x"]],
    "contents": [5, "a\0b"],
    "complete": ["no"],
    "format": [[1], "1", float("nan"), None],
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_of_other_values(folder, retriever, name):
    content = json.loads((folder / MANIFEST).read_text())
    for value in MANIFESTS[name]:
        (folder / MANIFEST).write_text(json.dumps({**content, name: value}))
        refused(folder, retriever, f"{MANIFEST} is damaged: .*{name} |it has format |its manifest has tokens")
    del content[name]
    (folder / MANIFEST).write_text(json.dumps(content))
    if name in ("model", "model_hash", "embed_dim", "format", "tokens", "token_shape"):
        refused(folder, retriever, f"{MANIFEST} is damaged")


def remake(folder, name, change):
    database = lancedb.connect(str(folder))
    database.create_table(name, change(database.open_table(name).to_arrow()), mode="overwrite")


def column(name, values):
    return lambda table: table.set_column(table.column_names.index(name), name, values)


@pytest.mark.parametrize(
    ("table", "change", "match"),
    [
        ("images", lambda table: table.drop_columns(["path"]), "'path' is missing, wanted string"),
        ("images", lambda table: table.drop_columns(["embed"]), "'embed' is missing"),
        ("images", column("path", pa.array(range(4))), "'path' is int64, wanted string"),
        ("images", column("file", pa.array(["x"] * 4)), "'file' is string, wanted binary"),
        ("contents", lambda table: table.drop_columns(["tokens"]), "'tokens' is missing"),
        ("contents", column("tokens", pa.array([b"abc"] * 4, pa.large_binary())), "3 bytes of tokens for an image"),
    ],
)
def test_tables_of_other_columns(folder, retriever, table, change, match):
    remake(folder, table, change)
    refused(folder, retriever, match)


@pytest.mark.parametrize("name", ["images.lance/data", "images.lance/_versions", "contents.lance/data"])
def test_a_pipe_in_a_table_is_not_waited_for(folder, retriever, name):
    for path in list((folder / name).iterdir()):
        path.unlink()
        os.mkfifo(path)
    refused(folder, retriever, f"{name}/.* is not a file")


def test_a_path_that_is_missing_is_no_error(folder, retriever):
    remake(folder, "images", column("path", pa.array([None] * 4, pa.string())))
    assert [hit.path for hit in Searcher.open(folder, model=retriever).search("a red circle")] == [""] * 4


LONG = 'path,reason\n"' + "x" * 200_000 + '",b\n'


@pytest.mark.parametrize("content", ["a,b\n1,2\n", b"\xff\xfe", LONG, "path,reason\na\n"])
def test_a_list_of_skipped_images_that_is_none(folder, content):
    (folder / SKIPPED).write_bytes(content if isinstance(content, bytes) else content.encode())
    for work in (read_skipped, lambda folder: remove_images(folder, missing=True)):
        with pytest.raises(ValueError, match=f"{SKIPPED} is damaged .*: delete it"):
            work(folder)


def test_nothing_is_written_through_a_link(folder, made, retriever, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    for name in (MANIFEST, SKIPPED):
        (folder / f"{name}.partial").symlink_to(mine)
    add_images(made / "photos", folder, model=retriever, num_workers=0, show_progress=False)
    assert mine.read_text() == "mine" and not (folder / MANIFEST).is_symlink()


def test_a_lock_that_is_no_file(folder, tmp_path):
    (folder / LOCK).unlink()
    for make in (lambda path: path.symlink_to(tmp_path / "other"), os.mkfifo):
        make(folder / LOCK)
        with pytest.raises(OSError, match=f"{LOCK} is not a lock file: delete it"), writing(folder):
            pass
        (folder / LOCK).unlink()
    assert not (tmp_path / "other").exists()
