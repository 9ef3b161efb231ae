"""The loop: for each source, pull, measure, transfer, fine-tune, record, free."""

import logging
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from .config.grasp import GraspConfig
from .data.digests import described
from .errors import ConfigError, GraspError, IncompatibleSourceError, PushError
from .files import interrupts_held, workspace
from .hub.download import locate
from .hub.pull import Puller, ShardedSource
from .hub.push import Destination, create_repo, push_files, tag_version
from .hub.reference import Source, SourceRef
from .merging.ranking import RankedSource, judge_sources, rank_sources, ranking_table
from .merging.step import Step
from .models.batches import Collator, check_dataset, keeping_model_columns
from .models.gradients import checkpointing, mean_gradient, preserved_state
from .models.processors import load_processing_class
from .models.target import load_target
from .record.card import declared_license
from .record.earlier import Continuation
from .record.entries import Evaluation
from .record.report import MergeReport, StepReport
from .record.saving import check_output, read_record, save_merge, save_record, saved_shards
from .sources.load import LoadedSource, load_source
from .tensors.placing import overwrite_, placed
from .tensors.scratch import Scratch
from .tensors.units import Unit, movable_tensors, partition
from .validation.losses import Judgement, losses_of

logger = logging.getLogger(__name__)

REFUSED_ARGUMENTS = {
    "device_map": "Accelerate chooses the device of each step",
    "trust_remote_code": "name the models whose code may run in GraspConfig(trust_remote_code=[...])",
    "cache_dir": "set HF_HOME or HF_HUB_CACHE",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "force_download": "a file whose checksum is wrong is downloaded again anyway",
    "ignore_mismatched_sizes": "a head of another size is drawn anyway, and anything else is an error",
}
PACKAGES = ("grasp_hf", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def merge_pretrained(
    base_model: str | None,
    sources: Sequence[str],
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    data_collator: Collator | None = None,
    config: GraspConfig | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Merge `sources` into `base_model`, one at a time, guided by gradients of `train_dataset`.

    Args:
        base_model: Hub id (`org/name`, `org/name@revision`) or folder; `None` starts from the first source.
        sources: References of full models and PEFT adapters of the base model; `config.order` says in which order they go.
        train_dataset: Labelled samples of the task in hand, as for `transformers.Trainer`.
        eval_dataset: Held-out samples; they judge each transfer and choose the best epoch.
        data_collator: Makes batches from samples, as for `transformers.Trainer`.
        config: How to merge; the defaults where left out.
        from_pretrained_kwargs: As for `GraspMerger.from_pretrained`.

    Returns:
        The merged model.

    Example:
        >>> model = merge_pretrained("org/base", ["org/a", "org/lora-b@v1.0"], train_dataset=train)  # doctest: +SKIP
    """
    starts_from_source = base_model is None
    if base_model is None:
        if not sources:
            raise ConfigError("there is nothing to merge: expected a base model or at least one source")
        base_model, sources = sources[0], sources[1:]
    merger = GraspMerger.from_pretrained(base_model, config=config, **from_pretrained_kwargs)
    if not merger.report.continues:
        merger.report.starts_from_source = starts_from_source
    token = from_pretrained_kwargs.get("token")
    merger.merge(
        sources, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=data_collator, token=token
    )
    return merger.model


class GraspMerger:
    """Merges sources into one model, one at a time; at no moment are two sources in memory.

    Args:
        model: The target; changed in place. Frozen parameters are measured and merged like the others; they only stay out
            of fine-tuning.
        config: How to merge; the defaults where left out.
        processing_class: Tokenizer or image processor, saved beside the model.
        base: Where the model came from, so that adapters of it can be merged; `from_pretrained` sets it.

    Attributes:
        model: The target, a plain `PreTrainedModel`.
        report: The record of all that was merged so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GraspConfig | None = None,
        *,
        processing_class: Any = None,
        base: Source | None = None,
    ) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                f"got a {type(model).__name__}, expected a PreTrainedModel; merge a PeftModel first, with "
                "merge_and_unload(), and compile a model in place, with model.compile()"
            )
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ConfigError(
                "the model is spread over several devices by a device_map; load it without one: Accelerate chooses the "
                "device of each step"
            )
        _check_config(config)
        self.model = model
        self.config = config or GraspConfig()
        self.processing_class = processing_class
        self.base = base
        self.report = MergeReport(
            base=str(base.ref) if base else model.name_or_path or type(model).__name__,
            base_sha=base.sha if base else None,
            base_license=declared_license(base.folder) if base else None,
            base_gated=base.gated if base else False,
            config=asdict(self.config),
            versions={name: version(name) for name in PACKAGES},
        )
        self._started = False
        self._continued: Continuation | None = None
        self._published: tuple[str, str] | None = None  # the repository and commit that the model is of
        self._descriptions: list[tuple[Any, dict[str, Any] | None]] = []  # of data sets, while scratch files are kept
        self._scratch: Scratch | None = None
        self._token: str | None = None  # that the base was loaded with
        self._checked: tuple[Any, Any] = None, None  # the data sets that made a finite loss
        if self._accelerator.num_processes > 1:
            raise GraspError("grasp_hf runs in one process for now; start it without a launcher")

    @property
    def _accelerator(self) -> Accelerator:
        # Made anew for each use: TrainingArguments resets the state that all Accelerators share.
        return Accelerator()

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
    ) -> "GraspMerger":
        """Load the target, and the tokenizer or processor beside it.

        A merge that this package saved or pushed is continued: sources are appended to it, and its record grows. Earlier
        sources are not needed for that.

        Args:
            model_id: Hub id, with `@revision` if wanted, or a folder.
            config: How to merge.
            task: Pipeline name such as `text-classification`; left out, the architecture in the model's config says.
            revision: Branch, tag or commit, unless `model_id` names one.
            subfolder: Folder in the repository, unless `model_id` names one.
            token: Hub token; left out, the one that you are logged in with.
            dtype: Of the target's weights; `"auto"` is that of its files. Sources are read in their own; fine-tuning and a
                mean of many sources want float32.
            new_head: Draw the head anew although the files hold one that fits, because the labels mean something else.
            model_kwargs: Passed on to the model class, such as `num_labels` or `id2label`.

        Raises:
            SourceNotFoundError: No such folder, repository, revision or weights.
            IncompatibleSourceError: Not a model that can solve the task.
        """
        if not isinstance(model_id, str | Path):
            raise ConfigError(
                f"got a {type(model_id).__name__}, expected a Hub id or a folder; GraspMerger(model) takes a model"
            )
        _check_config(config)
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
        needs_head = not (config or GraspConfig()).needs_data
        model = load_target(
            base, task=task, dtype=dtype, seed=seed, new_head=new_head, needs_head=needs_head, **model_kwargs
        )
        merger = cls(model, config, processing_class=load_processing_class(base), base=base)
        merger._token = token
        if not new_head and (record := read_record(base.folder)):
            merger._continued = Continuation(record, base, token)
            merger._published = merger._continued.published
            merger.report = merger._continued.begun(merger.report)
            merger._started = True
        return merger

    def with_config(self, config: GraspConfig, *, anew: bool = False) -> "GraspMerger":
        """Return a merger of the same model that merges as `config` says.

        It goes on where this one is: an average counts the sources so far. With `anew` the model counts as a base.
        """
        twin = copy(self)
        twin.config, twin.report = config, replace(deepcopy(self.report), config=asdict(config))
        if anew:
            twin._started = False
            twin.report = replace(
                twin.report,
                start={},
                starts_from_source=False,
                finetuned=False,
                ranking=[],
                final=None,
                control=None,
                test={},
                steps=[],
                continued_steps=0,
            )
        return twin

    def merge(
        self,
        sources: Iterable[str],
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Collator | None = None,
        token: str | None = None,
    ) -> MergeReport:
        """Merge `sources` one at a time, and fine-tune as the configuration says: before, after each, at the end.

        Every source is a step that either succeeds or leaves the model as it was before it; steps done before an
        error stay done, in `model` and in `report`. During a step the temporary directory (`TMPDIR`) holds the weights
        as they were before it, and those of fine-tuning.

        Args:
            sources: References of full models and PEFT adapters.
            train_dataset: Labelled samples of the task in hand, as for `transformers.Trainer`; only an average in the
                given order and without fine-tuning can do without.
            eval_dataset: Held-out samples; they judge each transfer and each fine-tuning. So do the labels a transfer, as
                long as the model was not fine-tuned on them, and without `eval_dataset` the first fine-tuning.
            data_collator: Makes batches from samples; left out, the one that `transformers.Trainer` would take.
            token: Hub token; left out, the one that you are logged in with.

        Raises:
            GraspError: With the number and name of the source that it happened at.
        """
        sources = sources if isinstance(sources, str) else [*sources]
        self._check_merge(sources, train_dataset, eval_dataset)
        sources, config, earlier = [str(source) for source in sources], self.config, len(self.report.steps)
        arguments = {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": data_collator}
        with self.scratch_files():
            with self.step(**arguments) as step:
                step.check_finetuning(config.total_epochs(len(sources)))
                if not self._started:
                    step.finetune(config.initial_epochs, config.seed)
                    if before := step.judge():
                        self.report.start = before.evaluation()
            self._started = True
            if sources:
                self.report.ranking = []
                if config.order != "given" and len(sources) > 1:
                    sources = self._ordered(sources, token, **arguments)
            commits = {row["reference"]: row["sha"] for row in self.report.ranking if row["sha"]}
            with self.puller(token, train_dataset, eval_dataset, commits=commits) as puller:
                for number, source in enumerate(sources, start=1):
                    try:
                        with puller.pull(source, *sources[number : number + 1]) as located:
                            merged = self._merge_located(located, **arguments)
                    except GraspError as error:
                        message = f"while merging source {number}/{len(sources)} '{source}': {error}"
                        raise error.reworded(message) from error
                    logger.info("%d/%d %s", number, len(sources), merged.line())
            if sources and config.final_epochs and train_dataset is not None:
                taken = [step for step in self.report.steps[earlier:] if step.changed]
                with self.step(**arguments) as step:
                    alone = step.scratch.base if config.compares_alone and taken else None
                    final = step.finetune(config.final_epochs, config.seed, alone=alone)
                    if final and eval_dataset is not None:
                        final.after = step.judgement(eval_dataset).evaluation()
                self.report.final = final  # nothing can take the weights back any more
                if final:
                    for merged in taken if final.without_sources else []:
                        merged.undo("fine-tuning without any source is better")
                    logger.info("at the end: %s", final.line())
        return self.report

    def _check_merge(self, sources: Sequence[str], train_dataset: Any, eval_dataset: Any) -> None:
        """Raise where a merge makes no sense, and warn where it is worth less than it seems."""
        config = self.config
        if isinstance(sources, str):
            raise ConfigError(f"sources: got '{sources}', expected a list of references")
        for source in sources:
            if not isinstance(source, str | Path):
                raise ConfigError(
                    f"sources: got a {type(source).__name__}, expected references: Hub ids, or folders of saved models"
                )
        for name, off in {"eval_strategy": "no", "eval_on_start": False}.items():
            if eval_dataset is None and config.training_arguments.get(name, off) != off:
                raise ConfigError(f"training_arguments.{name}: expected none without evaluation data")
        if not sources:
            return
        self._check_units()
        learns_first = self.report.finetuned or config.finetunes_between
        if eval_dataset is None and train_dataset is not None and config.gate and learns_first:
            logger.warning(
                "no evaluation data, and the model is fine-tuned on labels before they could judge a source: neither "
                "transfers nor what it is fine-tuned later are judged"
            )
        if len(sources) > 1 and config.method != "copy" and self.model.dtype in (torch.float16, torch.bfloat16):
            logger.warning(
                "the target is in %s, which rounds the mean after every source, so that later ones lose weight; load it "
                "in float32 (the default), and convert the merged model",
                str(self.model.dtype).removeprefix("torch."),
            )

    def finetuned_alone(
        self,
        sources: int,
        dataset: Any,
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        data_collator: Collator | None = None,
    ) -> Judgement:
        """Return the losses on `dataset` of the model as it is now, fine-tuned without any source; nothing is changed.

        Args:
            sources: As many epochs as a merge of this number of sources has.
            dataset: Samples to judge by, as in `judge`.
            train_dataset: As for `merge`, as the next two.
            eval_dataset: See `merge`.
            data_collator: See `merge`.
        """
        epochs, config = self.config.total_epochs(sources), self.config
        fixed = {"max_steps", "num_train_epochs"} & set(config.training_arguments)
        if fixed and config.finetunes_between:
            raise ConfigError(
                f"training_arguments.{fixed.pop()}: a merge that fine-tunes between its sources does so for each "
                "fine-tuning, and fine-tuning alone once; expected none, to compare the same number of steps: set "
                "initial_epochs, finetune_epochs and final_epochs"
            )
        with self._tried(train_dataset, eval_dataset, data_collator) as step:
            step.finetune(epochs, self.config.seed)
            return step.judgement(dataset)

    def judge(self, dataset: Any, *, data_collator: Collator | None = None) -> Judgement:
        """Return the losses of the model as it is now on every sample of `dataset`; changes nothing."""
        check_dataset(dataset, "dataset")
        with preserved_state(self.model):
            self.model.to(self._accelerator.device)
            return losses_of(self.model, dataset, self.collator(data_collator), self.config.batch_size)

    def _ordered(
        self,
        sources: Sequence[str],
        token: str | None,
        train_dataset: Any,
        eval_dataset: Any,
        data_collator: Collator | None,
    ) -> list[str]:
        """Judge the sources, record the ranking, and return those to merge, the best or most promising first."""
        if self.config.order == "rank":
            by = "first-order gain"
            ranked = self.rank(
                sources,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                data_collator=data_collator,
                token=token,
            )
        else:
            by = "loss"
            with self.step(train_dataset, eval_dataset, data_collator) as step:
                tensors, start = movable_tensors(self.model), step.scratch.start

                def judged(located: Source) -> Judgement:
                    with placed(tensors, self.load(located, step.scratch).tensors, start):
                        return step.judge_source()

                with self.puller(token) as puller:
                    ranked = judge_sources(sources, puller, judged)
        if problems := [row.problem for row in ranked if row.problem]:
            kinds = {row.error for row in ranked if row.problem}
            error = kinds.pop() if len(kinds) == 1 else IncompatibleSourceError
            raise error("nothing was merged, for these sources cannot be", problems=problems)
        self.report.ranking = [row.summary() for row in ranked]
        logger.info("ranked by %s:\n%s", by, ranking_table(ranked))
        return [row.reference for row in ranked[: self.config.top]]

    def rank(
        self,
        sources: Sequence[str],
        *,
        train_dataset: Any,
        eval_dataset: Any = None,
        data_collator: Collator | None = None,
        token: str | None = None,
    ) -> list[RankedSource]:
        """Order sources by what they promise to the model; nothing is changed or merged.

        One gradient of the model, over `config.num_batches` batches, is kept in a file. What a source promises is the
        first-order estimate of how much the loss falls on the whole way to it, the gain `-<g, S - T>`: it needs only the
        source's bytes, no pass through it. A gradient through an untrained head says little, so a model that has not
        been fine-tuned is for that, by `initial_epochs` or else `final_epochs`, and put back in the end. Sources that
        cannot be read or do not fit come last, with their problem.

        Args:
            sources: References of full models and PEFT adapters.
            train_dataset: Labelled samples of the task in hand.
            eval_dataset: Held-out samples, which judge the fine-tuning.
            data_collator: Makes batches from samples; left out, the one that `transformers.Trainer` would take.
            token: Hub token; left out, the one that you are logged in with.

        Returns:
            One entry per source, the largest gain first.
        """
        config = self.config
        with self._tried(train_dataset, eval_dataset, data_collator) as step:
            if not self.report.finetuned:
                step.finetune(config.initial_epochs or config.final_epochs, config.seed)
            batches, scratch = step.batches(train_dataset, config.seed), step.scratch
            self.model.eval()
            found, _ = mean_gradient(self.model, batches, scratch.gradients)
            gradient = {name: scratch.gradients[name] for name in found}
            units = partition(self.model, config.unit)
            tensors = movable_tensors(self.model.cpu())

            def load(located: Source) -> LoadedSource:
                return self.load(located, scratch, check_finite=False)  # its products say so

            with self.puller(token) as puller:
                return rank_sources([str(source) for source in sources], puller, load, gradient, tensors, units)

    @contextmanager
    def _tried(self, train_dataset: Any, eval_dataset: Any, data_collator: Collator | None) -> Iterator[Step]:
        """Let the block fine-tune the model, and put everything back."""
        check_dataset(train_dataset, "train_dataset")
        with self.scratch_files(), self.step(train_dataset, eval_dataset, data_collator) as step:
            yield step
            overwrite_(movable_tensors(self.model), step.scratch.start)
            step.scratch.judged, step.learned = None, self.report.finetuned
            step.scratch.make_room()

    def puller(self, token: str | None, *datasets: Any, commits: Mapping[str, str] | None = None) -> Puller:
        """Return what brings sources; for a merge with `datasets`, in shards where each weight is read only once.

        `commits` are those that some of the sources were judged at.
        """
        undo_bytes = None
        if datasets and self.config.method == "average":  # with data, every step keeps what it takes to undo it
            kept = any(dataset is not None for dataset in datasets)
            undo_bytes = 0 if kept else sum(tensor.nbytes for tensor in movable_tensors(self.model).values())
        prefetch, trusted = self.config.prefetch, self.config.trust_remote_code
        return Puller(token=token, prefetch=prefetch, trusted=trusted, undo_bytes=undo_bytes, commits=commits)

    def load(self, located: Source, scratch: Scratch, *, check_finite: bool = True) -> LoadedSource:
        """Read a source as the model would hold it."""
        return load_source(
            located,
            self.model,
            base=self._continued.base() if self._continued and located.kind == "adapter" else self.base,
            directory=scratch.source_folder(),
            processing_class=self.processing_class,
            accepted_bases=self.config.accepted_bases,
            check_finite=check_finite,
            token=self._token,
        )

    def merge_source(
        self,
        source: str,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Collator | None = None,
        token: str | None = None,
    ) -> StepReport:
        """Merge one source and fine-tune; arguments as for `merge`, without fine-tuning before the first.

        Returns:
            What was measured, decided and changed; also the last entry of `report.steps`.

        Raises:
            GraspError: The source, the data or the numbers are not fit; the model is as it was before the call.
        """
        with self.puller(token, train_dataset, eval_dataset) as puller, puller.pull(str(source)) as located:
            return self._merge_located(
                located, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=data_collator
            )

    def _merge_located(
        self, located: Source, *, train_dataset: Any, eval_dataset: Any, data_collator: Collator | None
    ) -> StepReport:
        began = time.perf_counter()
        self._check_units()
        seed = self.config.seed + len(self.report.steps) + 1
        sharded = isinstance(located, ShardedSource)
        try:
            with (
                ExitStack() as held,
                self.scratch_files(),
                self.step(train_dataset, eval_dataset, data_collator, sharded) as step,
            ):
                report = StepReport(str(located.ref), located.sha, located.kind, num_bytes=located.num_bytes)
                report.license, report.gated = declared_license(located.folder), located.gated
                step.transfer(lambda: self.load(located, step.scratch), self._shares, report, seed, held)
                report.finetuned = step.finetune(self.config.finetune_epochs, seed)
                if after := step.judge():
                    report.after = after.evaluation()
                report.seconds = time.perf_counter() - began
                report.peak_memory = _peak_memory()
                self.report.data = {"train": self._described(train_dataset), "eval": self._described(eval_dataset)}
                self._started = True
                self.report.final = self.report.control = None  # those of an earlier run
                self.report.test = {}
                self.report.steps.append(report)
        except BaseException as error:
            error.add_note(f"while merging source '{located.ref}'")
            raise
        return report

    def _described(self, dataset: Any) -> dict[str, Any] | None:
        """Return what the record says of a data set; it is read once, and not again for every source."""
        for known, description in self._descriptions:
            if known is dataset:
                return description
        self._descriptions.append((dataset, described(dataset)))
        return self._descriptions[-1][1]

    def _check_units(self) -> None:
        """Raise where sources so far were counted by other units than those to come will be."""
        if self.config.method == "copy":  # which counts none
            return
        names = {unit.name for unit in partition(self.model, self.config.unit)}
        for step in self.report.steps:
            if other := [unit.name for unit in step.units if unit.name not in names]:
                raise ConfigError(
                    f"unit: got '{self.config.unit}', but source '{step.source}' was merged by other units, such as "
                    f"'{other[0]}'; expected the same, to know how much of each there is: the record of the earlier merge "
                    "(grasp_config.yaml) says which"
                )

    def _shares(self, units: Sequence[Unit]) -> dict[str, float]:
        """Return how much of a source an average of all sources so far takes, by unit."""
        averaged = Counter(u.name for step in self.report.steps for u in step.units if u.decision == "moved")
        before = int(self.report.starts_from_source)
        return {u.name: 1 / (before + averaged[u.name] + 1) for u in units}

    @contextmanager
    def scratch_files(self) -> Iterator[None]:
        """Keep the scratch files of all steps inside the block in one temporary directory."""
        if self._scratch is not None:
            yield
            return
        with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as directory:
            self._scratch = Scratch(directory, movable_tensors(self.model))
            if self.config.learns or self.config.compares_alone:
                self._scratch.base.copy_(movable_tensors(self.model))
            try:
                yield
            finally:
                self._scratch = None
                self._descriptions.clear()

    @contextmanager
    def step(
        self, train_dataset: Any, eval_dataset: Any, data_collator: Collator | None, sharded: bool = False
    ) -> Iterator[Step]:
        """Check the data, bring the model to the accelerator, and put everything back if the block raises.

        It must lie inside of `scratch_files`.
        """
        if train_dataset is not None or self.config.needs_data:
            check_dataset(train_dataset, "train_dataset")
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset")
        asked = self.config.training_arguments
        checkpoints = bool(asked.get("gradient_checkpointing") or asked.get("activation_checkpointing"))
        assert self._scratch is not None
        step = Step(
            self.model,
            self.config,
            train_dataset,
            eval_dataset,
            self.collator(data_collator),
            self._scratch,
            learned=self.report.finetuned,
            sharded=sharded,
        )
        with preserved_state(self.model), checkpointing(self.model, checkpoints):
            self.model.to(self._accelerator.device)
            if not step.can_fail:
                yield step
                return
            step.scratch.start.copy_(movable_tensors(self.model))
            try:
                for name, dataset in {"train_dataset": train_dataset, "eval_dataset": eval_dataset}.items():
                    if dataset is not None and not any(dataset is known for known in self._checked):
                        step.check_loss(dataset, name)
                self._checked = train_dataset, eval_dataset
                yield step
            except BaseException as error:
                with interrupts_held():  # a second one, of somebody who cannot wait
                    overwrite_(movable_tensors(self.model), step.scratch.start)
                step.scratch.judged = None
                # A caught exception would keep the source, or the optimizer, alive through the frames that it names.
                traceback.clear_frames(error.__traceback__)
                raise
        self.report.finetuned = step.learned

    def collator(self, data_collator: Collator | None = None) -> Collator:
        """Return what makes batches that the model takes."""
        if data_collator is None and isinstance(self.processing_class, PreTrainedTokenizerBase):
            data_collator = DataCollatorWithPadding(self.processing_class)
        if data_collator is not None and self.config.training_arguments.get("remove_unused_columns") is False:
            return data_collator
        return keeping_model_columns(self.model, data_collator)

    def evaluate(self, dataset: Any, *, data_collator: Collator | None = None) -> Evaluation:
        """Return the mean `loss` over `dataset`, and the `accuracy` in [0, 1] of a classifier; changes nothing."""
        return self.judge(dataset, data_collator=data_collator).evaluation()

    @property
    def _record(self) -> MergeReport:
        return self._continued.saved(self.report) if self._continued else self.report

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

        The disk holds one shard at a time. What is uploaded names local folders by their last part only. A commit on the
        main branch gets a version tag, `v1`, `v2` and so on. There a merge that continues a published one replaces only
        the version that it was made from.

        Raises:
            PushError: The token may not write there, the branch was changed by someone else meanwhile, the Hub could not be
                reached, or the temporary directory has no room for a shard; the repository is as it was. Calling it again
                goes on where it stopped.
        """
        to = Destination(repo_id, revision, create_pr, private, token)
        to = replace(to, repo_id=create_repo(to))
        on_main = not create_pr and revision in (None, "main")
        known = self._published[1] if on_main and self._published and self._published[0] == to.repo_id else None
        with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as directory:
            folder = directory / "push"
            try:
                save_record(
                    folder, self.model, self.processing_class, self._record.without_paths(), model_id=to.repo_id
                )
                files = chain(_files_in(folder), saved_shards(folder, self.model, max_shard_size))
                commit = push_files(to, folder, files, message=commit_message, continues=known)
            except (OSError, SafetensorError) as error:
                if isinstance(error, GraspError):
                    raise
                raise PushError(
                    f"'{to.repo_id}': what is to be uploaded could not be written to '{directory.parent}': {error}; free "
                    "some space there, set TMPDIR to another folder or lower max_shard_size, and push again"
                ) from error
        if on_main:
            self._published = to.repo_id, commit.oid
            tag_version(to, commit.oid)
        return str(commit.pr_url or commit.commit_url)


def _check_config(config: Any) -> None:
    """Raise `ConfigError` where it is something else than a configuration, or none."""
    if config is not None and not isinstance(config, GraspConfig):
        raise ConfigError(f"config: got a {type(config).__name__}, expected a GraspConfig: GraspConfig(**…)")


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _peak_memory() -> int:
    """Return the largest memory that this process has held so far, in bytes: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
