"""What `loopitr search serve` does: a page on which an index is searched."""

import contextlib
import sys
from dataclasses import dataclass

SERVE = """\
loopitr search serve INDEX [--port 7860] [--OPTION VALUE ...]

A page in the browser: images by text, with and without reranking, and similar images and captions by image.
"""


@dataclass
class ServeOptions:
    """Which index, and where the page is."""

    index: str = ""
    """Folder of the index."""
    host: str = "127.0.0.1"
    """Address that is listened at; 0.0.0.0: everybody who reaches this machine may search and see the images."""
    port: int = 7860
    """0: any free one."""
    rerank: int = 100
    """Candidates of a text that the fusion head scores."""
    model: str | None = None
    """The index's model, where it has moved."""
    device: str | None = None
    """cpu, cuda, ...; unset: a GPU if there is one."""


def serve(options: ServeOptions) -> None:
    """Serve the page until it is interrupted.

    Raises:
        ValueError, OSError, ModuleNotFoundError: an index, a model or a port that cannot be used, or no gradio.
    """
    from loopitr.search.looking import Looking
    from loopitr.search.page import import_gradio
    from loopitr.search.searcher import Searcher
    from loopitr.search.serving import bound_socket, is_loopback, page_server

    import_gradio()
    with bound_socket(options.host, options.port) as own:  # before a model is loaded
        looking = Looking(
            Searcher.open(options.index, device=options.device, model=options.model), rerank=options.rerank
        )
        host, port = own.getsockname()[:2]
        with page_server(looking, own, options.host) as server:
            if not is_loopback(host):
                print(f"warning: whoever reaches {host} may search and see the images", file=sys.stderr)
            shown = f"[{host}]" if ":" in host else host
            print(
                f"{options.index}: {len(looking.searcher)} images at http://{shown}:{port} (Ctrl-C ends it)", flush=True
            )
            # uvicorn raises it again after it has closed down.
            with contextlib.suppress(KeyboardInterrupt):
                server.run(sockets=[own])
