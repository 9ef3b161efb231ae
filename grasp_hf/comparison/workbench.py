"""The workbench of a comparison: one model that every method starts from, and the same fine-tuning for all."""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

from ..config.grasp import GraspConfig
from ..data.samples import Samples
from ..merger import GraspMerger
from ..merging.run import Run, collator_for
from ..merging.step import Step
from ..models.batches import Batch, Collator
from ..sources.placebo import Placebo
from ..tensors.mapped import MappedTensors
from ..tensors.placing import overwrite_
from ..tensors.scratch import Scratch
from ..tensors.units import movable_tensors
from ..validation.losses import MOST_VALIDATION_LABELS, SampleLosses
from .inputs import MethodInputs, wide_like

COMMON = (
    "batch_size",
    "lora",
    "training_arguments",
    "seed",
    "accepted_bases",
    "source_options",
    "trust_remote_code",
    "prefetch",
)


class Workbench:
    """The labels, the sources and the model that all methods of one run share.

    Args:
        merger: Holds the base model. The methods work in its model, one at a time.
        sources: References, in the order of this run.
        data: The run's labels (`train`, and `validation` if there is one) and the test samples.
        unlabeled: Inputs whose labels no method reads; `None` if there are none.
        epochs: Epochs of fine-tuning that each method may spend in total.
        directory: Folder for the files of this run.
    """

    def __init__(
        self,
        merger: GraspMerger,
        sources: list[str],
        data: Samples,
        *,
        unlabeled: Any = None,
        epochs: float,
        directory: Path,
    ) -> None:
        self.sources, self.data, self.epochs, self.directory = sources, data, epochs, directory
        self.unlabeled = unlabeled
        self._origin = merger
        self.seed = merger.config.seed
        self.config = GraspConfig(method="average", gate=False, order="given", final_epochs=0, **self.settings(COMMON))
        self._base = MappedTensors(directory / "base", movable_tensors(merger.model)).copy_(
            movable_tensors(merger.model)
        )

    @property
    def selection_samples(self) -> Any:
        """The samples by which methods choose: up to `MOST_VALIDATION_LABELS` training samples, all for validation."""
        some = Subset(self.data.train, range(min(MOST_VALIDATION_LABELS, len(self.data.train))))
        return some if self.data.validation is None else ConcatDataset([some, self.data.validation])

    @property
    def generates(self) -> bool:
        """Whether the base is a language model that generates."""
        return self._origin.model.can_generate()

    @property
    def collator(self) -> Collator:
        """The function that makes batches for the base model."""
        origin = self._origin
        return collator_for(origin.model, origin.config, origin.processing_class, self.data.collator)

    def settings(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the recipe's values of these settings."""
        return {name: getattr(self._origin.config, name) for name in names}

    def restore_base(self) -> None:
        """Load the base's weights into the model."""
        overwrite_(movable_tensors(self._origin.model), self._base)

    def new_merger(self, config: GraspConfig) -> GraspMerger:
        """Return a merger of the model with its present weights and an empty record."""
        return self._origin.with_config(config, anew=True)

    def merge(self, config: GraspConfig, sources: list[str]) -> None:
        """Merge `sources` into the model with its present weights."""
        self.new_merger(config).merge(sources, **self.data.keywords())

    def merge_by_recipe(self, settings: dict[str, Any], *, placebo: bool = False, taught: bool = False) -> None:
        """Merge all sources into the model with the recipe's configuration, changed by `settings`.

        The base keeps its record: if it is a merge, this merge appends to it.

        Args:
            settings: Values that replace those of the recipe.
            placebo: Whether a placebo replaces each source.
            taught: Whether the merge may read the unlabelled inputs of the run.
        """
        config = replace(self._origin.config, **settings)
        merger = self._origin.with_config(config, placebo=Placebo(self.seed, self._base) if placebo else None)
        data = replace(self.data, unlabeled=self.unlabeled) if taught else self.data
        merger.merge(self.sources, **data.keywords())

    def load_source_weights(self, source: str) -> None:
        """Load a source's weights into the model; tensors that the source lacks are those of the base."""
        self.restore_base()
        self.merge(self.config, [source])

    def finetune(self, epochs: float, *, gate: bool = False) -> None:
        """Fine-tune the model by the recipe's settings.

        Args:
            epochs: Passes over the training samples.
            gate: Whether the gate chooses how much of the change is kept.
        """
        with self.open_step(replace(self.config, gate=gate)) as (_, step):
            step.finetune(epochs, self.seed)

    def test(self) -> SampleLosses:
        """Return the losses of the model on the test samples."""
        return self._judge(self.data.test)

    def selection_loss(self) -> float:
        """Return the loss of the model on `selection_samples`."""
        return self._judge(self.selection_samples).loss

    def _judge(self, samples: Any) -> SampleLosses:
        return self.new_merger(self.config).judge(samples, data_collator=self.data.collator)

    @contextmanager
    def open_step(self, config: GraspConfig) -> Iterator[tuple[Run, Step]]:
        """Yield a new run with the model, and a step of it."""
        with self.new_merger(config).open_run(self.data) as run, run.step() as step:
            yield run, step

    @contextmanager
    def open_inputs(self) -> Iterator[MethodInputs]:
        """Load the base's weights into the model, and yield the inputs of an existing method."""
        self.restore_base()
        with self.open_step(self.config) as (run, step), run.puller(None, whole=True) as puller:
            run.model.eval()
            tensors = movable_tensors(run.model)

            def load(source: str, number: int, stack: ExitStack) -> dict[str, Tensor]:
                scratch = Scratch(run.scratch.directory / f"source-{number}", tensors)
                scratch.directory.mkdir(exist_ok=True)
                loaded = run.load(stack.enter_context(puller.pull(source)), scratch=scratch)
                return {name: loaded.tensors[name] for name in loaded.candidates}

            def stream_sources() -> Iterator[dict[str, Tensor]]:
                for source in self.sources:
                    with ExitStack() as stack:
                        yield load(source, 0, stack)

            @contextmanager
            def open_sources() -> Iterator[list[dict[str, Tensor]]]:
                with ExitStack() as stack:
                    yield [load(source, number, stack) for number, source in enumerate(self.sources)]

            def batches(count: int) -> Iterator[Batch]:
                config = replace(self.config, num_batches=count)
                return step.with_config(config).labels.batches(self.data.train, self.seed)

            def finetune(epochs: float, seed: int, lora: dict[str, Any], learning_rate: float) -> None:
                arguments = {**self.config.training_arguments, "learning_rate": learning_rate}
                config = replace(self.config, lora=lora, training_arguments=arguments)
                step.with_config(config).finetune(epochs, seed)

            buffers: dict[str, MappedTensors] = {}

            def buffer(name: str) -> MappedTensors:
                if name not in buffers:
                    buffers[name] = MappedTensors(run.scratch.directory / f"buffer-{name}", wide_like(tensors))
                return buffers[name]

            yield MethodInputs(
                model=run.model,
                base=run.scratch.start,
                stream_sources=stream_sources,
                open_sources=open_sources,
                batches=batches,
                batches_per_epoch=math.ceil(
                    min(len(self.data.train), MOST_VALIDATION_LABELS) / self.config.batch_size
                ),
                loss=self.selection_loss,
                buffer=buffer,
                finetune=finetune,
                seed=self.seed,
            )
