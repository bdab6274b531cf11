"""The search page through gradio's own client and through plain requests: what it answers, and what it never serves."""

import http.client
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers.recipe_process import environment, error_lines
from helpers.served_page import get, served
from helpers.small_index import EVIL, IMAGES, QUERY, open_small_index
from helpers.tiny_gallery import jpeg

from loopitr.commands.main import main
from loopitr.models.scoring import DUAL_ALONE
from loopitr.search.page import share_of
from loopitr.search.serving import host_name, is_loopback

pytestmark = pytest.mark.slow  # A page is served.


@pytest.fixture(scope="module")
def page(small_index):
    with served(small_index) as page:
        yield page


@pytest.fixture(scope="module")
def client(page):
    return Client(page.url, verbose=False, analytics_enabled=False)


def titles(html):
    return [Path(path).name for path in re.findall('<figure title="([^"]*)"', html)]


def search(client, text=QUERY, reranked=True, share=0.02, top=6, where=""):
    return client.predict(text, reranked, share, top, where, api_name="/search")


def test_a_text_gives_the_searchers_images_with_their_moves(small_index, client):
    searcher = open_small_index(small_index)
    for share, weight in ((0.0, 0.0), (share_of(0.02), 0.02), (0.5, 1.0), (1.0, DUAL_ALONE)):
        html, status = search(client, share=share)
        expected = searcher.search(QUERY, top=6, similarity_weight=weight)
        assert titles(html) == [Path(hit.path).name for hit in expected]
        assert html.count("data:image/jpeg;base64,") == 6 and status.startswith(f"6 of {IMAGES} images, reranked, ")
        assert ("&uarr;" in html) == (weight < 0.1)  # At 1 the similarities of this random model decide all.
    _, status = client.predict(text=QUERY, api_name="/search")  # All other inputs have defaults.
    assert status == f"{IMAGES} of {IMAGES} images, reranked, w = 0.02"
    html, status = search(client, reranked=False, top=IMAGES)
    assert titles(html) == [Path(hit.path).name for hit in searcher.search(QUERY, top=IMAGES, rerank=0)]
    assert "&uarr;" not in html and status == f"{IMAGES} of {IMAGES} images, by the dual head's similarity"
    assert "<script" not in html and "&lt;script&gt;" in html


def test_a_condition_filters(client):
    html, status = search(client, where=f"caption LIKE '%{EVIL[:12]}%'")
    assert titles(html) == ["3.jpg"] and status.startswith("1 of")
    assert "No image found" in search(client, where="width > 10000")[0]


def test_an_image_gives_similar_images_and_captions(small_index, client, tmp_path):
    (tmp_path / "mine.jpg").write_bytes(jpeg(7))
    similar, captions, own = client.predict(handle_file(tmp_path / "mine.jpg"), 5, api_name="/similar")
    assert own.startswith('<img class="loopitr-own" src="data:image/jpeg;base64,')
    assert titles(similar)[0] == "7.jpg" and len(titles(similar)) == 5
    assert captions.count("<li>") == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "   "}, "the query is empty"),
        ({"where": "<b> ="}, "&lt;b&gt;"),
        ({"top": 0}, "less than minimum value 1"),
        ({"top": 97}, "greater than maximum value 96"),
        ({"share": 1.5}, "greater than maximum value 1"),
    ],
)
def test_what_cannot_be_searched_is_said_in_one_line(client, given, message):
    with pytest.raises(AppError) as raised:
        search(client, **given)
    assert message in str(raised.value) and "\n" not in str(raised.value) and "<b>" not in str(raised.value)


