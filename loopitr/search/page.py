"""The search page: a gradio interface to a `CachedSearcher`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial, wraps
from html import escape
from pathlib import Path
from typing import Any

from loopitr.data import decode_image
from loopitr.evaluation.report import weight_text
from loopitr.models.scoring import DUAL_ALONE

from .cached_searcher import CachedSearcher
from .figures import Thumbnails, caption_list, grid, preview

TOP, MOST = 24, 96  # images that are shown by default, and at most
CAPTIONS = 10  # captions that are shown for an image
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}


def weight_of(share: float) -> float:
    """The similarity weight for a position of the slider: 0 is the match score, 1/2 the sum, 1 the similarity.

    Raises:
        ValueError: `share` is not from 0 to 1.

    Example:
        >>> from loopitr.search.page import weight_of
        >>> weight_of(0.0), weight_of(0.5), weight_of(0.75)
        (0.0, 1.0, 3.0)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the similarity must be from 0 to 1, got {share}")
    return DUAL_ALONE if share == 1 else share / (1 - share)


def share_of(weight: float) -> float:
    """The position of the slider for a similarity weight, rounded to three decimals."""
    return 1.0 if weight >= DUAL_ALONE else round(weight / (1 + weight), 3)


def build_page(cached: CachedSearcher, uploads: Path) -> Any:
    """A `gradio.Blocks` with a tab for text queries and one for images, and endpoints `/search` and `/similar`.

    Results are HTML that contains the pictures, so that no file of the index is served. The only paths from outside
    that the page opens are those of uploaded files, in gradio's folder `uploads`.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    gradio = import_gradio()
    picture = Thumbnails(cached.searcher)
    own_share = share_of(cached.own_weight)
    nothing = ("", "", "")

    def search(text: str, reranked: bool, share: float, top: float, where: str) -> tuple[str, str]:
        """Find images by text. Returns the grid as HTML, and a line that says how it is ordered."""
        # The slider's positions are rounded, so that of the model's own weight would give a slightly different one.
        weight = cached.own_weight if share == own_share else weight_of(share)
        placed = cached.by_text(text, top=_count(top), reranked=reranked, weight=weight, where=where.strip() or None)
        reranks = reranked and cached.reranks
        order = f"reranked, {weight_text(weight)}" if reranks else "by the dual head's similarity"
        return grid(placed, picture, moves=reranks), f"{len(placed)} of {len(cached.searcher)} images, {order}"

    def similar(image: str | None, top: float) -> tuple[str, str, str]:
        """Find similar images and captions for an image. Returns the grid, the captions and the image as HTML."""
        if image is None:
            raise ValueError("no image is given")
        opened = decode_image(Path(_uploaded(image, uploads)), "the image")
        placed = cached.by_image(opened, top=_count(top))
        captions = caption_list(cached.captions(opened, top=CAPTIONS))
        return grid(placed, picture, moves=False), captions, preview(opened)

    search, similar = (_with_short_errors(function, gradio.Error) for function in (search, similar))
    with gradio.Blocks(title="loopitr", analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as page:
        gradio.Markdown(f"## {len(cached.searcher):,} images")
        with gradio.Tab("By text"):
            with gradio.Row():
                text = gradio.Textbox(label="Query", placeholder="a dog on a beach", scale=4, autofocus=True)
                button = gradio.Button("Search", variant="primary", scale=1)
            with gradio.Row():
                reranked = gradio.Checkbox(
                    value=cached.reranks,
                    label="Rerank",
                    info=f"the fusion head orders the first {cached.rerank}; arrows: places moved"
                    if cached.reranks
                    else "this model is only a dual encoder",
                    interactive=cached.reranks,
                )
                share = gradio.Slider(
                    *(0, 1, own_share),
                    step=0.001,
                    label="Similarity weight",
                    info=f"0: match score alone, 1: similarity alone; the model's: {own_share:g}",
                    interactive=cached.reranks,
                )
                top = gradio.Slider(1, MOST, TOP, step=1, label="Images")
                where = gradio.Textbox("", label="Only where", placeholder="width > 800", info="as in SQL")
            status = gradio.Markdown()
            results = gradio.HTML()
            inputs, outputs = [text, reranked, share, top, where], [results, status]
            gradio.on(
                [text.submit, button.click],
                search,
                inputs,
                outputs,
                api_name="search",
                **ONE_AT_A_TIME,
            )
            again: dict[str, Any] = {"api_visibility": "private", "trigger_mode": "always_last", **ONE_AT_A_TIME}
            gradio.on(
                [reranked.input, share.release, top.release, where.submit],
                lambda *given: search(*given) if given[0].strip() else ("", ""),
                inputs,
                outputs,
                **again,
            )
        with gradio.Tab("By image"):
            with gradio.Row():
                image = gradio.File(
                    label="Drop an image",
                    type="filepath",
                    height=160,
                    elem_classes="loopitr-upload",
                )
                own = gradio.HTML()  # gradio's own preview would ask for a file by its path.
                count = gradio.Slider(1, MOST, TOP, step=1, label="Images")
            with gradio.Row():
                with gradio.Column(scale=3):
                    gradio.Markdown("#### Similar images")
                    neighbours = gradio.HTML()
                with gradio.Column(scale=1):
                    gradio.Markdown("#### Captions of the index that fit best")
                    captions = gradio.HTML()
            outputs = [neighbours, captions, own]
            image.upload(similar, [image, count], outputs, api_name="similar", **ONE_AT_A_TIME)
            count.release(lambda *given: similar(*given) if given[0] else nothing, [image, count], outputs, **again)
            image.clear(lambda: nothing, None, outputs, api_visibility="private")
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = partial(_checked_upload, uploads=uploads)
    return page


async def _checked_upload(path: str | None, *, uploads: Path) -> str | None:
    """Replaces a method of gradio that would accept any file of this machine, or of any address, in a mounted page."""
    return None if path is None else _uploaded(path, uploads)


def _uploaded(path: str, uploads: Path) -> str:
    """The path of an uploaded file, after checking that it is in `uploads`.

    Raises:
        ValueError: the file is somewhere else.
    """
    if not Path(path).resolve().is_relative_to(uploads.resolve()):
        raise ValueError("the image was not uploaded")
    return path


def import_gradio() -> Any:
    """Import gradio when it is needed.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the search page needs gradio: pip install "loopitr[app]"') from error
    return gradio


def _count(top: float) -> int:
    if not (math.isfinite(top) and 1 <= top <= MOST):
        raise ValueError(f"the number of images must be from 1 to {MOST}, got {top:g}")
    return int(top)


def _with_short_errors(function: Callable[..., Any], kind: type[Exception]) -> Callable[..., Any]:
    """`function`, but errors that the user can correct are shown on the page as one line; others go to the terminal."""

    @wraps(function)  # gradio reads the parameters of the endpoint from it.
    def with_short_errors(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, OSError) as error:
            # The page shows the text as HTML.
            raise kind(escape(" ".join(str(error).split())), print_exception=False) from error  # type: ignore[call-arg]

    return with_short_errors
