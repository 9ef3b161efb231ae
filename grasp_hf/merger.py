"""The public verbs: a merger is loaded, merges sources one at a time, is evaluated, saved and pushed."""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from accelerate import Accelerator

from .config.grasp import GraspConfig
from .config.sources import require_entries
from .data.classes import check_class_names
from .data.digests import fingerprint
from .data.samples import Samples
from .errors import ConfigError, GraspError
from .files import workspace
from .hub.download import locate
from .hub.pull import Puller, ShardedSource
from .hub.push import Destination, push_merge
from .hub.reference import Source, SourceRef
from .merging.checks import check_config, check_finetuning, check_merge, check_units
from .merging.ranking import RankedSource, rank_by_gain, rank_for_merge
from .merging.run import Run, collator_for
from .models.batches import Collator, check_dataset
from .models.classes import load_config
from .models.gradients import preserved_state
from .models.processors import load_processing_class
from .models.target import load_target, untie_
from .record.card import declared_license
from .record.earlier import EarlierMerge
from .record.entries import ControlReport, Evaluation, Reason
from .record.report import MergeReport, RunReport, StepReport
from .record.saving import check_output, read_record, save_merge, save_record, saved_shards
from .record.text import WIDTH, wrap
from .sources.placebo import Placebo
from .tensors.mapped import MappedTensors
from .tensors.placing import overwrite_
from .tensors.units import Unit, movable_tensors
from .validation.losses import SampleLosses, evaluation_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