def test_an_image_that_does_not_open_and_other_files_are_refused(client, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(jpeg(7)[:100])
    with pytest.raises(AppError, match=r"the image: unreadable image \(truncated\)"):
        client.predict(handle_file(tmp_path / "broken.jpg"), 5, api_name="/similar")
    (tmp_path / "note.txt").write_text("text")
    with pytest.raises(AppError, match="not a known image format"):
        client.predict(handle_file(tmp_path / "note.txt"), 5, api_name="/similar")
    with pytest.raises(AppError, match="no image is given"):
        client.predict(None, 5, api_name="/similar")


def test_a_path_or_an_address_is_no_upload(small_index, page):
    """Requests that name a file instead of one that was uploaded, as any of the inputs."""
    (page.uploads.parent / "loopitr-outside.jpg").write_bytes(jpeg(7))
    paths = [
        small_index / "photos" / "4.jpg",
        "/etc/hostname",
        page.uploads / ".." / "loopitr-outside.jpg",
        page.uploads,
    ]
    with listener() as asked:
        for path in [*paths, f"http://127.0.0.1:{asked.port}/7.jpg"]:
            data = {"path": str(path), "meta": {"_type": "gradio.FileData"}, "orig_name": "a.jpg"}
            for more in ({}, {"is_stream": True}, {"url": f"http://127.0.0.1:{asked.port}/"}):
                assert "event: error" in called(page, "similar", [{**data, **more}, 5]), (path, more)
            if path != page.uploads:  # As a text, a folder of gradio's own is one as any other.
                assert "event: error" in called(page, "search", [data, True, 0.5, 5, ""])
        assert not asked.requests
    copies = [path.read_bytes() for path in page.uploads.rglob("*") if path.is_file()]
    assert jpeg(4) not in copies and Path("/etc/hostname").read_bytes() not in copies
    (page.uploads.parent / "loopitr-outside.jpg").unlink()


def called(page, name, inputs):
    """The events with which the server answers a plain call of an endpoint."""
    started = httpx.post(f"{page.url}/gradio_api/call/{name}", json={"data": inputs, "session_hash": "abc"})
    return httpx.get(f"{page.url}/gradio_api/call/{name}/{started.json()['event_id']}", timeout=30).text


@contextmanager
def listener():
    """A server that serves an image, and remembers who asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(jpeg(7))

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        seen = SimpleNamespace(port=server.server_address[1], requests=[])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield seen
        server.shutdown()


def test_no_file_is_served(small_index, page, client, tmp_path):
    (tmp_path / "mine.jpg").write_bytes(jpeg(7))
    client.predict(handle_file(tmp_path / "mine.jpg"), 5, api_name="/similar")
    (uploaded,) = {path for path in page.uploads.rglob("*.jpg") if path.read_bytes() == jpeg(7)}
    files = [
        "/etc/passwd",
        small_index / "photos" / "4.jpg",
        small_index / "photos.csv",
        small_index / "index" / "manifest.json",
        uploaded,
    ]
    files += [os.path.relpath("/etc/passwd"), "setup.cfg", Path(__file__)]
    answers = []
    for file in map(str, files):
        for form in (
            file,
            urllib.parse.quote(file, safe=""),
            "../" * 12 + file.lstrip("/"),
            "..%2f" * 12 + file.lstrip("/"),
        ):
            for address in (
                "gradio_api/file=",
                "gradio_api/file/",
                "file=",
                "gradio_api/%66ile%3d",
                "gradio_api//file=",
            ):
                answers.append((404, get(page, f"/{address}{form}")))
            for address in ("", "static/", "assets/", "gradio_api/", "custom_component/", "gradio_api/stream/"):
                answers.append((None, get(page, f"/{address}{form}")))
    assert get(page, "/gradio_api/file=x", method="HEAD").status == 404
    secrets = [
        Path("/etc/passwd").read_bytes()[:20],
        jpeg(7)[-40:],
        jpeg(4)[-40:],
        b"image,caption",
        b"[metadata]",
        b"model_hash",
    ]
    for status, answer in answers:
        assert not any(secret in answer.content for secret in secrets)
        assert status in (None, answer.status)
    for address in ("gradio_api/proxy=", "gradio_api/file=", "proxy="):  # Nothing is fetched for others either.
        assert get(page, f"/{address}{page.url}/").status == 404


def test_another_name_of_this_machine_is_refused(page):
    for host in ("evil.example", f"evil.example:{page.port}", "127.0.0.1.evil.example", ""):
        assert get(page, "/", host=host or " ").status == 421
    for host in ("localhost", f"LOCALHOST:{page.port}", f"[::1]:{page.port}", "127.0.0.1"):
        assert get(page, "/", host=host).status == 200
    assert host_name("[::1]:80") == "::1" and host_name("A.b:80") == "a.b"
    assert [is_loopback(host) for host in ("127.0.0.2", "::1", "localhost", "0.0.0.0", "10.0.0.1", "x")] == [
        True
    ] * 3 + [False] * 3


def test_the_page_refers_to_no_other_host(page):
    answer = get(page, "/")
    assert answer.getheader("content-security-policy").startswith("default-src 'self' ")
    html = answer.content.decode()
    loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:)?//([^"/]*)', html)
    assert not [host for _, host in loaded if not host.startswith("127.0.0.1")]


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        main(["search", "serve", *map(str, arguments)])
    assert raised.value.code == 2
    (line,) = error_lines(capsys.readouterr().err)
    return line


def test_a_port_in_use_a_wrong_host_and_no_index_are_one_line(small_index, page, capsys, tmp_path):
    index = (small_index / "index",)
    assert f"port {page.port} of 127.0.0.1: Address already in use" in fails(capsys, *index, "--port", page.port)
    assert "port must be from 0 to 65535, got 70000" in fails(capsys, *index, "--port", 70000)
    assert "203.0.113.7" in fails(capsys, *index, "--host", "203.0.113.7", "--port", 0)
    assert str(tmp_path / "none") in fails(capsys, tmp_path / "none", "--port", 0)
    assert "rerank must be at least 1" in fails(capsys, *index, "--port", 0, "--rerank", 0)
    assert "no index is given" in fails(capsys)


def test_without_gradio_it_names_the_extra(small_index, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "loopitr[app]"' in fails(capsys, small_index / "index")


def test_the_command_serves_until_it_is_interrupted(small_index):
    # A process that the tests are in the background of ignores interrupts.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from loopitr.commands.main import main; main()"
    given = ["search", "serve", str(small_index / "index"), "--port", "0", "--device", "cpu"]
    words = [sys.executable, "-c", code, *given]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        port = int(re.search(r"12 images at http://127\.0\.0\.1:(\d+) ", line)[1])
        while True:  # The line comes just before the first answer.
            try:
                assert get(SimpleNamespace(port=port), "/").status == 200
                break
            except (TimeoutError, ConnectionError):
                time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in errors and not out
