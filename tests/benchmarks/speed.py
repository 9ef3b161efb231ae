"""Measures the speed of grasp_hf against the least work: passes over the batches, and reading the sources.

Run it with `python -m tests.benchmarks.speed`. The model is a BERT-base with a short vocabulary (346 MB, float32).
Ours and the baseline run alternately, and a ratio is the median over these pairs. If a row says `from disk`, the files
are dropped from the page cache before each run of both sides; otherwise they are in it for both.

- `copy alignment`: one source is measured on two batches of 32 texts of 32 tokens and merged, against two plain passes
  forward and backward over each batch and one read of the source's bytes.
- `blend alignment`: the same with the default method, which makes one pass per batch, against the same baseline.
- `rank`: sources ranked by one stored gradient, against a read of their bytes.
- `average`: the streaming average of sources, against a read of their bytes, without starting Python and saving.
- `mergekit`: the same average with saving, against `linear` of mergekit 0.1.5 on the same files. Each is a process,
  with its start and the peaks of private and of resident memory (which counts mapped files). mergekit gets its own
  environment in the cache folder. The merged weights must be equal.

A read is `safetensors.torch.load_file` and a copy of every tensor to private memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

from grasp_hf import GraspConfig, GraspMerger, merge_pretrained
from tests.benchmarks.packages import cache_folder

TINY: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SIZES: dict[str, dict[str, Any]] = {"base": {}, "tiny": TINY}
BATCH, TOKENS, BATCHES = 32, 32, 2
MERGEKIT = ["mergekit==0.1.5", "torch==2.13.0"]
STILL: dict[str, Any] = {"order": "given", "final_epochs": 0, "gate": False, "batch_size": BATCH}


def save_models(folder: Path, size: str, count: int) -> list[Path]:
    """Write random models that differ a little, and return their folders."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 512, "num_labels": 10, **SIZES[size]}
    model = BertForSequenceClassification(BertConfig(**sizes))
    folders = [folder / f"model-{index}" for index in range(count)]
    for path in folders:
        model.save_pretrained(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    return folders


def make_texts(count: int) -> list[dict[str, Any]]:
    """Return random texts of `TOKENS` tokens with labels."""
    return [{"input_ids": torch.randint(0, 512, (TOKENS,)), "labels": index % 10} for index in range(count)]


def read(folders: list[Path]) -> None:
    """Read the bytes of models into memory, one model at a time."""
    for folder in folders:
        for tensor in load_file(folder / "model.safetensors").values():
            tensor.clone()


def drop_from_page_cache(folders: list[Path]) -> None:
    """Drop the files of models from the page cache, if the system allows it."""
    for folder in folders:
        with open(folder / "model.safetensors", "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_alternately(
    ours: Callable[[], Any], baseline: Callable[[], Any], turns: int, cold: list[Path] | None = None
) -> dict[str, float]:
    """Time both functions alternately, after one pair that does not count.

    Args:
        ours: Function of ours; it may return its own seconds.
        baseline: Function of the baseline; it may return its own seconds.
        turns: Number of pairs.
        cold: Folders whose files are dropped from the page cache before each run.

    Returns:
        The median seconds of both, and the median of the ratios.
    """

    def once(function: Callable[[], Any]) -> float:
        drop_from_page_cache(cold or [])
        began = time.perf_counter()
        own = function()
        return own if isinstance(own, float) else time.perf_counter() - began

    rows = [(once(ours), once(baseline)) for _ in range(turns + 1)][1:]
    return {
        "seconds": statistics.median(row[0] for row in rows),
        "baseline seconds": statistics.median(row[1] for row in rows),
        "ratio": statistics.median(row[0] / row[1] for row in rows),
    }


def alignment(folders: list[Path], method: str) -> dict[str, float]:
    """Time one step that measures and merges a source."""
    texts = make_texts(BATCH * BATCHES)
    config = GraspConfig(method=method, num_batches=BATCHES, **STILL)
    merger = GraspMerger.from_pretrained(str(folders[0]), config=config)
    plain = BertForSequenceClassification.from_pretrained(folders[0]).eval()
    batches = [
        {key: torch.stack([torch.as_tensor(text[key]) for text in texts[:BATCH]]) for key in texts[0]}
    ] * BATCHES

    def passes() -> None:
        for batch in [*batches, *batches]:
            plain(**batch).loss.backward()
            plain.zero_grad()
        read(folders[1:2])

    def merge() -> None:
        merger.merge_source(str(folders[1]), train_dataset=texts)

    return time_alternately(merge, passes, turns=3)


def ranking(folders: list[Path], cold: bool) -> dict[str, float]:
    """Time the ranking of all sources except the first, without the time of the gradient."""
    merger = GraspMerger.from_pretrained(str(folders[0]), config=GraspConfig(num_batches=1, **STILL))
    texts, sources = make_texts(4), folders[1:]

    def rank() -> float:
        return sum(row.seconds for row in merger.rank([str(path) for path in sources], train_dataset=texts))

    return time_alternately(rank, lambda: read(sources), turns=3, cold=sources if cold else None)


def average(folders: list[Path]) -> None:
    """Merge by the streaming average from the first source."""
    config = GraspConfig(method="average", order="given", final_epochs=0)
    merge_pretrained(None, [str(folder) for folder in folders], config=config)


def peaks_of(command: list[str]) -> tuple[float, dict[str, int]]:
    """Run a command; return its seconds, and the peaks of memory with its children, in bytes."""
    began, done = time.perf_counter(), threading.Event()
    peaks = {"private": 0, "resident": 0}
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        while not done.wait(0.01):
            now = dict.fromkeys(peaks, 0)
            try:
                for member in [process, *process.children(recursive=True)]:
                    lines = Path(f"/proc/{member.pid}/status").read_text().splitlines()
                    found = {
                        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")
                    }
                    now["resident"] += sum(found.values())
                    now["private"] += sum(found.values()) - found.get("RssFile", 0)
            except (psutil.Error, OSError):
                continue
            peaks.update({key: max(peaks[key], now[key]) for key in peaks})

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, errors = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors[-2000:]}")
    return time.perf_counter() - began, peaks


