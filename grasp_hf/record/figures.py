"""Figures of a merge: the score and the decision for each source and layer, and the loss from source to source."""

import io
import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .entries import EVALUATION_DATA, Evaluation, UnitReport
from .report import MergeReport, StepReport
from .text import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALIGNMENT_FILE = "alignment.png"
PROGRESS_FILE = "progress.png"
MOST_COLUMNS = 24  # with more units than this, the units of a layer share a column
NAME_LENGTH = 34  # characters of the name of a source or unit on an axis
DPI = 120
Point = tuple[float, float]  # place of a source on the horizontal axis, loss
# Colours of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, GREEN, ORANGE, VERMILION = "#0072B2", "#009E73", "#E69F00", "#D55E00"
GREY = "0.82"


@dataclass(frozen=True)
class _Cell:
    """The units of one source in one column.

    Attributes:
        value: Mean score or coefficient of the units; `None` if no unit has one.
        decision: The decision on them; if they differ, the first of `undone`, `moved`, `kept` and `undefined`.
        moved: Fraction of the units that moved.
    """

    value: float | None
    decision: str
    moved: float


def save_figures(report: MergeReport, directory: Path) -> list[str]:
    """Write the figures for which `report` has data to `directory`, and return their file names.

    Figures of an earlier merge are removed. An average without data gets no figure, because nothing was measured.
    """
    figures = {ALIGNMENT_FILE: alignment_figure, PROGRESS_FILE: progress_figure}
    measured = report.start or any(unit.score is not None for step in report.steps for unit in step.units)
    drawn = {name: figure for name, draw in figures.items() if measured and (figure := draw(report)) is not None}
    written = {name: io.BytesIO() for name in drawn}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ ")  # the font lacks some scripts, such as Chinese
        for name, figure in drawn.items():
            figure.savefig(written[name], dpi=DPI, metadata={"Software": None})
    for name in figures:
        if name in written:
            (directory / name).write_bytes(written[name].getvalue())
        else:
            (directory / name).unlink(missing_ok=True)
    return list(drawn)


def alignment_figure(report: MergeReport) -> "Figure | None":
    """Draw one row per source and one column per unit or layer, with the mean score and the decision.

    If no unit has a score, the coefficient takes its place.

    Returns:
        The figure; `None` if no source has a unit that could have moved.
    """
    if not any(step.units for step in report.steps):
        return None
    from matplotlib.figure import Figure

    scored = any(unit.score is not None for step in report.steps for unit in step.units)
    columns = _find_columns(report.steps)
    labels = list(dict.fromkeys(columns.values()))
    cells = [_make_cells(step, columns, labels, scored) for step in report.steps]
    width = min(max(7.5, 3.6 + 0.34 * len(labels)), 20)
    height = min(1.5 + 0.3 * len(cells) + 0.07 * max(len(_shorten_name(label)) for label in labels), 24)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _draw_heat(figure, axes, cells, scored)
    _draw_decisions(axes, cells)
    grouped = len(labels) < len(columns)
    measured = "score (cosine)" if scored else "coefficient"
    if grouped:
        axes.set_title(f"Mean {measured} per source and layer")
    else:
        axes.set_title(f"{measured.capitalize()} per source and unit")
    axes.set_xlabel("layer" if grouped else "unit")
    axes.set_ylabel("source, in order of merging" if len(cells) > 5 else "source")
    _label_axis(axes, "x", [_shorten_name(label) for label in labels], most=round(width / 0.17), rotation=90)
    _label_axis(axes, "y", [_shorten_name(step.name) for step in report.steps], most=round(height / 0.17))
    _draw_legend(figure, cells)
    return figure


