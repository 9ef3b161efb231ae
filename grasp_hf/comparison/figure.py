"""The figure of a comparison."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..record.figures import BLUE, VERMILION, literal_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def comparison_figure(
    rows: Sequence[tuple[str, str, Sequence[float], Sequence[float], float | None]], measure: str, over: str
) -> "Figure":
    """Draw the scores of each method, the best on top: its runs, their mean, and the mean before fine-tuning.

    Args:
        rows: Five values for each method: its title; its group (`control`, `existing` or `ours`); the final scores of
            its runs; their scores as merged, before the final fine-tuning (may be empty); and half of the 95 %
            interval of the final mean, or `None`.
        measure: `accuracy`, of which more is better, or `loss`, of which less is better.
        over: What the intervals are over, in words.
    """
    from matplotlib.figure import Figure

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else math.nan

    rows = sorted((row for row in rows if row[2]), key=lambda row: mean(row[2]), reverse=measure == "loss")
    colours = {"control": "0.45", "existing": BLUE, "ours": VERMILION}
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shown = [value for row in rows for value in (*row[2], mean(row[3])) if math.isfinite(value)]
    if shown:  # the limits ignore the intervals, because that of two runs is wider than all scores
        margin = 0.05 * (max(shown) - min(shown)) or 0.05
        axes.set_xlim(min(shown) - margin, max(shown) + margin)
    for place, (_, group, runs, merged, half) in enumerate(rows):
        if half is not None:
            axes.errorbar([mean(runs)], [place], xerr=[half], color=colours[group], linewidth=1, zorder=1)
        axes.scatter(runs, [place] * len(runs), s=12, color=colours[group], alpha=0.35, linewidths=0)
        axes.scatter([mean(merged)], [place], s=34, facecolors="white", edgecolors=colours[group], zorder=2)
        axes.scatter([mean(runs)], [place], s=44, color=colours[group], zorder=3)
    for group, colour in colours.items():
        axes.scatter([], [], s=44, color=colour, label=group)
    axes.scatter([], [], s=34, facecolors="white", edgecolors="0.45", label="as merged")
    axes.set_yticks(range(len(rows)), [literal_text(row[0]) for row in rows], fontsize=8)
    intervals = f" with its 95 % interval over {over}" if any(row[4] is not None for row in rows) else ""
    axes.set_xlabel(f"test {measure}, each run and the mean{intervals}")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure
