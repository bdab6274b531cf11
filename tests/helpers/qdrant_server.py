"""A Qdrant server as far as an index calls one: HTTP in front of its client's local mode, as strict as a server is."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from qdrant_client import QdrantClient, models

MOST_BYTES = 2**25


class Server(ThreadingHTTPServer):
    """`key`: the API key that it wants. `calls`: (method, path) of each request; `schema`: the indexed columns."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.client, self.lock = QdrantClient(":memory:"), threading.Lock()
        self.key: str | None = None
        self.calls: list[tuple[str, str]] = []
        self.schema: dict[str, str] = {}
        self.largest = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None: ...

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        server = self.server
        server.calls.append((self.command, self.path))
        server.largest = max(server.largest, len(data))
        if server.key is not None and self.headers.get("api-key") != server.key:
            return self._send(401, "Must provide an API key or an Authorization bearer token")
        if len(data) > MOST_BYTES:
            return self._send(413, {"status": {"error": "JSON payload is larger than allowed"}})
        found = re.fullmatch(r"/collections/([^/]+)(/.*)?", path)
        if found is None:
            return self._send(404, {"status": {"error": "no such path"}})
        body = json.loads(data, parse_constant=lambda name: self.fail(name)) if data else {}
        with server.lock:
            try:
                result = self._result(found[1], f"{self.command} {found[2] or ''}", body, query)
            except ValueError as error:
                status = 404 if "not found" in str(error) else 400
                return self._send(status, {"status": {"error": str(error)}})
        self._send(200, {"result": result, "status": "ok", "time": 0.0})

    do_GET = do_PUT = do_POST = _answer

    def fail(self, name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def _send(self, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _result(self, name: str, call: str, body: dict[str, Any], query: str) -> Any:
        client, schema = self.server.client, self.server.schema
        chosen = models.Filter(**body["filter"]) if body.get("filter") else None
        done = {"operation_id": 1, "status": "completed" if "wait=true" in query else "acknowledged"}
        if call == "GET /exists":
            return {"exists": client.collection_exists(name)}
        if call == "PUT ":
            return client.create_collection(name, vectors_config=models.VectorParams(**body["vectors"]))
        if call == "GET ":
            info = json.loads(client.get_collection(name).model_dump_json())
            indexed = {column: {"data_type": kind, "points": 0} for column, kind in schema.items()}
            return {**info, "payload_schema": indexed}
        if call == "PUT /index":
            schema[body["field_name"]] = models.PayloadSchemaType(body["field_schema"]).value
            return done
        if call == "PUT /points":
            client.upsert(name, models.PointsList(**body).points)
            return done
        if call == "POST /points/delete":
            client.delete(name, models.PointIdsList(**body))
            return done
        if call == "POST /points/count":
            return {"count": client.count(name, count_filter=chosen).count}
        wanted = {"limit": body["limit"], "with_payload": body.get("with_payload", True)}
        if call == "POST /points/scroll":
            points, following = client.scroll(name, scroll_filter=chosen, offset=body.get("offset"), **wanted)
            rows = [json.loads(point.model_dump_json()) for point in points]
            return {"points": rows, "next_page_offset": following}
        if call == "POST /points/query":
            points = client.query_points(name, query=body["query"]["nearest"], query_filter=chosen, **wanted).points
            return {"points": [json.loads(point.model_dump_json()) for point in points]}
        raise ValueError(f"unknown call {call}")


@contextmanager
def qdrant_server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
