"""Training processes that soak.py forks, observes and kills: what they are doing, and what they have trained on.

A run of several ranks has one process per rank, connected by gloo on this machine.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils.other import get_free_port

# Before the first fork: every training process has them without importing them again.
from loopitr.building import build as _build  # noqa: F401
from loopitr.cli import parse, run
from loopitr.data.loader import EpochLoader
from loopitr.objective import build as _objective  # noqa: F401
from loopitr.training import saving, setup, trainer, validation
from loopitr.training.options import PretrainOptions

RECIPE = Path(__file__).parents[1] / "pretrain.py"
TINY = [
    *("--model.vision.name=resnet10t", "--model.vision.image_size=32", "--model.vision.pretrained=false"),
    "--model.vision.kwargs={channels: [8, 8, 16, 16], stem_width: 8, output_stride: 8}",
    *("--model.text.name=scenes", "--model.text.pretrained=false", "--model.text.max_length=32"),
    "--model.text.kwargs={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}",
    "--model.fusion={num_layers: 1, num_heads: 2, intermediate_size: 32, dropout: 0.1}",
    *("--model.embed_dim=16", "--data.scenes=true", "--data.scenes_val=16", "--data.scenes_image_size=32"),
    *("--data.randaugment=true", "--data.crop_scale_min=0.5", "--data.num_workers=0", "--objective.mining=sample"),
    *("--train.batch_size=8", "--train.backbone_lr=1e-3", "--train.lr=1e-3", "--train.tracker=none"),
    *("--train.checkpoint_every=7", "--train.log_every=3", "--validation.rerank=4", "--validation.final_rerank=8"),
    "--validation.every_steps=10",
]
PHASES = ("starting", "waiting for ranks", "step", "save", "validation", "final table", "cache")


class Phase:
    """What the training process is doing, in memory shared with this process."""

    def __init__(self) -> None:
        self.shared = mmap.mmap(-1, 1)

    def read(self) -> str:
        return PHASES[self.shared[0]]

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        before, self.shared[0] = self.shared[0], PHASES.index(name)
        try:
            yield
        finally:
            self.shared[0] = before

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Make calls of `owner.name` set that phase."""
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.during(phase):
                return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def then(self, owner: Any, name: str, phase: str) -> None:
        """Make the first call of `owner.name` end in that phase."""
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.shared[0] = PHASES.index(phase)
            return result

        setattr(owner, name, wrapped)


def note_samples(path: Path) -> None:
    """Make this training process write the images of each step to a line of `path`.

    If a step is repeated after a resumption, its last line counts.
    """
    names: list[str] = []
    epoch, step = EpochLoader.epoch, trainer.Trainer._step

    def noted_epoch(self: EpochLoader, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in epoch(self, *args, **kwargs):
            names.extend(batch.names)
            yield batch

    def noted_step(self: trainer.Trainer) -> None:
        step(self)
        with path.open("a") as file:
            file.write(json.dumps({"step": self.progress.step, "images": names}) + "\n")
        names.clear()

    EpochLoader.epoch, trainer.Trainer._step = noted_epoch, noted_step  # type: ignore[method-assign]


def samples(folder: Path) -> dict[int, list[str]]:
    """The names of the images of each step, over all ranks."""
    steps: dict[int, list[str]] = {}
    for path in sorted(folder.glob("samples-*.jsonl")):
        own = {}
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # A killed process may leave an incomplete line.
                row = json.loads(line)
                own[row["step"]] = row["images"]
        for step, images in own.items():
            steps.setdefault(step, []).extend(images)
    return steps


def fork(work: Callable[[], None], log: Path) -> int:
    """Run `work` as a recipe would, in a new process that leads its own process group; returns its pid.

    Its output goes to `log`.
    """
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # The child may have done so itself.
            os.setpgid(pid, pid)
        return pid
    status = 70
    try:
        os.setpgrp()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        run(work)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


class Launch:
    """A running training: its processes, one per rank."""

    def __init__(
        self, folder: Path, words: list[str], *, phase: Phase, resume: bool, ranks: int = 1, fsdp: bool = False
    ) -> None:
        """Fork them; `phase` is rank 0's, and with `fsdp` the weights are sharded over the ranks by FSDP 2."""
        folder.mkdir(parents=True, exist_ok=True)
        words = [*TINY, *words, f"--train.output_dir={folder / 'run'}", *(["--resume=true"] if resume else [])]
        phase.shared[0] = PHASES.index("waiting for ranks" if ranks > 1 else "starting")
        meeting = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}

        if fsdp:
            meeting |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

        def work(rank: int) -> None:
            AcceleratorState._reset_state(True)  # This process may have trained before it was forked.
            if ranks > 1:
                own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                os.environ.update(meeting | {name: str(value) for name, value in own.items()})
            note_samples(folder / f"samples-{rank}.jsonl")
            if rank == 0:
                phase.then(setup, "start", "starting")
                phase.wrap(saving.Saver, "save", "save")
                phase.wrap(validation.Validator, "validate", "validation")
                phase.wrap(trainer.Trainer, "_finish", "final table")
                phase.wrap(trainer.Trainer, "_epoch", "step")
                phase.wrap(trainer.Caches, "images", "cache")
            runpy.run_path(str(RECIPE))["make_trainer"](parse(PretrainOptions, words)).run()

        self.pids = [fork(partial(work, rank), folder / "log") for rank in range(ranks)]
        self.statuses: dict[int, int] = {}
        self.phase = phase

    def ended(self, *, until: float = float("inf"), look: Callable[[], None] = lambda: None) -> list[int] | None:
        """The exit statuses of all ranks; None: one of them runs at the time `until` (`time.monotonic`)."""
        while time.monotonic() < until:
            for pid in set(self.pids) - set(self.statuses):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
            if len(self.statuses) == len(self.pids):
                return [self.statuses[pid] for pid in self.pids]
            look()
            time.sleep(0.002)
        return None

    def kill(self, number: int, ranks: Iterable[int]) -> None:
        """Signal these ranks' processes and those that they have started."""
        for rank in ranks:
            if self.pids[rank] not in self.statuses:
                with contextlib.suppress(ProcessLookupError):  # It has ended by now.
                    os.killpg(self.pids[rank], number)


def last_words(folder: Path) -> str:
    return " ".join((folder / "log").read_text()[-600:].split())
