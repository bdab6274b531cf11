"""An index holds every readable image once, whatever happens while it is built."""

import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers.recipe_process import environment
from helpers.tiny_building import save_tiny
from helpers.tiny_gallery import jpeg
from helpers.tiny_index import index, listed, tiny_retriever, write_bad_photos, write_photos
from PIL import Image

from loopitr import Searcher
from loopitr.search import writer
from loopitr.search.contents import Contents
from loopitr.search.indexing import add_images
from loopitr.search.lance import LanceImages
from loopitr.search.manifest import read_manifest, writing
from loopitr.search.removing import remove_images


def embeds(folder):
    table = LanceImages.open(folder, 16).table.to_arrow()
    return {
        os.path.basename(path): np.array(row) for path, row in zip(*(table[n].to_pylist() for n in ("path", "embed")))
    }


def test_good_and_bad_files_of_a_folder_and_the_folders_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    photos = write_photos(tmp_path / "photos", 5)
    bad = write_bad_photos(photos / "bad")
    write_photos(photos / "deep" / "deeper", 2, first=5)
    (photos / "upper.JPEG").write_bytes(jpeg(9))
    retriever = tiny_retriever()
    report = index(photos, retriever, tmp_path / "index", num_workers=2)
    assert (report.added, report.updated, report.unchanged) == (8, 0, 0)
    reasons = {os.path.basename(path): reason for path, reason in report.skipped.items()}
    assert reasons == bad
    rows = listed(tmp_path / "index")
    assert sorted(rows) == [*(f"{i:03}.jpg" for i in range(7)), "upper.JPEG"]
    row = rows["006.jpg"]
    assert row.columns["width"] == 40 and row.columns["height"] == 30
    assert row.columns["size"] == len(jpeg(6)) and row.file == os.fsencode(photos / "deep" / "deeper" / "006.jpg")
    wanted = retriever.encode_images([photos / "000.jpg", photos / "upper.JPEG"])
    own = embeds(tmp_path / "index")
    assert np.allclose([own["000.jpg"], own["upper.JPEG"]], wanted, atol=1e-6)
    with open(tmp_path / "index" / "skipped.csv", newline="") as file:
        assert {os.path.basename(row["path"]): row["reason"] for row in csv.DictReader(file)} == bad
    again = index(photos, retriever, tmp_path / "index")
    assert (again.added, again.updated, again.unchanged) == (0, 0, 8) and len(again.skipped) == len(bad)
    (photos / "bad" / "broken.jpg").write_bytes(jpeg(30))
    mended = index(photos, retriever, tmp_path / "index")
    assert mended.added == 1 and len(mended.skipped) == len(bad) - 1
    assert "broken" not in (tmp_path / "index" / "skipped.csv").read_text()


def test_a_name_that_is_no_utf8(tmp_path):
    photos = write_photos(tmp_path / "photos", 1)
    name = os.fsencode(photos) + b"/caf\xe9 \xf0\x9f\x90\x95.jpg"
    with open(name, "wb") as file:
        file.write(jpeg(2))
    retriever = tiny_retriever()
    assert index(photos, retriever, tmp_path / "index", tokens="none").added == 2
    rows = listed(tmp_path / "index")
    assert rows["caf\\xe9 🐕.jpg"].file == name
    searcher = Searcher.open(tmp_path / "index", model=retriever)
    hit = searcher.search(Image.open(os.fsdecode(name)), top=1)[0]
    assert hit.path.endswith("caf\\xe9 🐕.jpg") and searcher.picture(hit).size == (40, 30)
    assert all(hit.match is not None for hit in searcher.search("a red circle"))  # Its file is opened for it.
    assert index(photos, retriever, tmp_path / "index").unchanged == 2
    assert remove_images(tmp_path / "index", [os.fsdecode(name)]) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path):
    photos = write_photos(tmp_path / "photos", 2)
    write_photos(photos / "closed", 2)
    (photos / "000.jpg").chmod(0)
    (photos / "closed").chmod(0)
    report = index(photos, tiny_retriever(), tmp_path / "index")
    (photos / "closed").chmod(0o700)
    assert report.added == 1 and {*report.skipped} == {str(photos / "000.jpg"), str(photos / "closed")}


