"""What an index says of itself is checked before it is used."""

import io
import json
import os
import shutil

import pytest
from helpers.tiny_index import index, listed, tiny_retriever, write_photos

from loopitr import Searcher
from loopitr.search import manifest
from loopitr.search.manifest import check_model, read_manifest, read_skipped, writing
from loopitr.search.removing import remove_images

GOOD = {"format": 1, "model": "run", "model_hash": "abc", "embed_dim": 16, "tokens": "fp16", "token_shape": [17, 32]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged: it is not JSON"),
        ("[]", "is damaged"),
        ("null", "is damaged"),
        ("{}", "is damaged: model is 'missing'"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": 1, "format": 1}', "'format' twice"),
        (json.dumps({**GOOD, "format": 2}), "it has format 2, this version of loopitr reads format 1"),
        (json.dumps({**GOOD, "format": float("inf")}), "it has format inf"),
        (json.dumps({**GOOD, "model": None}), "is damaged: model is None"),
        (json.dumps({**GOOD, "model_hash": 3}), "is damaged: model_hash is 3"),
        (json.dumps({**GOOD, "embed_dim": "16"}), "is damaged: embed_dim is '16'"),
        (json.dumps({**GOOD, "embed_dim": 0}), "is damaged: embed_dim is 0"),
        (json.dumps({**GOOD, "tokens": "int4"}), "is damaged: tokens is 'int4'"),
        (json.dumps({**GOOD, "token_shape": None}), "is damaged: tokens is 'fp16', token_shape None"),
        (json.dumps({**GOOD, "token_shape": [3]}), "is damaged: token_shape is [3]"),
        (json.dumps({**GOOD, "store": 5}), "is damaged: store is 5"),
        (json.dumps({"format": 1}), "is damaged: model is"),
    ],
    ids=lambda x: x[:40],
)
def test_a_damaged_manifest_is_named(content, message, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/manifest.json") as raised:
        read_manifest(tmp_path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_what_later_versions_may_add_is_ignored(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({**GOOD, "more": 1}))
    assert read_manifest(tmp_path).token_shape == (17, 32)


@pytest.mark.parametrize("content", [b"garbage\nx\n", b"path,reason\n\xff\xfe\n", b'path,reason\n"' + b"x" * 200_000])
def test_a_damaged_list_of_skipped_images_is_named(content, tmp_path):
    (tmp_path / "skipped.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/skipped.csv is damaged .*: delete it$"):
        read_skipped(tmp_path)


def test_an_index_stays_as_it_was_made(tmp_path):
    photos, retriever = write_photos(tmp_path / "photos", 2), tiny_retriever()
    with pytest.raises(ValueError, match="collection 'x' is one of a Qdrant server: give its address as store"):
        index(photos, retriever, tmp_path / "index", collection="x")
    index(photos, retriever, tmp_path / "index", tokens="bf16")
    for options in ({}, {"tokens": "bf16"}):
        assert index(photos, retriever, tmp_path / "index", **options).unchanged == 2
    for options, message in (
        ({"tokens": "none"}, "was made with tokens bf16, which cannot become none"),
        ({"tokens": "fp16"}, "was made with tokens bf16, which cannot become fp16"),
        ({"store": "http://127.0.0.1:9"}, "was made with store none, which cannot become http://127.0.0.1:9"),
        ({"contents": "elsewhere"}, "was made with contents none, which cannot become /.*/elsewhere"),
    ):
        with pytest.raises(ValueError, match=message):
            index(photos, retriever, tmp_path / "index", **options)


def test_a_lock_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "index.lock")
    with pytest.raises(OSError, match="index.lock is not a lock file: delete it"), writing(tmp_path):
        pass


def test_the_index_is_held_until_its_lock_file_is_closed(tmp_path, monkeypatch):
    refused = []

    class Watched(io.TextIOWrapper):
        def close(self):
            if not self.closed:  # Closing it takes away the lock that another thread would get now.
                with pytest.raises(ValueError, match="is being written to"), writing(tmp_path):
                    pass
                refused.append(True)
            super().close()

    monkeypatch.setattr(manifest, "open", lambda path, *_, **__: Watched(io.FileIO(path, "a")), raising=False)
    with writing(tmp_path):
        pass
    assert refused == [True]


@pytest.fixture
def edited(tmp_path):
    """A function that writes an index's manifest anew with some fields changed; the index's folder, and its model."""
    photos, retriever = write_photos(tmp_path / "photos", 2), tiny_retriever()
    folder = tmp_path / "index"
    index(photos, retriever, folder)
    content = json.loads((folder / "manifest.json").read_text())

    def edit(**wrong):
        (folder / "manifest.json").write_text(json.dumps({**content, **wrong}))

    return edit, folder, retriever


@pytest.mark.parametrize(
    ("name", "wrong", "fault"),
    [
        ("embed_dim", 8, r"is a damaged index: its column 'embed' is .*\[16\], wanted .*\[8\]"),
        ("token_shape", [3, 4], r"its 'tokens' is fp16 17x32 in the table 'images', but fp16 3x4 in the manifest"),
    ],
)
def test_sizes_that_are_not_the_models(edited, name, wrong, fault):
    edit, folder, retriever = edited
    edit(**{name: wrong})
    with pytest.raises(ValueError, match=fault):
        Searcher.open(folder, model=retriever)
    with pytest.raises(ValueError, match=f"manifest.json is damaged: {name} is .*, and .* in the model"):
        check_model(folder, read_manifest(folder), retriever)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"tokens": "bf16"}, "its 'tokens' is fp16 17x32 in the table 'images', but bf16 17x32 in the manifest"),
        (
            {"tokens": None, "token_shape": None},
            "its 'tokens' is fp16 17x32 in the table 'images', but none in the manifest",
        ),
        ({"model_hash": "abc"}, r"its 'model_hash' is \w+ in the table 'images', but abc in the manifest"),
    ],
)
def test_facts_that_the_tables_contradict(edited, wrong, fault):
    edit, folder, retriever = edited
    edit(**wrong)
    with pytest.raises(ValueError, match=fault):
        Searcher.open(folder, model=retriever)
    with pytest.raises(ValueError, match=fault):
        remove_images(folder, where="width > 0")


def test_the_contents_of_another_index(tmp_path):
    photos, model, other = write_photos(tmp_path / "photos", 2), tiny_retriever(), tiny_retriever(embed_dim=8)
    for name, retriever in (("one", model), ("two", other)):
        index(photos, retriever, tmp_path / name, contents=str(tmp_path / f"{name}_contents"))
    path = tmp_path / "one" / "manifest.json"
    path.write_text(path.read_text().replace("one_contents", "two_contents"))
    with pytest.raises(ValueError, match="cannot be opened in .*two_contents: its 'model_hash' is "):
        Searcher.open(tmp_path / "one", model=model)


def test_tokens_that_are_lost_are_computed_again(tmp_path):
    photos, retriever = write_photos(tmp_path / "photos", 3), tiny_retriever()
    index(photos, retriever, tmp_path / "index")
    shutil.rmtree(tmp_path / "index" / "contents.lance")
    report = index(photos, retriever, tmp_path / "index")
    assert (report.updated, report.unchanged) == (3, 0) and len(listed(tmp_path / "index")) == 3
    assert index(photos, retriever, tmp_path / "index").unchanged == 3


def test_an_index_without_tokens_is_continued_by_the_same_call(tmp_path):
    photos = write_photos(tmp_path / "photos", 2)
    retriever = tiny_retriever()
    for added in (2, 0):
        assert index(photos, retriever, tmp_path / "index", tokens="none").added == added
