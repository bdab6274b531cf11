"""Saves a model with its processor and card, or uploads them to the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from loopitr.building.card import write_card
from loopitr.building.card_file import CARD, is_own, may_write
from loopitr.building.folders import save_for_use
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor
from loopitr.reading import user_path


def push_to_hub(
    model: LoopITRModel | DualEncoder,
    processor: LoopITRProcessor,
    repo_id: str,
    *,
    source: str | Path | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model, processor and card",
) -> str:
    """Upload a model with its processor and card to a repository of the hub.

    The card is the README.md in `source` if a user wrote or changed it. Otherwise a new one is generated, unless the
    repository has a card that a user wrote or changed.

    Args:
        repo_id: `NAME` or `OWNER/NAME`; created if it does not exist.
        source: the run folder or export that the model comes from; None: unknown.
        private: whether a new repository is private; None: the owner's default.
        token: None: that of the logged-in user.
        revision: an existing branch; None: main.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: `repo_id` is not the name of a repository.
        OSError: the hub cannot be reached, or refuses.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as name, _one_kind_of_error(repo_id):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        folder = Path(name)
        save_with_card(model, processor, folder, source=source, name=repo)
        if is_own((folder / CARD).read_text(encoding="utf-8")) and _has_user_card(api, repo, revision):
            (folder / CARD).unlink()
        info = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=commit_message, revision=revision)
    return str(info.commit_url)


@contextmanager
def _one_kind_of_error(repo_id: str) -> Iterator[None]:
    """A context in which failed connections are OSErrors too, as they are only in some versions of huggingface_hub."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or "TransportError" not in [kind.__name__ for kind in type(error).__mro__]:
            raise
        raise OSError(f"{repo_id}: the hub cannot be reached ({error})") from error


def save_with_card(
    model: LoopITRModel | DualEncoder,
    processor: LoopITRProcessor,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    name: str | None = None,
) -> None:
    """Save a model with its processor and card, for `from_pretrained`.

    A README.md in `folder` that a user wrote or changed stays; otherwise one in `source` is copied.

    Args:
        source: the run folder, export or hub id that the model comes from; None: unknown.
        name: the name that the card's example loads; None: the folder's own name.

    Raises:
        OSError: the folder cannot be written to.
    """
    folder = user_path(folder)
    source_card = None if source is None else user_path(source) / CARD
    if source_card is not None and source_card.is_file() and not may_write(source_card) and may_write(folder / CARD):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CARD).write_bytes(source_card.read_bytes())
    if isinstance(model, LoopITRModel):
        save_for_use(model, processor, folder)
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    write_card(folder, model, source=source, name=name)


def _has_user_card(api: HfApi, repo: str, revision: str | None) -> bool:
    """Whether the repository has a card that a user wrote or changed."""
    if not api.file_exists(repo, CARD, revision=revision):
        return False
    return not is_own(Path(api.hf_hub_download(repo, CARD, revision=revision)).read_text(encoding="utf-8"))
