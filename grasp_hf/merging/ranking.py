"""What sources promise before any is merged: the first-order gain of going to each, from its bytes alone."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..errors import GraspError, IncompatibleSourceError, NonFiniteError
from ..hub.pull import Puller
from ..hub.reference import Source
from ..models.gradients import mean_gradient
from ..record.text import format_number, markdown_table
from ..sources.load import LoadedSource
from ..tensors.placing import placed
from ..tensors.products import UnitProducts, cosine
from ..tensors.units import Unit, movable_tensors, partition, units_within
from .run import Run

logger = logging.getLogger(__name__)


@dataclass
class UnitPromise:
    """What one unit of a source promises; see `RankedSource`."""

    name: str
    gain: float
    cosine: float | None


@dataclass
class RankedSource:
    """What a source promises to the target, to first order.

    Attributes:
        reference: As the user gave it.
        sha: Commit of its files; `None` for a local folder.
        kind: `full` or `adapter`; empty where it was not found.
        num_bytes: Size of its weight files.
        gain: `-<g, S - T>`, in units of the loss: how much the loss would fall on the whole way to the source if the
            gradient `g` of the target stayed what it is. `None` where the source cannot be read.
        cosine: Between `-g` and `S - T` over all units together, in [-1, 1]; `None` where it is undefined.
        loss: Calibrated loss of the source itself on the labels; only where sources are ranked by it.
        units: The same per unit.
        seconds: Duration of finding, reading and comparing it.
        problem: Why it cannot be ranked.
        error: The class of that error.
    """

    reference: str
    sha: str | None = None
    kind: str = ""
    num_bytes: int = 0
    gain: float | None = None
    cosine: float | None = None
    loss: float | None = None
    units: list[UnitPromise] = field(default_factory=list)
    seconds: float = 0.0
    problem: str | None = None
    error: type[GraspError] = GraspError

    def summary(self) -> dict[str, Any]:
        """Return everything but the units and the class of the error."""
        return {key: value for key, value in asdict(self).items() if key not in ("units", "error")}

    def row(self, place: int) -> dict[str, str]:
        """Return its line of the table."""
        best = max(self.units, key=lambda unit: unit.gain, default=None)
        return {
            "": str(place),
            "source": self.reference if self.sha else Path(self.reference).name,
            "kind": self.kind or "–",
            **(
                {"calibrated loss": format_number(self.loss)}
                if self.loss is not None
                else {
                    "gain": "–" if self.gain is None else f"{self.gain:+.4g}",
                    "cosine": format_number(self.cosine, 4),
                    "best unit": f"{best.name} {best.gain:+.3g}" if best and best.gain > 0 else "–",
                }
            ),
            "MB": f"{self.num_bytes / 1e6:.1f}",
            "seconds": f"{self.seconds:.1f}",
        }


def rank_by_gain(run: Run, references: Sequence[str], *, finetuned: bool, token: str | None) -> list[RankedSource]:
    """Return the estimated gain of each source, the largest first; sources that cannot be read come last.

    One gradient of the target is kept in a file. A gradient through an untrained head says little, so a target that was
    not fine-tuned is fine-tuned for it. The target comes back unchanged.

    Args:
        run: The merge; no source is merged.
        references: The sources; one at a time is read.
        finetuned: Whether the target was fine-tuned before.
        token: Hub token.
    """
    config, model = run.config, run.model
    with run.trial() as step:
        if not finetuned:
            step.finetune(config.initial_epochs or config.final_epochs, config.seed)
        buffer = run.scratch.gradients
        model.eval()
        found, _ = mean_gradient(model, run.labels.batches(run.samples.train, config.seed), buffer)
        gradient = {name: buffer[name] for name in found}
        units = partition(model, config.unit)
        tensors = movable_tensors(model.cpu())

        def read(source: Source) -> RankedSource:
            loaded = run.load(source, check_finite=False)  # its products say so
            return rank_source(source, loaded, gradient, tensors, units)

        with run.puller(token, whole=True) as puller:
            rows = [*_each(references, puller, read)]
    return sorted(rows, key=lambda row: -math.inf if row.gain is None else row.gain, reverse=True)


def rank_by_loss(run: Run, references: Sequence[str], *, token: str | None) -> list[RankedSource]:
    """Return the loss of each source by itself on the labels, the lowest first; those that cannot be read come last."""
    with run.step() as step, run.puller(token, whole=True) as puller:
        tensors, start = movable_tensors(run.model), run.scratch.start

        def read(source: Source) -> RankedSource:
            with placed(tensors, run.load(source).tensors, start):
                loss = step.labels.source_losses().calibrated_loss
            return RankedSource(str(source.ref), source.sha, source.kind, source.num_bytes, loss=loss)

        rows = [*_each(references, puller, read)]
    return sorted(rows, key=lambda row: math.inf if row.loss is None else row.loss)


def rank_for_merge(run: Run, references: Sequence[str], *, finetuned: bool, token: str | None) -> list[RankedSource]:
    """Return the sources in the order of `config.order`, or raise what keeps one of them from being merged."""
    if run.config.order == "rank":
        by, rows = "first-order gain", rank_by_gain(run, references, finetuned=finetuned, token=token)
    else:
        by, rows = "loss", rank_by_loss(run, references, token=token)
    if problems := [row.problem for row in rows if row.problem]:
        kinds = {row.error for row in rows if row.problem}
        error = kinds.pop() if len(kinds) == 1 else IncompatibleSourceError
        raise error("nothing was merged, because these sources cannot be", problems=problems)
    logger.info("ranked by %s:\n%s", by, ranking_table(rows))
    return rows


def _each(references: Sequence[str], puller: Puller, read: Callable[[Source], RankedSource]) -> Iterator[RankedSource]:
    bar = tqdm(references, desc="ranking", unit="source", leave=False, disable=None)
    for number, reference in enumerate(bar, start=1):
        began = time.perf_counter()
        try:
            with puller.pull(reference, *references[number : number + 1]) as source:
                row = read(source)
        except GraspError as error:
            row = RankedSource(reference, problem=str(error), error=type(error))
        row.seconds = time.perf_counter() - began
        yield row


def rank_source(
    source: Source,
    loaded: LoadedSource,
    gradient: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    units: Sequence[Unit],
) -> RankedSource:
    """Return what `source` promises, reading each of its tensors once.

    Args:
        source: What was loaded.
        loaded: Its tensors.
        gradient: The target's gradient by parameter; tensors without one promise nothing.
        target: The target's tensors.
        units: The partition of the target.
    """
    products = UnitProducts(units_within(units, loaded.candidates))
    for name in gradient:
        if name in products:
            products.add(name, gradient[name], loaded.tensors[name], target[name])
    try:
        sums = {name: row for name, row in products.sums().items() if row is not None}
    except NonFiniteError as error:
        raise NonFiniteError(
            f"a weight is NaN or infinite; expected finite ones ({error})", subject=source.ref
        ) from error
    whole = [sum(row[index] for row in sums.values()) for index in range(3)]
    return RankedSource(
        reference=str(source.ref),
        sha=source.sha,
        kind=source.kind,
        num_bytes=source.num_bytes,
        gain=-whole[0],
        cosine=_opposite(cosine(whole[0], whole[1], whole[2])),
        units=[UnitPromise(name, -row[0], _opposite(cosine(*row))) for name, row in sums.items()],
    )


def _opposite(value: float | None) -> float | None:
    return None if value is None else -value


def ranking_table(rows: Sequence[RankedSource]) -> str:
    """Return the ranking as a Markdown table, and below it the problems of those that have no place in it."""
    ranked = [row for row in rows if row.problem is None]
    table = [markdown_table([row.row(place) for place, row in enumerate(ranked, start=1)])] if ranked else []
    return "\n".join([*table, *(f"- {row.problem}" for row in rows if row.problem)])
