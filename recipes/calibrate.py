"""python recipes/calibrate.py --model RUN --data.karpathy FILE.json --data.images DIR [--data.split val] [--rerank 64]

Fits the weight w of the reranking score, match score + w x similarity / temperature, on held-out data, and writes it to
RUN's config.json. Training does this at its end; use this recipe for converted models and for other data. On the data
that it is fitted on, reranking is then never below the dual head.
"""

from loopitr.cli import parse, run
from loopitr.commands.calibrate import CalibrateOptions, calibrate
from loopitr.training.launching import start_all_processes


def main() -> None:
    calibrate(parse(CalibrateOptions, description=__doc__))


if __name__ == "__main__" and not start_all_processes():
    run(main)
