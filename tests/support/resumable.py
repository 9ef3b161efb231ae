"""A merge in a process of its own that keeps its state, and kills itself at one of its changes of the file system."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.merging import state
from grasp_hf.models.mixture import state_tensors
from grasp_hf.tensors.stored import sum_of
from tests.support.models import perturbed, saved, saved_adapter, tiny_data, tiny_model

EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
MODULE = "tests.support.resumable"


def write_world(folder: Path, *, adapters: int = 1) -> None:
    """Write a base model and three sources `0` to `2`, of which the last ones are adapters."""
    base = tiny_model("bert")
    name = saved(base, folder / "base")
    for number in range(3 - adapters):
        saved(perturbed(deepcopy(base), number + 1), folder / str(number))
    for number in range(3 - adapters, 3):
        saved_adapter(deepcopy(base), name, folder / str(number), seed=number, target_modules=["query", "dense"])


def merge(folder: Path, asked: dict[str, Any]) -> None:
    """Merge the sources in `folder` into the base with the state in `folder/state`, and write `result.json`."""
    torch.set_num_threads(1)
    settings = dict(asked)
    evaluates, taught = settings.pop("evaluates", False), settings.pop("taught", False)
    state.CHECKPOINT_SECONDS = 0.0
    config = GraspConfig(**{"batch_size": 4, "num_batches": 2, "final_epochs": 2, **settings})
    merger = GraspMerger.from_pretrained(str(folder / "base"), config=config)
    report = merger.merge(
        [str(folder / number) for number in "012"],
        train_dataset=tiny_data("bert", 12, seed=1),
        eval_dataset=tiny_data("bert", 9, seed=2) if evaluates else None,
        unlabeled_dataset=tiny_data("bert", 30, seed=3).remove_columns("labels") if taught else None,
        resume_from=folder / "state",
    )
    found = {"weights": sum_of(state_tensors(merger.model)), "report": without_times(asdict(report))}
    (folder / "result.json").write_text(json.dumps(found))


def without_times(values: Any) -> Any:
    """Return a record without the values that differ from process to process."""
    if isinstance(values, dict):
        return {key: without_times(own) for key, own in values.items() if key not in ("seconds", "peak_memory")}
    return [without_times(own) for own in values] if isinstance(values, list) else values


def watched(folder: Path, asked: dict[str, Any], kill_at: int) -> None:
    """Merge, and kill this process before its change number `kill_at` of a name below the state; 0 only counts them."""
    changes = count_changes(f"{folder.name}/state", kill_at)
    merge(folder, asked)
    (folder / "changes.txt").write_text(str(changes()))


def count_changes(place: str, kill_at: int) -> Callable[[], int]:
    """Count the changes of a name, and the openings of a file to write, of paths that contain `place`.

    Returns:
        A function that returns the number so far. The process kills itself before the change number `kill_at`.
    """
    count = 0

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opens = name == "open" and isinstance(arguments[1], str) and arguments[1] != "r"
        if (name in EVENTS or opens) and place in str(arguments[0]):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return lambda: count


def run_process(folder: Path, asked: dict[str, Any], kill_at: int = 0) -> int:
    """Run `watched` in a process of its own, and return its exit code: that of SIGKILL is -9."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([MODULE])
    process = context.Process(target=watched, args=(folder, asked, kill_at))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
