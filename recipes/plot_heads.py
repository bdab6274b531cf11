"""python recipes/plot_heads.py --model RUN --data.karpathy FILE.json --data.images DIR [--output heads.png]

Plots the scores of the two heads on held-out data, for text queries: match scores against similarities of right, hard
and easy pairs; a reliability diagram of match probabilities; R@1 against the similarity weight of the reranking score;
and, for a run folder, the rank correlation of the heads on hard and easy negatives during training.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import loopitr
from loopitr.checks import check_at_least
from loopitr.cli import check_output_file, parse, run
from loopitr.data import DataOptions

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from loopitr.data import Record


@dataclass
class PlotOptions:
    """The model, the data, and the output."""

    model: str
    """Run folder or hub id, with a fusion head."""
    data: DataOptions = field(default_factory=lambda: DataOptions(split="val"))
    max_images: int = 200
    """Number of images to use, the first ones, each with its first caption."""
    rerank: int = 16
    """Nearest candidates per caption, whose wrong ones are the hard pairs; as many others are drawn as easy pairs."""
    output: str = "heads.png"
    """Image file to write."""
    device: str | None = None
    """cpu, cuda, ...; unset: a GPU if there is one."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Scores of each caption's candidates `[T, C]`: the nearest by similarity, then `easy` others drawn at random."""

    similarity: Tensor  # divided by the temperature
    match: Tensor
    right: Tensor
    easy: int


def score_heads(options: PlotOptions) -> Heads:
    """The scores of both heads, and whether each candidate is right."""
    import torch

    model, processor = loopitr.load(options.model, device=options.device)
    if not isinstance(model, loopitr.LoopITRModel):
        raise ValueError(f"{options.model} has no fusion head")
    model.config.similarity_weight = 0.0  # The reranking score is then the match score.
    records = loopitr.load_records(options.data, options.data.split)
    if not isinstance(records, Sequence):
        raise ValueError("data.streaming: a plot needs images that can be read twice")
    own = [records[row] for row in range(min(options.max_images, len(records)))]
    own, images = readable([record for record in own if record.captions])
    if len(own) < 4:
        raise ValueError(f"{len(own)} images with captions are too few to draw")
    texts = [record.captions[0] for record in own]
    retriever = loopitr.Retriever(model, processor)
    image_vectors = retriever.encode_images(images, convert_to_tensor=True)
    text_vectors = retriever.encode_texts(texts, convert_to_tensor=True)
    all_similarities = retriever.similarity(text_vectors, image_vectors).cpu()  # [T, I]
    number = min(options.rerank, len(own) // 2)
    order = all_similarities.argsort(1, descending=True)
    generator = torch.Generator().manual_seed(0)
    places = torch.rand(order[:, number:].shape, generator=generator).argsort(1)[:, :number]
    easy = order[:, number:].gather(1, places)  # [T, easy]
    chosen = torch.cat([order[:, :number], easy], 1)  # [T, C]
    identities = torch.tensor([record.identity for record in own])
    pairs = [(texts[row], images[column]) for row, columns in enumerate(chosen.tolist()) for column in columns]
    match = torch.as_tensor(retriever.predict(pairs, convert_to_tensor=True)).view_as(chosen)
    return Heads(
        similarity=all_similarities.gather(1, chosen) * float(model.dual.scale.detach()),
        match=match.cpu(),
        right=identities[chosen] == identities[:, None],
        easy=number,
    )


def readable(records: Sequence[Record]) -> tuple[list[Record], list[Image.Image]]:
    """The records whose images can be opened, and these images; prints the number of the others."""
    from loopitr.data.images import UnreadableImage, decode_image

    opened, images = [], []
    for record in records:
        with suppress(UnreadableImage):
            images.append(decode_image(record.image, name=record.name))
            opened.append(record)
    if len(opened) < len(records):
        print(f"skipped {len(records) - len(opened)} unreadable images")
    return opened, images


def draw(heads: Heads, rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the four panels; `rows` are those of the run's history."""
    import torch
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (scatter, reliability), (weights, agreement) = figure.subplots(2, 2)
    near = torch.arange(heads.match.shape[1]) < heads.match.shape[1] - heads.easy
    for label, chosen in (("easy", ~heads.right & ~near), ("hard", ~heads.right & near), ("right", heads.right)):
        scatter.scatter(heads.similarity[chosen], heads.match[chosen], s=4, alpha=0.5, label=label)
    scatter.set(title="pairs", xlabel="similarity / temperature", ylabel="match score")

    match, right = heads.match[:, near], heads.right[:, near]
    probability, bins = match.flatten().sigmoid(), 10
    bin_of = (probability * bins).long().clamp(max=bins - 1)
    filled = [number for number in range(bins) if bool((bin_of == number).any())]
    mean = [float(probability[bin_of == number].mean()) for number in filled]
    share = [float(right.flatten()[bin_of == number].double().mean()) for number in filled]
    reliability.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    reliability.plot(mean, share, marker="o")
    reliability.set(title="calibration, the nearest candidates", xlabel="match probability", ylabel="share right")

    grid = torch.logspace(-2, 2, 81, dtype=torch.float64)
    sums = match.double() + grid[:, None, None] * heads.similarity[:, near].double()  # [W, T, k]
    first = right.expand(len(grid), -1, -1).gather(2, sums.argmax(2, keepdim=True))  # [W, T, 1]
    weights.semilogx(grid.tolist(), (100 * first.double().mean((1, 2))).tolist())
    weights.set(title="reranking score, text to image", xlabel="weight of the similarity", ylabel="R@1, percent")

    # With two negatives, only the correlation of both together is logged.
    separately = any("train/rank_agreement_hard" in row for row in rows)
    for name in ("rank_agreement_hard", "rank_agreement_easy") if separately else ("rank_agreement",):
        points = [(row["step"], row[f"train/{name}"]) for row in rows if f"train/{name}" in row]
        if points:
            agreement.plot(*zip(*points), label=name.removeprefix("rank_agreement_"))
    agreement.set(title="agreement of the heads on training negatives", xlabel="step", ylabel="Kendall's tau")
    for axes in (scatter, agreement):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    for axes in (scatter, reliability, weights, agreement):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = parse(PlotOptions, description=__doc__)
    check_at_least(1, rerank=options.rerank)
    check_at_least(4, max_images=options.max_images)
    check_output_file(Path(options.output))
    heads = score_heads(options)
    from loopitr.training.reporting import read_history

    folder = Path(options.model)
    rows = read_history(folder) if (folder / "history.jsonl").is_file() else []
    draw(heads, rows, Path(options.output))
    print(f"{len(heads.match)} captions, {heads.match.numel()} pairs, plotted in {options.output}")


if __name__ == "__main__":
    run(main)
