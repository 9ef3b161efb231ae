"""Figures: what each source brought to each layer, the loss along a merge, and what the methods of a comparison reached."""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .entries import EVALUATION_DATA, UnitReport
from .report import MergeReport, StepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALIGNMENT_FILE = "alignment.png"
PROGRESS_FILE = "progress.png"
MOST_COLUMNS = 24  # with more units than this, those of a layer share a column
NAME_LENGTH = 34
DPI = 120
# Colours of Okabe and Ito, which the colour-blind can tell apart.
BLUE, GREEN, ORANGE, VERMILION = "#0072B2", "#009E73", "#E69F00", "#D55E00"
GREY = "0.82"


@dataclass(frozen=True)
class _Cell:
    """The units of one source in one column: their mean value, and what was decided on them."""

    value: float | None
    decision: str
    share: float  # of the units that moved


def save_figures(report: MergeReport, directory: Path) -> list[str]:
    """Write the figures for which `report` has data to `directory`, and return their file names.

    Those of an earlier merge are removed. An average without data measured nothing: its coefficients are all alike.
    """
    figures = {ALIGNMENT_FILE: alignment_figure, PROGRESS_FILE: progress_figure}
    measured = report.start or any(unit.score is not None for step in report.steps for unit in step.units)
    drawn = {name: figure for name, draw in figures.items() if measured and (figure := draw(report)) is not None}
    written = {name: io.BytesIO() for name in drawn}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ ")  # of names in writings that the font lacks
        for name, figure in drawn.items():
            figure.savefig(written[name], dpi=DPI, metadata={"Software": None})
    for name in figures:
        if name in written:
            (directory / name).write_bytes(written[name].getvalue())
        else:
            (directory / name).unlink(missing_ok=True)
    return list(drawn)


def alignment_figure(report: MergeReport) -> "Figure | None":
    """Draw sources against layers: the mean score of the units (the coefficient where none has a score), the decision.

    Returns:
        The figure; `None` where no source has a unit that could have moved.
    """
    if not any(step.units for step in report.steps):
        return None
    from matplotlib.figure import Figure

    scored = any(unit.score is not None for step in report.steps for unit in step.units)
    columns = _columns(report.steps)
    labels = list(dict.fromkeys(columns.values()))
    cells = [_cells(step, columns, labels, scored) for step in report.steps]
    width = min(max(7.5, 3.6 + 0.34 * len(labels)), 20)
    height = min(1.5 + 0.3 * len(cells) + 0.07 * max(len(_short(label)) for label in labels), 24)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _draw_heat(figure, axes, cells, scored)
    _draw_decisions(axes, cells)
    grouped = len(labels) < len(columns)
    measured = "score (cosine)" if scored else "coefficient"
    axes.set_title(
        f"{'Mean ' + measured if grouped else measured.capitalize()} per source and {'layer' if grouped else 'unit'}"
    )
    axes.set_xlabel("layer" if grouped else "unit")
    axes.set_ylabel("source, in order of merging" if len(cells) > 5 else "source")
    _label(axes, "x", [_short(label) for label in labels], most=round(width / 0.17), rotation=90)
    _label(axes, "y", [_short(step.name) for step in report.steps], most=round(height / 0.17))
    _legend(figure, cells)
    return figure


