"""One step of a merge: a source is measured, mixed in, validated, and kept or undone; then the model is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config.grasp import GraspConfig
from ..errors import NonFiniteLossError
from ..files import interrupts_held
from ..methods.candidates import AVERAGE, Candidate, Inputs, Mixes
from ..methods.table import find_candidates
from ..record.entries import FinetuneReport, Reason
from ..sources.load import LoadedSource
from ..teaching.predictions import Predictions
from ..tensors.mixing import Mix
from ..tensors.scratch import Scratch
from ..tensors.units import Unit, movable_tensors, partition, units_within
from ..validation.changes import paired_change
from ..validation.gate import choose_candidate
from ..validation.labels import Labels
from ..validation.losses import SampleLosses, concatenate
from .finetuning import Finetuning
from .mixed import MixedModel
from .state import RunState
from .transfer import Transfer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Step:
    """The model during one step, with the labels that teach and validate it.

    Args:
        model: The target, on the accelerator's device; changed in place.
        config: How to merge.
        labels: The labelled samples, with the losses of the model on them.
        scratch: The temporary files. Where the step `can_fail`, `scratch.start` holds the target before the step.
        can_fail: Whether the step can fail after weights have moved, so that a copy of them is kept.
        state: Keeps the result of each training of a fine-tuning, so that a later process does not repeat it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GraspConfig,
        labels: Labels,
        scratch: Scratch,
        *,
        can_fail: bool,
        state: RunState | None = None,
    ) -> None:
        self.model, self.config, self.labels, self.scratch, self.can_fail = model, config, labels, scratch, can_fail
        self._state = state

    def with_config(self, config: GraspConfig) -> Step:
        """Return this step with another configuration and labels of its own, which do not share `learned` with this step."""
        old = self.labels
        labels = Labels(self.model, old.samples, old.collator, config, learned=old.learned)
        return Step(self.model, config, labels, self.scratch, can_fail=self.can_fail)

    def transfer(
        self,
        load: Callable[[], LoadedSource],
        average: Callable[[Sequence[Unit]], Mapping[str, float]],
        name: str,
        seed: int,
        stack: ExitStack,
    ) -> Transfer:
        """Measure a source, mix in the candidate with the best losses, and undo it if it harms.

        Args:
            load: Reads the source.
            average: Returns how much of the source a mean of all sources so far would take, by unit.
            name: The source, for progress bars and messages.
            seed: Seeds the shuffling of the batches.
            stack: The caller closes it after the step is recorded. If no copy of the weights is kept, interrupts wait until
                then.

        Raises:
            NonFiniteLossError: A loss is NaN or infinite, and no gate undoes the source.
        """
        before = self.labels.losses_before_source()
        loaded = load()
        every_unit = partition(self.model, self.config.unit)
        units = units_within(every_unit, loaded.candidates)
        inputs = Inputs(
            name=name,
            model=self.model,
            source=loaded.tensors,
            units=units,
            average=average(units),
            config=self.config,
            labels=self.labels,
            scratch=self.scratch,
            seed=seed,
        )
        try:
            candidates = find_candidates(inputs)
        except NonFiniteLossError:  # the loss was finite before the source
            if before is None or not self.config.gate:
                raise
            candidates = {}
        if not self.can_fail:
            stack.enter_context(interrupts_held())
        mixed = MixedModel(
            movable_tensors(self.model),
            loaded,
            units,
            self.labels,
            start=self.scratch.start if self.can_fail else None,
            base=self.scratch.base if self.config.learns else None,
        )
        if before is None:
            (candidate,) = candidates.values()
            mixed.put(candidate)
            result = Transfer(units, candidate)
        else:
            result = self._choose(units, candidates, mixed, before)
        return replace(result, notes=loaded.notes, other_units=len(every_unit) - len(units))

    def _choose(
        self, units: Sequence[Unit], candidates: Mapping[str, Candidate], mixed: MixedModel, before: SampleLosses
    ) -> Transfer:
        """Choose a candidate by its losses on the validation parts, and leave it in the model unless the gate undoes it."""
        validated: dict[str, SampleLosses] = {}
        # No comprehension: its cells would keep the source in memory after an error, as long as the exception lives.
        for name, candidate in candidates.items():
            losses = self._evaluate(mixed, candidate, candidate.validated)
            if losses is not None:
                validated[name] = losses
        calibrated = {name: losses.calibrated_loss for name, losses in validated.items()}
        chosen, after, whole = self._first_finite(candidates, validated, mixed)
        record: dict[str, Any] = {
            "validated_by": self.labels.validated_by,
            "losses": calibrated,
            "chosen": chosen,
            "before": before,
        }
        if after is None or whole is None:
            mixed.undo(before)
            return Transfer(units, _take_nothing(units), accepted=False, reason=Reason.NOT_FINITE, **record)
        candidate, change = candidates[chosen], paired_change(before, after)
        mixed.put(candidate)
        self.labels.changed(whole)
        accepted, reason = True, Reason.NONE
        if self.config.gate and any(mix.moves for mix in candidate.mixes.values()):
            # Each half of the labels validates its own fit, but the mean of the fits is merged: the worse change counts.
            change = max(change, paired_change(before, whole), key=lambda change: change.mean)
            accepted, reason = change.verdict != Reason.HARMS, change.verdict
        if not accepted:
            mixed.undo(before)
        return Transfer(units, candidate, accepted=accepted, reason=reason, after=after, change=change, **record)

    def _first_finite(
        self, candidates: Mapping[str, Candidate], validated: Mapping[str, SampleLosses], mixed: MixedModel
    ) -> tuple[str, SampleLosses | None, SampleLosses | None]:
        """Return the best candidate that has a finite loss on every part, and its losses, as validated and as merged.

        The two differ if each half of the labels validates a fit of its own, because the mean of the fits is merged. The
        losses are `None` if no candidate is left.
        """
        chosen, left = "", dict(validated)
        while left:
            chosen = choose_candidate(left, AVERAGE)
            candidate, after = candidates[chosen], left.pop(chosen)
            merged = [candidate.mixes] * len(candidate.validated)
            whole = after if candidate.validated == merged else self._evaluate(mixed, candidate, merged)
            if whole is not None:
                return chosen, after, whole
        return chosen, None, None

    def _evaluate(self, mixed: MixedModel, candidate: Candidate, mixes: Sequence[Mixes]) -> SampleLosses | None:
        """Return the losses of a candidate, on each validation part with the mixes for that part.

        Returns:
            The losses; `None` if one is NaN or infinite.

        Raises:
            NonFiniteLossError: A loss is NaN or infinite, and no gate undoes the source.
        """
        parts = []
        for own, samples in zip(mixes, self.labels.validation_parts, strict=True):
            mixed.put(candidate, own)
            try:
                parts.append(self.labels.losses_on(samples))
            except NonFiniteLossError:
                if not self.config.gate:
                    raise
                return None
        return concatenate(*parts)

    def finetune(
        self,
        epochs: float,
        seed: int,
        *,
        alone: Mapping[str, Tensor] | None = None,
        predictions: Predictions | None = None,
    ) -> FinetuneReport | None:
        """Fine-tune the model, as far as the gate allows.

        With the gate, two models are fine-tuned on one half of the labels each. The result is a point between the start and
        their mean: the point with the lowest loss on the half that each did not see, or on the evaluation data. If the
        sources have left predictions on unlabelled inputs, the model at that point is then taught by them.

        Labels that the model has learned before cannot validate. Without evaluation data, such a fine-tuning is kept as a
        whole.

        Args:
            epochs: Passes over the training samples.
            seed: Seeds the training.
            alone: Weights without any source. The model is fine-tuned from them too, and that result is kept if its loss is
                lower.
            predictions: The predictions of the sources, for a teacher.

        Returns:
            The entry for the record; `None` if there is nothing to fine-tune.
        """
        samples = self.labels.samples
        if samples.train is None or not self.config.trains(epochs):
            return None
        self.labels.changed()
        self.scratch.make_room()
        finetuning = Finetuning(self.model, self.config, self.labels, self.scratch, epochs, seed, self._state)
        return finetuning.run(alone, predictions)


def _take_nothing(units: Sequence[Unit]) -> Candidate:
    """Return a candidate that takes nothing from the source."""
    return Candidate({unit.name: Mix.on_line(0.0) for unit in units}, [], {unit.name: None for unit in units})