def mergekit_environment(cache: Path) -> Path:
    """Return the `mergekit-yaml` of mergekit's own environment; the first call makes it."""
    program = cache / "mergekit" / "bin" / "mergekit-yaml"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(cache / "mergekit")], check=True)
        pip = [str(cache / "mergekit" / "bin" / "python"), "-m", "pip", "install", "--quiet", *MERGEKIT]
        subprocess.run(pip, check=True)
    return program


def against_mergekit(folders: list[Path], cache: Path) -> dict[str, float]:
    """Average the models in both programs, from their start to the saved file, and compare the files."""
    program = mergekit_environment(cache)
    with tempfile.TemporaryDirectory() as name:
        recipe, theirs, ours = Path(name, "mergekit.yaml"), Path(name, "theirs"), Path(name, "ours")
        models = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders]
        config = {"merge_method": "linear", "dtype": "float32", "parameters": {"normalize": True}, "models": models}
        recipe.write_text(yaml.safe_dump(config))
        their_seconds, their_peaks = peaks_of([str(program), str(recipe), str(theirs)])
        mine = Path(name, "grasp.yaml")
        settings = {"method": "average", "initial_epochs": 0, "finetune_epochs": 0}
        mine.write_text(yaml.safe_dump({"sources": [str(folder) for folder in folders], **settings}))
        code = "from grasp_hf.cli import run; run()"
        seconds, peaks = peaks_of([sys.executable, "-c", code, "merge", str(mine), "--output", str(ours)])
        expected, merged = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
        for key, value in merged.items():
            torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-5)
    return {
        "seconds": seconds,
        "baseline seconds": their_seconds,
        "ratio": seconds / their_seconds,
        **peaks,
        **{f"baseline {key}": value for key, value in their_peaks.items()},
    }


def main() -> None:
    """Print the table, and with `--json` write its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="base")
    parser.add_argument("--sources", type=int, default=16, help="number of models (default: 16)")
    parser.add_argument("--cache", type=Path, default=cache_folder())
    names = (
        "copy alignment",
        "blend alignment",
        "rank",
        "rank from disk",
        "average",
        "average from disk",
        "mergekit",
        "mergekit of 2",
    )
    parser.add_argument("--only", nargs="+", choices=names, default=list(names), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folders = save_models(Path(name), args.model, args.sources)
        read(folders)
        measurements: dict[str, Callable[[], dict[str, float]]] = {
            "copy alignment": lambda: alignment(folders, "copy"),
            "blend alignment": lambda: alignment(folders, "blend"),
            "rank": lambda: ranking(folders, cold=False),
            "rank from disk": lambda: ranking(folders, cold=True),
            "average": lambda: time_alternately(lambda: average(folders), lambda: read(folders), turns=3),
            "average from disk": lambda: time_alternately(lambda: average(folders), lambda: read(folders), 3, folders),
            "mergekit": lambda: against_mergekit(folders, args.cache),
            "mergekit of 2": lambda: against_mergekit(folders[:2], args.cache),
        }
        megabytes = (folders[0] / "model.safetensors").stat().st_size / 1e6
        print(f"{args.sources} models of {megabytes:.1f} MB, {torch.get_num_threads()} threads")
        print(f"{'':20}{'ours':>10}{'baseline':>10}{'ratio':>8}   private, resident memory of ours and the baseline")
        results = {}
        for measurement in args.only:
            row = results[measurement] = measurements[measurement]()
            keys = ("private", "resident", "baseline private", "baseline resident")
            memory = "".join(f"{row[key] / 1e9:8.2f} GB" for key in keys if key in row)
            times = f"{row['seconds']:8.2f} s{row['baseline seconds']:8.2f} s{row['ratio']:8.2f}"
            print(f"{measurement:20}{times}{memory}", flush=True)
    if args.json:
        record = {"model": args.model, "sources": args.sources, "measurements": results}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