def progress_figure(report: MergeReport) -> "Figure | None":
    """Draw the loss on the judges from source to source: before the transfer, after it, and at the end of the step.

    Behind them stands the loss that the model has after the last fine-tuning, and as a line that of fine-tuning alone,
    where these were judged. The names say by what, for it may be other samples.

    Returns:
        The figure; `None` where no loss was measured along the way.
    """
    losses = [[_finite(step, name) for name in ("before", "after_transfer", "after")] for step in report.steps]
    if not any(math.isfinite(loss) for row in losses for loss in row):
        return None
    from matplotlib.figure import Figure

    start = report.start.get("loss", math.nan)
    names = ["start", *(_short(step.name) for step in report.steps)]
    width = min(max(6.4, 2.5 + 0.36 * len(names)), 20)
    longest = max(map(len, names))
    upright = longest > 13 * width / len(names)  # thirteen letters take about an inch
    figure = Figure(figsize=(width, 4.2 + 0.07 * longest * upright), layout="constrained")
    axes = figure.add_subplot()
    _draw_path(axes, report.steps, losses, start)
    _draw_losses(axes, report.steps, losses, start)
    judged = report.validated_by or "what judges"
    ends = _draw_end(axes, report, len(losses) + 0.5, judged)
    seen = [loss for row in [*losses, [start, *ends]] for loss in row if math.isfinite(loss)]
    if min(seen) > 0 and max(seen) > 20 * min(seen):
        axes.set_yscale("log")
    axes.set_title("Loss along the merge\non " + judged.replace(", later", ",\nlater"))
    axes.set_xlabel("source, in order of merging")
    axes.set_ylabel("mean loss")
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlim(-0.6, len(losses) + 0.6)
    _label(axes, "x", names, most=round(width / 0.17), rotation=90 * upright)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _columns(steps: Sequence[StepReport]) -> dict[str, str]:
    """Return the column of every unit, in the order of the model: its own name, or its layer where units are many."""
    longest = max(steps, key=lambda step: len(step.units))
    names = list(dict.fromkeys(unit.name for step in [longest, *steps] for unit in step.units))
    heads = [name.partition(".")[0] for name in names]
    common = max(set(heads), key=lambda head: (heads.count(head), head))
    prefix = f"{common}." if heads.count(common) > len(names) / 2 else ""
    bare = {name: name.removeprefix(prefix) for name in names}
    if len(names) <= MOST_COLUMNS:
        return bare
    layers = {name: _layer(text) for name, text in bare.items()}
    tails = {layer: ".".join(layer.split(".")[-2:]) for layer in layers.values()}
    unique = len(set(tails.values())) == len(tails)
    return {name: tails[layer] if unique else layer for name, layer in layers.items()}


def _layer(name: str) -> str:
    """Return the part of a unit's name that says its layer: up to the first number, else the first part."""
    numbered = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name)
    return numbered[0] if numbered else name.partition(".")[0]


def literal_text(name: str) -> str:
    """Return a name as a label that shows it: matplotlib takes what stands between two dollars for a formula."""
    return name.replace("$", r"\$")


def _short(name: str) -> str:
    """Return a name that fits beside an axis: without its organisation, then without its middle where it is long."""
    if len(name) > NAME_LENGTH and "/" in name:
        name = f"…/{name.partition('/')[2]}"
    half = (NAME_LENGTH - 1) // 2
    return name if len(name) <= NAME_LENGTH else f"{name[:half]}…{name[-half:]}"


def _cells(step: StepReport, columns: dict[str, str], labels: Sequence[str], scored: bool) -> list[_Cell | None]:
    """Return one cell per column, `None` where the source has no unit that could have moved."""
    found: dict[str, list[UnitReport]] = {}
    for unit in step.units:
        found.setdefault(columns[unit.name], []).append(unit)
    return [_cell(found[label], scored) if label in found else None for label in labels]


def _cell(units: Sequence[UnitReport], scored: bool) -> _Cell:
    values = [unit.score if scored else unit.coefficient for unit in units]
    known = [value for value in values if value is not None and math.isfinite(value)]
    decisions = {"kept" if unit.decision == "rescaled" else unit.decision for unit in units}
    decision = next(name for name in ("undone", "moved", "kept", "undefined") if name in decisions)
    moved = sum(unit.decision == "moved" for unit in units) / len(units)
    return _Cell(sum(known) / len(known) if known else None, decision, moved)


def _draw_heat(figure: "Figure", axes: "Axes", cells: Sequence[Sequence[_Cell | None]], scored: bool) -> None:
    """Colour the cells by value; those without one are grey, and those without a unit white."""
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
    """Mark what was decided: a dot as large as the share that moved, a ring where all was kept, a cross where undone."""
    scale = 0.6 if max(len(cells), len(cells[0])) > 60 else 1.0
    looks: dict[str, dict[str, Any]] = {
        "moved": {"marker": "o", "color": "black", "edgecolors": "white", "linewidths": 0.8},
        "kept": {"marker": "o", "color": "white", "edgecolors": "black", "linewidths": 0.8},
        "undone": {"marker": "X", "color": "black", "edgecolors": "white", "linewidths": 0.8},
    }
    for decision, look in looks.items():
        found = [
            (x, y, cell.share)
            for y, row in enumerate(cells)
            for x, cell in enumerate(row)
            if cell and cell.decision == decision
        ]
        sizes = [scale * {"moved": 15 + 65 * share, "kept": 26, "undone": 60}[decision] for _, _, share in found]
        axes.scatter([x for x, _, _ in found], [y for _, y, _ in found], s=sizes, **look)


