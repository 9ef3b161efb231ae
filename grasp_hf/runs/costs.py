"""Estimates of the download, the disk and the memory that a merge needs."""

import math

from ..config.grasp import GraspConfig
from ..config.methods import METHODS
from ..record.text import format_size
from .planned import PlannedSource

DOWNLOAD_RATE = 50e6  # bytes per second, assumed


def cost_lines(rows: list[PlannedSource], config: GraspConfig) -> list[str]:
    """Return lines with estimates of the download, the disk and the memory of a merge.

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
    if (
        config.order == "rank" and weighs
    ):  # first the estimated gains of all, then the predictions of those that are merged
        ordering += sum(largest[: config.top])
    ordering = ordering if len(sources) > 1 else 0
    download = base.bytes_to_download + ordering + sum(largest[: config.top])
    disk = sum(largest[: 2 if config.prefetch else 1]) + base.bytes_to_download
    # An adapter's weights are merged in a file in float32; a half-precision base is compared with a second such file.
    adapters = int(any(row.kind == "adapter" for row in sources))
    adapters *= 1 + (config.check and bool({"bfloat16", "float16"} & set(base.dtypes)))
    temporary = weights * (_temporary_copies(config, adapters) if config.needs_data else adapters)
    factor, how = _memory_factor(config)
    seconds = download / DOWNLOAD_RATE
    lines = [f"download: {format_size(download)}, {_duration(seconds)} at {DOWNLOAD_RATE / 1e6:.0f} MB/s"]
    if ordering:
        lines.append(f"  of it, to compare the sources: {format_size(ordering)}; they are then downloaded again")
    lines.append(f"disk at most: {format_size(disk)} of models, {format_size(temporary)} of temporary files")
    lines.append(f"memory: about {format_size(factor * weights)} and activations ({how})")
    return lines


def _temporary_copies(config: GraspConfig, adapters: int) -> int:
    """Return the largest number of copies of the target in the temporary files of a merge with data.

    `adapters` is the number of those for one adapter; 0 if there are no adapters.
    """
    kept = 1 + (config.learns or config.compares_alone)  # the target before the step, and before the merge
    fisher = 2 if config.gate and config.learns else 0  # two files of Fisher information
    # The weights before a fine-tuning, a fold model, and the mean of the fold models, with and without the sources.
    folds = 3 + config.compares_alone if config.gate and _trains(config) else 0
    gradients = 1 + config.accumulate_gradients if METHODS[config.method].stores_gradients else 0
    transfer = adapters + gradients + max(fisher, folds if config.finetunes_between else 0)
    ranking = adapters + 1 + folds if config.order == "rank" else 0
    longest = max(config.initial_epochs, config.finetune_epochs, config.final_epochs)
    training = folds + min(2, math.ceil(longest)) if _trains(config) else 0  # the best epoch and the next one
    return kept + max(transfer, ranking, training)


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
