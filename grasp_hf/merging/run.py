"""The state that all steps of one merge share: the data, the device, the files, and a copy of the weights."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from torch.utils.data import ConcatDataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from ..config.grasp import GraspConfig
from ..config.methods import METHODS
from ..data.classes import check_class_names
from ..data.digests import fingerprint
from ..data.samples import Samples
from ..files import interrupts_held, workspace
from ..hub.pull import Puller
from ..hub.reference import Source
from ..models.batches import Batch, Collator, check_dataset, keep_model_columns
from ..models.gradients import checkpointing, preserved_state
from ..sources.load import LoadedSource, load_source
from ..sources.placebo import Placebo
from ..teaching.predictions import Predictions
from ..tensors.placing import overwrite_
from ..tensors.scratch import Scratch
from ..tensors.units import movable_tensors
from ..validation.labels import Labels
from .checks import check_loss
from .step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Run:
    """A merge in progress. `Run.open` gives it a temporary directory.

    Args:
        model: The target; the steps change it in place.
        config: How to merge.
        samples: The data of the merge.
        directory: Temporary directory of the run.
        learned: Whether the model was fine-tuned on the labels.
        processing_class: The target's tokenizer or processor.
        base_of: Returns, for a source that is an adapter, the base model that the adapter must belong to.
        base_token: Hub token that the base was loaded with.
        placebo: Replaces every source by a placebo, for a control.
        checked: References and commits of the sources that were compared with their own library; grows.

    Attributes:
        labels: The labelled samples, with the losses of the model on them.
        scratch: The temporary files.
        predictions: The predictions of the sources.
        weights: Weight of each source in the mean, by reference; 1 for a source that is not named.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GraspConfig,
        samples: Samples,
        directory: Path,
        *,
        learned: bool,
        processing_class: Any,
        base_of: Callable[[Source], Source | None],
        base_token: str | None,
        placebo: Placebo | None = None,
        checked: set[str] | None = None,
    ) -> None:
        self._given = samples
        if model.can_generate() and samples.unlabeled is not None and samples.train is not None:
            samples = replace(samples, train=ConcatDataset([samples.train, samples.unlabeled]), unlabeled=None)
        self.model, self.config, self.samples = model, config, samples
        self._processing_class, self._base_of, self._base_token = processing_class, base_of, base_token
        self._placebo = placebo
        self._checked = set() if checked is None else checked
        self.scratch = Scratch(directory, movable_tensors(model))
        if config.learns or config.compares_alone:
            self.scratch.base.copy_(movable_tensors(model))
        collator = collator_for(model, config, processing_class, samples.collator)
        self.labels = Labels(model, samples, collator, config, learned=learned)
        self.predictions = Predictions(directory / "predictions")
        self.weights: dict[str, float] = {}
        self._has_finite_loss = False
        self._description: dict[str, Any] | None = None

    @property
    def weighs(self) -> bool:
        """Whether the predictions of the sources weigh them."""
        return METHODS[self.config.method].weighs

    @property
    def teaches(self) -> bool:
        """Whether the predictions of the sources on unlabelled inputs teach the model at the end."""
        config = self.config
        return self.samples.unlabeled is not None and config.gate and config.trains(config.final_epochs)

    @classmethod
    @contextmanager
    def open(cls, model: PreTrainedModel, config: GraspConfig, samples: Samples, **options: Any) -> Iterator[Run]:
        """Yield a run with a temporary directory in `TMPDIR`, which is removed at the end; `options` are as for `Run`."""
        with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as directory:
            yield cls(model, config, samples, directory, **options)

    @contextmanager
    def step(self, *, sharded: bool = False) -> Iterator[Step]:
        """Check the data, move the model to the accelerator, and restore its weights if the block raises an error.

        Args:
            sharded: Whether the source comes in shards, so that a step can fail after weights have moved.

        Raises:
            DataError: The data does not fit the model.
        """
        samples = {"train_dataset": self.samples.train, "eval_dataset": self.samples.validation}
        for name, dataset in samples.items():
            if dataset is not None or (name == "train_dataset" and self.config.needs_data):
                check_dataset(dataset, name)
        asked = self.config.training_arguments
        checkpoints = bool(asked.get("gradient_checkpointing") or asked.get("activation_checkpointing"))
        can_fail = sharded or any(dataset is not None for dataset in samples.values())
        step = Step(self.model, self.config, self.labels, self.scratch, can_fail=can_fail)
        with preserved_state(self.model), checkpointing(self.model, checkpoints):
            self.model.to(Accelerator().device)
            if not can_fail:
                yield step
                return
            self.scratch.start.copy_(movable_tensors(self.model))
            try:
                if not self._has_finite_loss:
                    for name, dataset in samples.items():
                        if dataset is not None:
                            check_class_names(self.model, dataset, name)
                            check_loss(self.labels, dataset, name)
                self._has_finite_loss = True
                yield step
            except BaseException as error:
                with interrupts_held():  # a second interrupt must not leave half of the weights
                    self.restore_()
                # Without this, an exception that the caller keeps would also keep the source or the optimizer in memory.
                traceback.clear_frames(error.__traceback__)
                raise

    @contextmanager
    def trial(self) -> Iterator[Step]:
        """Let the block fine-tune the model, then restore the model and the state of the run."""
        check_dataset(self.samples.train, "train_dataset")
        learned = self.labels.learned
        with self.step() as step:
            yield step
            self.restore_()
            self.labels.learned = learned
            self.scratch.make_room()

    def restore_(self) -> None:
        """Change the model back to its weights before the present step."""
        overwrite_(movable_tensors(self.model), self.scratch.start)
        self.labels.changed()

    def puller(self, token: str | None, *, commits: Mapping[str, str] | None = None, whole: bool = False) -> Puller:
        """Return the downloader of the sources.

        Args:
            token: Hub token.
            commits: Commit of each source that is already known, by reference.
            whole: Whether each source must come as a whole, and not in shards.
        """
        undo_bytes = None
        if not whole and METHODS[self.config.method].reads_once:
            has_data = self.samples.train is not None or self.samples.validation is not None
            # With data, every step keeps a copy of the weights, so that a source that fails can be undone.
            undo_bytes = 0 if has_data else sum(tensor.nbytes for tensor in movable_tensors(self.model).values())
        prefetch, trusted = self.config.prefetch, self.config.trust_remote_code
        return Puller(token=token, prefetch=prefetch, trusted=trusted, undo_bytes=undo_bytes, commits=commits)

    def load(self, located: Source, *, scratch: Scratch | None = None, check_finite: bool = True) -> LoadedSource:
        """Read the tensors of a source by the names and shapes of the model.

        Args:
            located: The source.
            scratch: Temporary files for the source; if left out, those of the run, which hold one source at a time.
            check_finite: Whether a weight that is NaN or infinite is an error.
        """
        directory = (scratch or self.scratch).source_folder()
        name = f"{located.ref}@{located.sha}"
        loaded = load_source(
            located,
            self.model,
            base=self._base_of(located),
            directory=directory,
            processing_class=self._processing_class,
            accepted_bases=self.config.accepted_bases,
            options=self.config.options_of(str(located.ref)),
            check_finite=check_finite,
            check=self.config.check and name not in self._checked,
            data=self._some_inputs if self.samples.train is not None else None,
            token=self._base_token,
        )
        self._checked.add(name)
        if self._placebo:
            return self._placebo.replace(loaded, str(located.ref), self.model, directory)
        return loaded

    def _some_inputs(self) -> Batch:
        """Return the inputs of two samples."""
        batch = self.labels.collator([self.samples.train[index] for index in range(min(2, len(self.samples.train)))])
        return {name: value for name, value in batch.items() if name != "labels"}

    def describe_data(self) -> dict[str, Any]:
        """Return the number of samples and a digest of each split, for the record; only the first call reads the data."""
        if self._description is None:
            splits = {"train": self._given.train, "eval": self._given.validation}
            if self._given.unlabeled is not None:
                splits["unlabeled"] = self._given.unlabeled
            self._description = {name: fingerprint(dataset) for name, dataset in splits.items()}
        return self._description


def collator_for(
    model: PreTrainedModel, config: GraspConfig, processing_class: Any, data_collator: Collator | None
) -> Collator:
    """Return the collator of the merge; for `None`, the one that the Trainer would take."""
    if data_collator is None and isinstance(processing_class, PreTrainedTokenizerBase):
        data_collator = DataCollatorWithPadding(processing_class)
    if data_collator is not None and config.training_arguments.get("remove_unused_columns") is False:
        return data_collator
    return keep_model_columns(model, data_collator)
