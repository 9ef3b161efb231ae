"""What the methods of a comparison reached, and the tables and figures that are made of it."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from ..errors import ConfigError
from ..files import write_whole
from ..record.entries import Evaluation
from ..record.figures import DPI
from ..record.text import markdown_table
from .figure import comparison_figure
from .methods import METHODS

RESULTS = "comparison.json"
TABLE = "comparison.md"
FIGURE = "comparison-{}.png"  # of a number of labels
OURS = "ours"


@dataclass
class Result:
    """What one method reached with one set of labels.

    Attributes:
        method: Its key in `METHODS`, or `source:` and a reference.
        size: Number of labels.
        seed: Which labels, which order of the sources, and the seed of the method.
        merged: Test loss (and accuracy) before the final fine-tuning; empty where a method has none.
        final: The same at the end.
        seconds: Duration.
        problem: Why it could not be run; the scores are then empty.
    """

    method: str
    size: int
    seed: int
    merged: Evaluation
    final: Evaluation
    seconds: float
    problem: str | None = None


@dataclass
class Comparison:
    """All results, and the tables made of them.

    Attributes:
        results: One per method, number of labels and seed.
        setting: What was compared: the recipe, digests of data and models, the settings of variants, the versions at first.
    """

    results: list[Result]
    setting: dict[str, Any]

    @property
    def measure(self) -> str:
        """`accuracy` of classifiers, else `loss`."""
        finals = [result.final for result in self.results if result.final]
        return "accuracy" if all("accuracy" in final for final in finals) else "loss"

    def methods(self, size: int) -> list[str]:
        """Return the methods that have results for a number of labels: sources, those of `METHODS`, variants."""
        found = dict.fromkeys(result.method for result in self.results if result.size == size)

        def place(method: str) -> int:
            if method in METHODS:
                return list(METHODS).index(method)
            return -1 if method.startswith("source:") else len(METHODS)

        return sorted(found, key=place)

    def runs(self, method: str, size: int, *, merged: bool = False) -> dict[int, float]:
        """Return the measure of a method by seed."""
        found = {}
        for result in self.results:
            evaluation = result.merged if merged else result.final
            if (result.method, result.size) == (method, size) and evaluation:
                found[result.seed] = evaluation[self.measure]
        return found

    def differences(self, method: str, size: int) -> list[float]:
        """Return by how much a method is better than ours with the same labels, seed by seed."""
        own, sign = self.runs(OURS, size), 1 if self.measure == "accuracy" else -1
        return [sign * (value - own[seed]) for seed, value in self.runs(method, size).items() if seed in own]

    def table(self, size: int) -> str:
        """Return one line per method for one number of labels: mean over seeds ± half of the 95 % interval."""
        rows = [
            {
                "": title_of(method),
                "kind": kind_of(method),
                "runs": str(len(self.runs(method, size))),
                "as merged": interval(list(self.runs(method, size, merged=True).values())),
                "in the end": interval(list(self.runs(method, size).values())),
                "better than ours by": "–"
                if method == OURS
                else interval(self.differences(method, size), signed=True),
                "memory (models)": METHODS[method].memory if method in METHODS else "1",
                "sources at once": METHODS[method].sources if method in METHODS else "1",
            }
            for method in self.methods(size)
        ]
        problems = {r.method: r.problem for r in self.results if r.size == size and r.problem}
        return "\n".join([markdown_table(rows), *(f"- {title_of(name)}: {text}" for name, text in problems.items())])

    def __str__(self) -> str:
        sizes = dict.fromkeys(result.size for result in self.results)
        return "\n\n".join(f"{size} labels, {self.measure}\n\n{self.table(size)}" for size in sizes)

    def save(self, directory: Path) -> None:
        """Write the results as JSON and the tables as Markdown to `directory`."""
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / RESULTS, json.dumps(asdict(self), indent=1) + "\n")
        (directory / TABLE).write_text(f"{self}\n")

    def save_figures(self, directory: Path) -> None:
        """Write one figure per number of labels to `directory`."""
        for size in dict.fromkeys(result.size for result in self.results):
            rows = [
                (
                    title_of(method),
                    kind_of(method),
                    list(self.runs(method, size).values()),
                    list(self.runs(method, size, merged=True).values()),
                    half_interval(list(self.runs(method, size).values())),
                )
                for method in self.methods(size)
            ]
            figure = comparison_figure(rows, self.measure)
            figure.savefig(directory / FIGURE.format(size), dpi=DPI, metadata={"Software": None})

    @classmethod
    def load(cls, directory: Path) -> "Comparison":
        """Read what `save` wrote.

        Raises:
            ConfigError: It holds something else.
        """
        try:
            values = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
            return cls([Result(**result) for result in values["results"]], values["setting"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"'{directory / RESULTS}' is not the record of a comparison: {error}") from error


def title_of(method: str) -> str:
    """Return how a method is called in tables."""
    if method in METHODS:
        return METHODS[method].title
    kind, _, name = method.partition(":")
    if kind != "source":
        return f"grasp_hf, {name}"
    return f"source {'/'.join(Path(name).parts[-2:]) if Path(name).is_absolute() else name}"


def kind_of(method: str) -> str:
    """Return whether a method is a control, an existing approach, or ours."""
    if method in METHODS:
        return METHODS[method].group
    return "control" if method.startswith("source:") else "ours"


def interval(values: list[float], *, signed: bool = False) -> str:
    """Return the mean and half of its 95 % interval for a table; a dash without values."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):{'+' if signed else ''}.3f}"
    half = half_interval(values)
    return mean if half is None else f"{mean} ± {half:.3f}"


def half_interval(values: Sequence[float]) -> float | None:
    """Return half of the 95 % interval of the mean (Student's t over runs); `None` for fewer than two."""
    if len(values) < 2:
        return None
    return float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))
