"""The contents of an index in object storage, against an S3 server of this machine if AWS_ENDPOINT_URL names one."""

import os
import uuid

import pytest
from helpers.tiny_index import index, listed, tiny_retriever, write_photos

from loopitr import Searcher
from loopitr.search.indexing import add_images
from loopitr.search.lance_errors import line_of, repair_of
from loopitr.search.removing import remove_images

START = (
    'Invalid input, Failed to connect to namespace: IO { source: Generic { store: "S3", source: ListRequest { source: '
)
REFUSED = """Http(ConnectError("tcp connect error", Os { code: 111, message: "Connection refused" })) }
location: Location { file: "/src/object_store.rs" } }"""
NO_BUCKET = """RetryError { inner: Status { status: 404, body: Some("<Code>NoSuchBucket</Code>
<Message>There is no such bucket</Message>") } } } }"""
NO_KEY = 'IO { source: "Failed to get AWS credentials: ProviderError" } } }'


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (REFUSED, "Connection refused"),
        (NO_BUCKET, "There is no such bucket"),
        (NO_KEY, "Failed to get AWS credentials"),
    ],
)
def test_the_cause_of_a_storage_error_is_one_short_line(text, cause):
    error = ValueError(START + text)
    assert line_of(error) == f"the storage does not answer as expected: {cause}"
    assert "AWS_ENDPOINT_URL" in repair_of(error)


def test_an_index_is_a_folder(tmp_path):
    photos, retriever = write_photos(tmp_path / "photos", 1), tiny_retriever()
    with pytest.raises(ValueError, match="^s3://bucket/index: an index is a folder of this machine"):
        index(photos, retriever, "s3://bucket/index")


def test_contents_in_another_folder_are_found_from_any_folder(tmp_path, monkeypatch):
    photos, retriever = write_photos(tmp_path / "photos", 2), tiny_retriever()
    monkeypatch.chdir(tmp_path)
    index(photos, retriever, "index", contents="contents")
    monkeypatch.chdir(photos)
    assert index(photos, retriever, tmp_path / "index", contents="../contents").unchanged == 2


@pytest.mark.skipif("AWS_ENDPOINT_URL" not in os.environ, reason="needs an S3 server, named by AWS_ENDPOINT_URL")
def test_contents_in_a_bucket(tmp_path):
    bucket = os.environ.get("LOOPITR_TEST_BUCKET", "loopitr")
    photos, retriever = write_photos(tmp_path / "photos", 6), tiny_retriever()
    for name, place in (("local", None), ("remote", f"s3://{bucket}/{uuid.uuid4().hex}")):
        index(photos, retriever, tmp_path / name, contents=place)
    add_images(write_photos(tmp_path / "more", 2, first=6), tmp_path / "remote", model=retriever, num_workers=0)
    assert remove_images(tmp_path / "remote", [tmp_path / "more"]) == 2
    assert len(listed(tmp_path / "remote")) == 6
    local, remote = (Searcher.open(tmp_path / name, model=retriever).search("a dog") for name in ("local", "remote"))
    assert local == remote and local[0].match is not None
