"""Checks that the working tree computes the same as a commit, bit for bit.

Run it with `python -m tests.benchmarks.identity COMMIT` before you commit a refactoring. It builds the commit and the
working tree with its uncommitted changes, each with the dependencies that its own `.ci/constraints.txt` pins. It runs
the same commands with both, offline and on one thread: the demo, every recipe in `recipes/digits/`, merges with other
settings, `append`, `rank` and `compare`. Then it compares all weights, and all numbers of all JSON files. Texts,
durations, memory and versions may differ.

It uses only the command `grasp-hf` and the folder `recipes/`, so files may move. `--keep FOLDER` keeps the
environments and the results of the commit, and the next call runs only the working tree. Kept results are valid only
on the machine that made them, because other processors round differently.

Exit codes: 0 identical, 1 different, 2 a command failed.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.benchmarks.packages import complete

# New names of fields and files, by their old names.
RENAMED = {"options": "candidates", "share": "fraction"}
IGNORED = {"seconds", "peak_memory", "versions"}  # fields that may differ, with everything in them
ROOT = Path(__file__).parents[2]
CONSTRAINTS = Path(".ci", "constraints.txt")
SHOWN = 10  # number of differences to print
SECONDS = "seconds.json"  # CPU time by run, in the folder of the kept outputs
WORK = "work"  # the working directory of all runs
LOADERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {  # by the suffix of files with weights
    ".safetensors": load_file,
    ".bin": partial(torch.load, weights_only=True),
}
SETTINGS = {  # environment variables of every run
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LANG": "C.UTF-8",
}
Name = tuple[str, ...]  # of a tensor or a number: the parts of its file's path, then the keys in the file
Number = int | float  # including booleans


@dataclass(frozen=True)
class Run:
    """A command that is run with both versions.

    Attributes:
        name: Its name in the printed lines.
        output: Its output folder, relative to the working directory.
        arguments: Arguments of `grasp-hf`.
        prints_scores: Whether its printed table has scores that are in no file.
    """

    name: str
    output: str
    arguments: tuple[str, ...]
    prints_scores: bool = False

    @property
    def printed(self) -> str:
        """The name of the file for the output of the command."""
        return f"{self.name}.out"


def list_runs(recipes: Sequence[str]) -> list[Run]:
    """Return all runs; each comes after the runs that make its models.

    Args:
        recipes: Names of the recipes in `recipes/digits/`.
    """

    def merge(name: str, recipe: str, *arguments: str) -> Run:
        return Run(name, name, ("merge", f"recipes/digits/{recipe}.yaml", "--output", name, "seed=0", *arguments))

    def compare(name: str, *options: str) -> Run:
        recipe = ("recipes/digits/mixed.yaml", "final_epochs=1", "--output", name, "--seeds", "0", "--sizes", "32")
        return Run(name, name, ("compare", *recipe, *options))

    epochs = ("initial_epochs=1", "finetune_epochs=1", "final_epochs=1")
    return [
        Run("demo", "grasp-demo", ("demo", "--output", "grasp-demo", "--seed", "0"), prints_scores=True),
        *(merge(recipe, recipe) for recipe in recipes),
        merge("average", "full", "method=average", "order=given", "gate=false", "final_epochs=0"),
        merge("accumulate", "mixed", "accumulate_gradients=true", "unit=module", "gate=false", "final_epochs=1"),
        merge("control", "full", "--control", "unit=tensor", "order=rank", "top=2", *epochs),
        merge("adapter", "full", "lora={r: 4, target_modules: [convolution]}", "num_batches=2", "final_epochs=2"),
        Run(
            "append",
            "append",
            ("append", "full", "grasp-demo/sources/scanned", "--output", "append", "final_epochs=2"),
        ),
        Run("rank", "rank", ("rank", "recipes/digits/full.yaml", "--json", "rank/ranking.json", "seed=0")),
        compare("compare", "--methods", "best-source", "average", "fisher"),
        compare("every-row", "method=blend"),
    ]


class Version:
    """One version of the package, installed next to the working directory of its runs.

    Args:
        source: Folder with the files of the version.
        folder: Folder for the package, in `package/`, and for all outputs, in `work/`.
        keep: Folder for environments, as in `environment`.
    """

    def __init__(self, source: Path, folder: Path, keep: Path) -> None:
        self._package, self._work = folder / "package", folder / WORK
        python = environment(source, keep)
        install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target")
        call(str(python), *install, str(self._package), str(source))
        for name in ("home", "temporary"):
            (folder / name).mkdir()
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder / "home"),
            "HF_HOME": str(folder / "home" / "huggingface"),
            "TMPDIR": str(folder / "temporary"),
            "PYTHONPATH": str(self._package),
            **SETTINGS,
        }
        self._work.mkdir()
        (source / "recipes").rename(self._work / "recipes")

    def run(self, run: Run) -> float:
        """Run a command, and return its CPU time in seconds.

        Raises:
            RuntimeError: The command failed.
        """
        (self._work / run.output).mkdir()
        command = [str(self._package / "bin" / "grasp-hf"), *run.arguments]
        printed, errors = self._work / run.printed, self._work / f"{run.name}.err"
        with printed.open("w") as out, errors.open("w") as err:
            process = subprocess.Popen(command, cwd=self._work, env=self._environment, stdout=out, stderr=err)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            text = errors.read_text()[-2000:]
            raise RuntimeError(f"'grasp-hf {' '.join(run.arguments)}' exits with {process.returncode}:\n{text}")
        return usage.ru_utime + usage.ru_stime


def environment(source: Path, keep: Path) -> Path:
    """Return the Python of an environment with the dependencies of a version; build it if `keep` lacks it."""
    project, constraints = source / "pyproject.toml", source / CONSTRAINTS
    folder = keep / "environments" / digest(project.read_text(), constraints.read_text(), sys.version)
    if not folder.exists():
        values = tomllib.loads(project.read_text())
        needed = [*values["project"]["dependencies"], *values["project"]["optional-dependencies"]["demo"]]
        needed += values["build-system"]["requires"]
        with complete(folder) as new:
            call(sys.executable, "-m", "venv", str(new))
            call(str(new / "bin" / "python"), "-m", "pip", "install", "--quiet", "-c", str(constraints), *needed)
    return folder / "bin" / "python"


def call(*command: str, folder: Path | None = None) -> bytes:
    """Run another program, and return its output.

    Raises:
        RuntimeError: The command failed.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"'{' '.join(command)}' exits with {done.returncode}:\n{done.stderr.decode()[-2000:]}")
    return done.stdout


