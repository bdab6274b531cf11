"""python recipes/evaluate.py --model RUN --data.karpathy FILE.json --data.images DIR --data.split test --rerank 64

Recall@1/5/10 in both directions, by the dual head alone and with its best candidates reranked. RUN is a run folder, an
exported dual encoder (with `--rerank 0`) or a hub id. `--data.scenes true` is the built-in data, and need not
be given for a RUN on it.
For scenes, whose ground truth is exact, also nDCG@10, mAP@R and how stable rankings are between paraphrases.
A table or an ALBEF list without splits is evaluated whole; of the one that RUN was trained on, what RUN held out.
Images that RUN was trained on are found by their content and named.
`--output metrics.json` keeps the figures; `--help_all` shows every option. `accelerate launch --num_processes 8
recipes/evaluate.py ...` (`--cpu`: without a GPU) gives the same figures sooner.
"""

from loopitr.cli import parse, run
from loopitr.commands.evaluate import EvaluateOptions, evaluate
from loopitr.training.launching import start_all_processes


def main() -> None:
    evaluate(parse(EvaluateOptions, description=__doc__))


if __name__ == "__main__" and not start_all_processes():
    run(main)
