"""One step of a merge: what the data says of the model, and what is done to it."""

import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config.grasp import GraspConfig
from ..errors import DataError, NonFiniteLossError, first_line
from ..files import interrupts_held
from ..methods.table import Candidate, Mixes, measure_source
from ..models.batches import Batch, Collator, batch_loss, labelled_terms, sample_batches
from ..models.gradients import preserved_state
from ..record.entries import FinetuneReport, unit_reports
from ..record.report import StepReport
from ..sources.load import LoadedSource
from ..tensors.mixing import Mix
from ..tensors.placing import overwrite_
from ..tensors.products import Scores, mean_defined
from ..tensors.scratch import Scratch
from ..tensors.units import Unit, movable_tensors, partition, units_within
from ..validation.changes import LEAST_SAMPLES, change, resolution
from ..validation.gate import plainest, verdict
from ..validation.labels import halves
from ..validation.line import finetune_on_line_
from ..validation.losses import EVIDENCE, Judgement, joined, losses_of
from .mixed import MixedModel

logger = logging.getLogger(__name__)


class Step:
    """The model while it is changed, with the data that teaches and judges it, and the files to go back with.

    Args:
        model: The target, on the accelerator's device; changed in place.
        config: How to merge.
        train: Labelled samples to learn from, if any.
        held_out: Samples to judge by, if any.
        collator: Makes batches of both.
        scratch: The files. Where the step `can_fail`, `scratch.start` holds the target as it was before.
        learned: Whether the model was fine-tuned on the labels, which speak for it then.
        sharded: Whether the source comes in shards.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GraspConfig,
        train: Any,
        held_out: Any,
        collator: Collator,
        scratch: Scratch,
        *,
        learned: bool,
        sharded: bool = False,
    ) -> None:
        self.model, self.config, self.train, self.held_out = model, config, train, held_out
        self.collator, self.scratch, self.learned = collator, scratch, learned
        self.can_fail = train is not None or held_out is not None or sharded  # after weights have moved

    def with_config(self, config: GraspConfig) -> "Step":
        """Return this step by another configuration; what that learns does not count as learned here."""
        twin = copy(self)
        twin.config = config
        return twin

    @property
    def _parts(self) -> list[list[int]]:
        """Places of the labels that judge a source: in halves where others teach; empty where labels do not judge."""
        if not self.config.gate or self.train is None or self.learned:
            return []
        judges = self._evidence()
        if not self.config.learns:
            return [judges]
        return [*halves(judges, self.config.seed)] if len(judges) > 1 else []

    def _evidence(self) -> list[int]:
        """Return `EVIDENCE` labels, the same ones each time, or all if there are no more."""
        number = len(self.train)
        return sorted(random.Random(self.config.seed).sample(range(number), min(number, EVIDENCE)))

    @property
    def judges(self) -> list[Any]:
        """Samples that may judge a source: labels that nothing has learned, whole or in halves, and evaluation data."""
        held_out = [] if self.held_out is None else [self.held_out]
        return [Subset(self.train, part) for part in self._parts] + held_out

    @property
    def judged_by(self) -> str:
        """The judges for a reader."""
        names = []
        if self._parts:
            some = f"{EVIDENCE} of the labels" if len(self.train) > EVIDENCE else "the labels"
            names.append(f"two halves of {some}" if self.config.learns else some.removeprefix("the "))
        return " and ".join(names + ["evaluation data"] * (self.held_out is not None))

    def judge_source(self) -> Judgement:
        """Return the losses of the model, which holds a source, on the judges, and on labels where there are none."""
        return self._joined(self.judges or [Subset(self.train, self._evidence())])

    def judge(self) -> Judgement | None:
        """Return the losses of the model as it is now on the judges; `None` where there are none."""
        if self.judges and self.scratch.judged is None:
            self.scratch.judged = self._joined(self.judges)
        return self.scratch.judged

    def judgement(self, samples: Any) -> Judgement:
        """Return the losses of the model as it is now on `samples`."""
        return losses_of(self.model, samples, self.collator, self.config.batch_size)

    def _joined(self, judges: Sequence[Any]) -> Judgement:
        return joined(*map(self.judgement, judges))

    def batches(self, labels: Any, seed: int) -> Iterator[Batch]:
        """Yield batches of labels, as the configuration says."""
        return sample_batches(labels, self.collator, Accelerator(), self.config, seed=seed)

    def transfer(
        self,
        load: Callable[[], LoadedSource],
        shares: Callable[[Sequence[Unit]], Mapping[str, float]],
        report: StepReport,
        seed: int,
        held: ExitStack,
    ) -> None:
        """Measure a source, move what the evidence says, and take it back if the judges say so.

        Args:
            load: Reads the source.
            shares: Says how much of the source an average of all so far would take, by unit.
            report: Where it is recorded.
            seed: Of the batches.
            held: Open until the step is recorded.
        """
        before = self.judge()
        if before:
            self._warn_of_few(before)
            if self.scratch.floor == math.inf:
                self.scratch.floor = before.calibrated_loss
        loaded = load()
        every_unit = partition(self.model, self.config.unit)
        units = units_within(every_unit, loaded.candidates)
        report.notes, report.other_units = loaded.notes, len(every_unit) - len(units)
        try:
            options = self._options(loaded, units, shares(units), report.name, seed)
        except NonFiniteLossError:  # with the source in it: before, the loss was finite
            if before is None or not self.config.gate:
                raise
            options = {}
        if not self.can_fail:  # no copy of the weights is kept, so a step must not stop between here and its record
            held.enter_context(interrupts_held())
        mixed = MixedModel(
            movable_tensors(self.model),
            loaded,
            units,
            start=self.scratch.start if self.can_fail else None,
            base=self.scratch.base if self.config.learns else None,
        )
        self.scratch.judged = None
        if before is None:
            (option,) = options.values()
            mixed.put(option.mixes)
        else:
            nothing = Candidate(
                {unit.name: Mix.on_line(0.0) for unit in units}, [], {unit.name: None for unit in units}
            )
            option = self._chosen(options, mixed, before, report) or nothing
        tensors = movable_tensors(self.model)
        sizes = {unit.name: sum(tensors[name].numel() for name in unit.tensors) for unit in units}
        report.units = unit_reports(sizes, option.mixes, option.scores, report.accepted)

    def _warn_of_few(self, before: Judgement) -> None:
        """Say once in a merge that the samples that judge its sources are too few to see much."""
        few = before.correct is not None and len(before.losses) < LEAST_SAMPLES
        if few and self.config.gate and not self.scratch.warned:
            self.scratch.warned = True
            logger.warning("the sources are judged by %s, %s", self.judged_by, resolution(len(before.losses)))

    def _options(
        self, loaded: LoadedSource, units: Sequence[Unit], shares: Mapping[str, float], name: str, seed: int
    ) -> dict[str, Candidate]:
        """Return the ways to take in a source: that of the method and, where labels chose it, means as a check."""
        config, judges = self.config, len(self.judges)
        average = {unit: Mix.on_line(share) for unit, share in shares.items()}
        if config.method == "average":
            return {"average": Candidate(average, [average] * judges, dict.fromkeys(average))}
        if not config.learns:
            mixes, scores = self._measure(loaded, units, shares, self.train, name, seed)
            return {config.method: Candidate(mixes, [mixes] * judges, scores)}
        everyone = {*range(len(self.train))}
        parts = self._parts
        teachers = [Subset(self.train, sorted(everyone - {*part})) for part in parts] or [self.train]
        fits = []
        for labels in teachers:  # no comprehension: the frames of an exception would keep its cells, and so the source
            fits.append(self._measure(loaded, units, shares, labels, name, seed))
        found = [mixes for mixes, _ in fits]
        mean = {unit: Mix.mean([mixes[unit] for mixes in found]) for unit in average}
        scores = {unit: mean_defined([own[unit] for _, own in fits]) for unit in average}
        judged = (found if parts else []) + ([] if self.held_out is None else [mean])
        options: dict[str, Candidate] = {config.method: Candidate(mean, judged, scores)}
        if judged and config.gate:
            options["average"] = Candidate(average, [average] * judges, scores)
            if weighted := self._weighted(loaded, units, shares, name, seed):
                options["fisher"] = Candidate(weighted, [weighted] * judges, scores, self.scratch.fisher.share)
        return options

    def _weighted(
        self, loaded: LoadedSource, units: Sequence[Unit], shares: Mapping[str, float], name: str, seed: int
    ) -> Mixes | None:
        """Return what a mean weighted by Fisher information takes; `None` where that is no other one, or labels are no classes.

        Labels do not teach it, only their inputs do, so that all of them may judge it.
        """
        if all(share == 1 for share in shares.values()):
            return None
        batches = [*self.batches(self.train, seed)]
        try:
            return self.scratch.fisher.measure(
                self.model, loaded.tensors, self.scratch.start, units, shares, batches, seed=seed
            )
        except DataError as error:
            logger.debug("%s: no average by Fisher information: %s", name, error)
            return None

    def _measure(
        self,
        loaded: LoadedSource,
        units: Sequence[Unit],
        shares: Mapping[str, float],
        labels: Any,
        name: str,
        seed: int,
    ) -> tuple[Mixes, Scores]:
        """Return the mix and the score of each unit that `labels` teach."""
        number = self.config.num_batches
        batches = tqdm(self.batches(labels, seed), desc=f"measuring {name}", total=number, leave=False, disable=None)
        return measure_source(
            self.model,
            loaded.tensors,
            units,
            batches,
            self.config,
            shares=shares,
            scratch=self.scratch,
            seed=seed,
        )

    def _chosen(
        self, options: Mapping[str, Candidate], mixed: MixedModel, before: Judgement, report: StepReport
    ) -> Candidate | None:
        """Return the option that the samples speak for, and leave it in the model unless the gate takes it back.

        `None` where no option has a finite loss.
        """
        report.judged_by, report.before = self.judged_by, before.evaluation()
        found: dict[str, Judgement] = {}
        whole: Judgement | None = None
        for name, option in options.items():
            if losses := self._judged(option, option.judged, mixed):
                found[name] = losses
        report.options = {name: after.calibrated_loss for name, after in found.items()}
        while found and whole is None:  # of what goes in, the halves of the labels have judged parts only
            report.taken = plainest(found, "average")
            option, after = options[report.taken], found.pop(report.taken)
            goes_in = [option.mixes] * len(option.judged)
            whole = after if option.judged == goes_in else self._judged(option, goes_in, mixed)
        if whole is None:
            report.accepted, report.reason = False, "the loss is NaN or infinite"
            self.scratch.judged = before
            mixed.undo()
            return None
        moved = change(before, after)
        report.change, report.after_transfer = moved.report(), after.evaluation()
        mixed.put(option.mixes, option.share)
        self.scratch.judged = whole
        if self.config.gate and any(mix.moves for mix in option.mixes.values()):
            report.accepted, report.reason = verdict(moved, self.scratch.floor, after, self.scratch.judged)
        if not report.accepted:
            self.scratch.judged = before
            mixed.undo()
        elif "fisher" in options:
            self.scratch.fisher.take()
        return option

    def _judged(self, option: Candidate, judged: Sequence[Mixes], mixed: MixedModel) -> Judgement | None:
        """Return the losses of mixes of an option, each on one of the judges.

        `None` where one is NaN or infinite, unless there is no gate to take the source back.
        """
        parts = []
        for mixes, samples in zip(judged, self.judges, strict=True):
            mixed.put(mixes, option.share)
            try:
                parts.append(self.judgement(samples))
            except NonFiniteLossError:
                if not self.config.gate:
                    raise
                return None
        return joined(*parts)

    def check_loss(self, dataset: Any, name: str) -> None:
        """Raise where the model makes no finite loss of a batch; the Trainer would, but in its own words and later.

        `name` is that of the data set, for the message.
        """
        try:
            batch = next(self.batches(dataset, self.config.seed))
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            columns = getattr(dataset, "column_names", None)
            held = f" with the columns {', '.join(columns)}" if isinstance(columns, list) else ""
            raise DataError(
                f"{name}: no batch can be made of its samples{held}: {first_line(error)}; expected "
                f"{self.model.main_input_name}, as the model's tokenizer or processor makes them, and labels as numbers"
            ) from error
        if name == "eval_dataset" and not labelled_terms(self.model, batch):  # others may have some
            return
        kind = self.model.config.problem_type
        try:
            with torch.no_grad(), preserved_state(self.model):
                self.model.eval()
                batch_loss(self.model, batch)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        except NonFiniteLossError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(
                f"{key} {tuple(value.shape)}" for key, value in batch.items() if hasattr(value, "shape")
            )
            raise DataError(
                f"{name}: the {type(self.model).__name__} cannot take a batch of {shapes}: {first_line(error)}"
            ) from error
        finally:
            self.model.config.problem_type = kind  # the model decides on it by the first labels that it sees

    def check_finetuning(self, epochs: float) -> None:
        """Raise where the Trainer will not fine-tune, so that it is known before the first source is merged."""
        if self.train is None or not self.config.trains(epochs):
            return
        from ..models.finetune import check_finetuning

        check_finetuning(
            self.model, self.train, self.held_out, self.collator, self.config, directory=self.scratch.directory
        )
        if self.config.lora is not None:
            overwrite_(movable_tensors(self.model), self.scratch.start)

    def finetune(
        self, epochs: float, seed: int, *, alone: Mapping[str, Tensor] | None = None
    ) -> FinetuneReport | None:
        """Fine-tune the model, and keep as much of it as the gate says; `None` where there is nothing to do.

        Labels that the model has learned before cannot judge what it learns of them; without evaluation data all of it is
        kept then. `alone` are weights without any source, see `finetune_on_line_`.
        """
        if self.train is None or not self.config.trains(epochs):
            return None
        from ..models.finetune import finetune_

        def train(samples: Any, seed: int) -> None:
            finetune_(
                self.model,
                samples,
                self.held_out,
                self.collator,
                self.config.for_part(len(samples) / len(self.train)),
                epochs=epochs,
                seed=seed,
                directory=self.scratch.directory,
            )

        self.scratch.judged, self.scratch.floor = None, math.inf
        self.scratch.make_room()
        if not self.config.gate or (self.learned and self.held_out is None):
            train(self.train, seed)
            self.learned = True
            return FinetuneReport()
        tensors, line = movable_tensors(self.model), self.scratch.line
        report = finetune_on_line_(tensors, line, train, self.judgement, self.train, self.held_out, seed, alone)
        self.learned = self.learned or report.share > 0 or report.without_sources
        return report
