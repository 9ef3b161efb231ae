"""The order of sources before a merge: by their first-order gain, or by the loss of each source itself."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from ..errors import GraspError, IncompatibleSourceError, NonFiniteError
from ..hub.pull import Puller
from ..hub.reference import Source
from ..models.gradients import mean_gradient
from ..record.text import format_number, markdown_table, shorten, wrap
from ..sources.load import LoadedSource
from ..tensors.placing import placed
from ..tensors.products import UnitProducts, cosine
from ..tensors.units import Unit, movable_tensors, partition, units_within
from ..validation.losses import concatenate
from .run import Run

logger = logging.getLogger(__name__)


@dataclass
class UnitGain:
    """The estimated gain of one unit of a source; the fields are those of `RankedSource`."""

    name: str
    gain: float
    cosine: float | None


@dataclass
class RankedSource:
    """The estimated gain of a source for the target, to first order.

    Attributes:
        reference: The reference as the user gave it.
        sha: Commit of its files; `None` for a local folder.
        kind: `full` or `adapter`; empty if the source was not found.
        num_bytes: Size of its weight files, in bytes.
        gain: `-<g, S - T>`, in units of the loss: how much the loss would fall on the whole way from the target `T` to the
            source `S` if the gradient `g` of the target stayed the same. `None` if the source cannot be read.
        cosine: Cosine of `-g` and `S - T` over all units together, in [-1, 1]; `None` if it is undefined.
        loss: Calibrated loss of the source itself on labels, and on the evaluation data if there are any; `None` unless
            sources are ranked by loss.
        weight: How much the predictions of the source are worth among those of all sources, with the mean 1; `None` unless
            they were compared.
        units: Gain and cosine of each unit.
        seconds: Duration of finding, reading and comparing the source.
        problem: Why the source cannot be ranked; `None` if it can.
        error: Class of the error that `problem` describes.
    """

    reference: str
    sha: str | None = None
    kind: str = ""
    num_bytes: int = 0
    gain: float | None = None
    cosine: float | None = None
    loss: float | None = None
    weight: float | None = None
    units: list[UnitGain] = field(default_factory=list)
    seconds: float = 0.0
    problem: str | None = None
    error: type[GraspError] = GraspError

    def summary(self) -> dict[str, Any]:
        """Return all fields but the units and the class of the error."""
        return {key: value for key, value in asdict(self).items() if key not in ("units", "error")}

    def row(self, place: int) -> dict[str, str | None]:
        """Return the line of the source in the table; with the others, it fits in a terminal."""
        row: dict[str, str | None] = {
            "": str(place),
            "source": shorten(self.reference if self.sha else Path(self.reference).name, 34),
        }
        if self.loss is not None:
            weight = None if self.weight is None else f"{self.weight:.2f}"
            return {**row, "kind": self.kind, "loss": format_number(self.loss), "weight": weight}
        best = max(self.units, key=lambda unit: unit.gain, default=None)
        return {
            **row,
            "gain": None if self.gain is None else f"{self.gain:+.4g}",
            "cosine": format_number(self.cosine, 4),
            "best unit": f"{shorten(best.name, 20)} {best.gain:+.3g}" if best and best.gain > 0 else None,
        }


def rank_by_gain(run: Run, references: Sequence[str], *, finetuned: bool, token: str | None) -> list[RankedSource]:
    """Return the estimated gain of each source, the largest first; sources that cannot be read come last.

    A file holds one gradient of the target. A gradient through an untrained head says little, so a target that has not
    been fine-tuned is fine-tuned for the ranking. The target comes back unchanged.

    Args:
        run: The merge; no source is merged.
        references: References of the sources, which are read one at a time.
        finetuned: Whether the target has been fine-tuned.
        token: Hub token.
    """
    config, model = run.config, run.model
    with run.trial() as step:
        if not finetuned:
            step.finetune(config.initial_epochs or config.final_epochs, config.seed)
        buffer = run.scratch.gradients
        model.eval()
        names, _ = mean_gradient(model, run.labels.batches(run.samples.train, config.seed), buffer)
        gradient = {name: buffer[name] for name in buffer if name in names}  # one order, so that sums repeat
        units = partition(model, config.unit)
        tensors = movable_tensors(model.cpu())

        def read(source: Source) -> RankedSource:
            return rank_source(source, run.load(source), gradient, tensors, units)

        with run.puller(token, whole=True) as puller:
            rows = [*_read_each(run, "gain", references, puller, read)]
    return sorted(rows, key=lambda row: -math.inf if row.gain is None else row.gain, reverse=True)


def rank_by_loss(run: Run, references: Sequence[str], *, token: str | None) -> list[RankedSource]:
    """Return the calibrated loss of each source itself, the lowest first; sources that cannot be read come last.

    `run.predictions` keeps the predictions of the sources on the labels and, if there are any, on the unlabelled inputs.
    """
    with run.step() as step, run.puller(token, whole=True) as puller:
        tensors, start = movable_tensors(run.model), run.scratch.start

        def read(source: Source) -> RankedSource:
            with placed(tensors, run.load(source).tensors, start):
                losses = step.labels.losses_on(step.labels.some_labels)
                validation = run.samples.validation
                judged = losses if validation is None else concatenate(losses, step.labels.losses_on(validation))
                unlabeled = None if losses.outputs is None else step.labels.unlabeled_logits()
            run.predictions.add(str(source.ref), losses, unlabeled)
            loss = judged.calibrated_loss
            return RankedSource(str(source.ref), source.sha, source.kind, source.num_bytes, loss=loss)

        rows = [*_read_each(run, "loss", references, puller, read)]
    return sorted(rows, key=lambda row: math.inf if row.loss is None else row.loss)


def rank_for_merge(run: Run, references: Sequence[str], *, finetuned: bool, token: str | None) -> list[RankedSource]:
    """Return the sources to merge in the order of `config.order`, with their weights if the method weighs sources.

    Raises:
        GraspError: Some sources cannot be merged. The error lists their problems, and has their class if all have the same.
    """
    order, rows, measure = run.config.order, [], "first-order gain"
    if order == "rank":
        rows = _require_readable(rank_by_gain(run, references, finetuned=finetuned, token=token))
        references = [row.reference for row in rows[: run.config.top]]
    if order != "rank" or run.weighs or run.teaches:
        by_loss = _require_readable(rank_by_loss(run, references, token=token))
        places = {reference: place for place, reference in enumerate(references)}
        if order == "loss":
            rows, measure = by_loss, "loss"
        elif order == "given":
            rows = sorted(by_loss, key=lambda row: places.get(row.reference, 0))
    run.predictions.keep([row.reference for row in rows[: run.config.top]])
    if run.weighs:
        run.weights = run.predictions.weights()
        rows = [replace(row, weight=run.weights.get(row.reference)) for row in rows]
    logger.info("%s:\n%s", "sources" if order == "given" else f"ranked by {measure}", ranking_table(rows))
    return rows


def _require_readable(rows: list[RankedSource]) -> list[RankedSource]:
    problems = [row.problem for row in rows if row.problem]
    if problems:
        kinds = {row.error for row in rows if row.problem}
        error = kinds.pop() if len(kinds) == 1 else IncompatibleSourceError
        raise error("nothing was merged, because these sources cannot be merged", problems=problems)
    return rows


def _read_each(
    run: Run, measure: str, references: Sequence[str], puller: Puller, read: Callable[[Source], RankedSource]
) -> Iterator[RankedSource]:
    """Yield a row for each source, while the next source is downloaded; an error becomes the problem of its row.

    A source that the state of the run knows from an earlier process is not read again.
    """
    bar = tqdm(references, desc="ranking", unit="source", leave=False, disable=None)
    for number, reference in enumerate(bar, start=1):
        if (known := _restored(run, measure, reference)) is not None:
            yield known
            continue
        began = time.perf_counter()
        try:
            with puller.pull(reference, *references[number : number + 1]) as source:
                row = read(source)
        except GraspError as error:
            row = RankedSource(reference, problem=str(error), error=type(error))
        row.seconds = time.perf_counter() - began
        if run.state is not None and row.problem is None:
            tensors, link = run.predictions.saved(reference) if measure == "loss" else (None, None)
            values = {**asdict(row), "error": None, "link": link}
            run.state.save(f"{measure} {reference}", values, tensors)
        yield row


def _restored(run: Run, measure: str, reference: str) -> RankedSource | None:
    """Return the row of a source that an earlier process of the merge has read; restore its predictions."""
    name = f"{measure} {reference}"
    if run.state is None or name not in run.state:
        return None
    values = dict(run.state.values(name))
    link = values.pop("link")
    if measure == "loss":
        run.predictions.restore(reference, dict(run.state.tensors(name)), link)
    return RankedSource(**{**values, "units": [UnitGain(**unit) for unit in values["units"]]})


def rank_source(
    source: Source,
    loaded: LoadedSource,
    gradient: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    units: Sequence[Unit],
) -> RankedSource:
    """Return the estimated gain of a source; each of its tensors is read once.

    Args:
        source: The source.
        loaded: Its tensors.
        gradient: Gradient of the target by parameter; a tensor without a gradient adds nothing to the gain.
        target: Tensors of the target by name.
        units: Units of the target.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
    """
    products = UnitProducts(units_within(units, loaded.candidates))
    for name in gradient:
        if name in products:
            products.add(name, gradient[name], loaded.tensors[name], target[name])
    try:
        sums = {name: row for name, row in products.sums().items() if row is not None}
    except NonFiniteError as error:
        raise NonFiniteError(
            f"a weight is NaN or infinite; expected finite numbers ({error})", subject=source.ref
        ) from error
    whole = [sum(row[index] for row in sums.values()) for index in range(3)]
    return RankedSource(
        reference=str(source.ref),
        sha=source.sha,
        kind=source.kind,
        num_bytes=source.num_bytes,
        gain=-whole[0],
        cosine=_negate(cosine(whole[0], whole[1], whole[2])),
        units=[UnitGain(name, -row[0], _negate(cosine(*row))) for name, row in sums.items()],
    )


def _negate(value: float | None) -> float | None:
    return None if value is None else -value


def ranking_table(rows: Sequence[RankedSource]) -> str:
    """Return the ranking as a Markdown table, followed by the problems of the sources that cannot be ranked."""
    ranked = [row.row(place) for place, row in enumerate((row for row in rows if row.problem is None), start=1)]
    lines = [markdown_table(ranked)] if ranked else []
    for row in rows:
        if row.problem is not None:
            first, *others = row.problem.splitlines()
            lines += [wrap(first, "- ", "  "), *(wrap(line, "  ", "  ") for line in others)]
    return "\n".join(lines)
