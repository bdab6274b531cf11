"""Serves the search page on a port of this machine, without access to files or for other sites."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cached_searcher import CachedSearcher
from .figures import STYLE
from .page import build_page, import_gradio

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# gradio's paths for serving files and for fetching from other addresses, which the page does not need.
FILES = re.compile(r"/(file|proxy)(=|/|$)")
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; base-uri 'self'"
LARGEST_UPLOAD = 64 * 2**20  # bytes


class Guard:
    """Refuses requests for gradio's paths of files and, on loopback, requests to other host names.

    Otherwise a site in the same browser could point its name to this machine and read the page (DNS rebinding).

    Args:
        names: the host names that requests may have; empty: any.
    """

    def __init__(self, app: App, names: frozenset[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.names and host_name(host) not in self.names:
            return await _refuse(send, 421, "this page is only for this machine")
        if FILES.search(scope["path"]):
            return await _refuse(send, 404, "no files are served")

        async def with_policy(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        await self.app(scope, receive, with_policy)


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


def host_name(host: str) -> str:
    """The name in a `Host` header, without the port and the brackets of IPv6."""
    return host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0].lower()


def is_loopback(host: str) -> bool:
    """Whether an address or name is one that only this machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on a port.

    Args:
        port: 0: any free port.

    Raises:
        OSError: the port is in use or not allowed for this user, or the address is not one of this machine.
    """
    if not 0 <= port < 2**16:
        raise OSError(f"port must be from 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"host {host!r}: {error.strerror or error}") from error
    try:
        if os.name == "posix":
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
        own.listen(128)  # This reserves the port.
    except OSError as error:
        own.close()
        raise OSError(f"port {port} of {host}: {error.strerror}; choose another with --port") from error
    return own


@contextmanager
def page_server(cached: CachedSearcher, own: socket.socket, host: str) -> Iterator[Any]:
    """A `uvicorn.Server` with the page; its `run(sockets=[own])` serves it until `should_exit` is set.

    Uploaded files go to a temporary folder that is deleted at the end.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    gradio = import_gradio()
    import uvicorn
    from fastapi import FastAPI

    names = frozenset({"localhost", "127.0.0.1", "::1", host.lower()}) if is_loopback(host) else frozenset[str]()
    with tempfile.TemporaryDirectory(prefix="loopitr-uploads-") as uploads:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            app = gradio.mount_gradio_app(
                FastAPI(openapi_url=None),
                build_page(cached, Path(uploads)),
                path="",
                server_name=host,
                server_port=own.getsockname()[1],
                allowed_paths=[],
                show_error=False,
                max_file_size=LARGEST_UPLOAD,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=["api"],
                css=STYLE,
            )
            config = uvicorn.Config(
                Guard(app, names), log_level="warning", timeout_graceful_shutdown=1, lifespan="on", ws="none"
            )
            yield uvicorn.Server(config)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before
