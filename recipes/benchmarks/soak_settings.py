"""The options of the runs that soak.py trains, and the tars that the streaming ones read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from loopitr.data import SceneRecords

SCENES = {
    "all at once": ["--objective.mlm=1"],
    "momentum teacher, accumulation": [
        *("--objective.teacher=momentum", "--objective.teacher_margin=-100", "--train.accumulation=2"),
        "--train.batch_size=4",
    ],
    "worker, image cache": ["--data.num_workers=1", "--data.cache_images={folder}/cache"],
    "gate, fusion later": ["--objective.teacher=match_plus_similarity", "--train.fusion_start=0.3"],
    "in chunks": [
        "--train.chunk_size=4",
        "--model.hold_batch_statistics=true",
        "--data.captions=all",
        "--train.max_steps=64",
    ],
}
_TARS = "--data.data_files={{train: '{folder}/tars/train-*.tar', val: '{folder}/tars/val.tar'}}"
_STREAM = ["--data.scenes=false", "--data.hub=webdataset", _TARS, "--data.streaming=true"]
STREAMS = {
    "stream": [*_STREAM, "--train.max_steps=40", "--objective.mlm=1"],
    "stream, workers": [*_STREAM, "--train.max_steps=40", "--data.num_workers=2", "--data.shuffle_buffer=16"],
    "stream, accumulation": [*_STREAM, "--train.max_steps=20", "--train.accumulation=3", "--train.batch_size=4"],
}
SETTINGS = {"scenes": SCENES, "tars": STREAMS}

_VIT = [
    *("--model.vision.name=vit_tiny_patch16_224", "--model.vision.pooling=mean"),
    "--model.vision.kwargs={patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2}",
]


def with_fsdp() -> dict[str, list[str]]:
    """The settings that FSDP 2 supports, without batch statistics."""
    without = {"--train.chunk_size=4", "--objective.teacher=momentum"}
    return {name: [*words, *_VIT] for name, words in SCENES.items() if not without & {*words}}


def words_of(setting: list[str], folder: Path, *, source: str, images: int, epochs: int) -> list[str]:
    """The options of a setting whose runs store their files in `folder`."""
    words = [word.format(folder=folder) if "{folder}" in word else word for word in setting]
    if source == "tars":
        write_tars(folder / "tars", images)
        return [*words, "--data.shuffle_buffer=32"] if "shuffle_buffer" not in str(words) else words
    return [*words, f"--data.scenes_train={images}", f"--train.epochs={epochs}"]


def write_tars(folder: Path, images: int) -> None:
    """Scenes as WebDataset tars: three of unequal length to train on, one to validate on."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    records = SceneRecords("train", images, image_size=32)
    cuts = [0, images // 2, images // 2 + images // 3, images]
    for part in range(3):
        _write_tar(folder / f"train-{part}.tar", records, range(cuts[part], cuts[part + 1]))
    _write_tar(folder / "val.tar", SceneRecords("val", 16, image_size=32), range(16))


def _write_tar(path: Path, records: SceneRecords, numbers: range) -> None:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            record, picture = records[number], io.BytesIO()
            record.image.save(picture, "PNG")  # type: ignore[union-attr]
            captions = json.dumps({"captions": list(record.captions)}).encode()
            for suffix, content in (("png", picture.getvalue()), ("json", captions)):
                info = tarfile.TarInfo(f"{number:05d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
