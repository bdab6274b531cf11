"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too: names on the left, figures on the right."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = [[x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))] for row in cells]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def recall_table(heads: Mapping[str, Mapping[str, Any]]) -> str:
    """Row name -> recalls (`Ranking.metrics()`), in percent, both directions side by side."""
    ks = (1, 5, 10)
    header = ["", *(f"i2t R@{k}" for k in ks), *(f"t2i R@{k}" for k in ks), "mean R@1"]
    rows = []
    for name, recalls in heads.items():
        values = [recalls[direction][f"r{k}"] for direction in ("i2t", "t2i") for k in ks]
        rows.append([name, *(f"{value:.1f}" for value in [*values, recalls["mean_r1"]])])
    return markdown_table(header, rows)
