"""python recipes/calibrate.py --model RUN --data.karpathy FILE.json --data.images DIR [--data.split val] [--rerank 64]

Fits the weight w of the reranking score, match score + w x similarity / temperature, on held-out data, and keeps it in
RUN's config.json: for a converted model, or one that meets other data than it was trained on. A run fits its own at its
end. On the data that it is fitted on, reranking is then never below the dual head.
"""

from loopitr.cli import parse, run
from loopitr.commands.calibrate import CalibrateOptions, calibrate
from loopitr.training.launching import start_all_processes


def main() -> None:
    calibrate(parse(CalibrateOptions, description=__doc__))


if __name__ == "__main__" and not start_all_processes():
    run(main)
