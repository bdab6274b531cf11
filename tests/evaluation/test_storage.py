"""Where tokens wait while an evaluation runs: equal results, bounded memory, nothing left behind, errors that name."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from helpers.support import tiny_model
from helpers.tiny_gallery import evaluate, tiny_records

from loopitr.data import DataError
from loopitr.evaluation import retrieval
from loopitr.evaluation.storage import TokenStorage, TokenStore

CPU = torch.device("cpu")


def scores(monkeypatch, model=None, records=None, **options):
    """Match scores of all candidate pairs of an evaluation."""
    seen = []
    score = retrieval.score_candidates
    with monkeypatch.context() as patch:
        patch.setattr(retrieval, "score_candidates", lambda *a, **k: seen.append(score(*a, **k)) or seen[-1])
        given = {"rerank": 4, "image_block": 4, "pair_block": 7, **options}
        evaluate(model or tiny_model(), records or tiny_records(), **given)
    (match_scores,) = seen
    return match_scores


@pytest.mark.parametrize("style", ["late", "shared"])
def test_wherever_tokens_wait_the_scores_are_the_same(monkeypatch, tmp_path, style):
    expected = scores(monkeypatch, tiny_model(style=style), token_storage="memory")
    for kind in ("disk", "recompute", "auto"):
        kept = scores(monkeypatch, tiny_model(style=style), token_storage=kind, token_folder=tmp_path)
        torch.testing.assert_close(kept, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["memory", "disk"])
@pytest.mark.parametrize(("dtype", "error"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_half_precision_is_close(monkeypatch, kind, dtype, error):
    expected = scores(monkeypatch, token_storage=kind)
    kept = scores(monkeypatch, token_storage=kind, token_dtype=dtype)
    torch.testing.assert_close(kept, expected, atol=error, rtol=error)
    assert not torch.equal(kept, expected)


@pytest.mark.parametrize("folder", ["file", "file/new"])
def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, folder):
    (tmp_path / "file").touch()
    storage = TokenStorage("disk", folder=tmp_path / folder)
    with pytest.raises(DataError, match=f"token_folder {tmp_path / folder} cannot be written to"):
        storage.open(2, 3, device=CPU, name=str)


def mapped() -> bool:
    return "loopitr-tokens" in Path("/proc/self/maps").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("fails", [False, True])
def test_the_file_is_gone_afterwards_also_after_an_error(monkeypatch, tmp_path, fails):
    model, folder, during = tiny_model(), tmp_path / "new" / "tokens", []
    score = model.score_pairs

    def score_pairs(*args, **kwargs):
        during.append((mapped(), list(folder.iterdir())))
        if fails:
            raise KeyError("in the middle")
        return score(*args, **kwargs)

    monkeypatch.setattr(model, "score_pairs", score_pairs)
    try:
        scores(monkeypatch, model, token_storage="disk", token_folder=folder)
        assert not fails
    except KeyError:
        assert fails
    gc.collect()
    # The file has no name, so that even SIGKILL would leave nothing.
    assert during and all(seen == (True, []) for seen in during)
    assert not mapped() and list(folder.iterdir()) == []


def test_of_a_file_only_the_rows_in_use_are_read(monkeypatch):
    live, most, rows = weakref.WeakSet(), [0], {3: [], 2: []}
    read = TokenStore.read

    def counting(self, index):
        tokens = read(self, index)
        rows[self.rows.ndim].append(len(index))
        if tokens.ndim == 3:
            live.add(tokens)
            most[0] = max(most[0], len(live))
        return tokens

    monkeypatch.setattr(TokenStore, "read", counting)
    records = tiny_records(20, 3)
    scores(monkeypatch, records=records, token_storage="disk", image_block=2, pair_block=6)
    assert rows[3] == [2] * 10 and most[0] <= 3  # One block is in use, one is read ahead, one is about to be dropped.
    assert max(rows[2]) <= 6 * 11  # These are the captions of a pair block, padded to 11 tokens at most.


@pytest.mark.parametrize(("value", "dtype"), [(1e6, "fp16"), (torch.nan, "fp32")])
def test_tokens_that_cannot_be_kept_name_their_image_or_caption(monkeypatch, value, dtype):
    images, captions = tiny_model(), tiny_model()

    def spoil(tokens: torch.Tensor, row: int) -> torch.Tensor:
        tokens[row, 0, 0] = value
        return tokens

    images.dual.vision.register_forward_hook(lambda _, __, tokens: spoil(tokens, 2))
    with pytest.raises(DataError, match=rf"^2\.jpg: its tokens hold NaN or values beyond {dtype}; keep them in bf16"):
        scores(monkeypatch, images, token_dtype=dtype, token_storage="disk")
    encode = captions.encode_texts
    records = tiny_records(1, 2)
    longest = max(records[0].captions, key=lambda caption: len(caption.split()))

    def encode_texts(*args):
        state = encode(*args)
        spoil(state.tokens, 1)  # They are sorted by length.
        return state

    monkeypatch.setattr(captions, "encode_texts", encode_texts)
    with pytest.raises(DataError, match=f"^caption '{longest}': its tokens hold NaN"):
        scores(monkeypatch, captions, records, token_dtype=dtype)


def test_a_full_disk_is_reported_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    monkeypatch.setattr(torch, "from_file", lambda *_, **__: pytest.fail("mapped"))
    with pytest.raises(DataError, match=f"{tmp_path}: keeping tokens needs 0.0 GiB, 0.0 are free"):
        scores(monkeypatch, token_storage="disk", token_folder=tmp_path)
    expected = scores(monkeypatch, token_storage="recompute")
    assert torch.equal(scores(monkeypatch, token_storage="auto", token_memory=0), expected)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="nothing to reserve with")
def test_room_that_another_process_took_is_reported(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match="No space left"):
        scores(monkeypatch, token_storage="disk", token_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_reported(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    with pytest.raises(DataError, match="memory: keeping tokens needs 0.0 GiB, 0.0 are free"):
        scores(monkeypatch, token_storage="memory")


def test_auto_takes_memory_then_disk_then_nothing(monkeypatch, tmp_path):
    def kind(memory: int, free: int, **options: bool) -> str:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        opened = TokenStorage("auto", "bf16", memory, tmp_path).open(10, 5, device=CPU, name=str, **options)
        return "recompute" if opened is None else "disk" if opened.on_disk else "memory"

    assert kind(100, 10**6) == "memory"  # 10 x 5 x 2 bytes
    assert kind(99, 200) == "disk" and kind(99, 199) == "recompute"  # A file may take half of what is free.
    assert kind(99, 200, may_map=False) == "recompute" and kind(100, 200, may_map=False) == "memory"


def test_rows_come_back_as_they_were_written(tmp_path):
    for kind in ("memory", "disk"):
        store = TokenStorage(kind, folder=tmp_path).open(6, 2, 3, device=CPU, name=str)
        tokens = torch.randn(4, 2, 3)
        store.write(torch.tensor([5, 0, 3, 1]), tokens)
        assert torch.equal(store.read(torch.tensor([3, 3, 5])), tokens[[2, 2, 0]])
        empty = TokenStorage(kind, folder=tmp_path).open(0, 2, 3, device=CPU, name=str)
        assert empty.read(torch.tensor([], dtype=torch.int64)).shape == (0, 2, 3)


@pytest.mark.parametrize("option", ["token_storage", "token_dtype"])
def test_an_unknown_kind_is_named(monkeypatch, option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'fp8'"):
        scores(monkeypatch, **{option: "fp8"})
