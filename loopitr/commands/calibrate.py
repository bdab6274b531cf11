"""`loopitr calibrate` and `recipes/calibrate.py`: fits the similarity weight of a saved model's reranking score."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from loopitr.commands.evaluate import MeasureOptions, look_for_overlap, measure
from loopitr.data import DataOptions
from loopitr.training.record_checks import FEW


@dataclass
class CalibrateOptions(MeasureOptions):
    """The model and the data to fit on."""

    data: DataOptions = field(default_factory=lambda: DataOptions(split="val"))


def calibrate(options: CalibrateOptions) -> None:
    """Fit the similarity weight on the data and write it into the model's `config.json`.

    Raises:
        ValueError, OSError: the model has no fusion head or is not in a local folder, `rerank` is 0, or the data or the
            device cannot be used.
    """
    from loopitr.building.card import write_card
    from loopitr.building.folders import model_source
    from loopitr.evaluation.report import weight_text

    if options.rerank < 1:
        raise ValueError(f"the weight is fitted on candidates: rerank must be at least 1, got {options.rerank}")
    folder = Path(model_source(options.model))
    if not folder.is_dir():
        raise ValueError(f"{options.model} is not a local folder: the weight is written into its config.json")
    measured = measure(options, calibrate=True)
    look_for_overlap(options, measured)
    before = measured.saved.model.config.similarity_weight
    weight = measured.result.similarity_weight
    assert weight is not None
    if measured.state.is_main_process and measured.result.num_images < FEW:
        number = measured.result.num_images
        print(f"warning: {number} images are few to fit a weight on, it may not suit others", file=sys.stderr)
    if measured.state.is_main_process:
        measured.saved.model.config.similarity_weight = weight
        config = type(measured.saved.model).config_class.from_pretrained(folder)  # with the type of the saved weights
        config.similarity_weight = weight
        config.save_pretrained(folder)
        write_card(folder, measured.saved.model)
        print(
            f"similarity weight: {weight_text(weight)} (before: {weight_text(before)}), written to {folder}/config.json"
        )
    measured.state.destroy_process_group()