def _legend(figure: "Figure", cells: Sequence[Sequence[_Cell | None]]) -> None:
    """Say what the marks mean, those that are there."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = {cell.decision for row in cells for cell in row if cell}
    ring: dict[str, Any] = {"marker": "o", "linestyle": "none", "color": "black"}
    entries: dict[str, Any] = {
        "moved (large: all units)": Line2D([], [], **ring) if "moved" in found else None,
        "kept": Line2D([], [], **ring, markerfacecolor="white") if "kept" in found else None,
        "undone": Line2D([], [], **{**ring, "marker": "X"}) if "undone" in found else None,
        "undefined": Patch(facecolor=GREY) if "undefined" in found else None,
        "not in the source": Patch(facecolor="white", edgecolor="0.6") if any(None in row for row in cells) else None,
    }
    shown = {text: handle for text, handle in entries.items() if handle is not None}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=5, frameon=False, fontsize=9)


def _finite(step: StepReport, name: str) -> float:
    loss = getattr(step, name).get("loss", math.nan)
    return loss if math.isfinite(loss) else math.nan


def _draw_path(axes: "Axes", steps: Sequence[StepReport], losses: Sequence[Sequence[float]], start: float) -> None:
    """Draw the loss of the model that the merge went on with; a rejected transfer is a dashed way aside."""
    path = [(0.0, start)]
    for place, (step, (before, transferred, after)) in enumerate(zip(steps, losses, strict=True), start=1):
        path.append((place - 0.25, before))
        if step.accepted:
            path.append((place, transferred))
        else:
            axes.plot([place - 0.25, place], [before, transferred], color=VERMILION, linestyle=":", linewidth=1)
        path.append((place + 0.25, after))
    known = [point for point in path if math.isfinite(point[1])]
    axes.plot(*zip(*known, strict=True), color="0.65", linewidth=1.2, zorder=1)


def _draw_losses(axes: "Axes", steps: Sequence[StepReport], losses: Sequence[Sequence[float]], start: float) -> None:
    """Mark what was measured, each kind with a shape and a colour of its own."""
    series: dict[str, tuple[str, str, list[tuple[float, float]]]] = {
        "start": ("D", "black", [(0.0, start)]),
        "before the transfer": ("o", BLUE, []),
        "transferred": ("^", ORANGE, []),
        "transferred, rejected and undone": ("X", VERMILION, []),
        "end of the step": ("s", GREEN, []),
    }
    for place, (step, (before, transferred, after)) in enumerate(zip(steps, losses, strict=True), start=1):
        series["before the transfer"][2].append((place - 0.25, before))
        series["transferred" if step.accepted else "transferred, rejected and undone"][2].append((place, transferred))
        series["end of the step"][2].append((place + 0.25, after))
    for label, (marker, colour, points) in series.items():
        known = [point for point in points if math.isfinite(point[1])]
        if known:
            places, values = zip(*known, strict=True)
            axes.scatter(places, values, marker=marker, color=colour, s=34, label=label, zorder=2)


def _draw_end(axes: "Axes", report: MergeReport, place: float, judged: str) -> list[float]:
    """Mark the loss after the last fine-tuning, and draw that of fine-tuning alone as a line; return both, if known."""
    final, control = report.run.final, report.run.control
    ends: dict[str, float] = {}
    if final and (final.loss is not None or final.after):
        loss, by = (
            (final.loss, final.validated_by) if final.loss is not None else (final.after["loss"], EVALUATION_DATA)
        )
        on = "" if by == judged else f", on {by}"
        axes.scatter([place], [loss], marker="*", color=GREEN, s=90, label=f"at the end{on}", zorder=2)
        ends["end"] = loss
        if final.alone is not None:
            ends["alone"] = final.alone
    if "alone" not in ends and control and control.validated_by == judged:
        on, ends["alone"] = "", control.alone["loss"]
    if "alone" in ends:
        label = f"fine-tuning alone{on}"
        axes.axhline(ends["alone"], color=GREEN, linestyle="--", linewidth=1, label=label)
    return list(ends.values())


def _label(axes: "Axes", axis: str, labels: Sequence[str], *, most: int, rotation: int = 0) -> None:
    """Name the places of an axis, every second (third, …) one where all do not fit."""
    every = math.ceil(len(labels) / max(most, 1))
    places = range(0, len(labels), every)
    setter = axes.set_xticks if axis == "x" else axes.set_yticks
    setter(list(places), [literal_text(labels[place]) for place in places], rotation=rotation, fontsize=8)