def progress_figure(report: MergeReport) -> "Figure | None":
    """Draw the loss on the validation samples for each source: before it, with it, and at the end of its step.

    The last point is the loss after the last fine-tuning, and a dashed line shows the loss of fine-tuning alone, if they
    were measured. Their labels name the samples if these are not the validation samples of the steps.

    Returns:
        The figure; `None` if no loss was measured during the merge.
    """
    losses = [
        [_finite_loss(evaluation) for evaluation in (step.before, step.after_transfer, step.after)]
        for step in report.steps
    ]
    if not any(math.isfinite(loss) for row in losses for loss in row):
        return None
    from matplotlib.figure import Figure

    start = report.start.get("loss", math.nan)
    names = ["start", *(_shorten_name(step.name) for step in report.steps)]
    width = min(max(6.4, 2.5 + 0.36 * len(names)), 20)
    longest = max(map(len, names))
    # About thirteen letters fit in an inch. Longer names are turned by 90 degrees, and the figure grows by their length.
    rotation, extra_height = (90, 0.07 * longest) if longest > 13 * width / len(names) else (0, 0.0)
    figure = Figure(figsize=(width, 4.2 + extra_height), layout="constrained")
    axes = figure.add_subplot()
    _draw_path(axes, report.steps, losses, start)
    _draw_losses(axes, report.steps, losses, start)
    samples = report.validated_by or "the validation samples"
    ends = _draw_end(axes, report, len(losses) + 0.5, samples)
    seen = [loss for row in [*losses, [start, *ends]] for loss in row if math.isfinite(loss)]
    if min(seen) > 0 and max(seen) > 20 * min(seen):
        axes.set_yscale("log")
    axes.set_title("Loss along the merge\n" + textwrap.fill(f"on {samples}", 60))
    axes.set_xlabel("source, in order of merging")
    axes.set_ylabel("mean loss")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlim(-0.6, len(losses) + 0.6)
    _label_axis(axes, "x", names, most=round(width / 0.17), rotation=rotation)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _find_columns(steps: Sequence[StepReport]) -> dict[str, str]:
    """Return the column of every unit, in the order of the model.

    A column is named by its unit or, if there are more units than `MOST_COLUMNS`, by their layer.
    """
    longest = max(steps, key=lambda step: len(step.units))
    names = list(dict.fromkeys(unit.name for step in [longest, *steps] for unit in step.units))
    heads = [name.partition(".")[0] for name in names]
    counts = Counter(heads)
    common = max(counts, key=lambda head: (counts[head], head))
    prefix = f"{common}." if counts[common] > len(names) / 2 else ""
    bare = {name: name.removeprefix(prefix) for name in names}
    if len(names) <= MOST_COLUMNS:
        return bare
    layers = {name: _layer_of(text) for name, text in bare.items()}
    tails = {layer: ".".join(layer.split(".")[-2:]) for layer in layers.values()}
    unique = len(set(tails.values())) == len(tails)
    return {name: tails[layer] if unique else layer for name, layer in layers.items()}


def _layer_of(name: str) -> str:
    """Return the part of a unit's name that names its layer: up to the first number or, without one, the first part."""
    numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name)
    return numbered[0] if numbered else name.partition(".")[0]


def literal_text(name: str) -> str:
    """Return `name` with its dollar signs escaped, because matplotlib reads text between two of them as a formula."""
    return name.replace("$", r"\$")


def _shorten_name(name: str) -> str:
    """Return a name that fits next to an axis: a long one loses its organisation, and then its middle."""
    if len(name) > NAME_LENGTH and "/" in name:
        name = f"…/{name.partition('/')[2]}"
    return shorten(name, NAME_LENGTH)


def _make_cells(step: StepReport, columns: dict[str, str], labels: Sequence[str], scored: bool) -> list[_Cell | None]:
    """Return one cell per column, `None` for a column in which the source has no unit."""
    units: dict[str, list[UnitReport]] = {}
    for unit in step.units:
        units.setdefault(columns[unit.name], []).append(unit)
    return [_make_cell(units[label], scored) if label in units else None for label in labels]


def _make_cell(units: Sequence[UnitReport], scored: bool) -> _Cell:
    values = [unit.score if scored else unit.coefficient for unit in units]
    known = [value for value in values if value is not None and math.isfinite(value)]
    decisions = {"kept" if unit.decision == "rescaled" else unit.decision for unit in units}
    decision = next(name for name in ("undone", "moved", "kept", "undefined") if name in decisions)
    moved = sum(unit.decision == "moved" for unit in units) / len(units)
    return _Cell(sum(known) / len(known) if known else None, decision, moved)


def _draw_heat(figure: "Figure", axes: "Axes", cells: Sequence[Sequence[_Cell | None]], scored: bool) -> None:
    """Colour each cell by its value: grey without a value, white without a unit."""
    import numpy as np
    from matplotlib.colors import ListedColormap

    values = np.array([[cell.value if cell and cell.value is not None else np.nan for cell in row] for row in cells])
    valueless = np.array([[1.0 if cell and cell.value is None else np.nan for cell in row] for row in cells])
    top = max((abs(cell.value) for row in cells for cell in row if cell and cell.value is not None), default=1.0)
    top = max(top, 1e-3)
    options: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest"}
    axes.imshow(valueless, cmap=ListedColormap([GREY]), **options)
    colours, bottom = ("PuOr_r", -top) if scored else ("Blues", 0.0)
    image = axes.imshow(values, cmap=colours, vmin=bottom, vmax=top, **options)
    label = "cosine" if scored else "coefficient"
    figure.colorbar(image, ax=axes, label=label, pad=0.01, aspect=12, shrink=min(1.0, 5 / len(cells) + 0.3))


def _draw_decisions(axes: "Axes", cells: Sequence[Sequence[_Cell | None]]) -> None:
    """Mark the decision in each cell: a dot for moved units, a ring for kept ones, a cross for undone ones.

    The size of a dot shows the fraction of the units that moved.
    """
    scale = 0.6 if max(len(cells), len(cells[0])) > 60 else 1.0
    looks: dict[str, dict[str, Any]] = {
        "moved": {"marker": "o", "color": "black", "edgecolors": "white", "linewidths": 0.8},
        "kept": {"marker": "o", "color": "white", "edgecolors": "black", "linewidths": 0.8},
        "undone": {"marker": "X", "color": "black", "edgecolors": "white", "linewidths": 0.8},
    }
    for decision, look in looks.items():
        found = [
            (x, y, cell.moved)
            for y, row in enumerate(cells)
            for x, cell in enumerate(row)
            if cell and cell.decision == decision
        ]
        sizes = [scale * {"moved": 15 + 65 * moved, "kept": 26, "undone": 60}[decision] for _, _, moved in found]
        axes.scatter([x for x, _, _ in found], [y for _, y, _ in found], s=sizes, **look)