def test_permissions_as_the_system_reports_them(tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos", 2)
    write_photos(photos / "closed", 2)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = index(photos, tiny_retriever(), tmp_path / "index")
    assert report.added == 2 and report.skipped == {str(photos / "closed"): "Permission denied"}


def test_changed_files_are_replaced_and_gone_ones_stay_until_they_are_removed(tmp_path, monkeypatch):
    photos, retriever = write_photos(tmp_path / "photos", 6), tiny_retriever()
    index(photos, retriever, tmp_path / "index")
    before = embeds(tmp_path / "index")
    (photos / "002.jpg").write_bytes(jpeg(77))
    os.utime(photos / "002.jpg", (1, 1))
    (photos / "003.jpg").unlink()
    report = index(photos, retriever, tmp_path / "index")
    assert (report.added, report.updated, report.unchanged) == (0, 1, 4)
    after = embeds(tmp_path / "index")
    assert [name for name in before if not np.allclose(before[name], after[name])] == ["002.jpg"]
    with monkeypatch.context() as patched:
        finished, finish = [], LanceImages.finish
        patched.setattr(LanceImages, "finish", lambda self: finished.append(len(self)) or finish(self))
        assert remove_images(tmp_path / "index", missing=True) == 1
        assert finished == [5]  # A vector index is made to fit what is left.
    assert sorted(listed(tmp_path / "index")) == ["000.jpg", "001.jpg", "002.jpg", "004.jpg", "005.jpg"]
    assert remove_images(tmp_path / "index", [photos / "000.jpg"]) == 1
    assert remove_images(tmp_path / "index", where=f"size = {len(jpeg(77))}") >= 1
    with pytest.raises(ValueError, match="holds no image .*/000.jpg"):
        remove_images(tmp_path / "index", [photos / "001.jpg", photos / "000.jpg"])
    assert "001.jpg" in listed(tmp_path / "index")
    assert remove_images(tmp_path / "index", [photos]) == len(before) - 3 and listed(tmp_path / "index") == {}
    with pytest.raises(ValueError, match="nothing is named"):
        remove_images(tmp_path / "index")
    with monkeypatch.context() as patched:
        patched.chdir(photos)
        index(photos, retriever, tmp_path / "index")
        for path in ("", " "):
            with pytest.raises(ValueError, match="a path to remove is empty"):
                remove_images(tmp_path / "index", [path])
        assert remove_images(tmp_path / "index", ["."]) == len(before) - 1


KILLED = """
import sys
from loopitr.search import indexing, writer
writer.COMMIT_IMAGES = 4
write = writer.Writer._write
def and_tell(self, waiting):
    write(self, waiting)
    print("written", flush=True)
writer.Writer._write = and_tell
how = {"device": "cpu", "batch_size": 4, "num_workers": 1, "show_progress": False}
indexing.build_index(sys.argv[1], sys.argv[2], sys.argv[3], **how)
"""


@pytest.mark.slow
def test_a_killed_process_loses_and_doubles_nothing(tmp_path):
    photos, run = write_photos(tmp_path / "photos", 160), save_tiny(tmp_path / "run")
    words = [sys.executable, "-c", KILLED, photos, run, tmp_path / "index"]
    process = subprocess.Popen([str(word) for word in words], env=environment(), stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not read_manifest(tmp_path / "index").complete
    held = len(LanceImages.open(tmp_path / "index", 16))
    assert 12 <= held < 160
    with pytest.warns(UserWarning, match=f"is not complete: it has {held} images so far"):
        Searcher.open(tmp_path / "index", device="cpu")
    report = index(photos, run, tmp_path / "index", device="cpu")
    assert (report.added, report.unchanged) == (160 - held, held)
    assert len(listed(tmp_path / "index")) == 160


@pytest.mark.parametrize("where", ["contents", "images"])
def test_whatever_is_written_when_the_process_ends(where, tmp_path, monkeypatch):
    photos, retriever = write_photos(tmp_path / "photos", 12), tiny_retriever()
    monkeypatch.setattr(writer, "COMMIT_IMAGES", 4)
    part = Contents if where == "contents" else LanceImages
    put, calls = part.put, []

    def end(self, *arguments):
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(part, "put", end)
        with pytest.raises(KeyboardInterrupt):
            index(photos, retriever, tmp_path / "index")
    assert len(LanceImages.open(tmp_path / "index", 16)) < 12
    index(photos, retriever, tmp_path / "index")
    assert len(listed(tmp_path / "index")) == 12


def test_many_images_get_a_vector_index_once(tmp_path, monkeypatch):
    monkeypatch.setattr("loopitr.search.lance.INDEXED_FROM", 300)
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((600, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    from loopitr.search.lance import Row

    images = LanceImages.open(tmp_path, 16, create=True)

    def put(start, end):
        images.put(
            [
                Row(id=i, file=b"", path=str(i), stamp=(i, i), width=1, height=1, columns={}, embed=vectors[i])
                for i in range(start, end)
            ]
        )
        images.finish()

    put(0, 300)
    assert images.vector_index() is None
    put(300, 500)
    assert images.vector_index() == "IvfFlat"
    put(500, 600)  # found too, though the index was there before them
    for query in vectors[::60]:
        exact = np.argsort(-vectors @ query)[:10]
        assert [found.id for found in images.search(query, 10, exact=True)] == exact.tolist()
        assert len({found.id for found in images.search(query, 10)} & {*exact.tolist()}) >= 9
    # Of few images that meet a condition, and of many results, none is lost.
    for query in vectors[::60]:
        for limit, where, allowed in ((1000, None, 600), (10, "size >= 590", 10), (9, "path IN ('3', '577')", 2)):
            found = images.search(query, limit, where)
            assert [one.id for one in found] == [one.id for one in images.search(query, limit, where, exact=True)]
            assert len(found) == allowed
    assert [found.id for found in images.search(vectors[0], 5, "size >= 590 AND size < 593")] and len(
        images.stamps()
    ) == 600


def test_outputs_and_sources_that_cannot_be_used(tmp_path):
    photos, retriever = write_photos(tmp_path / "photos", 2), tiny_retriever()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    for source, output, options, message in (
        (tmp_path / "none", "index", {}, "none: no such folder"),
        (tmp_path / "file", "index", {}, "file: is not a folder"),
        (tmp_path / "empty", "index", {}, "empty: there is no image to index"),
        (photos, "file", {}, "file is not a folder"),
        (photos, "link", {}, "link is not a folder"),
        (photos, "photos", {}, "holds 000.jpg and no search index"),
        (photos, "index", {"tokens": "int4"}, "unknown tokens 'int4'; known: fp16, bf16, none"),
        (photos, "index", {"batch_size": 0}, "batch_size must be at least 1"),
        (tmp_path / "none.csv", "index", {}, "none.csv: No such file"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            index(source, retriever, tmp_path / output, **options)
        assert not (tmp_path / "index").exists()
    with pytest.raises(FileNotFoundError, match="is not a search index"):
        add_images(photos, tmp_path / "index", model=retriever)
    index(photos, retriever, tmp_path / "index")
    with pytest.raises(ValueError, match="was indexed with another model"):
        index(photos, tiny_retriever(seed=1), tmp_path / "index")
    with writing(tmp_path / "index"), pytest.raises(ValueError, match="is being written to by another process"):
        remove_images(tmp_path / "index", missing=True)
    hold = "import fcntl, sys\nfile = open(sys.argv[1], 'a')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint()\ninput()"
    words = [sys.executable, "-c", hold, str(tmp_path / "index" / "index.lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="is being written to by another process"):
            remove_images(tmp_path / "index", missing=True)
        other.kill()
    write_photos(tmp_path / "photos", 1, first=9)
    assert index(photos, retriever, tmp_path / "index").added == 1
    inside = photos / "index"
    assert index(photos, retriever, inside).added == 3
    assert index(photos, retriever, inside).unchanged == 3


def test_tokens_beyond_fp16_are_refused_and_bf16_takes_them(tmp_path):
    photos, retriever = write_photos(tmp_path / "photos", 2), tiny_retriever()
    norm = retriever.model.dual.vision.model.norm
    norm.weight.data.mul_(1e6)
    with pytest.raises(ValueError, match="000.jpg: its tokens hold values beyond fp16; keep them in bf16 or none"):
        index(photos, retriever, tmp_path / "index")
    index(photos, retriever, tmp_path / "other", tokens="bf16")
    assert len(Searcher.open(tmp_path / "other", model=retriever).search("a dog")) == 2
