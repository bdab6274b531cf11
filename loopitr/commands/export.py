"""`loopitr export` and `recipes/export_dual.py`: writes a trained model in a form that other libraries load."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from loopitr.data import DataOptions

from .subcommands import quiet

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class ExportOptions:
    """The model, the output, and its form."""

    model: str
    """Run folder, exported dual encoder, or hub id."""
    output: str
    """Folder to write."""
    to: Literal["transformers", "onnx", "sentence-transformers"] = "transformers"
    """transformers: the dual encoder, for `from_pretrained` of this package's classes; onnx: towers and fusion head as
    graphs, for onnxruntime; sentence-transformers: a `SentenceTransformer` of stock modules."""
    tower: Literal["image", "text"] | None = None
    """Export only this tower; the other one's weights are not read."""
    precisions: list[Literal["fp16", "int8"]] = field(default_factory=list)
    """onnx: precisions to write besides fp32, for example '[fp16, int8]'. int8 quantises matrix products and word
    embeddings, but not convolutions."""
    recall: bool = False
    """onnx: print the recall of each precision on `data`."""
    rerank: int = 16
    """recall: candidates per query for the fusion head; 0: evaluate the dual head alone."""
    data: DataOptions = field(default_factory=lambda: DataOptions(split="test"))


def export(options: ExportOptions) -> None:
    """Write the export and print what it contains.

    Raises:
        ValueError, OSError: there is no such model, it is of another kind, or the folder cannot be written.
        ModuleNotFoundError: an extra is not installed.
    """
    if options.to != "onnx" and (options.precisions or options.recall):
        name = "precisions" if options.precisions else "recall"
        raise ValueError(f"{name} needs --to onnx, got --to {options.to}")
    if options.recall and options.tower is not None:
        raise ValueError(f"recall needs both towers, got tower {options.tower!r}")
    if options.rerank < 0:
        raise ValueError(f"rerank must be at least 0, got {options.rerank}")
    quiet()
    {"transformers": _transformers, "onnx": _onnx, "sentence-transformers": _sentence_transformers}[options.to](options)


# The functions below import what they need, so that --help works without torch.


def _transformers(options: ExportOptions) -> None:
    if options.tower is not None:
        from loopitr.export.towers import export_tower

        tower = export_tower(options.model, options.output, options.tower)
        parameters = sum(parameter.numel() for parameter in tower.parameters())
        print(f"{options.tower} tower with {parameters / 1e6:.1f}M parameters in {options.output}")
        return
    from loopitr.export.dual import export_dual

    dual = export_dual(options.model, options.output)
    parameters = sum(parameter.numel() for parameter in dual.parameters())
    print(f"dual encoder with {parameters / 1e6:.1f}M parameters in {options.output}")


def _onnx(options: ExportOptions) -> None:
    from loopitr.export.onnx import export_onnx

    exported = export_onnx(options.model, options.output, tower=options.tower, precisions=options.precisions)
    for file in sorted(exported.folder.glob("*.onnx*")):
        print(f"{file.stat().st_size / 1e6:8.1f} MB  {file}")
    differences = ", ".join(f"{name} {value:.1e}" for name, value in exported.parity.items())
    print(f"largest difference from torch, fp32: {differences}")
    if options.recall:
        _print_recall(options, exported.folder)


def _print_recall(options: ExportOptions, folder: "Path") -> None:
    from loopitr.building.folders import load_saved
    from loopitr.data import LoadReport, load_evaluated, trained_data
    from loopitr.export.onnx_recall import onnx_recall

    report = LoadReport()
    evaluated = load_evaluated(options.data, report, trained_on=trained_data(options.model)[0].data)
    print(f"{options.data.split}: {report.summary()}")
    if evaluated.note is not None:
        print(evaluated.note)
    recall = onnx_recall(
        folder,
        load_saved(options.model).processor,
        evaluated.records,
        rerank=options.rerank,
        num_workers=options.data.num_workers,
        max_skipped_fraction=options.data.max_skipped_fraction,
    )
    print(f"\n{recall.table()}")


def _sentence_transformers(options: ExportOptions) -> None:
    from loopitr.export.sentence_transformers import export_sentence_transformers

    exported = export_sentence_transformers(options.model, options.output, tower=options.tower)
    differences = ", ".join(f"{name} {value:.1e}" for name, value in exported.parity.items())
    print(f"SentenceTransformer in {options.output}; largest difference from the model: {differences}")
    if "image" in exported.parity:
        print(
            "so it is for PIL images with 8 bits per channel, in any mode; for those turned by an EXIF tag, and 16-bit "
            f"and float ones, {options.output}/README.md has the line that converts them"
        )
