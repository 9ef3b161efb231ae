"""The results of a comparison, and their tables and figures."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files import write_whole
from ..record.entries import Evaluation
from ..record.figures import DPI
from ..record.text import markdown_table, shorten
from ..validation.losses import SampleLosses
from .figure import comparison_figure
from .methods import METHODS
from .noise import Coded, SampleScores, decode, encode, half_interval

RESULTS = "comparison.json"
TABLE = "comparison.md"
FIGURE = "comparison-{}.png"  # the number of labels
OURS = "ours"
TITLE_WIDTH = 38  # characters; with it the tables fit in 100 columns
RUNS_ONLY = " (runs)"  # ends the title of a column whose intervals hold no noise of the test samples
LEGEND = """\
Each cell: the mean over the runs ± half of its 95 % interval, over runs and test samples.
merged: before the final fine-tuning. final: after it.
vs ours: the difference on the same labels; positive means better than ours."""
RUNS_ONLY_LEGEND = """\
(runs): the intervals are over runs only, because some results lack the scores of the test samples.
They are too narrow: all runs have the same test samples."""
COSTS_LEGEND = "Memory that merging takes, in sizes of the model. K: number of sources."


@dataclass
class Result:
    """The scores of one method with one set of labels.

    Attributes:
        method: Key in `METHODS`, `source:` and a reference, or `variant:` and a title.
        size: Number of labels.
        seed: Seed that draws the labels and the order of the sources, and that the method uses.
        merged: Test loss (and accuracy) before the final fine-tuning; empty if the method has no such fine-tuning.
        final: Test loss (and accuracy) of the result.
        seconds: Duration in seconds.
        problem: Error of a method that could not run; its scores are then empty.
        samples: The scores of each test sample, `merged` and `final`, as `encode` writes them. Earlier versions kept none.
    """

    method: str
    size: int
    seed: int
    merged: Evaluation
    final: Evaluation
    seconds: float
    problem: str | None = None
    samples: dict[str, Coded] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        method: str,
        size: int,
        seed: int,
        losses: Mapping[str, SampleLosses],
        seconds: float,
        problem: str | None = None,
    ) -> "Result":
        """Return the result with these losses on the test samples: `merged` (if there are any) and `final`."""
        scores = {name: losses[name].evaluation() if name in losses else {} for name in ("merged", "final")}
        samples = {name: encode(found) for name, found in losses.items()}
        return cls(method, size, seed, **scores, seconds=seconds, problem=problem, samples=samples)


@dataclass
class Comparison:
    """All results of a comparison, and their tables.

    Attributes:
        results: One result for each method, number of labels and seed.
        setting: The recipe, digests of data and models, the settings of variants, and the versions of the first run.
    """

    results: list[Result]
    setting: dict[str, Any]

    @property
    def measure(self) -> str:
        """`accuracy` if all methods have one, otherwise `loss`."""
        finals = [result.final for result in self.results if result.final]
        return "accuracy" if all("accuracy" in final for final in finals) else "loss"

    def methods(self, size: int) -> list[str]:
        """Return the methods with results for a number of labels: sources, those of `METHODS`, variants."""
        found = dict.fromkeys(result.method for result in self.results if result.size == size)

        def place(method: str) -> int:
            if method in METHODS:
                return list(METHODS).index(method)
            return -1 if method.startswith("source:") else len(METHODS)

        return sorted(found, key=place)

    def runs(self, method: str, size: int, *, merged: bool = False) -> dict[int, float]:
        """Return the final scores of a method by seed, or with `merged` those before the final fine-tuning."""
        found = {}
        for result in self.results:
            evaluation = result.merged if merged else result.final
            if (result.method, result.size) == (method, size) and evaluation:
                found[result.seed] = evaluation[self.measure]
        return found

    def differences(self, method: str, size: int) -> list[float]:
        """Return how much better a method is than ours, for each seed that both have; negative values are worse."""
        own, sign = self.runs(OURS, size), 1 if self.measure == "accuracy" else -1
        return [sign * (value - own[seed]) for seed, value in self.runs(method, size).items() if seed in own]

    def holds_samples(self, size: int, *, merged: bool = False) -> bool:
        """Whether all results for a number of labels hold the scores of the same number of test samples."""
        name = "merged" if merged else "final"
        scored = [result for result in self.results if result.size == size and getattr(result, name)]
        lengths = {len(result.samples[name]["loss"]) if name in result.samples else None for result in scored}
        return None not in lengths and len(lengths) <= 1

    def spread(self, method: str, size: int, *, merged: bool = False, paired: bool = False) -> float | None:
        """Return half of the 95 % interval of the mean score; with `paired`, of the mean difference to ours.

        It is over runs and test samples or, unless `holds_samples`, over runs only; `None` for fewer than two runs.
        """
        values = self.differences(method, size) if paired else [*self.runs(method, size, merged=merged).values()]
        if not self.holds_samples(size, merged=merged):
            return half_interval(values)
        scores = self._samples(method, size, merged=merged)
        if paired:
            own = self._samples(OURS, size)
            scores = {seed: found.minus(own[seed]) for seed, found in scores.items() if seed in own}
        return half_interval(values, scores.values())

    def _samples(self, method: str, size: int, *, merged: bool = False) -> dict[int, SampleScores]:
        """Return the scores of each test sample by seed."""
        name = "merged" if merged else "final"
        return {
            result.seed: decode(result.samples[name], self.measure)
            for result in self.results
            if (result.method, result.size) == (method, size) and name in result.samples
        }

    def table(self, size: int) -> str:
        """Return the scores for one number of labels, a row per method, and a line per method that could not run."""
        marks = ["" if self.holds_samples(size, merged=merged) else RUNS_ONLY for merged in (True, False)]
        rows = []
        for method in self.methods(size):
            scores = [list(self.runs(method, size, merged=merged).values()) for merged in (True, False)]
            spreads = [self.spread(method, size, merged=merged) for merged in (True, False)]
            gain = with_interval(self.differences(method, size), self.spread(method, size, paired=True), signed=True)
            rows.append(
                {
                    "": shorten(title_of(method), TITLE_WIDTH),
                    "runs": str(len(scores[1])),
                    f"merged{marks[0]}": with_interval(scores[0], spreads[0]),
                    f"final{marks[1]}": with_interval(scores[1], spreads[1]),
                    f"vs ours{marks[1]}": "–" if method == OURS else gain,
                }
            )
        problems = {r.method: r.problem for r in self.results if r.size == size and r.problem}
        return "\n".join([markdown_table(rows), *(f"- {title_of(name)}: {text}" for name, text in problems.items())])

    def costs_table(self) -> str:
        """Return a row per method: its kind, the memory of its merge, and the number of sources at once."""
        found = {result.method for result in self.results}
        rows = [
            {
                "": method.title,
                "kind": method.group,
                "memory (models)": method.memory,
                "sources at once": method.sources,
            }
            for name, method in METHODS.items()
            if name in found or name == OURS
        ]
        return markdown_table(rows)

    def __str__(self) -> str:
        sizes = dict.fromkeys(result.size for result in self.results)
        blocks = [f"{size} labels, {self.measure} on the test split\n\n{self.table(size)}" for size in sizes]
        if blocks:
            legend = f"{LEGEND}\n{RUNS_ONLY_LEGEND}" if any(RUNS_ONLY in block for block in blocks) else LEGEND
            blocks += [legend, self.costs_table(), COSTS_LEGEND]
        return "\n\n".join(blocks)

    def save(self, directory: Path) -> None:
        """Write the results as JSON and the tables as Markdown to `directory`, which is made if it is missing."""
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
                    self.spread(method, size),
                )
                for method in self.methods(size)
            ]
            over = "runs and test samples" if self.holds_samples(size) else "runs"
            figure = comparison_figure(rows, self.measure, over)
            figure.savefig(directory / FIGURE.format(size), dpi=DPI, metadata={"Software": None})

    @classmethod
    def load(cls, directory: Path) -> "Comparison":
        """Read the results that `save` wrote to `directory`.

        Raises:
            ConfigError: The file is not the record of a comparison.
        """
        try:
            values = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
            return cls([Result(**result) for result in values["results"]], values["setting"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"'{directory / RESULTS}' is not the record of a comparison ({error}); name another folder"
            ) from error


def title_of(method: str) -> str:
    """Return the title of a method in tables and figures."""
    if method in METHODS:
        return METHODS[method].title
    kind, _, name = method.partition(":")
    if kind != "source":
        return f"grasp_hf, {name}"
    if Path(name).is_absolute():
        name = "/".join(Path(name).parts[-2:])
    return f"source {name}"


def kind_of(method: str) -> str:
    """Return the kind of a method: `control`, `existing` or `ours`."""
    if method in METHODS:
        return METHODS[method].group
    return "control" if method.startswith("source:") else "ours"


def interval(values: list[float], *, signed: bool = False) -> str:
    """Return the mean ± half of its 95 % interval over runs, for a table; a dash if there are no values."""
    return with_interval(values, half_interval(values), signed=signed)


def with_interval(values: Sequence[float], half: float | None, *, signed: bool = False) -> str:
    """Return the mean of `values` ± `half`, for a table; a dash if there are no values."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):+.3f}" if signed else f"{statistics.fmean(values):.3f}"
    return mean if half is None else f"{mean} ± {half:.3f}"
