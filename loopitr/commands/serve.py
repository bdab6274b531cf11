"""`loopitr search serve`: serves a search page."""

import contextlib
import sys
from dataclasses import dataclass

SERVE = """\
loopitr search serve INDEX [--port 7860] [--OPTION VALUE ...]

Serves a search page for the browser: images for a text, with and without reranking, and similar images and captions for
an image.
"""


@dataclass
class ServeOptions:
    """The index, and the address of the page."""

    index: str = ""
    """Folder of the index."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: everybody who can reach this machine may search and see the images."""
    port: int = 7860
    """Port to listen on; 0: any free one."""
    rerank: int = 100
    """Candidates for a text that the fusion head scores."""
    model: str | None = None
    """The model of the index, if it has been moved."""
    device: str | None = None
    """cpu, cuda, ...; unset: a GPU if there is one."""


def serve(options: ServeOptions) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ValueError, OSError: the index, the model or the port cannot be used.
        ModuleNotFoundError: gradio is not installed.
    """
    from loopitr.search.cached_searcher import CachedSearcher
    from loopitr.search.page import import_gradio
    from loopitr.search.searcher import Searcher
    from loopitr.search.serving import bound_socket, is_loopback, page_server

    import_gradio()
    with bound_socket(options.host, options.port) as own:  # An unusable port is an error before a model is loaded.
        cached = CachedSearcher(
            Searcher.open(options.index, device=options.device, model=options.model), rerank=options.rerank
        )
        host, port = own.getsockname()[:2]
        with page_server(cached, own, options.host) as server:
            if not is_loopback(host):
                print(f"warning: everybody who can reach {host} may search and see the images", file=sys.stderr)
            shown = f"[{host}]" if ":" in host else host
            print(
                f"{options.index}: {len(cached.searcher)} images at http://{shown}:{port} (Ctrl-C ends it)", flush=True
            )
            # uvicorn raises it again after its shutdown.
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=[own])
