"""python recipes/search.py index photos/ --model RUN --output INDEX/
python recipes/search.py query INDEX/ "a dog on the beach" [--top 10] [--rerank 100]
python recipes/search.py add INDEX/ more/ | remove INDEX/ more/one.jpg | info INDEX/

Two-stage search over images, like `loopitr search`: the dual head finds candidates, the fusion head reranks them.
"""

import sys
from functools import partial

from loopitr.cli import run
from loopitr.commands.search import main

if __name__ == "__main__":
    run(partial(main, sys.argv[1:]))
