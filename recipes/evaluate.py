"""python recipes/evaluate.py --model RUN --data.karpathy FILE.json --data.images DIR --data.split test --rerank 64

Computes recall@1/5/10 in both directions, by the dual head alone and with its best candidates reranked. RUN is a run
folder, an exported dual encoder (with `--rerank 0`) or a hub id. `--data.scenes true` evaluates on the built-in data,
the default for a RUN that was trained on it; it also gives nDCG@10, mAP@R and the stability between paraphrases.

A table or an ALBEF list without splits is evaluated whole, except for the one that RUN was trained on, of which the
held-out part is used. Images that RUN was trained on are recognised by content and named.

`--output metrics.json` writes the results; `--help_all` shows every option. `accelerate launch --num_processes 8
recipes/evaluate.py ...` (with `--cpu` if there is no GPU) computes the same results faster.
"""

from loopitr.cli import parse, run
from loopitr.commands.evaluate import EvaluateOptions, evaluate
from loopitr.training.launching import start_all_processes


def main() -> None:
    evaluate(parse(EvaluateOptions, description=__doc__))


if __name__ == "__main__" and not start_all_processes():
    run(main)