def digest(*texts: str) -> str:
    """Return the first 16 digits of the SHA-256 of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def copy_commit(root: Path, commit: str, folder: Path) -> None:
    """Write the files of a commit to a new folder."""
    folder.mkdir()
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        call("git", "archive", f"--output={archive.name}", commit, folder=root)
        call("tar", "-xf", archive.name, folder=folder)


def copy_working_tree(root: Path, folder: Path) -> None:
    """Copy the working tree to a new folder: tracked files, and new files that Git does not ignore."""
    folder.mkdir()
    listed = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=root)
    for name in listed.decode().split("\0"):
        if name and (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((root / name).read_bytes())


@dataclass(frozen=True)
class Outcome:
    """The comparison of two versions of one output.

    Attributes:
        tensors: Number of all tensors.
        numbers: Number of all numbers and booleans.
        other_tensors: A line of text for each tensor that differs.
        other_numbers: A line of text for each number or boolean that differs.
    """

    tensors: int
    numbers: int
    other_tensors: list[str]
    other_numbers: list[str]

    @property
    def differences(self) -> list[str]:
        """All differences, first those of numbers, because they are easier to read."""
        return self.other_numbers + self.other_tensors

    def __str__(self) -> str:
        tensors, numbers = self.tensors - len(self.other_tensors), self.numbers - len(self.other_numbers)
        return f"tensors equal {tensors}/{self.tensors}, numbers equal {numbers}/{self.numbers}"


def compare_folders(old: Path, new: Path, printed: tuple[str, str] = ("", "")) -> Outcome:
    """Compare the weights and the numbers in two folders.

    Args:
        old: Output of the commit, with names that `RENAMED` replaces.
        new: Output of the working tree.
        printed: Printed text of the two versions, in which the scores of tables are compared.
    """
    old_tensors, new_tensors = renamed(read_tensors(old)), read_tensors(new)
    old_numbers = renamed(read_numbers(old) | read_scores(printed[0]))
    new_numbers = read_numbers(new) | read_scores(printed[1])
    return Outcome(
        len(old_tensors | new_tensors),
        len(old_numbers | new_numbers),
        differences(old_tensors, new_tensors, tensor_difference),
        differences(old_numbers, new_numbers, number_difference),
    )


def renamed(values: Mapping[Name, Any]) -> dict[Name, Any]:
    """Return values under their new names; `RENAMED` replaces each part of a name."""
    return {tuple(RENAMED.get(part, part) for part in name): value for name, value in values.items()}


def read_tensors(folder: Path) -> dict[Name, Tensor]:
    """Return all weights in a folder."""
    return {
        (*path.relative_to(folder).parts, name): tensor
        for suffix, load in LOADERS.items()
        for path in sorted(folder.rglob(f"*{suffix}"))
        for name, tensor in load(path).items()
    }


def read_numbers(folder: Path) -> dict[Name, Number]:
    """Return the numbers and booleans of all JSON files in a folder.

    The fields of the last run of a merge may be at the top of its record or under `run`. Both get the same names.

    Raises:
        ValueError: A field is at the top and under `run`.
    """
    found = {}
    for path in sorted(folder.rglob("*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("run"), dict):
            run = values.pop("run")
            if twice := values.keys() & run.keys():
                raise ValueError(f"'{path}': expected each field once, got {', '.join(twice)} also under 'run'")
            values |= run
        for name, number in leaves(values):
            found[(*path.relative_to(folder).parts, *name)] = number
    return found


def leaves(value: Any) -> Iterator[tuple[Name, Number]]:
    """Yield the numbers and booleans in a JSON value, each with its path of keys and indices."""
    if isinstance(value, int | float):
        yield (), value
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if key not in IGNORED:
                yield from (((str(key), *name), number) for name, number in leaves(item))


def read_scores(printed: str) -> dict[Name, Number]:
    """Return the scores with an interval, such as `0.879 ± 0.010`, in the tables of a printed text."""
    scores = re.findall(r"^\|.*\| *(-?\d+\.\d+) ± (\d+\.\d+) *\|$", printed, flags=re.MULTILINE)
    return {
        ("printed", str(row), str(i)): float(text) for row, pair in enumerate(scores) for i, text in enumerate(pair)
    }


def differences(
    old: Mapping[Name, Any], new: Mapping[Name, Any], difference: Callable[[Any, Any], str | None]
) -> list[str]:
    """Return a line of text for each name that one side lacks, and for each whose values differ."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        if name not in new:
            text: str | None = "only in the commit"
        elif name not in old:
            text = "only in the working tree"
        else:
            text = difference(old[name], new[name])
        if text:
            found.append(f"{'/'.join(name)}: {text}")
    return found


