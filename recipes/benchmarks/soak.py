"""python recipes/benchmarks/soak.py [--minutes 10] [--kills 100] [--ranks 2 [--fsdp true]] [--source tars]

Trains tiny models on the built-in scenes for a given time, kills the training at random moments (SIGKILL, every fifth
time SIGTERM) and resumes it, in several settings in turn. The result is compared with an undisturbed run of the same
options: `history.jsonl` and `model.safetensors` byte by byte, and the images of every step. Of several ranks, one (each
in turn) or all are killed; the others have to end within a minute, except that before the ranks have met they get a
SIGTERM, as from a launcher. With `--fsdp true`, the ranks share the weights. With `--source tars` the runs stream
WebDataset tars. The growth of memory per 1,000 steps and the open files of an undisturbed run are measured as well. It
runs on the CPU, on Linux and macOS.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch
from forked import Launch, Phase, last_words, samples
from soak_settings import SETTINGS, with_fsdp, words_of

from loopitr.checks import check_at_least
from loopitr.cli import check_output_file, parse, run
from loopitr.evaluation.report import markdown_table
from loopitr.training.reporting import write_json


@dataclass
class Options:
    minutes: float = 10.0
    """Minutes after which no other run is started."""
    kills: int = 100
    """Number of kills after which to stop."""
    ranks: int = 1
    """Number of processes of a run."""
    fsdp: bool = False
    """Shard the weights over the processes by FSDP 2 (needs several `ranks`); in the settings that it supports."""
    source: Literal["scenes", "tars"] = "scenes"
    """`tars`: scenes in WebDataset tars, which are streamed."""
    images: int = 256
    """Number of training scenes."""
    epochs: int = 2
    memory_steps: int = 1000
    """Steps of the run whose memory is watched; 0: none."""
    seed: int = 0
    """Seed of the moments at which runs are killed."""
    folder: str | None = None
    """Where the runs are kept; unset: a temporary folder."""
    output: str | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        check_at_least(1, kills=self.kills, ranks=self.ranks, images=self.images, epochs=self.epochs)
        check_at_least(0, minutes=self.minutes, memory_steps=self.memory_steps)
        if self.fsdp and (self.ranks < 2 or self.source != "scenes"):
            raise ValueError("fsdp needs ranks of at least 2, and the source scenes")
        if not hasattr(os, "fork"):
            raise ValueError("soak.py forks its training processes, which this system cannot")
        if self.output:
            check_output_file(self.output)


Start = Callable[..., Launch]  # with the folder of a run, its options, and whether to resume it


@dataclass
class Tally:
    """What happened in one setting."""

    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)  # by phase
    stopped: int = 0
    equal: int = 0
    lost: int = 0
    doubled: int = 0
    problems: list[str] = field(default_factory=list)


def undisturbed(folder: Path, words: list[str], start: Start) -> float:
    """The run to compare with; returns its seconds."""
    started = time.monotonic()
    statuses = start(folder, words, resume=False).ended()
    if statuses is None or any(statuses):
        raise ValueError(f"the undisturbed run ended with status {statuses}: {last_words(folder)}")
    return time.monotonic() - started


def disturb(
    folder: Path,
    words: list[str],
    whole: Path,
    seconds: float,
    start: Start,
    tally: Tally,
    end: float,
    kills_left: Callable[[], int],
    draw: random.Random,
    most: int,
) -> None:
    """Train one run that is killed at random moments, at most `most` times, then compare it with `whole`."""
    shutil.rmtree(folder, ignore_errors=True)
    tally.rounds += 1
    resume, patience, before = False, 0.4 * seconds, tally.kills.total()
    while True:
        launch = start(folder, words, resume=resume)
        resume, ranks = True, len(launch.pids)
        may_kill = kills_left() > 0 and tally.kills.total() - before < most and time.monotonic() < end
        moment = time.monotonic() + draw.uniform(0, patience) if may_kill else float("inf")
        statuses = launch.ended(until=moment)
        if statuses is None:
            turn = kills_left()  # over all settings
            number = signal.SIGTERM if turn % 5 == 4 else signal.SIGKILL
            alone = turn % (ranks + 1)  # this rank alone; every so often, as with SIGTERM, all of them
            killed = range(ranks) if number == signal.SIGTERM or alone == ranks else [alone]
            during = launch.phase.read()
            tally.kills[during] += 1
            launch.kill(number, killed)
            if during == "waiting for ranks":  # They would wait for the killed one, if no launcher ended them.
                launch.kill(signal.SIGTERM, range(ranks))
            statuses = launch.ended(until=time.monotonic() + 60)
            if statuses is None:
                launch.kill(signal.SIGKILL, range(ranks))
                launch.ended()
                tally.problems.append(f"signal {number} to {[*killed]} of {ranks} did not end it within a minute")
                continue
            by_signal = [statuses[rank] for rank in killed]
            if number == signal.SIGTERM and 128 + number in by_signal:
                tally.stopped += 1
            elif not {*by_signal} <= {-number, 0}:
                tally.problems.append(f"signal {number} ended it with status {statuses}: {last_words(folder)}")
            patience *= 1.05  # The later in a run, the longer a process takes to get past its newest checkpoint.
            if any(statuses):
                continue
        if any(statuses):
            tally.problems.append(f"resumed, it ended with status {statuses}: {last_words(folder)}")
            return
        break
    if ranks == 1 and "Traceback" in (folder / "log").read_text():  # Ranks that lose another one print a traceback.
        tally.problems.append("a traceback in its log")
    same = all(
        (folder / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
        for name in ("history.jsonl", "model.safetensors")
    )
    tally.equal += same
    if not same:
        tally.problems.append("its weights or its history differ")
    wanted, had = samples(whole), samples(folder)
    for step in {**wanted, **had}:
        a, b = Counter(wanted.get(step, [])), Counter(had.get(step, []))
        tally.lost += (a - b).total()
        tally.doubled += (b - a).total()


def watch_memory(folder: Path, steps: int, phase: Phase) -> dict[str, float]:
    """Observe a longer run: MiB per 1,000 steps (a line through its last three quarters), and open files."""
    points: list[tuple[int, float]] = []
    files: list[int] = []
    words = [f"--train.max_steps={steps}", "--train.epochs=1000", "--data.scenes_train=256", "--train.log_every=10"]
    words += ["--validation.every_steps=0", "--validation.every_epochs=0", "--train.checkpoint_every=100"]
    launch = Launch(folder, words, phase=phase, resume=False)
    process, last = psutil.Process(launch.pids[0]), [0.0]

    def look() -> None:
        if time.monotonic() - last[0] < 0.5:
            return
        last[0] = time.monotonic()
        with contextlib.suppress(OSError, ValueError, IndexError, psutil.Error):
            lines = (folder / "run" / "history.jsonl").read_text().splitlines()
            points.append((json.loads(lines[-1])["step"], process.memory_info().rss / 2**20))
            files.append(process.num_fds())

    if launch.ended(look=look) != [0]:
        raise ValueError(f"the watched run failed: {last_words(folder)}")
    later = [(step, mib) for step, mib in points if step > steps / 4]
    slope = statistics.linear_regression(*zip(*later)).slope if len({step for step, _ in later}) > 1 else 0.0
    half = len(files) // 2
    return {
        "mib_per_1000_steps": 1000 * slope,
        "mib": max(mib for _, mib in points),
        "files_first_half": max(files[:half] or [0]),
        "files_second_half": max(files[half:] or [0]),
    }


def main() -> None:
    options = parse(Options, description=__doc__)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.ExitStack() as stack:
        root = Path(options.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        soak(options, root)


def soak(options: Options, root: Path) -> None:
    phase, draw = Phase(), random.Random(options.seed)
    end = time.monotonic() + 60 * options.minutes
    memory = watch_memory(root / "memory", options.memory_steps, phase) if options.memory_steps else {}
    settings = with_fsdp() if options.fsdp else SETTINGS[options.source]
    start = partial(Launch, phase=phase, ranks=options.ranks, fsdp=options.fsdp)
    tallies = {name: Tally() for name in settings}
    seconds: dict[str, float] = {}

    def kills_left() -> int:
        return options.kills - sum(sum(tally.kills.values()) for tally in tallies.values())

    share = -(-options.kills // len(settings))  # of a run, so that every setting has its turn
    for number in range(10**6):
        name = list(settings)[number % len(settings)]
        if kills_left() <= 0 or time.monotonic() >= end:
            break
        place = root / name.replace(", ", "-").replace(" ", "_")
        amount = {"source": options.source, "images": options.images, "epochs": options.epochs}
        words = words_of(settings[name], place, **amount)
        try:
            seconds[name] = seconds.get(name) or undisturbed(place / "whole", words, start)
        except ValueError as error:
            tallies[name].problems.append(str(error))
            break
        shutil.rmtree(place / "cache", ignore_errors=True)
        paths = place / "parts", words, place / "whole", seconds[name]
        disturb(*paths, start, tallies[name], end, kills_left, draw, share)
        print(
            f"{name}: {sum(tallies[name].kills.values())} kills, {tallies[name].problems or 'no problem'}", flush=True
        )
    report(options, tallies, memory)


def report(options: Options, tallies: dict[str, Tally], memory: dict[str, float]) -> None:
    rows, total = [], Counter[str]()
    for name, tally in tallies.items():
        total += tally.kills
        killed = sum(tally.kills.values())
        cells = killed, tally.stopped, tally.rounds, tally.equal, tally.lost, tally.doubled, len(tally.problems)
        rows.append([name, *map(str, cells)])
    print(markdown_table(["setting", "kills", "SIGTERM", "runs", "equal", "lost", "doubled", "problems"], rows))
    print(f"\n{total.total()} kills, during: " + ", ".join(f"{phase} {count}" for phase, count in total.most_common()))
    if memory:
        print(
            f"memory over {options.memory_steps} steps: {memory['mib']:.0f} MiB at most, "
            f"{memory['mib_per_1000_steps']:+.1f} MiB per 1,000 steps; open files at most "
            f"{memory['files_first_half']:.0f} in its first half, {memory['files_second_half']:.0f} in its second"
        )
    problems = [f"{name}: {problem}" for name, tally in tallies.items() for problem in tally.problems]
    if options.output:
        figures = {name: {**vars(tally), "kills": dict(tally.kills)} for name, tally in tallies.items()}
        write_json(Path(options.output), {"options": vars(options), "figures": figures, "memory": memory})
    if problems:
        raise ValueError("; ".join(problems))


if __name__ == "__main__":
    run(main)
