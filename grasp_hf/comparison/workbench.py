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
from ..record.entries import Evaluation
from ..tensors.mapped import MappedTensors
from ..tensors.placing import overwrite_
from ..tensors.scratch import Scratch
from ..tensors.units import movable_tensors
from ..validation.losses import MOST_VALIDATION_LABELS
from .inputs import MethodInputs, wide_like

COMMON = ("batch_size", "lora", "training_arguments", "seed", "accepted_bases", "trust_remote_code", "prefetch")


class Workbench:
    """What all methods of one run share: the labels, the sources, the model that each of them starts from.

    Args:
        merger: Holds the base model; every method works in its model, one after the other.
        sources: References, in the order of this run.
        data: The run's labels (`train`, and `validation` where there is one) and the test samples.
        epochs: Fine-tuning that each method may spend, in all.
        directory: For files of this run.
    """

    def __init__(
        self, merger: GraspMerger, sources: list[str], data: Samples, *, epochs: float, directory: Path
    ) -> None:
        self.sources, self.data, self.epochs, self.directory = sources, data, epochs, directory
        self._origin = merger
        self.seed = merger.config.seed
        self.config = GraspConfig(method="average", gate=False, order="given", final_epochs=0, **self.shared(COMMON))
        self._start = MappedTensors(directory / "base", movable_tensors(merger.model)).copy_(
            movable_tensors(merger.model)
        )

    @property
    def labels(self) -> Any:
        """The samples that choices are made by: `MOST_VALIDATION_LABELS` labels at most, and the validation split where there is one."""
        some = Subset(self.data.train, range(min(MOST_VALIDATION_LABELS, len(self.data.train))))
        return some if self.data.validation is None else ConcatDataset([some, self.data.validation])

    @property
    def generates(self) -> bool:
        """Whether the base is a language model that generates."""
        return self._origin.model.can_generate()

    @property
    def collator(self) -> Collator:
        """What makes batches that the base model takes."""
        origin = self._origin
        return collator_for(origin.model, origin.config, origin.processing_class, self.data.collator)

    def shared(self, names: Iterable[str]) -> dict[str, Any]:
        """Return settings of the recipe."""
        return {name: getattr(self._origin.config, name) for name in names}

    def begin(self) -> None:
        """Put the base model's weights back."""
        overwrite_(movable_tensors(self._origin.model), self._start)

    def merger(self, config: GraspConfig) -> GraspMerger:
        """Return a merger of the model as it is now, as if nothing had been merged into it."""
        return self._origin.with_config(config, anew=True)

    def merge(self, config: GraspConfig, sources: list[str]) -> None:
        """Merge `sources` into the model as it is now."""
        self.merger(config).merge(sources, **self.data.keywords())

    def continue_(self, settings: dict[str, Any]) -> None:
        """Merge all sources into the model as the recipe says but for `settings`, where the base's record ends."""
        config = replace(self._origin.config, **settings)
        self._origin.with_config(config).merge(self.sources, **self.data.keywords())

    def copy(self, source: str) -> None:
        """Let the model hold the weights of a source; where it has none, those of the base."""
        self.begin()
        self.merge(self.config, [source])

    def finetune(self, epochs: float, *, gate: bool = False) -> None:
        """Fine-tune the model as it is now, as the recipe says; with the gate, no further than the labels allow."""
        with self.session(replace(self.config, gate=gate)) as (_, step):
            step.finetune(epochs, self.seed)

    def score(self, dataset: Any = None) -> Evaluation:
        """Return loss and accuracy of the model as it is now, on the test samples where `dataset` is left out."""
        dataset = self.data.test if dataset is None else dataset
        return self.merger(self.config).evaluate(dataset, data_collator=self.data.collator)

    @contextmanager
    def session(self, config: GraspConfig) -> Iterator[tuple[Run, Step]]:
        """Yield a run with the model as it is now, within a step of it."""
        with self.merger(config).open_run(self.data) as run, run.step() as step:
            yield run, step

    @contextmanager
    def inputs(self) -> Iterator[MethodInputs]:
        """Yield what an existing method works with; the model holds the base's weights at the start."""
        self.begin()
        with self.session(self.config) as (run, step), run.puller(None, whole=True) as puller:
            run.model.eval()
            tensors = movable_tensors(run.model)

            def load(source: str, number: int, held: ExitStack) -> dict[str, Tensor]:
                own = Scratch(run.scratch.directory / f"source-{number}", tensors)
                own.directory.mkdir(exist_ok=True)
                loaded = run.load(held.enter_context(puller.pull(source)), scratch=own)
                return {name: loaded.tensors[name] for name in loaded.candidates}

            def stream() -> Iterator[dict[str, Tensor]]:
                for source in self.sources:
                    with ExitStack() as held:
                        yield load(source, 0, held)

            @contextmanager
            def together() -> Iterator[list[dict[str, Tensor]]]:
                with ExitStack() as held:
                    yield [load(source, number, held) for number, source in enumerate(self.sources)]

            def batches(count: int) -> Iterator[Batch]:
                config = replace(self.config, num_batches=count)
                return step.with_config(config).labels.batches(self.data.train, self.seed)

            def finetune(epochs: float, seed: int, lora: dict[str, Any], learning_rate: float) -> None:
                arguments = {**self.config.training_arguments, "learning_rate": learning_rate}
                config = replace(self.config, lora=lora, training_arguments=arguments)
                step.with_config(config).finetune(epochs, seed)

            rooms: dict[str, MappedTensors] = {}

            def room(name: str) -> MappedTensors:
                if name not in rooms:
                    rooms[name] = MappedTensors(run.scratch.directory / f"room-{name}", wide_like(tensors))
                return rooms[name]

            yield MethodInputs(
                model=run.model,
                start=run.scratch.start,
                stream=stream,
                together=together,
                batches=batches,
                epoch=math.ceil(min(len(self.data.train), MOST_VALIDATION_LABELS) / self.config.batch_size),
                loss=lambda: self.score(self.labels)["loss"],
                room=room,
                finetune=finetune,
                seed=self.seed,
            )
