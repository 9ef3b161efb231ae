"""Measures how well `grasp-hf rank` predicts the effect of a source, by Spearman's correlation on real sentiment.

Run it with `python -m tests.benchmarks.rank` after `python -m tests.benchmarks.sources`. The target domain gives 64
labels for training, 64 for validation, and test texts. The sources are the adapters and the full fine-tunes of the six
other domains. The effect of a source is measured by merging it alone into the base model, fine-tuned on the 64 labels:

- `copied`: decrease of the test loss if all of it is copied;
- `averaged`: decrease by the mean of the two, without fine-tuning;
- `fine-tuned`: decrease by that mean, fine-tuned for three epochs.

Predictors are the `gain` and the `cosine` of the whole source (one gradient of the fine-tuned base, no pass through a
source), and the gain from the base model before fine-tuning, whose head is untrained. As a control, the loss of each
source on the 64 validation texts also predicts (a pass through every source). The table has means over targets and
seeds with half of the 95 % interval. The results are in `tests/benchmarks/results/rank.json`; `--table` prints their
table.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pandas import read_csv
from scipy.stats import spearmanr, t
from transformers import AutoTokenizer, DataCollatorWithPadding

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.record.text import markdown_table
from tests.benchmarks.compare import RESULTS
from tests.benchmarks.packages import cache_folder
from tests.benchmarks.sentiment import DOMAINS, LABELS
from tests.benchmarks.sources import TOKENS, source_folder

TARGETS = ("amazonHL", "movie", "nyt")
SIZE, TEST = 64, 128
EFFECTS = ("copied", "averaged", "fine-tuned")
PREDICTORS = {"gain": 1, "cosine": 1, "gain, untrained head": 1, "validation loss": -1}


def splits(cache: Path, target: str, seed: int) -> dict[str, Dataset]:
    """Return training, validation and test texts of a domain as token ids with labels."""
    tokenizer = AutoTokenizer.from_pretrained(cache / "models" / "minilm")

    def tokens(file: str, start: int, size: int, seed: int) -> Dataset:
        table = read_csv(cache / "sentiment" / target / f"{file}.csv", keep_default_na=False)
        table = table.sample(frac=1.0, random_state=seed)[start : start + size]
        ids = tokenizer(list(table["text"]), truncation=True, max_length=TOKENS)
        return Dataset.from_dict({**ids, "labels": [LABELS.index(label) for label in table["label"]]})

    return {
        "train": tokens("train", 0, SIZE, seed),
        "held-out": tokens("train", SIZE, SIZE, seed),
        "test": tokens("test", 0, TEST, 0),
    }


def measure(cache: Path, target: str, seed: int, kinds: list[str]) -> list[dict[str, Any]]:
    """Rank all sources for one target, then merge each alone; return one row per source."""
    data = splits(cache, target, seed)
    config = GraspConfig(seed=seed, initial_epochs=3, gate=False)
    merger = GraspMerger.from_pretrained(str(cache / "models" / "minilm"), config=config)
    collator = DataCollatorWithPadding(merger.processing_class)
    sources = [str(source_folder(cache, kind, domain)) for kind in kinds for domain in DOMAINS if domain != target]
    unchanged = merger.with_config(replace(config, initial_epochs=0, final_epochs=0))
    untrained = {row.reference: row.gain for row in unchanged.rank(sources, train_dataset=data["train"])}
    merger.merge([], train_dataset=data["train"])
    state = {name: value.clone() for name, value in merger.model.state_dict().items()}
    before = merger.evaluate(data["test"])
    ranked = merger.rank(sources, train_dataset=data["train"])
    rows = []
    for ranking in ranked:
        row: dict[str, Any] = {"target": target, "seed": seed, "source": Path(ranking.reference).name}
        row |= {"gain": ranking.gain, "cosine": ranking.cosine, "gain, untrained head": untrained[ranking.reference]}

        def record(effect: str, row: dict[str, Any] = row) -> None:
            after = merger.evaluate(data["test"], data_collator=collator)
            row |= {effect: before["loss"] - after["loss"], f"{effect} accuracy": after["accuracy"]}

        def merge(sources: list[str], *, epochs: int = 0, counts: bool = False) -> None:
            settings: dict[str, Any] = {"gate": False, "order": "given", "initial_epochs": epochs, "final_epochs": 0}
            config = GraspConfig(seed=seed, method="average", **settings)
            again = GraspMerger(merger.model, config, processing_class=merger.processing_class, base=merger.base)
            again.report.starts_from_source = counts
            again.merge(sources, train_dataset=data["train"])

        merger.model.load_state_dict(state)
        merge([ranking.reference])
        record("copied")
        row["validation loss"] = merger.evaluate(data["held-out"], data_collator=collator)["loss"]
        merger.model.load_state_dict(state)
        merge([ranking.reference], counts=True)
        record("averaged")
        merge([], epochs=3)
        record("fine-tuned")
        rows.append(row)
    return rows


def correlations(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Return Spearman's correlation of each predictor with each effect, one per target and seed."""
    found: dict[tuple[str, str], list[float]] = {}
    for run in sorted({(row["target"], row["seed"]) for row in rows}):
        mine = [row for row in rows if (row["target"], row["seed"]) == run]
        for predictor, sign in PREDICTORS.items():
            for effect in EFFECTS:
                value = spearmanr([sign * row[predictor] for row in mine], [row[effect] for row in mine]).statistic
                found.setdefault((predictor, effect), []).append(float(value))
    return found


def interval(values: list[float]) -> str:
    """Return the mean ± half of its 95 % interval; only the mean if there is one value."""
    if len(values) < 2:
        return f"{statistics.fmean(values):+.2f}"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.2f} ± {half:.2f}"


def table(found: dict[tuple[str, str], list[float]]) -> str:
    """Return the correlations as a Markdown table."""
    return markdown_table(
        [
            {"predictor": predictor} | {effect: interval(found[predictor, effect]) for effect in EFFECTS}
            for predictor in PREDICTORS
        ]
    )


def show(found: dict[tuple[str, str], list[float]], merged: int) -> None:
    """Print the correlations so far."""
    print(f"\n{f'{merged} sources merged':24}" + "".join(f"{effect:>16}" for effect in EFFECTS))
    for predictor in PREDICTORS:
        cells = "".join(f"{interval(found[predictor, effect]):>16}" for effect in EFFECTS)
        print(f"{predictor:24}{cells}", flush=True)


def main() -> None:
    """Print the table after every target, and with `--json` write every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    parser.add_argument("--targets", nargs="+", choices=DOMAINS, default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--kinds", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every source's row to FILE")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of the recorded results")
    args = parser.parse_args()
    if args.table:
        print(table(correlations(json.loads((RESULTS / "rank.json").read_text())["rows"])))
        return
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for target in args.targets:
            rows += measure(args.cache, target, seed, args.kinds)
            if args.json:
                results = {"command": " ".join(["python -m tests.benchmarks.rank", *sys.argv[1:]]), "rows": rows}
                args.json.write_text(json.dumps(results) + "\n")
            show(correlations(rows), len(rows))


if __name__ == "__main__":
    main()