def _draw_legend(figure: "Figure", cells: Sequence[Sequence[_Cell | None]]) -> None:
    """Explain the marks that occur in the figure."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = {cell.decision for row in cells for cell in row if cell}
    ring: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "black"}
    entries: dict[str, Any] = {
        "moved (large dot: all units)": Line2D([], [], **ring) if "moved" in found else None,
        "kept": Line2D([], [], **ring, markerfacecolor="white") if "kept" in found else None,
        "undone": Line2D([], [], **{**ring, "marker": "X"}) if "undone" in found else None,
        "undefined": Patch(facecolor=GREY) if "undefined" in found else None,
        "not in the source": Patch(facecolor="white", edgecolor="0.6") if any(None in row for row in cells) else None,
    }
    shown = {text: handle for text, handle in entries.items() if handle is not None}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def _finite_loss(evaluation: Evaluation) -> float:
    """Return the loss; NaN if it is missing or infinite."""
    loss = evaluation.get("loss", math.nan)
    return loss if math.isfinite(loss) else math.nan


def _draw_path(axes: "Axes", steps: Sequence[StepReport], losses: Sequence[Sequence[float]], start: float) -> None:
    """Draw the loss of the merge from step to step; a dotted line leads to the loss with a rejected source."""
    path = [(0.0, start)]
    for place, (step, (before, with_source, after)) in enumerate(zip(steps, losses, strict=True), start=1):
        path.append((place - 0.25, before))
        if step.accepted:
            path.append((place, with_source))
        else:
            axes.plot([place - 0.25, place], [before, with_source], color=VERMILION, linestyle=":", linewidth=1)
        path.append((place + 0.25, after))
    known = [point for point in path if math.isfinite(point[1])]
    axes.plot(*zip(*known, strict=True), color="0.65", linewidth=1.2, zorder=1)


def _draw_losses(axes: "Axes", steps: Sequence[StepReport], losses: Sequence[Sequence[float]], start: float) -> None:
    """Mark each measured loss; its kind has a shape and a colour of its own."""
    before, accepted, rejected, after = list[Point](), list[Point](), list[Point](), list[Point]()
    for place, (step, values) in enumerate(zip(steps, losses, strict=True), start=1):
        before.append((place - 0.25, values[0]))
        (accepted if step.accepted else rejected).append((place, values[1]))
        after.append((place + 0.25, values[2]))
    _mark(axes, [(0.0, start)], "start", marker="D", color="black")
    _mark(axes, before, "before the source", marker="o", color=BLUE)
    _mark(axes, accepted, "with the source", marker="^", color=ORANGE)
    _mark(axes, rejected, "with the source, which was rejected", marker="X", color=VERMILION)
    _mark(axes, after, "end of the step", marker="s", color=GREEN)


def _mark(axes: "Axes", points: Sequence[Point], label: str, **look: Any) -> None:
    known = [point for point in points if math.isfinite(point[1])]
    if known:
        places, losses = zip(*known, strict=True)
        axes.scatter(places, losses, s=34, label=label, zorder=2, **look)


def _draw_end(axes: "Axes", report: MergeReport, place: float, samples: str) -> list[float]:
    """Mark the loss after the last fine-tuning, draw that of fine-tuning alone as a line, and return those that are known.

    Args:
        axes: The axes to draw on.
        report: The record of the merge.
        place: Place of the last fine-tuning on the horizontal axis.
        samples: The validation samples of the steps; the label of a loss on other samples names those.
    """
    final, control = report.run.final, report.run.control
    loss = alone = None
    suffix = ""
    if final and final.loss is not None:
        loss, alone = final.loss, final.alone
        suffix = "" if final.validated_by == samples else f", on {final.validated_by}"
    elif final and final.after:
        loss = final.after["loss"]
        suffix = "" if samples == EVALUATION_DATA else f", on {EVALUATION_DATA}"
    if loss is not None:
        label = f"after the last fine-tuning{suffix}"
        axes.scatter([place], [loss], marker="*", color=GREEN, s=90, label=label, zorder=2)
    if alone is None and control and control.validated_by == samples:
        alone, suffix = control.alone["loss"], ""
    if alone is not None:
        label = f"fine-tuning alone{suffix}"
        axes.axhline(alone, color=GREEN, linestyle="--", linewidth=1, label=label)
    return [value for value in (loss, alone) if value is not None]


def _label_axis(axes: "Axes", axis: str, labels: Sequence[str], *, most: int, rotation: int = 0) -> None:
    """Label the places of an axis; if there are more than `most`, only every second (third, …) one."""
    every = math.ceil(len(labels) / max(most, 1))
    places = range(0, len(labels), every)
    set_ticks = axes.set_xticks if axis == "x" else axes.set_yticks
    set_ticks(list(places), [literal_text(labels[place]) for place in places], rotation=rotation, fontsize=8)
