"""Estimates of the download, the disk and the memory that a merge needs."""

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from ..config.grasp import GraspConfig
from ..config.methods import METHODS
from ..record.text import format_size
from .planned import PlannedSource

DOWNLOAD_RATE = 50e6  # bytes per second, assumed


@dataclass(frozen=True)
class Costs:
    """What a merge needs, in bytes; upper bounds.

    Attributes:
        download: Bytes to download.
        ordering: Those of them that only serve to compare the sources.
        cache: Disk for the base model, in the user's Hugging Face cache.
        models: Disk for the sources that are there at one time, beside the output.
        state: Disk for the state of the merge and for its result, beside the output.
        temporary: Disk for temporary files, in `TMPDIR`.
        memory: Memory without activations.
        memory_of: What the memory is for.
    """

    download: int
    ordering: int
    cache: int
    models: int
    state: int
    temporary: int
    memory: float
    memory_of: str


def estimate(rows: list[PlannedSource], config: GraspConfig) -> Costs:
    """Return what a merge needs.

    The factors of memory are those that `python -m tests.benchmarks.memory` measures; they do not include activations.

    Args:
        rows: The base, and then the sources.
        config: Configuration of the merge.
    """
    base, sources = rows[0], rows[1:]
    weights = 4 * (base.parameters or base.num_bytes // 4)  # bytes, because the target is float32
    largest = sorted((row.bytes_to_download for row in sources), reverse=True)
    weighs = METHODS[config.method].weighs
    ordering = sum(largest) if config.order != "given" or weighs else 0
    if config.order == "rank" and weighs:
        ordering += sum(largest[: config.top])  # after the estimated gains of all, the predictions of those to merge
    ordering = ordering if len(sources) > 1 else 0
    # An adapter's weights are merged in a file in float32; a half-precision base is compared with a second such file.
    adapters = int(any(row.kind == "adapter" for row in sources))
    adapters *= 1 + (config.check and bool({"bfloat16", "float16"} & set(base.dtypes)))
    temporary = weights * (_temporary_copies(config, adapters) if config.needs_data else adapters)
    factor, how = _memory_factor(config)
    memory = factor * weights
    if config.adapts:
        # The base in its own type, and every adapter in float32. Files hold the next source and one of training.
        weights = sum(4 * (row.parameters or row.num_bytes // 4) for row in sources)
        memory, how = (
            base.num_bytes + weights,
            "the base as it is, and the adapters; more for the training of an adapter",
        )
        temporary = max((2 * row.num_bytes for row in sources), default=0)
    return Costs(
        download=base.bytes_to_download + ordering + sum(largest[: config.top]),
        ordering=ordering,
        cache=base.bytes_to_download,
        models=sum(largest[: 2 if config.prefetch else 1]),
        state=weights * (2 + _state_copies(config)),
        temporary=temporary,
        memory=memory,
        memory_of=how,
    )


def cost_lines(rows: list[PlannedSource], config: GraspConfig) -> list[str]:
    """Return lines with estimates of the download, the disk and the memory of a merge; arguments as for `estimate`."""
    costs = estimate(rows, config)
    seconds = costs.download / DOWNLOAD_RATE
    lines = [f"download: {format_size(costs.download)}, {_duration(seconds)} at {DOWNLOAD_RATE / 1e6:.0f} MB/s"]
    if costs.ordering:
        lines.append(f"  of it, to compare the sources: {format_size(costs.ordering)}; they are then downloaded again")
    lines.append(
        f"disk at most: {format_size(costs.models + costs.cache)} of models, {format_size(costs.temporary)} of temporary "
        f"files, {format_size(costs.state)} of state and result"
    )
    lines.append(f"memory: about {format_size(costs.memory)} and activations ({costs.memory_of})")
    return lines


def disk_warnings(costs: Costs, beside: Path) -> list[str]:
    """Return a sentence for each disk whose free space is below what a merge may need.

    Args:
        costs: What the merge needs.
        beside: Folder beside the output, which may be missing.
    """
    needs: dict[int, list[tuple[str, Path, int]]] = {}
    for what, folder, size in (
        ("the base model (HF_HOME)", Path(constants.HF_HUB_CACHE), costs.cache),
        ("sources, state and result", beside, costs.models + costs.state),
        ("temporary files (TMPDIR)", Path(tempfile.gettempdir()), costs.temporary),
    ):
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if size:
            needs.setdefault(place.stat().st_dev, []).append((what, place, size))
    found = []
    for own in needs.values():
        needed, free = sum(size for _, _, size in own), shutil.disk_usage(own[0][1]).free
        if needed > free:
            parts = ", ".join(f"{format_size(size)} for {what}" for what, _, size in own)
            found.append(
                f"the disk of '{own[0][1]}' has {format_size(free)} free, and the merge may need {format_size(needed)}: "
                f"{parts}; free some space, or set TMPDIR, HF_HOME or --output to a larger disk. If the disk fills up, the "
                "state of the merge is kept"
            )
    return found


def _temporary_copies(config: GraspConfig, adapters: int) -> int:
    """Return the largest number of copies of the target in the temporary files of a merge with data.

    `adapters` is the number of those for one adapter; 0 if there are no adapters.
    """
    kept = 1 + (config.learns or config.compares_alone)  # the target before the step, and before the merge
    # The weights before a fine-tuning, a fold model, and the mean of the fold models, with and without the sources.
    folds = 3 + config.compares_alone if config.gate and _trains(config) else 0
    gradients = 1 + config.accumulate_gradients if METHODS[config.method].stores_gradients else 0
    transfer = adapters + gradients + (folds if config.finetunes_between else 0)
    ranking = adapters + 1 + folds if config.order == "rank" else 0
    longest = max(config.initial_epochs, config.finetune_epochs, config.final_epochs)
    training = folds + min(2, math.ceil(longest)) if _trains(config) else 0  # the best epoch and the next one
    return kept + max(transfer, ranking, training)


def _state_copies(config: GraspConfig) -> int:
    """Return the largest number of copies of the target in the state, besides the last two steps."""
    if not _trains(config):
        return 0
    trainings = 2 * (1 + config.compares_alone) + 1 if config.gate else 1  # two folds, also without sources; a student
    return trainings + METHODS[config.method].stores_gradients


def _trains(config: GraspConfig) -> bool:
    return any(map(config.trains, (config.initial_epochs, config.finetune_epochs, config.final_epochs)))


def _memory_factor(config: GraspConfig) -> tuple[float, str]:
    """Return the peak memory of a merge in sizes of its model, and the kind of fine-tuning that causes it."""
    if not _trains(config):
        return 1.1, "no fine-tuning"
    if config.lora is not None:
        return 1.2, "with LoRA"
    if config.training_arguments.get("optim") == "adafactor":
        return 2.2, "with Adafactor"
    return 4.1, "with AdamW; less with `lora` or `optim: adafactor`"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
