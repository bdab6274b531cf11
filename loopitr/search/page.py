"""The page on which an index is searched: gradio's interface over `Looking`."""

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

from .figures import Thumbnails, caption_list, grid, preview
from .looking import Looking

TOP = 24  # images
MOST = 96
CAPTIONS = 10
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}


def weight_of(share: float) -> float:
    """The similarity weight at a place of the slider: 0 is the match score alone, 1/2 the sum, 1 the similarity alone.

    Raises:
        ValueError: no place from 0 to 1.

    Example:
        >>> from loopitr.search.page import weight_of
        >>> weight_of(0.0), weight_of(0.5), weight_of(0.75)
        (0.0, 1.0, 3.0)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the similarity is from 0 to 1, got {share}")
    return DUAL_ALONE if share == 1 else share / (1 - share)


def share_of(weight: float) -> float:
    """The place on the slider of a similarity weight, to its third decimal."""
    return 1.0 if weight >= DUAL_ALONE else round(weight / (1 + weight), 3)


def build_page(looking: Looking, uploads: Path) -> Any:
    """A `gradio.Blocks` with a tab for texts and one for images; as endpoints `/search` and `/similar`.

    Results are HTML in which the pictures lie, so that the page needs no file of the index by its path. The only files
    that it opens by a path from outside are those in `uploads`, gradio's folder for them.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    gradio = import_gradio()
    picture = Thumbnails(looking.searcher)
    own_share = share_of(looking.own_weight)
    nothing = ("", "", "")

    def search(text: str, reranked: bool, share: float, top: float, where: str) -> tuple[str, str]:
        """Find images by text: the grid as HTML, and what it was ordered by."""
        # The slider has no place that is the model's own weight to the last digit.
        weight = looking.own_weight if share == own_share else weight_of(share)
        found = looking.by_text(text, top=_count(top), reranked=reranked, weight=weight, where=where.strip() or None)
        reranks = reranked and looking.reranks
        order = f"reranked, {weight_text(weight)}" if reranks else "by the dual head's similarity"
        return grid(found, picture, moves=reranks), f"{len(found)} of {len(looking.searcher)} images, {order}"

    def similar(image: str | None, top: float) -> tuple[str, str, str]:
        """Find similar images and captions for an image: the grid, the captions, and the image itself, as HTML."""
        if image is None:
            raise ValueError("no image is given")
        opened = decode_image(Path(_uploaded(image, uploads)), "the image")
        found = looking.by_image(opened, top=_count(top))
        captions = caption_list(looking.captions(opened, top=CAPTIONS))
        return grid(found, picture, moves=False), captions, preview(opened)

    search, similar = (_with_short_errors(function, gradio.Error) for function in (search, similar))
    with gradio.Blocks(title="loopitr", analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as page:
        gradio.Markdown(f"## {len(looking.searcher):,} images")
        with gradio.Tab("By text"):
            with gradio.Row():
                text = gradio.Textbox(label="Query", placeholder="a dog on a beach", scale=4, autofocus=True)
                button = gradio.Button("Search", variant="primary", scale=1)
            with gradio.Row():
                reranked = gradio.Checkbox(
                    value=looking.reranks,
                    label="Rerank",
                    info=f"the fusion head orders the first {looking.rerank}; arrows: places moved"
                    if looking.reranks
                    else "this model is a dual encoder alone",
                    interactive=looking.reranks,
                )
                share = gradio.Slider(
                    *(0, 1, own_share),
                    step=0.001,
                    label="Similarity weight",
                    info=f"0: match score alone, 1: similarity alone; the model's: {own_share:g}",
                    interactive=looking.reranks,
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
    """In place of gradio's own, which takes any file of this machine, or of any address, into a mounted page."""
    return None if path is None else _uploaded(path, uploads)


def _uploaded(path: str, uploads: Path) -> str:
    """
    Raises:
        ValueError: the file lies somewhere else.
    """
    if not Path(path).resolve().is_relative_to(uploads.resolve()):
        raise ValueError("the image was not uploaded")
    return path


def import_gradio() -> Any:
    """
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
        raise ValueError(f"from 1 to {MOST} images are shown, got {top:g}")
    return int(top)


def _with_short_errors(function: Callable[..., Any], kind: type[Exception]) -> Callable[..., Any]:
    """What the user can mend is one line on the page, which shows HTML; anything else is for the terminal."""

    @wraps(function)  # Its parameters are those of the endpoint.
    def shown(*given: Any) -> Any:
        try:
            return function(*given)
        except (ValueError, OSError) as error:
            raise kind(escape(" ".join(str(error).split())), print_exception=False) from error  # type: ignore[call-arg]

    return shown
