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
from ..data.samples import TaskData
from ..merger import GraspMerger
from ..merging.step import Step
from ..models.batches import Batch, Collator
from ..record.entries import Evaluation
from ..tensors.mapped import MappedTensors
from ..tensors.placing import overwrite_
from ..tensors.scratch import Scratch
from ..tensors.units import movable_tensors
from ..validation.losses import EVIDENCE
from .inputs import Trial, wide_like

COMMON = ("batch_size", "lora", "training_arguments", "seed", "accepted_bases", "trust_remote_code", "prefetch")


class Arena:
    """What all methods of one run share: the labels, the sources, the model that each of them starts from.

    Args:
        merger: Holds the base model; every method works in its model, one after the other.
        sources: References, in the order of this run.
        data: The run's labels (`train`, and `validation` where there is one) and the test samples.
        epochs: Fine-tuning that each method may spend, in all.
        directory: For files of this run.
    """

    def __init__(
        self, merger: GraspMerger, sources: list[str], data: TaskData, *, epochs: float, directory: Path
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
        """The samples that choices are made by: `EVIDENCE` labels at most, and the validation split where there is one."""
        some = Subset(self.data.train, range(min(EVIDENCE, len(self.data.train))))
        return some if self.data.validation is None else ConcatDataset([some, self.data.validation])

    @property
    def generates(self) -> bool:
        """Whether the base is a language model that generates."""
        return self._origin.model.can_generate()

    @property
    def collator(self) -> Collator:
        """What makes batches that the base model takes."""
        return self._origin.collator(self.data.collator)

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
        self.merger(config).merge(sources, **self.data.merge_arguments())

    def continue_(self, settings: dict[str, Any]) -> None:
        """Merge all sources into the model as the recipe says but for `settings`, where the base's record ends."""
        config = replace(self._origin.config, **settings)
        self._origin.with_config(config).merge(self.sources, **self.data.merge_arguments())

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
    def session(self, config: GraspConfig) -> Iterator[tuple[GraspMerger, Step]]:
        """Yield a merger of the model as it is now, within a step of it."""
        merger, data = self.merger(config), self.data
        with merger.scratch_files(), merger.step(data.train, data.validation, data.collator) as step:
            yield merger, step

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Yield what an existing method works with; the base's weights stand in the model at the start."""
        self.begin()
        with self.session(self.config) as (merger, step), merger.puller(None) as puller:
            merger.model.eval()
            tensors = movable_tensors(merger.model)

            def load(source: str, number: int, held: ExitStack) -> dict[str, Tensor]:
                own = Scratch(step.scratch.directory / f"source-{number}", tensors)
                own.directory.mkdir(exist_ok=True)
                loaded = merger.load(held.enter_context(puller.pull(source)), own)
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
                return step.with_config(config).batches(self.data.train, self.seed)

            def finetune(epochs: float, seed: int, lora: dict[str, Any], learning_rate: float) -> None:
                arguments = {**self.config.training_arguments, "learning_rate": learning_rate}
                config = replace(self.config, lora=lora, training_arguments=arguments)
                step.with_config(config).finetune(epochs, seed)

            rooms: dict[str, MappedTensors] = {}

            def room(name: str) -> MappedTensors:
                if name not in rooms:
                    rooms[name] = MappedTensors(step.scratch.directory / f"room-{name}", wide_like(tensors))
                return rooms[name]

            yield Trial(
                model=merger.model,
                start=step.scratch.start,
                stream=stream,
                together=together,
                batches=batches,
                epoch=math.ceil(min(len(self.data.train), EVIDENCE) / self.config.batch_size),
                loss=lambda: self.score(self.labels)["loss"],
                room=room,
                finetune=finetune,
                seed=self.seed,
            )
