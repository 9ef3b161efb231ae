"""The fine-tuning of a merge: on folds of the labels, then taught by the sources' predictions, at a fitted temperature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config.grasp import GraspConfig
from ..models.batches import Collator
from ..models.logits import scale_logits_
from ..record.entries import FinetuneReport, TeacherReport
from ..teaching.folds import FoldModels, finetune_on_folds_, set_interpolated_
from ..teaching.pool import FittedPool, fit_scale, probabilities
from ..teaching.predictions import Member, Predictions, fit_teacher
from ..teaching.student import TaughtSamples, label_column, taught_loss, with_targets
from ..tensors.placing import overwrite_
from ..tensors.scratch import Scratch
from ..tensors.units import movable_tensors
from ..validation.changes import paired_change
from ..validation.labels import Labels
from ..validation.losses import LABEL_COLUMNS, Outputs, losses_of
from .state import TRAINING, RunState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..models.finetune import Checkpoints

MODEL_BEFORE, MODEL_AFTER = "the merge before fine-tuning", "the merge after fine-tuning"


@dataclass
class Finetuning:
    """One fine-tuning of the target.

    Args:
        model: The target, on the accelerator's device; changed in place.
        config: How to merge.
        labels: The labelled samples.
        scratch: The temporary files.
        epochs: Passes over the training samples.
        seed: Seeds the training.
        state: Keeps the result of each training; `None` keeps none.
    """

    model: PreTrainedModel
    config: GraspConfig
    labels: Labels
    scratch: Scratch
    epochs: float
    seed: int
    state: RunState | None = None
    trainings: int = 0

    def run(self, alone: Mapping[str, Tensor] | None, predictions: Predictions | None) -> FinetuneReport:
        """Fine-tune the model; arguments and result as for `Step.finetune`."""
        samples = self.labels.samples
        if not self.config.gate or (self.labels.learned and samples.validation is None):
            self._train(samples.train, self.seed)
            self.labels.learned = True
            return FinetuneReport()
        note = self._reason_not_to_teach(predictions)
        taught = predictions is not None and len(predictions) > 0 and self.labels.unlabeled is not None and not note
        members = self._members_before(predictions) if taught and predictions is not None else []
        tensors, (start, mean) = movable_tensors(self.model), self.scratch.line
        overwrite_(start, tensors)
        found = self._train_folds(start, mean)
        without = None if alone is None else self._train_folds(alone, self.scratch.mean_alone)
        without_sources = without is not None and without.losses.calibrated_loss < found.losses.calibrated_loss
        teacher = temperature = None
        if without is not None and alone is not None and without_sources:
            set_interpolated_(tensors, alone, self.scratch.mean_alone, without.fraction)
            temperature = self._set_temperature(without)
        else:
            set_interpolated_(tensors, start, mean, found.fraction)
            if taught and predictions is not None:
                teacher = self._teach(found, members, predictions)
            if teacher is None or not teacher.used:
                temperature = self._set_temperature(found)
        moved = found.fraction > 0 or (teacher is not None and teacher.used)
        self.labels.learned = self.labels.learned or moved or without_sources
        return FinetuneReport(
            fraction=found.fraction,
            losses={str(at): point.calibrated_loss for at, point in found.points.items()},
            validated_by=found.validated_by,
            note=note,
            temperature=temperature,
            teacher=teacher,
            alone=None if without is None else without.losses.calibrated_loss,
            gain=None if without is None else paired_change(without.losses, found.losses).report(),
            without_sources=without_sources,
        )

    def _reason_not_to_teach(self, predictions: Predictions | None) -> str:
        """Return why the unlabelled inputs cannot teach the model; empty if they can, or if there are none."""
        if self.labels.unlabeled is None or predictions is None or not len(predictions):
            return ""
        if predictions.truth is None:
            kind = type(self.model).__name__
            return (
                f"not taught on unlabelled inputs: a {kind} does not predict one class, several labels or one number"
            )
        if label_column(self.labels.samples.train[0]) is None:
            return f"not taught on unlabelled inputs: the labels are in none of the columns {', '.join(LABEL_COLUMNS)}"
        return ""

    def _train(self, part: Any, seed: int) -> None:
        samples = self.labels.samples
        config = self.config.for_part(len(part) / len(samples.train))
        self._finetune(part, self.labels.collator, config, seed)

    def _finetune(
        self, data: Any, collator: Collator, config: GraspConfig, seed: int, loss: Callable[..., Tensor] | None = None
    ) -> None:
        """Change the model: train it, or restore the result of this training from the state."""
        from ..models.finetune import finetune_  # imports datasets, which a merge without data does not need

        def train(checkpoints: Checkpoints | None = None) -> None:
            finetune_(
                self.model,
                data,
                self.labels.samples.validation,
                collator,
                config,
                epochs=self.epochs,
                seed=seed,
                directory=self.scratch.directory,
                loss=loss,
                checkpoints=checkpoints,
            )

        if self.state is None:
            train()
        else:
            self.trainings += 1
            self.state.train(f"{TRAINING} {self.trainings}", self.model, train)

    def _train_folds(self, start: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> FoldModels:
        samples = self.labels.samples
        return finetune_on_folds_(
            movable_tensors(self.model),
            start,
            mean,
            self.scratch.fold,
            self._train,
            self.labels.losses_on,
            samples.train,
            samples.validation,
            self.seed,
        )

    def _set_temperature(self, found: FoldModels) -> float | None:
        """Fit a temperature on held-out labels, and put it into the head; return it, or `None` if the model has none."""
        outputs = found.losses.outputs
        if outputs is None or outputs.link == "identity" or found.fraction == 0:
            return None
        scale = fit_scale(outputs.logits.double().numpy(), outputs.targets.double().numpy(), outputs.link)
        batch = next(self.labels.batches(self.labels.samples.train, self.seed))
        return 1 / scale if scale_logits_(self.model, scale, batch) else None

    def _members_before(self, predictions: Predictions) -> list[Member]:
        """Return the sources, and the model before it is fine-tuned unless it has learned the labels."""
        members = predictions.members()
        if self.labels.learned:
            return members
        outputs = self.labels.losses_on(self.labels.some_labels).outputs
        return members if outputs is None else [*members, self._member(MODEL_BEFORE, outputs.logits)]

    def _member(self, name: str, labelled: Tensor) -> Member:
        unlabeled = self.labels.unlabeled_logits()
        return Member(name, labelled.double().numpy(), None if unlabeled is None else unlabeled.double().numpy())

    def _teach(self, found: FoldModels, members: list[Member], predictions: Predictions) -> TeacherReport:
        """Fit a teacher and train the model on its predictions, unless it predicts held-out labels worse than the model."""
        truth = predictions.truth
        assert truth is not None
        held_out = found.held_out(self.labels.validation_indices)
        if held_out is not None and not self.labels.learned:
            members = [*members, self._member(MODEL_AFTER, held_out)]
        fitted = fit_teacher(members, truth, self.config.seed)
        unlabeled = [member.unlabeled for member in members if member.unlabeled is not None]
        loss = losses_of(replace(truth, logits=torch.from_numpy(fitted.held_out).float())).calibrated_loss
        before = None if held_out is None else losses_of(replace(truth, logits=held_out)).calibrated_loss
        used = before is None or loss <= before
        if used:
            soft = torch.from_numpy(probabilities(fitted.pool.logits(unlabeled), truth.link)).float()
            self._train_student(fitted, truth, soft)
        return TeacherReport(
            worth=_named([member.name for member in members], fitted.pool.coefficients.tolist()),
            loss=loss,
            loss_before=before,
            ridge=fitted.ridge,
            labels=int(truth.samples.max()) + 1,
            unlabeled=len(self.labels.unlabeled),
            used=used,
        )

    def _train_student(self, fitted: FittedPool, truth: Outputs, soft: Tensor) -> None:
        """Change the model: train it on the mean of labels and teacher, and on the teacher alone where there is no label."""
        labels = self.labels
        held_out = torch.from_numpy(probabilities(fitted.held_out, truth.link)).float()
        taught = ((truth.targets + held_out) / 2).split(truth.samples.bincount().tolist())
        data = TaughtSamples(labels.some_labels, taught, labels.unlabeled, _split_like(labels, soft))
        passes = self.config.training_arguments.get("num_train_epochs", self.epochs)
        reads = 2 * passes * len(labels.some_labels)  # half of them unlabelled inputs
        arguments = {**self.config.training_arguments, "num_train_epochs": reads / len(data)}
        if (steps := arguments.get("max_steps", 0)) > 0:
            arguments["max_steps"] = 2 * steps
        config = replace(self.config, training_arguments=arguments)
        self._finetune(data, with_targets(labels.collator), config, self.seed, taught_loss(truth.link))


def _named(references: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Return the values by the name of each model; a folder is named by its last part, as in every record that is pushed."""
    found: dict[str, float] = {}
    for reference, value in zip(references, values, strict=True):
        name = unique = Path(reference).name if Path(reference).is_dir() else reference
        number = 2
        while unique in found:
            unique, number = f"{name} ({number})", number + 1
        found[unique] = value
    return found


def _split_like(labels: Labels, rows: Tensor) -> Sequence[Tensor]:
    """Return the rows of each unlabelled input: one, or one for each of its tokens."""
    inputs = labels.unlabeled
    if len(rows) == len(inputs):
        return rows.split(1)
    counts = []
    for index in range(len(inputs)):
        sample = inputs[index]
        mask = sample.get("attention_mask")
        counts.append(len(sample["input_ids"]) if mask is None else int(torch.as_tensor(mask).sum()))
    return rows.split(counts)
