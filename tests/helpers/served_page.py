"""The search page of an index, served in this process, and plain requests to it."""

from __future__ import annotations

import http.client
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.small_index import open_small_index

from loopitr.search.cached_searcher import CachedSearcher
from loopitr.search.serving import bound_socket, page_server


@contextmanager
def served(folder: Path) -> Iterator[SimpleNamespace]:
    """The page of an index on a free port of this machine, in a thread."""
    with (
        bound_socket("127.0.0.1", 0) as own,
        page_server(CachedSearcher(open_small_index(folder)), own, "127.0.0.1") as server,
    ):
        uploads = os.environ["GRADIO_TEMP_DIR"]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [own]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        port = own.getsockname()[1]
        try:
            yield SimpleNamespace(port=port, url=f"http://127.0.0.1:{port}", uploads=Path(uploads))
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive() and not Path(uploads).exists() and "GRADIO_TEMP_DIR" not in os.environ


def get(page: SimpleNamespace, target: str, *, host: str | None = None, method: str = "GET") -> Any:
    """The answer to a request for `target` as it stands, which ordinary clients would tidy up."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=30)
    connection.putrequest(method, target, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{page.port}")
    connection.endheaders()
    answer = connection.getresponse()
    answer.content = answer.read()
    connection.close()
    return answer