REFUSED_ARGUMENTS = {
    "device_map": "Accelerate chooses the device of each step",
    "trust_remote_code": "name the models whose code may run in GraspConfig(trust_remote_code=[...])",
    "cache_dir": "set HF_HOME or HF_HUB_CACHE",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "force_download": "a file whose checksum is wrong is downloaded again anyway",
    "ignore_mismatched_sizes": "a head of another size is drawn anew anyway, and anything else is an error",
}
PACKAGES = ("grasp_hf", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def merge_pretrained(
    base_model: str | None,
    sources: Sequence[str | Mapping[str, Any]],
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    unlabeled_dataset: Any = None,
    test_dataset: Any = None,
    data_collator: Collator | None = None,
    config: GraspConfig | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Merge `sources` into `base_model`, one at a time, guided by gradients of `train_dataset`.

    Args:
        base_model: Hub id (`org/name`, `org/name@revision`) or folder; `None` starts from the first source.
        sources: References of full models and of PEFT adapters of the base model; `config.order` sets their order. An
            entry may be a section with the keys of a recipe, such as `{"id": "org/a", "labels": ["negative", "positive"]}`.
        train_dataset: Labelled samples of the target task, as for `transformers.Trainer`.
        eval_dataset: Held-out samples. They validate each source and choose the best epoch.
        unlabeled_dataset: Inputs without labels. The predictions of the sources on them teach the merged model. A language
            model is trained on them like on `train_dataset`.
        test_dataset: Samples that choose nothing. The result is evaluated on them once, at the end.
        data_collator: Makes batches from samples, as for `transformers.Trainer`.
        config: How to merge; the defaults if left out.
        from_pretrained_kwargs: Keyword arguments of `GraspMerger.from_pretrained`.

    Returns:
        The merged model.

    Example:
        >>> model = merge_pretrained("org/base", ["org/a", "org/lora-b@v1.0"], train_dataset=train)  # doctest: +SKIP
    """
    starts_from_source = base_model is None
    if base_model is None:
        if not sources:
            raise ConfigError("there is nothing to merge: expected a base model or at least one source")
        (base_model, *sources), options = require_entries(sources)
        config = config or GraspConfig()
        config = replace(config, source_options={**config.source_options, **options})
    merger = GraspMerger.from_pretrained(base_model, config=config, **from_pretrained_kwargs)
    merger.describe_run(starts_from_source=starts_from_source)
    token = from_pretrained_kwargs.get("token")
    merger.merge(
        sources,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        unlabeled_dataset=unlabeled_dataset,
        test_dataset=test_dataset,
        data_collator=data_collator,
        token=token,
    )
    return merger.model


class GraspMerger:
    """Merges sources into one model, one at a time; at no moment are two sources in memory.

    Args:
        model: The target; changed in place. Frozen parameters are measured and merged like the others; they only stay out
            of fine-tuning.
        config: How to merge; the defaults if left out.
        processing_class: Tokenizer or image processor, saved with the model.
        base: The files that the model was loaded from, so that its adapters can be merged; `from_pretrained` sets it.

    Attributes:
        model: The target, a plain `PreTrainedModel`.
        report: The record of the merge so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GraspConfig | None = None,
        *,
        processing_class: Any = None,
        base: Source | None = None,
    ) -> None:
        if not isinstance(model, transformers.PreTrainedModel):
            raise ConfigError(
                f"got a {type(model).__name__}, expected a PreTrainedModel; merge a PeftModel first, with "
                "merge_and_unload(), and compile a model in place, with model.compile()"
            )
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ConfigError(
                "the model is spread over several devices by a device_map; load it without one: Accelerate chooses the "
                "device of each step"
            )
        check_config(config)
        self.model = model
        self.config = config or GraspConfig()
        if self.config.untie:
            untie_(model)
        self.processing_class = processing_class
        self.base = base
        versions = {name: version(name) for name in PACKAGES}
        self.report = MergeReport(
            base=str(base.ref) if base else model.name_or_path or type(model).__name__,
            base_sha=base.sha if base else None,
            base_license=declared_license(base.folder) if base else None,
            base_gated=base.gated if base else False,
            run=RunReport(config=asdict(self.config), versions=versions),
        )
        self._started = False
        self._continued: EarlierMerge | None = None
        self._pushed: tuple[str, str] | None = None  # repository and commit of the pushed version that this continues
        self._token: str | None = None  # Hub token that the base was loaded with
        self._placebo: Placebo | None = None
        self._checked: set[str] = set()
        if Accelerator().num_processes > 1:
            raise GraspError("grasp_hf runs in one process for now; start it without a launcher")

    @classmethod
    def from_pretrained(
        cls,
        model_id: str,
        *,
        config: GraspConfig | None = None,
        task: str | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        dtype: torch.dtype | Literal["auto"] = torch.float32,
        new_head: bool = False,
        **model_kwargs: Any,
    ) -> GraspMerger:
        """Load the target with its tokenizer or processor.

        A merge that this package saved or pushed is continued: sources are appended to it, and its record grows. Earlier
        sources are not needed for that.

        Args:
            model_id: Hub id, with `@revision` if wanted, or a folder.
            config: How to merge.
            task: Pipeline name such as `text-classification`; if left out, the architecture in the model's config decides.
            revision: Branch, tag or commit, unless `model_id` names one.
            subfolder: Folder in the repository, unless `model_id` names one.
            token: Hub token; if left out, the one that you are logged in with.
            dtype: Type of the target's weights; `"auto"` is the type of its files. Fine-tuning and a mean of many sources
                need float32 to be exact. Sources are read in the type of their own files.
            new_head: Whether to draw the head anew although the files hold one that fits, because your labels mean
                something else.
            model_kwargs: Keyword arguments of the model class, such as `num_labels` or `id2label`.

        Raises:
            SourceNotFoundError: The folder, repository, revision or weights do not exist.
            IncompatibleSourceError: The model cannot solve the task.
        """
        if not isinstance(model_id, str | Path):
            raise ConfigError(
                f"got a {type(model_id).__name__}, expected a Hub id or a folder; GraspMerger(model) takes a model"
            )
        check_config(config)
        for name, advice in REFUSED_ARGUMENTS.items():
            if model_kwargs.pop(name, None):
                raise ConfigError(f"{name}: leave it out; {advice}")
        for name in model_kwargs:
            if name in GraspConfig.__dataclass_fields__:
                raise ConfigError(f"{name}: it belongs in the configuration: config=GraspConfig({name}=…)")
        ref = SourceRef.parse(model_id)
        if ref.is_local and revision:
            raise ConfigError(f"revision: '{model_id}' is a folder, which has no revisions; leave out '{revision}'")
        if ref.is_local and subfolder:
            ref = SourceRef.parse(str(Path(ref.name, subfolder)))
        else:
            ref = replace(ref, revision=ref.revision or revision, subfolder=ref.subfolder or subfolder)
        base = locate(ref, token=token, trusted=(config or GraspConfig()).trust_remote_code)
        seed = (config or GraspConfig()).seed
        labels = (config or GraspConfig()).options_of(str(ref)).labels
        if labels and "id2label" not in model_kwargs:
            named = load_config(base, labels)
            model_kwargs |= {"id2label": named.id2label, "label2id": named.label2id}
        needs_head = not (config or GraspConfig()).needs_data
        model = load_target(
            base, task=task, dtype=dtype, seed=seed, new_head=new_head, needs_head=needs_head, **model_kwargs
        )
        merger = cls(model, config, processing_class=load_processing_class(base), base=base)
        merger._token = token
        if not new_head and (record := read_record(base.folder)):
            merger._continued = EarlierMerge(record, base, token)
            merger._pushed = merger._continued.pushed
            merger.report = merger._continued.begin(merger.report.run)
            merger._started = True
        return merger

    def with_config(self, config: GraspConfig, *, anew: bool = False, placebo: Placebo | None = None) -> GraspMerger:
        """Return a merger of the same model that merges as `config` says.

        The twin continues this merge, so a mean counts the sources so far. With `anew` the model counts as a base. A
        `placebo` replaces each source of the twin, for a control.
        """
        twin = copy(self)
        twin.config = config
        twin._placebo = placebo
        if anew:
            run = self.report.run.next(asdict(config), self.report.run.versions)
            twin.report = self.report.as_base(run)
            twin._started = False
        else:
            twin.report = replace(deepcopy(self.report), run=replace(deepcopy(self.report.run), config=asdict(config)))
        return twin

    def describe_run(self, *, starts_from_source: bool = False, recipe: Mapping[str, Any] | None = None) -> None:
        """Record where this run started.

        Args:
            starts_from_source: Whether the base is the first source. A continued merge keeps its record.
            recipe: Task and data of the recipe.
        """
        if not self.report.continues:
            self.report.starts_from_source = starts_from_source
        if recipe is not None:
            self.report.run.recipe = dict(recipe)

    def record_end(self, *, test: Evaluation | None = None, control: ControlReport | None = None) -> None:
        """Record measurements of the finished merge: its scores on the test split, and one more control."""
        if test is not None:
            self.report.run.test = test
        if control is not None:
            self.report.run.controls.append(control)

    def merge(
        self,
        sources: Iterable[str | Mapping[str, Any]],
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        unlabeled_dataset: Any = None,
        test_dataset: Any = None,
        data_collator: Collator | None = None,
        token: str | None = None,
    ) -> MergeReport:
        """Merge `sources` one at a time, and fine-tune as the configuration says: before, after each, at the end.

        Every source is a step that either succeeds or leaves the model as it was before it. Steps done before an error stay
        done, in `model` and in `report`. During a step the temporary directory (`TMPDIR`) holds the weights before it, and
        those of fine-tuning.

        Args:
            sources: References of full models and PEFT adapters, or sections with the keys of a recipe, such as
                `{"id": "org/a", "labels": ["negative", "positive"]}`.
            train_dataset: Labelled samples of the target task, as for `transformers.Trainer`. Only an average in the given
                order and without fine-tuning needs none.
            eval_dataset: Held-out samples. They validate each source and each fine-tuning. The labels validate a source too,
                as long as the model was not fine-tuned on them, and without `eval_dataset` also the first fine-tuning.
            unlabeled_dataset: Inputs without labels. The predictions of the sources on them teach the merged model. A language
                model is trained on them like on `train_dataset`.
            test_dataset: Samples that choose nothing. The result is evaluated on them once, at the end.
            data_collator: Makes batches from samples; if left out, the one that `transformers.Trainer` would take.
            token: Hub token; if left out, the one that you are logged in with.

        Raises:
            GraspError: A source cannot be merged; the message names its number and reference.
        """
        samples = Samples(train_dataset, eval_dataset, unlabeled_dataset, collator=data_collator)
        sources = sources if isinstance(sources, str | Mapping) else [*sources]
        check_merge(self.model, self.config, self.report, sources, samples)
        if test_dataset is not None:
            check_dataset(test_dataset, "test_dataset")
            check_class_names(self.model, test_dataset, "test_dataset")
        references, earlier = self._references(sources), len(self.report.steps)
        with self.open_run(samples) as run:
            self._start(run, len(references))
            references = self._ordered(run, references, token)
            commits = {row["reference"]: row["sha"] for row in self.report.run.ranking if row["sha"]}
            with run.puller(token, commits=commits) as puller:
                for number, source in enumerate(references, start=1):
                    step = self._merge_numbered(run, puller, number, source, references)
                    self._log_step(f"{number}/{len(references)} ", step)
            if references:
                self._finish(run, self.report.steps[earlier:])
        if test_dataset is not None:
            self.record_end(test=self.evaluate(test_dataset, data_collator=data_collator))
            self.report.run.data["test"] = fingerprint(test_dataset)
        return self.report

    def _references(self, sources: Iterable[str | Mapping[str, Any]]) -> list[str]:
        """Return the references of `sources`, and add what their sections say to the configuration."""
        references, options = require_entries(sources)
        if options:
            self.config = replace(self.config, source_options={**self.config.source_options, **options})
            self.report.run.config = asdict(self.config)
        return [str(reference) for reference in references]

    def _start(self, run: Run, sources: int) -> None:
        """Check the fine-tuning, fine-tune before the first source of a merge, and record the loss that it starts from."""
        with run.step() as step:
            check_finetuning(step, self.config.total_epochs(sources))
            if not self._started:
                step.finetune(self.config.initial_epochs, self.config.seed)
                if before := run.labels.losses():
                    self.report.start = before.evaluation()
        self.report.finetuned = run.labels.learned
        self._started = True

    def _ordered(self, run: Run, references: list[str], token: str | None) -> list[str]:
        """Return the references to merge in their order, and record the ranking if there is one."""
        if not references:
            return []
        self.report.run.ranking = []
        compares = len(references) > 1 and (self.config.order != "given" or run.weighs)
        if not compares and not run.teaches:
            return references
        ranked = rank_for_merge(run, references, finetuned=self.report.finetuned, token=token)
        self.report.run.ranking = [row.summary() for row in ranked]
        return [row.reference for row in ranked[: self.config.top]]

    def _merge_numbered(
        self, run: Run, puller: Puller, number: int, source: str, references: Sequence[str]
    ) -> StepReport:
        """Merge one source while the next one is downloaded; an error names its number and name."""
        try:
            with puller.pull(source, *references[number : number + 1]) as located:
                return self._merge_located(run, located)
        except GraspError as error:
            raise error.reworded(f"while merging source {number}/{len(references)} '{source}': {error}") from error

    def _finish(self, run: Run, steps: Sequence[StepReport]) -> None:
        """Fine-tune after the last source: from the merge and, with the gate, from the weights without any source too."""
        config = self.config
        if not config.final_epochs or run.samples.train is None:
            return
        merged = [step for step in steps if step.changed]
        with run.step() as step:
            alone = run.scratch.base if config.compares_alone and merged else None
            final = step.finetune(config.final_epochs, config.seed, alone=alone, predictions=run.predictions)
            if final and run.samples.validation is not None:
                final = replace(final, after=run.labels.losses_on(run.samples.validation).evaluation())
        self.report.finetuned = run.labels.learned
        self.report.run.final = final
        if final is None:
            return
        if final.without_sources:
            for report in merged:
                report.undo(Reason.BETTER_ALONE)
        first, *rest = final.sentences()
        gain = final.against_alone()
        for sentence in (f"at the end: {first}", *rest, *([gain] if gain else [])):
            logger.info(wrap(sentence, "", "    "))

    @staticmethod
    def _log_step(number: str, step: StepReport) -> None:
        """Log one line for a source, its notes below it and, at the debug level, its details."""
        logger.info("%s%s", number, step.summary_line(WIDTH - len(number)))
        for note in step.notes:
            logger.info(wrap(note, "    ", "    "))
        for detail in step.details():
            logger.debug(wrap(detail, "    ", "    "))

    def merge_source(
        self,
        source: str | Mapping[str, Any],
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        unlabeled_dataset: Any = None,
        data_collator: Collator | None = None,
        token: str | None = None,
    ) -> StepReport:
        """Merge one source and fine-tune; arguments as for `merge`, without fine-tuning before the first source.

        Returns:
            What was measured, decided and changed; also the last entry of `report.steps`.

        Raises:
            GraspError: The source or the data cannot be merged, or a number is not finite; the model is as before the call.
        """
        (reference,) = self._references([source])
        with self.open_run(Samples(train_dataset, eval_dataset, unlabeled_dataset, collator=data_collator)) as run:
            with run.puller(token) as puller, puller.pull(reference) as located:
                return self._merge_located(run, located)

    def _merge_located(self, run: Run, located: Source) -> StepReport:
        began = time.perf_counter()
        check_units(self.model, self.config, self.report)
        seed = self.config.seed + len(self.report.steps) + 1
        name = StepReport(str(located.ref), located.sha, located.kind).name
        try:
            with ExitStack() as stack, run.step(sharded=isinstance(located, ShardedSource)) as step:
                weight = run.weights.get(str(located.ref), 1.0)
                transfer = step.transfer(partial(run.load, located), partial(self._average, weight), name, seed, stack)
                finetuned = step.finetune(self.config.finetune_epochs, seed)
                after = run.labels.losses()
                report = transfer.report(
                    located,
                    movable_tensors(self.model),
                    finetuned,
                    weight=weight,
                    after=after.evaluation() if after else {},
                    seconds=time.perf_counter() - began,
                    peak_memory=_peak_memory(),
                )
                self.report.run = self.report.run.after_source(run.describe_data())
                self._started = True
                self.report.steps.append(report)
            self.report.finetuned = run.labels.learned
        except BaseException as error:
            error.add_note(f"while merging source '{located.ref}'")
            raise
        return report

    def _average(self, weight: float, units: Sequence[Unit]) -> dict[str, float]:
        """Return how much of a source with this weight a mean of all sources so far takes, by unit."""
        before = dict.fromkeys((unit.name for unit in units), float(self.report.starts_from_source))
        for step in self.report.steps:
            for unit in step.units:
                if unit.decision == "moved" and unit.name in before:
                    before[unit.name] += step.weight
        return {name: weight / (weight + others) for name, others in before.items()}

    def rank(
        self,
        sources: Sequence[str | Mapping[str, Any]],
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        unlabeled_dataset: Any = None,
        data_collator: Collator | None = None,
        token: str | None = None,
    ) -> list[RankedSource]:
        """Order sources by their estimated gain for the model; nothing is changed or merged.

        The estimated gain of a source is the first-order estimate `-<g, S - T>` of how much the loss falls on the whole way
        from the target `T` to the source `S`. It needs one gradient `g` of the target, over `config.num_batches` batches,
        and reads each source once, without a pass through it. A gradient through an untrained head says little, so a model
        that has not been fine-tuned is fine-tuned for this, by `initial_epochs` or, if those are 0, `final_epochs`, and
        restored at the end. Sources that cannot be read or do not fit come last, with their problem.

        Args:
            sources: References of full models and PEFT adapters.
            train_dataset: Labelled samples of the target task.
            eval_dataset: Held-out samples, which validate the fine-tuning.
            unlabeled_dataset: Inputs without labels. The predictions of the sources on them teach the merged model. A language
                model is trained on them like on `train_dataset`.
            data_collator: Makes batches from samples; if left out, the one that `transformers.Trainer` would take.
            token: Hub token; if left out, the one that you are logged in with.

        Returns:
            One entry per source, the largest gain first.
        """
        references = self._references(sources)
        with self.open_run(Samples(train_dataset, eval_dataset, unlabeled_dataset, collator=data_collator)) as run:
            return rank_by_gain(run, references, finetuned=self.report.finetuned, token=token)

    def finetuned_alone(
        self,
        sources: int,
        dataset: Any,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        unlabeled_dataset: Any = None,
        data_collator: Collator | None = None,
    ) -> SampleLosses:
        """Return the losses on `dataset` of the present model, fine-tuned without any source; nothing is changed.

        Args:
            sources: Number of sources of the merge to compare with, which has as many epochs.
            dataset: Samples to evaluate on, as in `judge`.
            train_dataset: Labelled samples, as for `merge`.
            eval_dataset: Held-out samples, as for `merge`.
            unlabeled_dataset: Inputs without labels. The predictions of the sources on them teach the merged model. A language
                model is trained on them like on `train_dataset`.
            data_collator: Makes batches from samples, as for `merge`.
        """
        epochs, config = self.config.total_epochs(sources), self.config
        fixed = {"max_steps", "num_train_epochs"} & set(config.training_arguments)
        if fixed and config.finetunes_between:
            raise ConfigError(
                f"training_arguments.{fixed.pop()}: a merge that fine-tunes between its sources does so for each "
                "fine-tuning, and fine-tuning alone once; expected none, to compare the same number of steps: set "
                "initial_epochs, finetune_epochs and final_epochs"
            )
        samples = Samples(train_dataset, eval_dataset, unlabeled_dataset, collator=data_collator)
        with self.open_run(samples) as run, run.trial() as step:
            step.finetune(epochs, config.seed)
            return run.labels.losses_on(dataset)

    def control_merge(
        self, sources: Sequence[str], dataset: Any, config: GraspConfig, *, placebo: bool = False, **data: Any
    ) -> SampleLosses:
        """Return the losses on `dataset` of another merge from the present model; nothing is changed or recorded.

        Args:
            sources: References of the sources.
            dataset: Samples to evaluate on, as in `judge`.
            config: How to merge.
            placebo: Whether a placebo replaces each source: its changes become random ones of the same size.
            data: Keyword arguments of `merge`.
        """
        tensors = movable_tensors(self.model)
        with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as directory:
            before = MappedTensors(directory / "before", tensors).copy_(tensors)
            twin = self.with_config(config, placebo=Placebo(config.seed, before) if placebo else None)
            try:
                twin.merge(sources, **data)
                return twin.judge(dataset, data_collator=data.get("data_collator"))
            finally:
                overwrite_(movable_tensors(self.model), before)

    def judge(self, dataset: Any, *, data_collator: Collator | None = None) -> SampleLosses:
        """Return the losses of the present model on every sample of `dataset`; changes nothing."""
        check_dataset(dataset, "dataset")
        check_class_names(self.model, dataset, "dataset")
        collator = collator_for(self.model, self.config, self.processing_class, data_collator)
        with preserved_state(self.model):
            self.model.to(Accelerator().device)
            return evaluation_losses(self.model, dataset, collator, self.config.batch_size)

    def evaluate(self, dataset: Any, *, data_collator: Collator | None = None) -> Evaluation:
        """Return the mean `loss` over `dataset`, and the `accuracy` in [0, 1] of a classifier; changes nothing."""
        return self.judge(dataset, data_collator=data_collator).evaluation()

    @contextmanager
    def open_run(self, samples: Samples) -> Iterator[Run]:
        """Open a run of the present model on `samples`, for the verbs of this class and for the methods of a comparison."""
        with Run.open(
            self.model,
            self.config,
            samples,
            learned=self.report.finetuned,
            processing_class=self.processing_class,
            base_of=self._base_of,
            base_token=self._token,
            placebo=self._placebo,
            checked=self._checked,
        ) as run:
            yield run

    def _base_of(self, source: Source) -> Source | None:
        """Return the base model that an adapter must belong to; for a continued merge, the one that the merge started from."""
        return self._continued.base() if self._continued and source.kind == "adapter" else self.base

    @property
    def _record(self) -> MergeReport:
        return self._continued.record_to_save(self.report) if self._continued else self.report

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the model, its tokenizer or processor, the card, the resolved configuration and the report.

        The folder loads with `from_pretrained` of the model's class. An earlier merge in it is replaced.

        Raises:
            OutputExistsError: The folder holds something that is not a merge.
        """
        check_output(Path(save_directory))
        save_merge(Path(save_directory), self.model, self.processing_class, self._record)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str = "Upload model merged with grasp_hf",
        max_shard_size: int | str = "5GB",
    ) -> str:
        """Upload what `save_pretrained` writes to `repo_id`, as one commit, and return its URL, or that of the pull request.

        The disk holds one shard at a time. The uploaded files name local folders by their last part only. A commit on the
        main branch gets a version tag, `v1`, `v2` and so on. There a merge that continues a pushed one replaces only the
        version that it was made from.

        Args:
            repo_id: Repository `org/name`, created if there is none.
            private: Whether a new repository is private.
            token: Hub token; if left out, the one that you are logged in with.
            revision: Branch, created if there is none; the main branch if left out.
            create_pr: Whether to open a pull request instead of changing the branch.
            commit_message: First line of the commit.
            max_shard_size: Size of the largest weight file, in bytes or as text such as `"5GB"`.

        Raises:
            PushError: The token may not write there, someone else has changed the branch meanwhile, the Hub could not be
                reached, or the temporary directory has no space for a shard. The repository is as it was; another call
                continues where this one stopped.
        """

        def write(folder: Path, full_repo_id: str) -> Iterator[Path]:
            record = self._record.without_paths()
            save_record(folder, self.model, self.processing_class, record, model_id=full_repo_id)
            small = sorted(path for path in folder.rglob("*") if path.is_file())
            return chain(small, saved_shards(folder, self.model, max_shard_size))

        to = Destination(repo_id, revision, create_pr, private, token)
        pushed = push_merge(to, write, message=commit_message, earlier=self._pushed)
        self._pushed = pushed.version or self._pushed
        return pushed.url


def _peak_memory() -> int:
    """Return the largest memory of this process so far, in bytes; with a GPU, the memory of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
