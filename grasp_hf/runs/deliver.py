"""Runs a merge, and saves and pushes the result; after any error the merged model is kept."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..data.samples import Samples
from ..errors import ConfigError, GraspError, OutputExistsError, PushError, StaleMergeError
from ..files import interrupts_held
from ..hub.push import check_repo_id
from ..merger import GraspMerger
from ..merging.state import CONTROLS, RunState
from ..record.entries import ALONE, BEST_SOURCE, PLACEBO, ControlReport
from ..record.saving import PARTIAL, check_output
from ..validation.changes import paired_change
from ..validation.losses import SampleLosses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Delivery:
    """The destination of a merge.

    Attributes:
        output: Folder for the merged model; `None` does not save it.
        repo_id: Repository on the Hub; `None` does not push it.
        private: Whether a new repository is private.
        create_pr: Whether to open a pull request instead of changing the branch.
        fresh: Whether to discard the state of an interrupted merge, and begin anew.
    """

    output: Path | None = None
    repo_id: str | None = None
    private: bool = False
    create_pr: bool = False
    fresh: bool = False

    @property
    def state_folder(self) -> Path:
        """Folder for the state of the merge: beside the output or, where nothing can be written there, in it."""
        if self.output is None:
            return Path(f"{(self.repo_id or '').rpartition('/')[2]}.partial").absolute()
        output = self.output.expanduser().resolve()
        nearest = next(path for path in output.parents if path.exists())
        mounted = output.exists() and output.is_mount()
        if os.access(nearest, os.W_OK) and not mounted:
            return output.with_name(f"{output.name}.partial")
        return output / PARTIAL

    @contextmanager
    def checked(self) -> Iterator[RunState]:
        """Check folder and repository name, and yield the state of the merge, locked for this process.

        Raises:
            OutputExistsError: The folder holds something that is not a merge, or cannot be written.
            PushError: The Hub allows no repository of this name.
            StateError: Another process merges into the folder, or the state is damaged.
        """
        if self.repo_id:
            check_repo_id(self.repo_id)
        if self.output:
            check_output(self.output)
        with RunState.open(self.state_folder, fresh=self.fresh) as state:
            yield state


def merge_sources(
    merger: GraspMerger, sources: Sequence[str], data: Samples, to: Delivery, state: RunState, *, control: bool = False
) -> None:
    """Merge `sources`, evaluate the result on the test split, and save and push it to its destination.

    If the merge stops early, its state stays, so that the same merge goes on there. After an error, the result of the
    sources merged so far is saved too, unless the output holds an earlier merge.

    Args:
        merger: The target; changed in place.
        sources: References of the sources.
        data: The samples; without a test split the result is not evaluated.
        to: The destination.
        state: The state of the merge, from `to.checked()`.
        control: Whether to also fine-tune the start without any source, fine-tune the best source alone, and merge placebo
            sources, and to record how much better the merge is.

    Raises:
        ConfigError: `control` lacks samples or epochs of fine-tuning.
        OutputExistsError: The output folder could not be written, so the merged model is in another folder.
        PushError: The merged model could not be pushed.
    """
    before = len(merger.report.steps)
    replaces = to.output is not None and to.output.exists() and any(to.output.iterdir())
    merger.check_state(state, sources, data)
    try:
        controls = _run_controls(merger, sources, data, state) if control else {}
        merger.merge(sources, test_dataset=data.test, resume_from=state, **data.keywords())
        if controls:
            samples, name = _control_samples(data)
            merged = merger.judge(samples, data_collator=data.collator)
            for title, losses in controls.items():
                gain = paired_change(losses, merged, calibrated=False).report()  # the models as users load them
                evaluations = losses.evaluation(), merged.evaluation()
                merger.record_end(control=ControlReport(name, *evaluations, gain, title))
        logger.info("\n%s\n", merger.report)
    except BaseException as error:
        done, planned = len(merger.report.steps) - before, merger.report.run.planned or sources
        if done and isinstance(error, Exception) and not replaces and (kept := _save(merger, to)):
            logger.info("saved the merge so far, %d of %d sources: %s", done, len(planned), kept)
        if state.names():
            logger.info(
                "what was done is kept in '%s': the same command goes on after %d of %d sources",
                state.folder,
                done,
                len(planned),
            )
        raise
    kept = _save(merger, to) if to.output else None
    if kept:
        logger.info("saved: %s", kept)
    try:
        if to.repo_id:
            push(merger, to, kept)
    except PushError:  # its message names the folder, from which `push` goes on
        state.complete()
        raise
    state.complete()
    if kept != to.output:
        where = f"it is in '{kept}'" if kept else "it could not be saved"
        raise OutputExistsError(f"the merged model is not in '{to.output}'; {where}, see the errors above")


def push(merger: GraspMerger, to: Delivery, kept: Path | None) -> None:
    """Push the merge; if that fails, keep it in a folder.

    Args:
        merger: Holds the merge.
        to: The destination.
        kept: Folder that already holds the merge; `None` saves it to a new folder in the working directory if the push
            fails.

    Raises:
        PushError: The merge could not be pushed; the message names the folder that holds it.
    """
    assert to.repo_id is not None
    try:
        url = merger.push_to_hub(to.repo_id, private=to.private or None, create_pr=to.create_pr)
    except BaseException as error:
        kept = kept or _save(merger, to)
        where = "the merged model could not be saved either"
        if kept:
            where = f"the merged model is in the folder '{kept}'"
            if not isinstance(error, StaleMergeError):
                where += f"; push it again with `grasp-hf push {kept} {to.repo_id}`"
        if isinstance(error, PushError):
            raise error.reworded(f"{error}; {where}") from error
        logger.info("not pushed; %s", where)
        raise
    logger.info("pushed: %s", url)


def _save(merger: GraspMerger, to: Delivery) -> Path | None:
    """Save the merge in the output folder or else in a new one; return that folder, or `None` if both fail."""
    name = to.output.name if to.output else f"{(to.repo_id or '').rpartition('/')[2]}-not-pushed"
    new = _unused_path(name)
    for folder in (to.output, new) if to.output else (new,):
        try:
            with interrupts_held():
                merger.save_pretrained(folder)
            return folder
        except (GraspError, OSError, SafetensorError) as error:
            logger.error("the merged model could not be saved in '%s': %s", folder, error)
    return None


def _unused_path(name: str) -> Path:
    """Return the first path in the working directory that does not exist, of `name`, `name-2`, `name-3` and so on."""
    path = Path(name)
    for number in count(2):
        if not path.exists():
            break
        path = Path(f"{name}-{number}")
    return path


def _control_samples(data: Samples) -> tuple[Any, str]:
    """Return the samples on which a merge is compared with fine-tuning alone, and their name for the report."""
    return (data.test, "test data") if data.test is not None else (data.validation, "evaluation data")


def _run_controls(
    merger: GraspMerger, sources: Sequence[str], data: Samples, state: RunState
) -> dict[str, SampleLosses]:
    """Return the losses of each control on the samples of `_control_samples`; the model comes back unchanged.

    The state keeps them, so that an interrupted merge does not repeat them.
    """
    samples, _ = _control_samples(data)
    if samples is None or data.train is None:
        raise ConfigError(
            "--control: expected data with the splits 'train' and 'test' (or 'validation'), on which it compares; add "
            "the missing split"
        )
    config, found = merger.config, read_losses(state)
    if not config.total_epochs(len(sources)):
        raise ConfigError("--control: expected epochs of fine-tuning, got none; set final_epochs")

    def run(title: str, measure: Callable[[], SampleLosses]) -> None:
        if title not in found:
            logger.info("control: %s", title.rstrip(","))
            found[title] = measure()
            save_losses(state, found)

    keywords = data.keywords()
    run(ALONE, lambda: merger.finetuned_alone(len(sources), samples, **keywords))
    if config.published:
        return found  # its first source is the start, and it weighs no source
    best = replace(config, method="average", order="loss", top=1)
    run(BEST_SOURCE, lambda: merger.control_merge(sources, samples, best, **keywords))
    run(PLACEBO, lambda: merger.control_merge(sources, samples, config, placebo=True, **keywords))
    return found


def save_losses(state: RunState, found: Mapping[str, SampleLosses]) -> None:
    """Save the losses of controls in the state."""
    parts = {"losses", "terms", "calibrated", "correct"}
    tensors = {
        f"{title} {part}": value
        for title, losses in found.items()
        for part, value in vars(losses).items()
        if part in parts and value is not None
    }
    state.save(CONTROLS, [*found], tensors)


def read_losses(state: RunState) -> dict[str, SampleLosses]:
    """Return the losses of the controls in the state."""
    titles = state.values(CONTROLS) or []
    tensors = dict(state.tensors(CONTROLS)) if titles else {}
    return {
        title: SampleLosses(
            tensors[f"{title} losses"],
            tensors[f"{title} terms"],
            tensors[f"{title} calibrated"],
            tensors.get(f"{title} correct"),
        )
        for title in titles
    }