def number_difference(old: Number, new: Number) -> str | None:
    """Return both values if they differ; a boolean differs from a number, and NaN equals NaN."""
    same = isinstance(old, bool) == isinstance(new, bool) and (old == new or (math.isnan(old) and math.isnan(new)))
    return None if same else f"{old!r} != {new!r}"


def tensor_difference(old: Tensor, new: Tensor) -> str | None:
    """Return type, shape and digest of both tensors if one of these differs."""
    if fingerprint(old) == fingerprint(new):
        return None
    text = f"{fingerprint(old)} != {fingerprint(new)}"
    if old.shape != new.shape or not old.numel():
        return text
    return f"{text}, by up to {float((old.double() - new.double()).abs().max()):.3g}"


def fingerprint(tensor: Tensor) -> str:
    """Return the type, the shape and the SHA-256 of the bytes of a tensor."""
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


@contextmanager
def in_sequence(work: Callable[[Run], float], runs: Sequence[Run]) -> Iterator[list[Future[float]]]:
    """Run one at a time in a thread, and yield the futures; the end of the block cancels runs that have not begun."""
    pool = ThreadPoolExecutor(max_workers=1)
    try:
        yield [pool.submit(work, run) for run in runs]
    finally:
        pool.shutdown(cancel_futures=True)


def compare_versions(commit: str, keep: Path, scratch: Path) -> int:
    """Run both versions, print a line for each run and the first differences; return the number of differences."""
    commit = call("git", "rev-parse", "--verify", f"{commit}^{{commit}}", folder=ROOT).decode().strip()
    sources, tree = scratch / "commit", scratch / "tree"
    copy_commit(ROOT, commit, sources)
    copy_working_tree(ROOT, tree)
    runs = list_runs([path.stem for path in sorted((sources / "recipes" / "digits").glob("*.yaml"))])
    # The digest leaves out the tables at the top of this file, because their changes need no new results.
    how = (repr(runs), repr(SETTINGS), sys.version, inspect.getsource(Version), inspect.getsource(environment))
    kept, new = keep / "results" / f"{commit[:12]}-{digest(*how)}", scratch / "new"
    total = 0
    with ExitStack() as stack:
        new.mkdir()
        run_new = Version(tree, new, keep).run
        if is_kept := kept.exists():
            old, seconds = kept, json.loads((kept / SECONDS).read_text())
            run_old: Callable[[Run], float] = lambda run: seconds[run.name]  # noqa: E731
        else:
            old = stack.enter_context(complete(kept))
            run_old, seconds = Version(sources, old, keep).run, {}
        running = [stack.enter_context(in_sequence(work, runs)) for work in (run_old, run_new)]
        for run, *results in zip(runs, *running, strict=True):
            seconds[run.name], new_seconds = (result.result() for result in results)
            printed = [(folder / WORK / run.printed).read_text() if run.prints_scores else "" for folder in (old, new)]
            outcome = compare_folders(old / WORK / run.output, new / WORK / run.output, (printed[0], printed[1]))
            if not outcome.numbers:
                raise RuntimeError(f"the run '{run.name}' wrote no number to compare in '{run.output}'")
            print(f"{run.name:10} CPU {seconds[run.name]:5.1f} s and {new_seconds:5.1f} s, {outcome}", flush=True)
            for line in outcome.differences[: max(0, SHOWN - total)]:
                print(f"  {line}", flush=True)
            total += len(outcome.differences)
        if not is_kept:
            (old / SECONDS).write_text(json.dumps(seconds))
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the working tree with a commit, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", metavar="COMMIT", help="commit to compare with")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="folder that keeps environments and results of commits"
    )
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="grasp_hf-identity-") as name:
        keep = options.keep.absolute() if options.keep else Path(name, "keep")
        try:
            total = compare_versions(options.commit, keep, Path(name))
        except (RuntimeError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    print(f"{time.perf_counter() - began:.0f} s in all")
    print(f"{total} differences" if total else "identical")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
