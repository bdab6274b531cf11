"""Runs whose frozen text backbone's tokens come from a cache."""

import pytest
from helpers.tiny_run import NO_DROPOUT, logged, run

from loopitr.data import TextTokenCache
from loopitr.models.text_backbone import TextBackbone

# A partial ranking changes by jumps where half precision swaps two scores of an untrained model; `kl` does not.
FROZEN = {"model__freeze": ["text"], "data__randaugment": False, "objective__distillation_loss": "kl"}
MLM = {"model__mlm_head": True, "objective__mlm": 1.0}


@pytest.fixture
def encoded(monkeypatch):
    """How many captions the text backbone has run for."""
    counts, forward = [], TextBackbone.forward

    def noting(self, input_ids, *args, **kwargs):
        counts.append(len(input_ids))
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(TextBackbone, "forward", noting)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="late"),
        pytest.param({**MLM, "data__captions": "all", "train__max_steps": 6}, id="MLM"),
        pytest.param({"model__fusion__style": "shared", "data__num_workers": 1}, id="shared"),
        pytest.param({"model__hold_batch_statistics": True, "train__chunk_size": 4}, id="chunks"),
    ],
)
def test_a_cached_run_has_the_losses_of_one_without(tmp_path, encoded, changes):
    plain = run(tmp_path / "a", **FROZEN, **NO_DROPOUT, **changes)
    encoded.clear()
    cached = run(tmp_path / "b", **FROZEN, **NO_DROPOUT, **changes, data__cache_text_tokens=str(tmp_path / "cache"))
    names = ["loss/total", "loss/itc", "loss/itm", *(["loss/mlm"] if changes.keys() >= MLM.keys() else [])]
    for name in names:  # the cache is in half precision
        assert logged(tmp_path / "b", name) == pytest.approx(logged(tmp_path / "a", name), abs=5e-3)
        assert len(logged(tmp_path / "b", name)) > 5
    assert cached["training"]["truncated_captions"] == plain["training"]["truncated_captions"]
    assert cached["num_captions"] == plain["num_captions"]
    assert len(list((tmp_path / "cache").iterdir())) == 3  # train, val, test
    steps, first = cached["training"]["steps"], sum(encoded)
    encoded.clear()
    again = run(tmp_path / "c", **FROZEN, **NO_DROPOUT, **changes, data__cache_text_tokens=str(tmp_path / "cache"))
    assert sum(encoded) == (8 * steps if changes.keys() >= MLM.keys() else 0) < first  # masked captions alone
    assert again["dual"] == cached["dual"] and again["match"] == cached["match"]


@pytest.mark.slow
def test_evaluation_reads_the_cache_as_it_would_compute(tmp_path):
    untrained = {**FROZEN, "train__epochs": 0}
    plain = run(tmp_path / "a", **untrained)
    cached = run(tmp_path / "b", **untrained, data__cache_text_tokens=str(tmp_path / "cache"))
    for head in ("dual", "match"):
        assert cached[head]["mean_recall"] == pytest.approx(plain[head]["mean_recall"], abs=3)  # half precision


@pytest.mark.slow
def test_both_caches_in_one_folder(tmp_path, encoded):
    folder = str(tmp_path / "cache")
    both = {"model__freeze": ["vision", "text"], "data__cache_tokens": folder, "data__cache_text_tokens": folder}
    run(tmp_path / "a", **both, train__max_steps=1)
    assert len(list((tmp_path / "cache").iterdir())) == 6
    encoded.clear()
    run(tmp_path / "b", **both, train__max_steps=1, train__lr=2e-3)
    assert encoded == []
    run(tmp_path / "c", **both, train__max_steps=1, train__seed=1)  # other weights
    assert encoded and len(list((tmp_path / "cache").iterdir())) == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "data.cache_text_tokens needs a frozen text backbone: model.freeze must name text"),
        ({**FROZEN, "data__streaming": True}, "data.cache_text_tokens needs data of known length.*data.streaming"),
        ({"model__freeze": ["vision"]}, "data.cache_text_tokens needs a frozen text backbone"),
        ({"model__lora": {"text_rank": 2}}, "the text backbone has LoRA adapters"),
    ],
)
def test_a_text_backbone_that_trains_is_refused(tmp_path, changes, message):
    if "model__lora" in changes:
        pytest.importorskip("peft", reason="LoRA adapters are made by peft (extra `lora`)")
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes, data__cache_text_tokens=str(tmp_path / "cache"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_damaged_cache_is_named(tmp_path):
    folder = tmp_path / "cache"
    run(tmp_path / "a", **FROZEN, data__cache_text_tokens=str(folder), train__max_steps=1)
    for cache in folder.iterdir():
        TextTokenCache(cache)
        (cache / "ends.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot map its arrays .* delete it to have it built again"):
        run(tmp_path / "b", **FROZEN, data__cache_text_tokens=str(folder), train__max_steps=1)
