"""Tars of every damage: each sample comes as it is, is a counted skip, or its tar is refused in one line."""

import datasets
import numpy as np
import pytest
from helpers.hostile_images import encode, picture
from helpers.hostile_tars import SAMPLES, hostile_tars

from loopitr.data import DataError, LoadReport, StreamDataset, load_hub
from loopitr.data.tars import tar_fault


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    return tmp_path_factory.mktemp("evidence") / "it ran"


@pytest.fixture(scope="module")
def cases(evidence):
    return list(hostile_tars(evidence))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("streaming", [False, True])
def test_each_sample_comes_whole_or_is_counted(cases, evidence, tmp_path, streaming):
    assert len(cases) > 45
    wrong = []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "train-00000.tar").write_bytes(case.content)
        report = LoadReport()
        try:
            records = list(load_hub(str(folder), "train", report, streaming=streaming))
        except DataError as error:
            line = str(error)
            if case.lost is not None or not line.isprintable() or str(folder) not in line:
                wrong.append((case.name, line))
            continue
        lost = 0 if case.name == "twice" else case.lost  # datasets 5.0 and older overlook the repetition.
        if lost is None or SAMPLES - len(records) != lost or set(report.counts) != set(case.reasons):
            wrong.append((case.name, len(records), report.counts))
        for place, record in enumerate(records[:5]):
            good = record.captions == (f"sample {place}",) and record.name.endswith(f"{place:03d}")
            same = record.image == encode(picture(place), "JPEG")
            if not good or not same:
                wrong.append((case.name, place, record.captions))
    assert wrong == []
    assert not evidence.exists()
    assert not list(tmp_path.parent.glob("**/evil"))


def test_the_evidence_would_be_there(tmp_path):
    import pickle

    from helpers.hostile_tars import Evidence

    pickle.loads(Evidence(tmp_path / "it ran").pickled())
    assert (tmp_path / "it ran").exists()


def test_a_training_stream_names_a_broken_tar_once_an_epoch(cases, tmp_path):
    cut = next(case for case in cases if case.name == "cut between members")
    folder = tmp_path / "tars"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"train-{name}.tar").write_bytes(cut.content)
    stream = load_hub(str(folder), "train", LoadReport(), streaming=True)
    examples = list(StreamDataset(stream, transform=np.asarray))
    skipped = [item for example in examples for item in example["skipped"]]
    assert len(examples) == 6 and [reason for _, reason in skipped] == [cut.reasons[0]] * 2
    assert {name for name, _ in skipped} == {str(folder / f"train-{name}.tar") for name in ("a", "b")}


def test_faults_of_what_is_no_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar")
    assert tar_fault(tmp_path / "x.tar") is tar_fault(tmp_path / "gone.tar") is tar_fault("hf://x/y.tar") is None
