"""What an index sends to a Qdrant server."""

import json
import os

import pytest
from helpers.tiny_index import index, tiny_retriever, write_photos

from loopitr import Searcher
from loopitr.search.removing import remove_images

pytest.importorskip("qdrant_client", reason="the vectors are on a Qdrant server (extra `qdrant`)")
from helpers.qdrant_server import qdrant_server
from qdrant_client import models

COUNT = 9


@pytest.fixture(scope="module")
def retriever():
    return tiny_retriever()


@pytest.fixture
def server():
    with qdrant_server() as running:
        yield running


@pytest.fixture
def table(tmp_path):
    write_photos(tmp_path / "photos", COUNT)
    rows = [{"image": f"photos/{i:03}.jpg", "caption": f"dog no. {i}", "year": 2000 + i} for i in range(COUNT)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data.jsonl"


def names(hits):
    return [os.path.basename(hit.path) for hit in hits]


def test_a_server_finds_what_lance_finds(server, table, retriever, tmp_path, monkeypatch):
    monkeypatch.setattr("loopitr.search.qdrant.REQUEST_BYTES", 2000)
    assert index(table, retriever, tmp_path / "remote", store=server.address).added == COUNT
    index(table, retriever, tmp_path / "local")
    local, remote = (Searcher.open(tmp_path / name, model=retriever) for name in ("local", "remote"))
    for where in (None, "year >= 2004", "year = 2003", "width > 30", "mtime > timestamp '2020-01-01 00:00:00'"):
        there, here = (own.search("a dog", top=COUNT, where=where) for own in (remote, local))
        assert names(there) == names(here) and len(there) > 0
        assert [hit.score for hit in there] == pytest.approx([hit.score for hit in here], abs=1e-4)
    assert names(remote.search("a dog", where="caption HAS 'dog 4'")) == ["004.jpg"]
    assert remote.picture(remote.search("a dog", top=1)[0]).size == (40, 30)
    writes = [path for method, path in server.calls if method == "PUT" and path.partition("?")[0].endswith("/points")]
    assert len(writes) > 2 and all("wait=true" in path for path in writes) and server.largest < 4000
    assert server.schema == {
        **{"path": "keyword", "size": "integer", "mtime": "datetime", "width": "integer", "height": "integer"},
        **{"caption": "text", "year": "float"},
    }
    assert index(table, retriever, tmp_path / "remote", store=server.address).unchanged == COUNT
    assert remove_images(tmp_path / "remote", where="year < 2002") == 2 and len(remote) == COUNT - 2


def test_a_server_that_wants_a_key(server, table, retriever, tmp_path, monkeypatch):
    server.key = "secret"
    with pytest.raises(ValueError, match=f"^the store {server.address}: .*401 .*Must provide an API key") as raised:
        index(table, retriever, tmp_path / "index", store=server.address)
    assert "\n" not in str(raised.value)
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    with pytest.warns(UserWarning, match="Api key is used with an insecure connection"):
        assert index(table, retriever, tmp_path / "index", store=server.address).added == COUNT


def test_a_collection_that_is_gone_or_of_others(server, table, retriever, tmp_path):
    index(table, retriever, tmp_path / "index", store=server.address)
    server.client.delete_collection("index")
    with pytest.raises(ValueError, match=f"^the store {server.address}: it has no collection 'index'$"):
        Searcher.open(tmp_path / "index", model=retriever)
    cosine, named = models.Distance.COSINE, {"a": models.VectorParams(size=16, distance=models.Distance.DOT)}
    for vectors in (models.VectorParams(size=16, distance=cosine), named):
        server.client.create_collection("index", vectors_config=vectors)
        with pytest.raises(ValueError, match="'index' is not of an index: it does not compare vectors by dot product"):
            Searcher.open(tmp_path / "index", model=retriever)
        server.client.delete_collection("index")
    server.client.create_collection("index", vectors_config=models.VectorParams(size=8, distance=models.Distance.DOT))
    with pytest.raises(ValueError, match="'index' holds vectors of 8 dimensions, wanted 16"):
        Searcher.open(tmp_path / "index", model=retriever)
